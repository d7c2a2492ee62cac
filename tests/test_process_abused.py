"""The real process under parents that die, readers that stall, calls that fail, and input and weights of any kind.

Whatever happens, it must end with a documented status, or go on and give the same bytes as in peace. Tests that repeat
something many times do so a few times here, and as often as it takes under `pytest -m slow`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if sys.platform != "linux":
    pytest.skip("looks into /proc, and leans on Linux's pipes", allow_module_level=True)

from mossnano_stdio.protocol.messages import MAX_MESSAGE_BYTES, Kind, Message
from mossnano_stdio.tokens import Codes, pack_frames
from tests.child import DEMO, LONG, PROCESS, ROOT, Child, decoded, double, encoded, fields, pcm_of, random_tokens, run
from tests.conftest import SHARED, STEP, repeated
from tests.doubles import NANO, SMALL, artifact_bytes, expected_pcm, some_frames, tokens_payload

END = Message(Kind.END)
FRAME_PCM_BYTES = NANO.frame_pcm_bytes
MIB = 1 << 20


def memory_bytes(pid: int, field: str = "VmRSS") -> int:
    for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field} of process {pid}")


def stat_of(pid: int) -> list[str]:
    """What /proc says after the process's name: first its state."""
    return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()


def cpu_seconds(pid: int) -> float:
    return sum(map(int, stat_of(pid)[11:13])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def grows_by_less_than(limit_bytes: int, child: Child, field: str = "VmHWM") -> Iterator[None]:
    before = memory_bytes(child.process.pid, field)
    yield
    assert memory_bytes(child.process.pid, field) - before < limit_bytes


def assert_that_nothing_grows(child: Child, burst: Callable[[int], None]) -> None:
    sizes, descriptors = [], set()
    for number in range(10):
        burst(number)
        sizes.append(memory_bytes(child.process.pid))
        descriptors.add(len(list(Path(f"/proc/{child.process.pid}/fd").iterdir())))
    assert max(sizes[3:]) - min(sizes[3:]) < MIB
    assert len(descriptors) == 1


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.TOKENS, Kind.ARTIFACT, Kind.PING, 0x42])
def test_a_length_that_is_only_claimed_takes_no_memory(kind: int) -> None:
    with Child(double()) as child:
        child.next()
        with grows_by_less_than(MIB, child, "VmRSS"):
            child.write(MAX_MESSAGE_BYTES.to_bytes(4, "little") + bytes([kind]))
            time.sleep(0.2)
        assert child.finish()[0] == 65


