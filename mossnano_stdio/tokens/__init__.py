"""Codes: the numbers of a codec, frames packed into bytes, artifacts, plain files, callers' arrays.

Rules of this room:

- What every stream needs is imported from here. plain.py and arrays.py, which read what people and callers bring, are
  imported by their names.
"""
