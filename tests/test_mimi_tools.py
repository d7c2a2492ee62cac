"""Mimi through everything that a user calls: the tools, the process, the library, by the numbers of its weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mossnano_stdio import Codec, codecs
from mossnano_stdio.errors import ArtifactError, ExitStatus, TokenError, UsageError
from mossnano_stdio.pcm import to_pcm16
from mossnano_stdio.pcm.wav import WavWriter
from mossnano_stdio.protocol.messages import Kind, Message
from mossnano_stdio.tokens import Artifact, Codes, pack_frames, parse_artifact
from mossnano_stdio.tools.bench import PEERS
from mossnano_stdio.tools.bench.peers import peer_sides
from mossnano_stdio.tools.bench.sides import WorkerProcesses, sides_of
from mossnano_stdio.weights import DEMO_FOLDER, load_bundle
from tests.child import PROCESS, decoded, encoded, fields, outline, pcm_of, run
from tests.clients import CLIENTS, start
from tests.tool import call_tool, run_tool

FRAME_SAMPLES = 1920
SAMPLES = 20_000  # the eleventh frame is not full
FRAMES = 11


@pytest.fixture(scope="module")
def codes() -> Codes:
    return np.random.default_rng(4).integers(0, 2048, (FRAMES, 32)).astype(np.uint16)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "in.wav"
    audio = 0.1 * np.random.default_rng(5).standard_normal((SAMPLES, 1)).astype(np.float32)
    with path.open("wb") as file:
        writer = WavWriter(file, 24_000, 1)
        writer.write(to_pcm16(audio))
        writer.finish()
    return path


def test_there_and_back(mimi_standin: Path, recording: Path, tmp_path: Path) -> None:
    artifact, sound = tmp_path / "a.mossnano", tmp_path / "out.wav"
    assert call_tool("encode", "--weights", mimi_standin, recording, artifact).status == 0
    parsed = parse_artifact(artifact.read_bytes())
    assert (parsed.sample_rate, parsed.channels, parsed.original_samples) == (24_000, 1, SAMPLES)
    assert (parsed.quantizers, parsed.frames, parsed.codebook_size) == (32, FRAMES, 2048)
    assert len(artifact.read_bytes()) == 32 + FRAMES * 44
    assert json.loads(call_tool("info", artifact, "--json").out)["bits_per_code"] == 11
    assert call_tool("decode", "--weights", mimi_standin, artifact, sound).status == 0
    assert len(sound.read_bytes()) == 44 + 2 * SAMPLES
    whole = tmp_path / "whole.wav"
    assert call_tool("decode", "--weights", mimi_standin, "--decoder", "full", artifact, whole).status == 0
    assert json.loads(call_tool("compare", whole, sound, "--json").out)["max_error_steps"] <= 1


def test_pack_knows_its_numbers(codes: Codes, tmp_path: Path) -> None:
    plain, artifact, back = tmp_path / "a.npy", tmp_path / "a.mossnano", tmp_path / "b.npy"
    np.save(plain, codes)
    assert call_tool("pack", "--model", "mimi", plain, artifact).status == 0
    parsed = parse_artifact(artifact.read_bytes())
    assert (parsed.sample_rate, parsed.channels, parsed.codebook_size) == (24_000, 1, 2048)
    assert parsed.original_samples == FRAMES * FRAME_SAMPLES
    assert call_tool("unpack", artifact, back).status == 0
    assert np.array_equal(np.load(back), codes)


def test_weights_are_told(mimi_standin: Path) -> None:
    facts = json.loads(call_tool("info", mimi_standin, "--json").out)
    assert facts["name"] == "mimi tiny stand-in, seed 0"
    assert (facts["frame_bytes"], facts["frames_per_second"]) == (44, 12.5)
    assert (facts["caches"], facts["longest_context_tokens"]) == (2, 11)


def test_weights_pass_the_check(mimi_standin: Path) -> None:
    outcome = call_tool("check", mimi_standin, "--threads", 1, "--json")
    checks = json.loads(outcome.out)["checks"]
    assert outcome.status == 0, checks
    assert {row["name"] for row in checks if row["about"] == "graph"} == {
        "decode_step", "decode_full", "encode", "encode_step"
    }  # fmt: skip
    assert sum(row["about"] == "sound" for row in checks) == 1 + 3 + 3


def test_damaged_weights_do_not(mimi_standin: Path, tmp_path: Path) -> None:
    for path in mimi_standin.glob("mi*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "mossnano.json").write_bytes((mimi_standin / "mossnano.json").read_bytes())
    data = tmp_path / "mimi_decode_step.data"
    data.write_bytes(data.read_bytes()[:-1] + b"!")
    assert call_tool("check", tmp_path, "--threads", 1).status == ExitStatus.NO_WEIGHTS


# --- the process --------------------------------------------------------------------------------------------------


def tokens(codes: Codes) -> Message:
    return Message(Kind.TOKENS, pack_frames(codes, 2048))


def test_the_process_decodes(mimi_standin: Path, codes: Codes) -> None:
    settings = Message(Kind.SETTINGS, b'{"quantizers": 8}')
    wire = encoded(tokens(codes), Message(Kind.END), settings, tokens(codes[:, :8]), Message(Kind.END))
    done = run([*PROCESS, "--weights", str(mimi_standin), "--threads", "1"], wire)
    assert done.returncode == 0, done.stderr
    messages = decoded(done.stdout)
    assert outline(messages) == ["HANDSHAKE", "AUDIO", "END", "HANDSHAKE", "AUDIO", "END"]
    said = fields(messages[0])
    assert said["codec"].startswith("mimi")
    assert (said["graph"], said["sample_rate"], said["channels"]) == ("decode_step", 24_000, 1)
    assert (said["codebook_size"], said["frame_bytes"], said["frame_samples"]) == (2048, 44, FRAME_SAMPLES)
    middle = next(index for index, message in enumerate(messages) if index and message.kind == Kind.HANDSHAKE)
    assert fields(messages[middle])["frame_bytes"] == 11
    decoder = codecs.load_decoder(load_bundle(mimi_standin), threads=1)
    for part, quantizers in ((messages[:middle], 32), (messages[middle:], 8)):
        decoder.reset()
        found = np.frombuffer(pcm_of(part), "<i2").astype(int)
        expected = np.frombuffer(to_pcm16(decoder.step(codes[:, :quantizers])), "<i2")
        assert np.abs(found - expected).max() <= 1


def test_the_process_encodes(mimi_standin: Path, recording: Path) -> None:
    wire = encoded(Message(Kind.AUDIO, recording.read_bytes()[44:]), Message(Kind.END))
    done = run([*PROCESS, "--weights", str(mimi_standin), "--encode"], wire)
    messages = decoded(done.stdout)
    assert fields(messages[-1])["original_samples"] == SAMPLES
    packed = b"".join(message.payload for message in messages if message.kind == Kind.TOKENS)
    outcome = call_tool("encode", "--weights", mimi_standin, recording, "-")
    whole = parse_artifact(outcome.out).codes
    assert packed == pack_frames(whole, 2048)
    outcome = call_tool("encode", "--weights", mimi_standin, "--quantizers", 8, recording, "-")
    assert np.array_equal(parse_artifact(outcome.out).codes, whole[:, :8])


def test_framed_artifacts(mimi_standin: Path, codes: Codes, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", codes)
    call_tool("pack", "--model", "mimi", "--original-samples", SAMPLES, tmp_path / "a.npy", tmp_path / "a.mossnano")
    for form in ("artifact", "tokens"):
        framed = call_tool("frame", "--as", form, tmp_path / "a.mossnano").out
        messages = decoded(run([*PROCESS, "--weights", str(mimi_standin)], framed).stdout)
        samples = SAMPLES if form == "artifact" else FRAMES * FRAME_SAMPLES
        assert len(pcm_of(messages)) == 2 * samples
        assert outline(messages)[-1] == "END"


CASES = (
    "handshakes-has-every-key",
    "handshakes-agrees-with-itself",
    "tokens-come-back-as-whole-frames",
    "tokens-may-be-split-over-messages",
    "streams-leave-no-trace-in-the-next",
    "artifacts-sound-like-their-tokens",
    "artifacts-are-trimmed",
    "settings-choose-the-quantizers",
)


def test_it_conforms(mimi_standin: Path) -> None:
    """In those cases that depend on the codec. All others pass as well, and take longer."""
    options = [word for name in CASES for word in ("--case", name)]
    outcome = run_tool("conformance", *options, "--", *PROCESS, "--weights", mimi_standin, "--threads", 1)
    assert outcome.status == 0, outcome.out
    assert f"{len(CASES)} passed, 0 failed, 0 not applicable".encode() in outcome.out


# --- the library, and codes that are none -------------------------------------------------------------------------


def test_the_library(mimi_standin: Path, codes: Codes) -> None:
    with Codec.load(mimi_standin, threads=1) as codec:
        assert (codec.sample_rate, codec.quantizers, codec.codebook_size) == (24_000, 32, 2048)
        assert codec.context_seconds == pytest.approx(6 / 12.5)  # eleven tokens, two a frame
        audio = codec.decode(codes)
        assert audio.shape == (1, FRAMES * FRAME_SAMPLES)
        assert codec.decode(codes[:, :8], num_quantizers=8).shape == audio.shape
        assert codec.encode(audio, 24_000).codes.shape == (32, FRAMES)


@pytest.mark.parametrize(
    ("code", "meaning"),
    [
        (2048, "language models put 2048 where no code is yet"),
        (-1, "language models put -1 where they generated nothing"),
        (-2, "language models put -2 where they generated nothing"),
    ],
)
def test_codes_of_language_models_are_refused_with_what_they_mean(
    mimi_standin: Path, codes: Codes, code: int, meaning: str
) -> None:
    wrong = codes.astype(np.int64)
    wrong[3, 5] = code
    with pytest.raises(TokenError, match=meaning):
        pack_frames(wrong, 2048)
    with pytest.raises(TokenError, match=meaning):
        codecs.load_decoder(load_bundle(mimi_standin), threads=1).step(wrong)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match=meaning):
        Artifact(24_000, 1, SAMPLES, 32, FRAMES, 2048, wrong)  # type: ignore[arg-type]
    with Codec.load(mimi_standin, threads=1) as codec, pytest.raises(ValueError, match=meaning):
        codec.decode(wrong)


@pytest.mark.parametrize("code", [2048, -1, -2])
def test_packing_such_codes_says_what_they_mean(codes: Codes, tmp_path: Path, code: int) -> None:
    wrong = codes.astype(np.int64)
    wrong[3, 5] = code
    np.save(tmp_path / "codes.npy", wrong)
    status, _, told = call_tool("pack", "--model", "mimi", tmp_path / "codes.npy", tmp_path / "out.mossnano")
    assert status == ExitStatus.BAD_INPUT
    assert f"code 5 of frame 3 is {code}, " in told
    assert f"(language models put {code} where " in told


def test_other_codecs_know_no_such_codes() -> None:
    with pytest.raises(TokenError, match=r"is 2048, allowed are 0 to 1023$"):
        pack_frames(np.full((1, 16), 2048), 1024)
    with Codec.load(DEMO_FOLDER) as codec, pytest.raises(ValueError, match=r"holds -1, allowed are 0 to 1023$"):
        codec.decode(np.full((4, 16), -1))


# --- clients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", CLIENTS)
def test_the_clients_for_python(mimi_standin: Path, codes: Codes, client: str) -> None:
    command = [*PROCESS, "--weights", str(mimi_standin), "--threads", "1", "--chunk-frames", "4"]
    face = start(client, [*command, "--stop-on-zero-frame"])
    try:
        expected = run([*command, "--output", "raw"], encoded(tokens(codes), Message(Kind.END))).stdout
        stream = face.open()
        for frame in [*codes, np.zeros(32, int), codes[0]]:  # one at a time, as a language model gives them
            stream.feed(frame[np.newaxis])
        stream.finish()
        assert stream.read() == expected
        assert face.settle(quantizers=8)["frame_bytes"] == 11
        assert len(face.decode(codes[:, :8])) == len(expected)
        with pytest.raises(TokenError, match="language models put 2048 where no code is yet"):
            face.feed(np.full((1, 8), 2048))
    finally:
        face.close()


# --- bench --------------------------------------------------------------------------------------------------------

# In the peers' place: programs that are called as the real ones are, and note how.
FAKE_PEERS = {
    "told.py": """
