"""Frames wait, go through a codec in chunks, and come out as PCM or as codes."""
