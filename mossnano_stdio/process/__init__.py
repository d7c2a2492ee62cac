"""`mossnano-stdio`: messages in on stdin, PCM out on stdout, until the input ends."""
