"""A weights folder: where it lies, what its metadata says, which files are whole, how the published one is got."""