import json, os, sys
def tell(**what):
    with open(os.environ["PEERS_WERE_TOLD"], "a") as file:
        print(json.dumps(what), file=file)
""",
    "rustymimi.py": """
import os
import numpy as np
from told import tell
class Tokenizer:
    def __init__(self, path, *, num_codebooks=8, dtype="f32", max_seq_len=None):
        self.codebooks = num_codebooks
        tell(peer="rustymimi", file=os.path.basename(path), codebooks=num_codebooks,
             threads=int(os.environ["RAYON_NUM_THREADS"]), lasts=max_seq_len > 8192)
    def reset(self):
        tell(peer="rustymimi", reset=True)
    def decode_step(self, codes):
        tell(peer="rustymimi", codes=[*codes.shape, str(codes.dtype)])
        return np.zeros((1, 1, 1920 * codes.shape[2]), np.float32)
    def encode_step(self, audio):
        tell(peer="rustymimi", audio=[*audio.shape, str(audio.dtype)])
        return np.zeros((1, self.codebooks, audio.shape[2] // 1920), np.uint32)
""",
    "torch.py": """
from contextlib import contextmanager
from told import tell
class Tensor:
    def __init__(self, array): self.array = array
    def numpy(self):
        assert not is_learning[0], "a tensor that is to be learnt from cannot become numpy"
        return self.array
is_learning = [True]
from_numpy = Tensor
def set_num_threads(threads): tell(peer="moshi", threads=threads)
@contextmanager
def no_grad():
    is_learning[0] = False
    yield
    is_learning[0] = True
""",
    "moshi/models/loaders.py": """
import os
import numpy as np
from told import tell
from torch import Tensor
class Mimi:
    def streaming_forever(self, batch): tell(peer="moshi", streams=batch)
    def reset_streaming(self): tell(peer="moshi", reset=True)
    def decode(self, codes):
        tell(peer="moshi", codes=[*codes.array.shape, str(codes.array.dtype)])
        return Tensor(np.zeros((1, 1, 1920 * codes.array.shape[2]), np.float32))
    def encode(self, audio):
        tell(peer="moshi", audio=[*audio.array.shape, str(audio.array.dtype)])
        return Tensor(np.zeros((1, 32, audio.array.shape[2] // 1920), np.int64))
def get_mimi(path, mimi_config, device, *, num_codebooks):
    assert mimi_config is None
    tell(peer="moshi", file=os.path.basename(path), device=device, codebooks=num_codebooks)
    return Mimi()
""",
}


@pytest.fixture
def peers_were_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[dict[str, Any]]]:
    for name, program in FAKE_PEERS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PEERS_WERE_TOLD", str(tmp_path / "told.jsonl"))

    def told(peer: str) -> list[dict[str, Any]]:
        lines = map(json.loads, (tmp_path / "told.jsonl").read_text().splitlines())
        return [line for line in lines if line.pop("peer") == peer]

    return told


@pytest.mark.parametrize("peer", PEERS)
def test_peers_decode_beside_us(
    mimi_standin: Path, peers_were_told: Callable[[str], list[dict[str, Any]]], peer: str
) -> None:
    bundle = load_bundle(mimi_standin)
    peers = peer_sides(bundle, [peer], sys.executable, None, encodes=False)
    sides = sides_of(bundle, peers=peers)
    assert [side.name for side in sides] == [peer, "our runtime"]
    for side in sides:
        with WorkerProcesses(bundle, 8).start(side, 3) as worker:
            assert len(worker.ask("steps", chunk_frames=2, steps=4)) == 4
            assert worker.ask("utterance", frames=2, chunk_frames=1) > 0
            assert worker.facts["load_ms"] > 0
    told = peers_were_told(peer)
    facts: dict[str, Any] = {}
    for line in told:
        facts |= line
    assert (facts["file"], facts["codebooks"], facts["threads"]) == ("tokenizer-standin.safetensors", 8, 3)
    dtype = {"moshi": "int64", "rustymimi": "uint32"}[peer]
    shapes = [line["codes"] for line in told if "codes" in line]
    assert shapes == [[1, 8, 1, dtype]] + [[1, 8, 8, dtype]] * 2 + [[1, 8, 2, dtype]] * 4 + [[1, 8, 1, dtype]] * 2
    assert told[-3] == {"reset": True}


def test_steps_are_measured(mimi_standin: Path) -> None:
    few = ["--threads", "1", "--chunks", "1,2", "--turns", "1", "--json"]
    outcome = call_tool("bench", "--weights", mimi_standin, "--steps", "--quantizers", "8", *few)
    assert outcome.status == 0, outcome.err
    (found,) = json.loads(outcome.out)["threads"].values()
    assert [*found] == ["steps_ms"]
    assert [[*cells] for cells in found["steps_ms"].values()] == [["our runtime"], ["our runtime"]]


def test_peers_encode_beside_us(mimi_standin: Path, peers_were_told: Callable[[str], list[dict[str, Any]]]) -> None:
    options = [word for peer in PEERS for word in ("--peer", peer)]
    few = ["--threads", "1", "--chunks", "2", "--turns", "1", "--json"]
    outcome = call_tool("bench", "--weights", mimi_standin, "--encode", "--cpu-time", *options, *few)
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["cpu_time"] is True
    cells = json.loads(outcome.out)["threads"]["1"]["steps_ms"]["2"]
    assert [*cells] == [*PEERS, "encoding"]
    assert cells["moshi"]["times"] == 1
    for peer in PEERS:
        assert [1, 1, 2 * FRAME_SAMPLES, "float32"] in [line.get("audio") for line in peers_were_told(peer)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--peer", "moshi", "--peer-python", "/no/python"], "--peer-python /no/python cannot be run: No such file"),
        (["--peer", "rustymimi", "--peer-python", sys.executable], "rustymimi is not installed for"),
        (["--peer", "moshi", "--weights", "demo"], "--peer is for Mimi, and"),
        (["--peer-python", sys.executable], "are for --peer, which is not given"),
        (["--peer", "moshi", "--process"], "leave --bits, --process and --streams out"),
        (["--cpu-time"], "--cpu-time is for steps; add --steps or --encode"),
        (["--quantizers", "33"], "--quantizers is 33;"),
        (["--quantizers", "8", "--encode"], "--quantizers is for decoding"),
        (["--quantizers", "8", "--weights", "demo"], "the official loop decodes all 16 only"),
    ],
)
def test_what_cannot_be_compared_is_said(mimi_standin: Path, arguments: list[str], words: str) -> None:
    outcome = call_tool("bench", "--weights", mimi_standin, *arguments)
    assert outcome.status != 0
    assert words in outcome.error_line


def test_the_checkpoint_that_peers_read_is_found_or_named(mimi_standin: Path, tmp_path: Path) -> None:
    bundle = replace(load_bundle(mimi_standin), folder=tmp_path)
    with pytest.raises(UsageError, match="has 0 files"):
        peer_sides(bundle, ["json"], sys.executable, None, encodes=False)
    (side,) = peer_sides(bundle, ["json"], sys.executable, tmp_path / "x.safetensors", encodes=True)
    assert (side.kind, side.weights) == ("json-encode", tmp_path / "x.safetensors")
