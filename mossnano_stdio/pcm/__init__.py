"""Sound as numbers and as files: samples and PCM16, WAV and what the extra `audio` reads, recordings compared."""
