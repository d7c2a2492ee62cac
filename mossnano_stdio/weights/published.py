"""The published weights: which repositories, at which revisions, with which files of which size and SHA-256.

Rules of this room:

- Facts, typed in once and never computed. A release with other weights is a change of this table.
- Whoever loads, checks or fetches official files compares with these numbers, and with nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mossnano_stdio.tokens import CodecFormat
from mossnano_stdio.weights.graphs import FileRecord
from mossnano_stdio.weights.metadata import (
    DECODE_DATA,
    DECODE_FULL_FILE,
    DECODE_STEP_FILE,
    ENCODE_DATA,
    ENCODE_FILE,
    METADATA_NAME,
)


@dataclass(frozen=True)
class PinnedRepository:
    """One repository of the model hub at one revision."""

    repository: str
    revision: str
    files: Mapping[str, FileRecord]


# What the published weights decode. Their metadata says all of it but the size of the codebooks.
NANO = CodecFormat(sample_rate=48000, channels=2, frame_samples=3840, quantizers=16, codebook_size=1024)
LICENCE = "Apache-2.0"

WEIGHTS_NAME = "MOSS-Audio-Tokenizer-Nano-ONNX"  # of the folder that holds the bundle
CHECKPOINT_NAME = "MOSS-Audio-Tokenizer-Nano"

BUNDLE = PinnedRepository(
    repository="OpenMOSS-Team/MOSS-Audio-Tokenizer-Nano-ONNX",
    revision="ceff0d0749bfb3fa2d61149794ec6feef0d1e1ae",
    files={
        METADATA_NAME: FileRecord(17_036, "3e291c883bb7d11ff2fe8e964e3e495519760358859f35c951254c7741592731"),
        DECODE_FULL_FILE: FileRecord(681_902, "0fbbafe3fd4afa2a019af5c5ced204af6e2d1db044fa40f021525d2aee95b4ac"),
        DECODE_STEP_FILE: FileRecord(351_400, "9527c86a29e1837edec1f74db57d5eeaadb3a715af3382703566460afed25855"),
        DECODE_DATA: FileRecord(44_198_912, "e69d52e0f4e84ca27850557ee54face46632d3a5a16c89bd246c7c408466dcad"),
        ENCODE_FILE: FileRecord(815_775, "eadea4a645abdcf98714c7aead122ee2ce7da6e080f9f80b977cd1ca8e19473a"),
        ENCODE_DATA: FileRecord(44_507_136, "aa751265b2bab2887eac224484546b194875aa7494b607115439b3dc6b228a2c"),
    },
)

CHECKPOINT = PinnedRepository(
    repository="OpenMOSS-Team/MOSS-Audio-Tokenizer-Nano",
    revision="6aa02b01e445cc585582cf0ba480bc3ea6c8dd68",
    files={
        "config.json": FileRecord(7_385, "b38892f8ba00efc18af2ad9eca999c7603f871548c2e7f99258cb1cefc70ee06"),
        "model.safetensors.index.json": FileRecord(
            34_346, "2bf639e2c37c8502b1d0d92bf616b8108cb9975d42f587487a103682575b1d6d"
        ),
        "model-00001-of-00001.safetensors": FileRecord(
            87_922_568, "34d9880d805eecb21bde975202b1c256dbd0eb98c8680b9d3aeffd2bc6ac2f67"
        ),
    },
)
