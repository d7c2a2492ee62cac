"""Holds codes in all their forms: in arrays, packed into bytes, in artifacts and in plain files.

Rules of this room:

- What every stream needs is imported from here. plain.py, ecdc.py and arrays.py, which read what people and callers
  bring, are imported by their names.
"""

from mossnano_stdio.tokens.artifact import (
    FIELD_LIMITS,
    MAGIC,
    Artifact,
    ArtifactHeader,
    ArtifactReader,
    build_artifact,
    load_artifact,
    parse_artifact,
)
from mossnano_stdio.tokens.format import (
    SAMPLE_BYTES,
    CodecFormat,
    Codes,
    bits_per_code,
    frame_bytes,
    frames_before_zeros,
    to_graph,
    to_quantizer_major,
)
from mossnano_stdio.tokens.packing import first_outside, meaning_of, pack_frames, unpack_frames

__all__ = [
    "FIELD_LIMITS",
    "MAGIC",
    "SAMPLE_BYTES",
    "Artifact",
    "ArtifactHeader",
    "ArtifactReader",
    "CodecFormat",
    "Codes",
    "bits_per_code",
    "build_artifact",
    "first_outside",
    "frame_bytes",
    "frames_before_zeros",
    "load_artifact",
    "meaning_of",
    "pack_frames",
    "parse_artifact",
    "to_graph",
    "to_quantizer_major",
    "unpack_frames",
]