def test_an_artifact_that_only_claims_to_be_large_takes_no_memory() -> None:
    header = artifact_bytes(some_frames(1), SMALL)[:32]
    largest = header[:24] + (32 * MIB * 8 // 40 - 8).to_bytes(4, "little") + header[28:]
    with Child(double()) as child:
        child.next()
        with grows_by_less_than(MIB, child):
            child.say(Message(Kind.ARTIFACT, largest), Message(Kind.PING))
            assert child.next().kind == Kind.PING  # so it was taken for the beginning of one
        assert child.finish()[0] == 65


@pytest.mark.parametrize("is_heard_out", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_seventy_minutes_in_one_message_take_no_memory_that_grows_with_them(is_heard_out: bool) -> None:
    frames = (MAX_MESSAGE_BYTES - 1) // 20
    with Child(DEMO, stderr=subprocess.DEVNULL) as child:
        child.next()
        child.say(random_tokens(50), END)
        child.until(Kind.END)
        with grows_by_less_than(32 * MIB, child):
            child.say(random_tokens(frames), END)
            if is_heard_out:
                pcm_bytes = 0
                while (message := child.next()).kind == Kind.AUDIO:
                    pcm_bytes += len(message.payload)
                assert pcm_bytes == frames * FRAME_PCM_BYTES
            else:
                for _ in range(60):
                    child.next()
        if not is_heard_out:
            child.say(Message(Kind.CANCEL))
            assert fields(child.until(Kind.END)[-1])["cancelled"] is True


@pytest.mark.parametrize("extra_mib", [0, 4, 16, 40])
def test_memory_that_is_not_to_be_had_is_said_and_ends_us(extra_mib: int) -> None:
    """1,000 frames are 30 MB as floats, twice that while they are joined, and 15 MB as PCM."""
    resource = pytest.importorskip("resource")
    with Child([*DEMO, "--threads", "1", "--chunk-frames", "1000"]) as child:
        child.next()
        child.say(random_tokens(2), END)
        child.until(Kind.END)
        limit = memory_bytes(child.process.pid, "VmSize") + extra_mib * MIB
        resource.prlimit(child.process.pid, resource.RLIMIT_AS, (limit, limit))
        child.say(random_tokens(1000))
        error = child.next()
        assert (fields(error)["code"], fields(error)["fatal"]) == ("out_of_memory", True)
        status, rest, said = child.finish()
    assert (status, rest) == (71, [])
    assert "Traceback" not in said


@repeated(few=3_000, many=100_000)
def test_neither_memory_nor_descriptors_grow_with_the_age_of_a_stream(times: int) -> None:
    def burst(number: int) -> None:
        child.say(random_tokens(times // 10, seed=number), Message(Kind.PING))
        child.until(Kind.PING)

    with Child([*DEMO, "--chunk-frames", "1", "--threads", "1"], stderr=subprocess.DEVNULL) as child:
        child.next()
        assert_that_nothing_grows(child, burst)


@repeated(few=300, many=20_000)
def test_neither_memory_nor_descriptors_grow_with_the_number_of_streams(times: int) -> None:
    """Good streams, bad ones, cut ones, cancelled ones."""
    artifact = artifact_bytes(some_frames(3), SMALL)
    round_of_streams = encoded(
        Message(Kind.TOKENS, tokens_payload(some_frames(3))),
        END,
        Message(Kind.TOKENS, b"\xff"),
        END,
        Message(Kind.ARTIFACT, artifact),
        Message(Kind.ARTIFACT, artifact[:-3]),
        Message(Kind.CANCEL),
        Message(Kind.ARTIFACT, b"MOSSNANO" + bytes(50)),
        Message(Kind.CANCEL),
        Message(0x42, bytes(1000)),
        Message(Kind.SETTINGS, b'{"chunk_frames": null}'),
        Message(Kind.PING),
    )

    def burst(number: int) -> None:
        for _ in range(times // 10):
            child.write(round_of_streams)
            child.until(Kind.PING)

    with Child(double(), stderr=subprocess.DEVNULL) as child:
        assert_that_nothing_grows(child, burst)


# --- parents and readers ---------------------------------------------------------------------------------------------

# Starts the process, brings it into some state, says its id, and sleeps until it is killed.
PARENT = """
import json, sys, time
from tests.child import Child, random_tokens
state, command = sys.argv[1], json.loads(sys.argv[2])
child = Child(command)
if state != "loading":
    child.next()
if state in ("decoding", "blocked"):
    child.say(random_tokens(20_000))
print(child.process.pid, flush=True)
while state == "decoding":
    child.next()
time.sleep(60)
"""


@repeated(few=1, many=25)
@pytest.mark.parametrize("state", ["loading", "idle", "decoding", "blocked"])
def test_who_loses_their_parent_is_gone_soon(times: int, state: str) -> None:
    for attempt in range(times):
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, state, json.dumps(DEMO)], stdout=subprocess.PIPE, cwd=ROOT
        )
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(random.Random(attempt).uniform(0, 0.3))
        parent.kill()
        parent.wait()
        parent.stdout.close()
        killed = time.monotonic()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            while stat_of(pid)[0] != "Z":  # it has ended, and waits for somebody to ask for its status
                assert time.monotonic() - killed < 2, state
                time.sleep(0.02)


@repeated(few=2, many=10)
def test_a_reader_that_stalls_costs_nothing_and_loses_nothing(times: int, in_peace: bytes) -> None:
    """`times` is how many seconds it stalls."""
    with Child(DEMO) as child:
        child.next()
        child.write(LONG)
        time.sleep(1)
        with grows_by_less_than(MIB, child, "VmRSS"):
            before_cpu = cpu_seconds(child.process.pid)
            time.sleep(times)
            assert cpu_seconds(child.process.pid) - before_cpu <= max(0.01 * times, 0.02)
        assert pcm_of(child.until(Kind.END)) == in_peace


def test_an_idle_process_costs_nothing() -> None:
    with Child(DEMO) as child:
        child.next()
        before_cpu = cpu_seconds(child.process.pid)
        time.sleep(2)
        assert cpu_seconds(child.process.pid) - before_cpu <= 0.02


# --- calls that fail -------------------------------------------------------------------------------------------------

STREAMS = [some_frames(3, seed=seed) for seed in range(3)]
SCRIPT = [
    message
    for frames in STREAMS
    for message in (*(Message(Kind.TOKENS, tokens_payload([frame])) for frame in frames), END)
]


def play_script(plan: dict[str, Any]) -> tuple[int, list[Message]]:
    """Message by message, each waiting for its answer where one comes: so many reads, so many writes, so many steps."""
    with Child(double(plan), stderr=subprocess.DEVNULL) as child:
        answers: list[Message] = []
        with contextlib.suppress(AssertionError, BrokenPipeError):  # it has ended
            answers.append(child.next())
            for message in SCRIPT:
                child.say(message)
                answers.append(child.next())
        status, rest, _ = child.finish()
        return status, answers + rest


def test_the_script_in_peace() -> None:
    status, answers = play_script({})
    assert status == 0
    assert pcm_of(answers) == b"".join(expected_pcm(frames, SMALL) for frames in STREAMS)
    assert len(answers) == 1 + len(SCRIPT)


@pytest.mark.parametrize("nth", range(len(SCRIPT) + 1))
def test_the_nth_read_fails(nth: int) -> None:
    status, answers = play_script({"failing_reads": [nth]})
    assert status == 65
    assert [fields(answer)["code"] for answer in answers if answer.kind == Kind.ERROR] == ["input_cut"]
    whole = b"".join(expected_pcm(frames, SMALL) for frames in STREAMS)
    assert whole.startswith(pcm_of(answers))


@pytest.mark.parametrize("nth", range(len(SCRIPT) + 1))
def test_the_nth_write_fails(nth: int) -> None:
    status, answers = play_script({"failing_writes": [nth]})
    assert status == 74
    assert len(answers) == nth


def split_streams(answers: Sequence[Message]) -> list[list[Message]]:
    """The answers to each stream, its END the last."""
    streams: list[list[Message]] = [[]]
    for answer in answers:
        streams[-1].append(answer)
        if answer.kind == Kind.END:
            streams.append([])
    return streams[:-1]


@pytest.mark.parametrize("nth", range(1, 10))
def test_the_nth_step_fails(nth: int) -> None:
    """Step 0 is the warm-up. The stream it was in is lost, the others are as ever."""
    wire = encoded(*SCRIPT)
    done = run(double({"failing_steps": [nth]}, "--chunk-frames", "1"), wire)
    assert done.returncode == 0
    streams = split_streams(decoded(done.stdout)[1:])
    hit = (nth - 1) // 3
    for index, frames in enumerate(STREAMS):
        errors = [fields(message)["code"] for message in streams[index] if message.kind == Kind.ERROR]
        pcm = pcm_of(streams[index])
        assert errors == (["decode_failed"] if index == hit else [])
        assert fields(streams[index][-1])["errors"] == (index == hit)
        assert expected_pcm(frames, SMALL).startswith(pcm)
        if index != hit:
            assert pcm == expected_pcm(frames, SMALL)


# --- what is sent back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        Message(Kind.CANCEL, bytes(1_000_000)),
        Message(Kind.SETTINGS, b'{"' + b"\\\\" * 400_000 + b'": 1}'),
        Message(Kind.SETTINGS, b'{"quantizers": "' + b"\\u0001" * 170_000 + b'"}'),
        Message(Kind.HANDSHAKE, b'{"sample_rate": "' + b"\\u0001" * 170_000 + b'"}'),
        Message(Kind.ERROR, b"\xff" * 1_000_000),
        Message(Kind.PING, bytes(MAX_MESSAGE_BYTES - 1)),
        Message(Kind.END, bytes(1_000_000)),
        Message(0x42, bytes(1_000_000)),
    ],
    ids=["CANCEL", "SETTINGS key", "SETTINGS value", "HANDSHAKE", "ERROR", "PING", "END", "unknown kind"],
)
def test_no_answer_is_longer_than_the_protocol_promises(message: Message) -> None:
    done = run(double(), encoded(message))
    assert done.returncode == 0
    assert max(len(answer.payload) + 1 for answer in decoded(done.stdout)) <= MIB


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_json_as_deep_as_it_gets(opening: bytes) -> None:
    closing = {b"[": b"]", b'{"a":': b"}"}[opening]
    depths = [*range(900, 1000), 100_000]
    wire = encoded(
        *(
            Message(kind, b'{"%s":' % key + opening * depth + b"1" + closing * depth + b"}")
            for kind, key in ((Kind.SETTINGS, b"quantizers"), (Kind.HANDSHAKE, b"sample_rate"))
            for depth in depths
        )
    )
    done = run(double(), wire)
    assert done.returncode == 0
    assert [message.kind for message in decoded(done.stdout)] == [Kind.HANDSHAKE] + [Kind.ERROR] * 2 * len(depths)


NO_CHUNK_FRAMES = (
    b"9" * 4299, b"9" * 5000, b"-1", b"0", b"-0", b"1e999", b"NaN", b"Infinity", b"4.0", b"true", b'"4"', b"[4]",
    b"1001",
)  # fmt: skip


@pytest.mark.parametrize(
    "payload",
    [
        *(b'{"chunk_frames": %s}' % value for value in NO_CHUNK_FRAMES),
        b'{"\\ud800": 1}',
        b'{"chunk_frames": "\\udfff"}',
        b"\xff",
        b"",
        b"null",
        b"4",
        b'{"chunk_frames": 4}x',
        b'{"chunk_frames": 4, "x": 1}',
    ],
    ids=lambda payload: payload[:40].decode("ascii", "replace"),
)
def test_settings_that_make_no_sense(payload: bytes, double_that_stays: Child) -> None:
    double_that_stays.say(Message(Kind.SETTINGS, payload), Message(Kind.PING))
    error, ping = double_that_stays.next(), double_that_stays.next()
    assert (error.kind, ping.kind) == (Kind.ERROR, Kind.PING)
    assert fields(error)["code"] in ("bad_settings", "bad_payload")


@pytest.fixture(scope="module")
def double_that_stays() -> Iterator[Child]:
    with Child(double(), stderr=subprocess.DEVNULL) as child:
        child.next()
        yield child


# --- the same bytes --------------------------------------------------------------------------------------------------


@repeated(few=3, many=100)
def test_the_same_chunks_give_the_same_bytes(times: int, tiny_bundle: Path, codes: Codes) -> None:
    wire = encoded(Message(Kind.TOKENS, pack_frames(codes, 1024)), END)
    command = [*PROCESS, "--weights", str(tiny_bundle), "--threads", "1", "--chunk-frames", "5", "--output", "raw"]
    heard = {run(command, wire).stdout for _ in range(times)}
    assert len(heard) == 1
    assert len(heard.pop()) == len(codes) * FRAME_PCM_BYTES


def test_after_a_cancel_the_next_stream_is_that_of_a_fresh_process(tiny_bundle: Path, codes: Codes) -> None:
    tokens = Message(Kind.TOKENS, pack_frames(codes, 1024))
    command = [*PROCESS, "--weights", str(tiny_bundle), "--threads", "1", "--chunk-frames", "3"]
    fresh = pcm_of(decoded(run(command, encoded(tokens, END)).stdout))
    with Child(command) as child:
        child.next()
        for _ in range(3):
            child.say(tokens)
            child.next()
            child.say(Message(Kind.CANCEL), tokens, END)
            assert fields(child.until(Kind.END)[-1])["cancelled"] is True
            assert pcm_of(child.until(Kind.END)) == fresh


@pytest.mark.parametrize("frames", [1, 2, 4, 8, 17, 23, 1000])
def test_any_chunks_give_the_same_sound(frames: int, in_peace: bytes) -> None:
    done = run([*DEMO, "--output", "raw", "--chunk-frames", str(frames)], LONG)
    difference = np.frombuffer(done.stdout, "<i2").astype(int) - np.frombuffer(in_peace, "<i2")
    assert np.abs(difference).max() <= 1


# --- weights ---------------------------------------------------------------------------------------------------------


@repeated(few=8, many=300)
def test_damage_that_no_sha256_could_find_kills_nobody(times: int, folder: Path) -> None:
    """Wherever the native library is handed nonsense, it is refused, or decoded for what it is: never a crash."""
    genuine = (folder / STEP).read_bytes()
    for attempt in range(times):
        chosen = random.Random(attempt)
        content = bytearray(genuine)
        for _ in range(chosen.choice([1, 10, 1000])):
            content[chosen.randrange(len(content))] = chosen.randrange(256)
        (folder / STEP).write_bytes(content)
        done = run([*PROCESS, "--weights", str(folder)], encoded(random_tokens(3), END))
        assert done.returncode in (0, 66), (attempt, done.stderr)
        assert (done.returncode == 66) == (pcm_of(decoded(done.stdout)) == b""), (attempt, done.stderr)
        assert b"Traceback" not in done.stderr


def test_numbers_that_are_none_become_silence_and_an_error(folder: Path) -> None:
    data = np.fromfile(folder / SHARED, dtype=np.float32)
    data[len(data) // 2 :] = np.nan
    data.tofile(folder / SHARED)
    wire = encoded(random_tokens(5), END)
    done = run([*PROCESS, "--weights", str(folder), "--chunk-frames", "5"], wire)
    messages = decoded(done.stdout)
    assert [message.kind for message in messages] == [Kind.HANDSHAKE, Kind.ERROR, Kind.AUDIO, Kind.END]
    assert fields(messages[1])["code"] == "not_finite"
    assert messages[2].payload == bytes(5 * FRAME_PCM_BYTES)
    assert fields(messages[3])["errors"] == 1
    assert done.returncode == 0


POISON = 7  # a code of the first quantizer


def poisoned(folder: Path, graph: str, tensor_name: str) -> Path:
    """Make one row of a table of codes NaN, and forget every SHA-256."""
    import onnx

    model = onnx.load(folder / graph, load_external_data=False)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == tensor_name]
    where = {entry.key: entry.value for entry in tensor.external_data}
    table = np.memmap(
        folder / where["location"], np.float32, "r+", offset=int(where["offset"]), shape=tuple(tensor.dims)
    )
    table[POISON] = np.nan
    table.flush()
    sidecar = folder / "mossnano.json"
    if sidecar.exists():
        sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "files": {}}))
    return folder


