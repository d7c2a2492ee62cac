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

from mossnano_stdio.weights.folder import CODEC_FOLDERS, DEMO, DEMO_FOLDER, Bundle, find_weights, load_bundle
from mossnano_stdio.weights.graphs import FileRecord, Graph, GraphSpec, StateSpec, WeightFile
from mossnano_stdio.weights.metadata import (
    DECODE_DATA,
    DECODE_FULL_FILE,
    DECODE_INPUTS,
    DECODE_OUTPUTS,
    DECODE_STEP_FILE,
    ENCODE_DATA,
    ENCODE_FILE,
    ENCODE_INPUTS,
    ENCODE_OUTPUTS,
    METADATA_NAME,
    OFFICIAL_FILES,
    STATES_OF_A_CACHE,
    build_cache,
    build_counter,
    build_metadata,
    build_streaming,
    states_of,
)
from mossnano_stdio.weights.published import MIMI_FILES, MODELS, NANO, UNPINNED_MODELS
from mossnano_stdio.weights.sidecar import SIDECAR_NAME, OwnCodec, Sidecar, load_sidecar, record_files, save_sidecar

__all__ = [
    "CODEC_FOLDERS",
    "DECODE_DATA",
    "DECODE_FULL_FILE",
    "DECODE_INPUTS",
    "DECODE_OUTPUTS",
    "DECODE_STEP_FILE",
    "DEMO",
    "DEMO_FOLDER",
    "ENCODE_DATA",
    "ENCODE_FILE",
    "ENCODE_INPUTS",
    "ENCODE_OUTPUTS",
    "METADATA_NAME",
    "MIMI_FILES",
    "MODELS",
    "NANO",
    "OFFICIAL_FILES",
    "SIDECAR_NAME",
    "STATES_OF_A_CACHE",
    "UNPINNED_MODELS",
    "Bundle",
    "FileRecord",
    "Graph",
    "GraphSpec",
    "OwnCodec",
    "Sidecar",
    "StateSpec",
    "WeightFile",
    "build_cache",
    "build_counter",
    "build_metadata",
    "build_streaming",
    "find_weights",
    "load_bundle",
    "load_sidecar",
    "record_files",
    "save_sidecar",
    "states_of",
]
