"""Whatever bytes a tool is given, it ends with a documented status, and with one line on stderr where it failed."""

from __future__ import annotations

import io
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mossnano_stdio.protocol.messages import Kind, encode_message
from mossnano_stdio.tokens.plain import FORMS, save_codes
from tests.fuzz_readers import corpus_of, mutated
from tests.tool import call_tool

CODES = np.random.default_rng(0).integers(0, 1024, (4, 16)).astype(np.uint16)
HANDSHAKE = json.dumps({"sample_rate": 48000, "channels": 2}).encode()
ANSWERS = (
    encode_message(Kind.HANDSHAKE, HANDSHAKE)
    + encode_message(Kind.AUDIO, bytes(80))
    + encode_message(Kind.ERROR, b'{"code":"x","message":"y"}')
)


def audio_file(form: str, subtype: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).uniform(-1, 1, (200, 2)), 48000, format=form, subtype=subtype)
    return file.getvalue()


AUDIO_FORMS = (
    ("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("WAV", "PCM_U8"),
    ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("AIFF", "PCM_16"),
)  # fmt: skip
ARTIFACTS = [*corpus_of("artifact"), *corpus_of("ecdc")]
STREAMS = [*corpus_of("protocol"), *corpus_of("session"), ANSWERS]
SOUNDS = [audio_file(*form) for form in AUDIO_FORMS]
CODE_FILES = {form: [save_codes(CODES, form), save_codes(CODES[:0], form)] for form in FORMS}

COMPARE = (
    "compare", "reference.wav", "-", "--chunk-frames", "1", "--frame-samples", "16", "--json", "--max-error", "0",
)  # fmt: skip
CASES = {
    "info": (("info", "-"), [*ARTIFACTS, *STREAMS], {0, 65, 76}),
    "info --json": (("info", "-", "--json"), [*ARTIFACTS, *STREAMS], {0, 65, 76}),
    "unpack": (("unpack", "-", "-", "--form", "json"), ARTIFACTS, {0, 65}),
    "frame artifact": (("frame", "-"), ARTIFACTS, {0, 65}),
    "frame tokens": (("frame", "-", "--as", "tokens"), ARTIFACTS, {0, 65}),
    "unframe": (("unframe",), STREAMS, {0, 65, 76}),
    "unframe --wav": (("unframe", "--wav"), STREAMS, {0, 65, 76}),
    "pack u16le": (("pack", "-", "-", "--form", "u16le"), CODE_FILES["u16le"], {0, 65}),
    "pack npy": (("pack", "-", "-", "--form", "npy"), CODE_FILES["npy"], {0, 65}),
    "pack json": (("pack", "-", "-", "--form", "json"), CODE_FILES["json"], {0, 65}),
    "compare": (COMPARE, SOUNDS, {0, 1, 65}),
    "compare without soundfile": (COMPARE, SOUNDS[:4], {0, 1, 65}),
}


@pytest.mark.parametrize("runs", [200, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_mutated_input_is_answered_or_refused(
    case: str, runs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("reference.wav").write_bytes(SOUNDS[0])
    if case == "compare without soundfile":
        monkeypatch.setitem(sys.modules, "soundfile", None)
    arguments, pool, statuses = CASES[case]
    chance = random.Random(case)
    for _ in range(runs):
        data = mutated(chance.choice(pool), pool, chance)
        outcome = call_tool(*arguments, stdin=data)
        assert outcome.status in statuses, (data, outcome.err)
        assert "Traceback" not in outcome.err, data
        if "unframe" not in case:  # which tells of every ERROR that it meets
            assert outcome.err.count("\n") == (outcome.status != 0), (data, outcome.err)