@pytest.fixture(scope="module", params=["official", "fast"])
def poisoned_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx", reason="the extra `build` is not installed")
    from mossnano_stdio.build.bundle import build_from_bundle

    folder = tmp_path_factory.mktemp("poison") / "weights"
    shutil.copytree(request.getfixturevalue("tiny_bundle"), folder, copy_function=shutil.copyfile)
    if request.param == "official":
        return poisoned(folder, STEP, "m.quantizer.quantizers.0.codebook.weight")
    build_from_bundle(folder, folder)
    return poisoned(folder, "mossnano_fast.onnx", "codebooks")


def test_a_poisoned_chunk_poisons_nothing_after_it(poisoned_bundle: Path) -> None:
    """NaN stays NaN in keys and values that are only masked: a reset has to take them away."""
    codes = np.random.default_rng(0).integers(POISON + 1, 1024, (12, 16))
    bad_codes = codes.copy()
    bad_codes[5, 0] = POISON
    clean, bad, tail = (Message(Kind.TOKENS, pack_frames(part, 1024)) for part in (codes, bad_codes, codes[8:]))
    command = [*PROCESS, "--weights", str(poisoned_bundle), "--threads", "1", "--chunk-frames", "4"]
    fresh = pcm_of(decoded(run(command, encoded(clean, END)).stdout))
    fresh_tail = pcm_of(decoded(run(command, encoded(tail, END)).stdout))
    chunk_bytes = 4 * FRAME_PCM_BYTES
    assert len(fresh) == 3 * chunk_bytes
    assert any(fresh)
    streams = split_streams(decoded(run(command, encoded(clean, END, bad, END, clean, END)).stdout)[1:])
    assert [fields(stream[-1])["errors"] for stream in streams] == [0, 1, 0]
    assert pcm_of(streams[0]) == pcm_of(streams[2]) == fresh
    assert pcm_of(streams[1]) == fresh[:chunk_bytes] + bytes(chunk_bytes) + fresh_tail


