"""The published models: which repositories, at which revisions, with which files of which size and SHA-256.

Rules of this room:

- Facts, typed in once and never computed. A release with other weights is a change of this table, another model a row
  in MODELS.
- Whoever loads, checks or fetches official files compares with these numbers, and with nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

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

    @property
    def name(self) -> str:
        """What the repository is called, without its owner."""
        return self.repository.partition("/")[2]


LICENCE = "Apache-2.0"


@dataclass(frozen=True)
class PublishedModel:
    """A model by the name that `--model` gives it."""

    format: CodecFormat
    checkpoint: PinnedRepository
    maybe_bundle: PinnedRepository | None = None  # official graphs that stream, where there are any
    decode_prefixes: tuple[str, ...] = ("decoder.", "quantizer.")  # of the tensors in the checkpoint that decode
    encode_prefixes: tuple[str, ...] = ("encoder.", "quantizer.")
    built_graphs: Literal["fast", "all"] = "fast"  # of a checkpoint, by `fetch`: those over whole files are as large
    licence: str = LICENCE
    maybe_attribution: str | None = None  # what the licence asks for
    maybe_folder_name: str | None = None  # where the repository is called after something else

    @property
    def folder_name(self) -> str:
        """Of the folder in which its graphs are looked for, whoever made them."""
        return self.maybe_folder_name or (self.maybe_bundle or self.checkpoint).name


# What the published weights decode. Their metadata says all of it but the size of the codebooks.
NANO = CodecFormat(sample_rate=48000, channels=2, frame_samples=3840, quantizers=16, codebook_size=1024)

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

CHECKPOINT_24K = PinnedRepository(
    repository="OpenMOSS-Team/MOSS-Audio-Tokenizer",
    revision="3cd226ba2947efa357ef453bcad111b6eafba782",
    files={
        "config.json": FileRecord(6_601, "0f669e288d39c9c0ffae4e39babe5167b57e89d3132f0785655d1096a8da8e45"),
        "model.safetensors.index.json": FileRecord(
            148_113, "e107e83fee64adc3ccdb993975290cecb00fcf7d72cdaa388011abad16bcc82d"
        ),
        "model-00001-of-00002.safetensors": FileRecord(
            4_998_259_168, "037f441ed30a0ab59f6049de83b824a1b3bd6feb7dbd46c3fbca41fc2f649f28"
        ),
        "model-00002-of-00002.safetensors": FileRecord(
            2_100_202_560, "a187d73d2cda1c2d0676586d9d03c09c0a5813450266af32029c871493fc9582"
        ),
    },
)

CHECKPOINT_V2 = PinnedRepository(
    repository="OpenMOSS-Team/MOSS-Audio-Tokenizer-v2",
    revision="f6e20e543b33d2c252a7ef71bdf8aa71e5ff9169",
    files={
        "config.json": FileRecord(10_166, "aeb9a0e9d88c74bf9fbaa81ee54443d463e09b5f335b3306bb798e282a10e564"),
        "model.safetensors.index.json": FileRecord(
            191_718, "912f52f053e04ff7e9abc8f05aa75dfbb40b31c86a0f4ad5c5a36e4aa28a624f"
        ),
        "model-00001-of-00003.safetensors": FileRecord(
            3_978_639_168, "2d9f9182f17b143a23937feb87c63c08221bd28e685e4bc2fa55dcdce17fcde7"
        ),
        "model-00002-of-00003.safetensors": FileRecord(
            3_992_738_352, "d4e48106d0254fe3b00ea0707e88fc6aee076993825e108dd9cef847f9db236e"
        ),
        "model-00003-of-00003.safetensors": FileRecord(
            523_681_336, "d0449fe1b0ef1f6045946867148d8166b9a91a58d0feca4a18b641494d0b22da"
        ),
    },
)

# Two trainings of Mimi in the same shape; codes of the one are not codes of the other. Each lies in several
# repositories, under several names, and is known by its content.
MIMI_FILES = {
    "mimi": FileRecord(384_644_900, "09b782f0629851a271227fb9d36db65c041790365f11bbe5d3d59369cf863f50"),
    "mimi of Hibiki": FileRecord(384_644_900, "31c14cf365353131094e8248150c6fe58e8642cf91899c50d9e450f861630e55"),
}

MIMI_NAME = "tokenizer-e351c8d8-checkpoint125.safetensors"

CHECKPOINT_MIMI = PinnedRepository(  # one of the repositories that have it; this one asks nobody for a token
    repository="kyutai/moshiko-mlx-bf16",
    revision="a31ebad976783a3ea356d6beb8b8e826d2d45a68",
    files={MIMI_NAME: MIMI_FILES["mimi"]},
)

# Known by name, and not by content: nobody told us the size and the SHA-256 of any of their files.
UNPINNED_MODELS = {"encodec-24k": "facebook/encodec_24khz", "encodec-48k": "facebook/encodec_48khz"}

MODELS = {
    "nano": PublishedModel(NANO, CHECKPOINT, BUNDLE),
    "24k": PublishedModel(CodecFormat(24000, 1, 1920, quantizers=32, codebook_size=1024), CHECKPOINT_24K),
    "v2": PublishedModel(CodecFormat(48000, 2, 3840, quantizers=32, codebook_size=1024), CHECKPOINT_V2),
    "mimi": PublishedModel(
        CodecFormat(24000, 1, 1920, quantizers=32, codebook_size=2048),
        CHECKPOINT_MIMI,
        built_graphs="all",
        licence="CC-BY 4.0",
        maybe_attribution="Mimi is by Kyutai, licensed under CC-BY 4.0",
        maybe_folder_name="mimi",
    ),
}
