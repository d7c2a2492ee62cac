"""Codes: the numbers of a codec, frames packed into bytes, artifacts, plain files, callers' arrays."""
