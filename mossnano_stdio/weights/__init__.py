"""A weights folder: where it lies, what its metadata says, which files are whole, how the published one is got.

Rules of this room:

- Whatever is wrong with a file is a BundleError that begins with the file's path.
- Sizes are always compared, and the SHA-256 of every file that is used and whose SHA-256 is known: what we built is
  recorded in `mossnano.json`, what was published is pinned in published.py.
- Weights that were asked for and are not there are an error; nothing else is loaded in their place, and the demo only
  by its name.
- Other rooms import from here. hub.py, which speaks to the network, and what reads files for us (checked_json.py,
  onnx_shapes.py) are imported by their names.
"""
