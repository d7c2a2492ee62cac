"""Holds codes in all their forms: in arrays, packed into bytes, in artifacts and in plain files.

Rules of this room:

- What every stream needs is imported from here. plain.py and arrays.py, which read what people and callers bring, are
  imported by their names.
"""