# --- anything at all -------------------------------------------------------------------------------------------------

PROBE = some_frames(6, seed=99)


def any_message(chosen: random.Random) -> Message:
    frames = some_frames(chosen.randrange(5), seed=chosen.randrange(100))
    artifact = bytearray(artifact_bytes(frames or some_frames(1), SMALL))
    if chosen.random() < 0.3:
        artifact[chosen.randrange(len(artifact))] ^= 1 << chosen.randrange(8)
    payloads: list[tuple[int, bytes]] = [
        (Kind.TOKENS, tokens_payload(frames)),
        (Kind.TOKENS, chosen.randbytes(chosen.randrange(20))),
        (Kind.ARTIFACT, bytes(artifact)),
        (Kind.ARTIFACT, bytes(artifact[: chosen.randrange(len(artifact))])),
        (Kind.END, b""),
        (Kind.END, b"{}"),
        (Kind.CANCEL, chosen.randbytes(3)),
        (Kind.PING, chosen.randbytes(chosen.randrange(100))),
        (Kind.SETTINGS, chosen.choice([b'{"chunk_frames": 3}', b'{"quantizers": 2}', b'{"quantizers": 4}', b"{", b""])),
        (Kind.HANDSHAKE, chosen.choice([b'{"channels": 2}', b'{"channels": 1}', b"{}", b"[]"])),
        (Kind.ERROR, b'{"code": "x"}'),
        (chosen.randrange(256), chosen.randbytes(5)),
    ]
    return Message(*chosen.choice(payloads))


@repeated(few=10, many=300)
def test_after_anything_at_all_the_next_stream_is_as_ever(times: int) -> None:
    for attempt in range(times):
        chosen = random.Random(attempt)
        messages = [any_message(chosen) for _ in range(chosen.randrange(60))]
        settled = [
            Message(Kind.CANCEL, b"enough"),
            Message(Kind.HANDSHAKE, b'{"channels": 2}'),
            Message(Kind.SETTINGS, b'{"quantizers": 4, "chunk_frames": null}'),
            Message(Kind.TOKENS, tokens_payload(PROBE)),
            END,
        ]
        done = run(double(), encoded(*messages, *settled))
        assert done.returncode == 0, attempt
        answers = decoded(done.stdout)
        ends = [fields(answer) for answer in answers if answer.kind == Kind.END]
        assert not ends[-1]["cancelled"], attempt
        numbers = [end["stream"] for end in ends if end["stream"] is not None]
        assert numbers == sorted(set(numbers)), attempt
        last_settings = max(index for index, answer in enumerate(answers) if answer.kind == Kind.HANDSHAKE)
        assert pcm_of(answers[last_settings:]) == expected_pcm(PROBE, SMALL), attempt
        assert b"Traceback" not in done.stderr


@repeated(few=10, many=300)
def test_any_bytes_end_as_documented(times: int) -> None:
    for attempt in range(times):
        chosen = random.Random(attempt)
        wire = bytearray(encoded(*(any_message(chosen) for _ in range(chosen.randrange(20)))))
        for _ in range(chosen.randrange(3)):
            if wire:
                wire[chosen.randrange(len(wire))] = chosen.randrange(256)
        del wire[len(wire) - chosen.randrange(len(wire) + 1) // 4 :]
        done = run(double(), bytes(wire))
        assert done.returncode in (0, 65, 76), attempt
        decoded(done.stdout)
        assert b"Traceback" not in done.stderr
