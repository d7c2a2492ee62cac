"""The ring and what the callback does with it, against models; then the player, on a real PortAudio.

The file device shows to the sample what was played, without a clock. The sound server plays in real time and shows
what a producer who stalls, a device that goes away and an interrupt do.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mossnano_stdio.errors import DeviceError, ExitStatus, UsageError
from mossnano_stdio.playback import Player, devices, output_devices
from mossnano_stdio.playback.convert import Converter
from mossnano_stdio.playback.feed import Feed, Outlook
from mossnano_stdio.playback.ring import PcmRing, Samples
from tests.sound import (
    FileDevice,
    SoundServer,
    loud_noise,
    missing_portaudio,
    missing_sound_server,
    run_player,
    silent_runs,
    without_silence,
)

needs_portaudio = pytest.mark.skipif(missing_portaudio() is not None, reason=str(missing_portaudio()))
needs_sound_server = pytest.mark.skipif(missing_sound_server() is not None, reason=str(missing_sound_server()))

CHUNK = 3840  # samples of one frame, 80 ms


@pytest.fixture
def doomed_server(tmp_path: Path) -> Iterator[SoundServer]:
    """A server of one's own, to be maltreated."""
    server = SoundServer(tmp_path, is_recorded=False)
    yield server
    server.stop()


# --- the ring ----------------------------------------------------------------------------------------------------


@given(
    capacity=st.integers(1, 20),
    moves=st.lists(st.tuples(st.sampled_from(["write", "read", "grow"]), st.integers(0, 25)), max_size=60),
)
def test_a_ring_is_a_bounded_queue(capacity: int, moves: list[tuple[str, int]]) -> None:
    ring = PcmRing(capacity, channels=1)
    model: deque[int] = deque()
    counter = 0
    for move, count in moves:
        match move:
            case "write":
                offered = np.arange(counter, counter + count, dtype=np.int16).reshape(-1, 1)
                taken = ring.write(offered)
                assert taken == min(count, capacity - len(model))
                model.extend(range(counter, counter + taken))
                counter += taken
            case "read":
                out: Samples = np.full((count, 1), -1, np.int16)
                given_samples = ring.read_into(out)
                expected = [model.popleft() for _ in range(min(count, len(model)))]
                assert out[:given_samples, 0].tolist() == expected
                assert (out[given_samples:] == -1).all(), "what was not read must stay as it was"
            case "grow" if count > capacity:
                capacity = count
                ring.grow(capacity)
        assert (ring.filled, ring.free, ring.capacity) == (len(model), capacity - len(model), capacity)


def test_two_threads_share_a_ring_without_losing_a_sample() -> None:
    pcm = loud_noise(100_000)
    ring = PcmRing(1000, channels=2)

    def write_all() -> None:
        at = 0
        while at < len(pcm):
            at += ring.write(pcm[at : at + 1 + at % 777])

    out = np.zeros_like(pcm)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        writer = threading.Thread(target=write_all)
        writer.start()
        at = 0
        while at < len(out):
            at += ring.read_into(out[at : at + 1 + at % 555])
        writer.join()
    finally:
        sys.setswitchinterval(interval)
    assert np.array_equal(out, pcm)


# --- the feed ----------------------------------------------------------------------------------------------------


def make_feed(prebuffer: float = 0, capacity: int = 64, longest: float = 48, latency: int = 0) -> Feed:
    feed = Feed(PcmRing(capacity, channels=1), 1000, prebuffer, longest)
    feed.latency_samples = latency
    return feed


def next_block(feed: Feed, size: int, now: float = 0.0, lead: float = 0.0) -> list[int]:
    out: Samples = np.full((size, 1), -1, np.int16)
    assert feed.fill(out, now, lead) is Outlook.GO_ON
    values: list[int] = out[:, 0].tolist()
    return values


def push(feed: Feed, *values: int) -> int:
    return feed.ring.write(np.array(values, np.int16).reshape(-1, 1))


moves = st.one_of(
    st.tuples(st.just("push"), st.integers(1, 40)),
    st.tuples(st.just("block"), st.integers(1, 20)),
    st.tuples(st.just("end"), st.just(0)),
    st.tuples(st.just("flush"), st.just(0)),
    st.tuples(st.just("flush latest"), st.just(0)),
)


@given(st.lists(moves, max_size=120), st.sampled_from([0, 1, 7, 30, 48]))
@settings(max_examples=300)
@example([("push", 1), ("block", 1), ("block", 1), ("end", 0), ("push", 1)], 0)  # two ends between two blocks
def test_whatever_comes_when_all_is_played_in_order_and_every_gap_is_counted(
    script: list[tuple[str, int]], prebuffer: int
) -> None:
    feed = make_feed(prebuffer)
    queue: deque[int] = deque()  # what was pushed and neither heard nor dropped, as (stream, number) in one integer
    heard: list[tuple[int, int]] = []  # (stream, number), (-1, 0) for silence
    stream, number = 0, 0
    for move, count in [*script, ("end", 0), *[("block", 64)] * 3]:
        match move:
            case "push":
                values = range(number + 1, number + 1 + count)
                taken = push(feed, *values)
                queue.extend(stream * 100_000 + value for value in values[:taken])
                number += taken
            case "end":
                feed.end_stream()
                stream += 1
            case "flush":
                feed.drop_stream()
                queue.clear()
                stream += 1
            case "flush latest":
                feed.drop_stream(keeps_ended=True)
                queue = deque(value for value in queue if value // 100_000 < stream)
                stream += 1
            case "block":
                for value in next_block(feed, count):
                    if not value:
                        heard.append((-1, 0))
                        continue
                    expected = queue.popleft()
                    assert value == expected % 100_000
                    heard.append((expected // 100_000, value))
    assert not queue, "what is whole is played to its end"
    loud = [index for index, (of_stream, _) in enumerate(heard) if of_stream >= 0]
    gaps = [
        after - before - 1
        for before, after in itertools.pairwise(loud)
        if after - before > 1 and heard[before][0] == heard[after][0]
    ]
    assert feed.underruns == len(gaps)
    assert feed.underrun_silence_samples == sum(gaps)
    assert feed.played_samples == len(loud)
    assert feed.dropped_samples == number - len(loud)


def test_silence_until_the_prebuffer_is_there_and_not_longer() -> None:
    feed = make_feed(prebuffer=5)
    push(feed, 1, 2, 3, 4)
    assert not feed.is_ready()
    assert next_block(feed, 3) == [0, 0, 0]
    push(feed, 5)
    assert feed.is_ready()
    assert next_block(feed, 3) == [1, 2, 3]
    assert next_block(feed, 2) == [4, 5]


def test_a_stream_shorter_than_the_prebuffer_is_played_once_it_ended() -> None:
    feed = make_feed(prebuffer=5)
    push(feed, 1, 2)
    assert next_block(feed, 3) == [0, 0, 0]
    feed.end_stream()
    assert next_block(feed, 3) == [1, 2, 0]
    assert feed.underruns == 0


def test_a_full_ring_is_enough_whatever_the_prebuffer() -> None:
    feed = make_feed(prebuffer=float("inf"), capacity=3, longest=float("inf"))
    push(feed, 1, 2)
    assert next_block(feed, 2) == [0, 0]
    push(feed, 3)
    assert next_block(feed, 2) == [1, 2]


def test_each_underrun_doubles_the_prebuffer_up_to_a_bound() -> None:
    feed = make_feed(prebuffer=10, longest=30)
    prebuffers = []
    for _ in range(3):
        push(feed, *range(1, 41))
        assert len([value for _ in range(3) for value in next_block(feed, 20) if value]) == 40
        prebuffers.append(feed.prebuffer_samples)
        push(feed, *range(1, 16))  # more than the first prebuffer, not enough for the next one
        assert not any(next_block(feed, 20))
        feed.end_stream()
        assert any(next_block(feed, 20))
    assert prebuffers == [10, 20, 30]
    assert feed.underruns == 3


def test_a_prebuffer_of_nothing_grows_too() -> None:
    feed = make_feed(prebuffer=0, longest=48)
    push(feed, 1)
    assert next_block(feed, 2) == [1, 0]
    push(feed, 2)
    assert next_block(feed, 2) == [0, 0]
    push(feed, *range(3, 22))
    assert next_block(feed, 2) == [2, 3]
    assert feed.prebuffer_samples == 20  # 20 ms


def test_an_end_that_comes_late_is_no_underrun() -> None:
    feed = make_feed()
    push(feed, 1, 2)
    assert next_block(feed, 4) == [1, 2, 0, 0]
    feed.end_stream()
    push(feed, 3)
    assert next_block(feed, 1) == [3]
    assert feed.underruns == 0
    assert feed.prebuffer_samples == 0


def test_silence_fills_the_device_first_so_that_the_prebuffer_is_not_swallowed() -> None:
    feed = make_feed(prebuffer=2, latency=10)
    push(feed, 1, 2, 3, 4)
    assert [next_block(feed, 3, lead=lead) for lead in (0.0, 0.003, 0.006)] == [[0, 0, 0]] * 3
    assert next_block(feed, 3, lead=0.009) == [1, 2, 3]


@pytest.mark.parametrize("lead", [-1.0, 0.008, 1e9, float("nan")])
def test_a_device_that_is_full_or_tells_nonsense_is_given_sound_at_once(lead: float) -> None:
    feed = make_feed(latency=10)
    push(feed, 1, 2, 3)
    assert next_block(feed, 3, lead=lead) == [1, 2, 3]


def test_played_out_means_heard() -> None:
    """By the clock, and by as much silence behind the last sample as the device could throw away."""
    out: Samples = np.zeros((2, 1), np.int16)
    for times in ((0.0, 0.001, 0.002, 0.004, 0.0051), (0.0, 1.0, 2.0)):
        feed = make_feed(latency=4)
        push(feed, 1)
        feed.end_stream()
        feed.stopping = True
        outlooks = [feed.fill(out, now, 0.004) for now in times]
        assert outlooks == [Outlook.GO_ON] * (len(times) - 1) + [Outlook.PLAYED_OUT]


def test_the_way_of_marked_samples_is_timed() -> None:
    feed = make_feed()
    push(feed, 1, 2, 3, 4)
    feed.mark_since, feed.mark_at = 9.0, 3
    next_block(feed, 2, now=10.0, lead=0.5)
    assert feed.latency_count == 0
    next_block(feed, 2, now=11.0, lead=0.5)
    assert feed.latencies_seconds[: feed.latency_count].tolist() == [pytest.approx(11.0 + 0.5 + 0.001 - 9.0)]


def test_a_mark_that_was_dropped_is_not_timed() -> None:
    feed = make_feed()
    push(feed, 1, 2)
    feed.mark_since, feed.mark_at = 9.0, 1
    feed.drop_stream()
    next_block(feed, 2)
    push(feed, 3, 4)
    next_block(feed, 2)
    assert feed.latency_count == 0
    assert feed.mark_answered == feed.mark_at, "the next one may be set"


def test_a_drop_that_comes_while_a_block_is_filled_waits_for_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = make_feed()
    push(feed, 1, 2, 3, 4, 5)
    assert next_block(feed, 2) == [1, 2]
    monkeypatch.setattr(feed, "drop_what_is_not_wanted", lambda: feed.drop_stream(keeps_ended=True))
    assert next_block(feed, 2) == [0, 0]
    monkeypatch.undo()
    push(feed, 6)
    assert next_block(feed, 2) == [6, 0]
    assert feed.dropped_samples == 3


# --- making it fit -----------------------------------------------------------------------------------------------


def test_what_fits_goes_through_untouched() -> None:
    pcm = np.array([[-32768, 32767], [0, 1]], "<i2")
    assert Converter(48000, 2, 48000, 2, 1.0).convert(pcm.tobytes()).tolist() == pcm.tolist()


@pytest.mark.parametrize(("volume", "expected"), [(0.5, [-16384, 16384]), (2.0, [-32768, 32767]), (0.0, [0, 0])])
def test_volume_is_clipped_and_rounded(volume: float, expected: list[int]) -> None:
    pcm = np.array([[-32768, 32767]], "<i2")
    assert Converter(48000, 2, 48000, 2, volume).convert(pcm.tobytes()).tolist() == [expected]


def test_resampling_in_pieces_is_resampling_at_once_and_every_stream_begins_anew() -> None:
    soxr = pytest.importorskip("soxr")
    converter = Converter(48000, 2, 44100, 2, 1.0)
    for seed in (1, 2):
        pcm = loud_noise(10_000, seed=seed) // 2
        pieces = [converter.convert(pcm[at : at + 999].tobytes()) for at in range(0, len(pcm), 999)]
        resampled = np.concatenate([*pieces, converter.finish()])
        assert len(resampled) == round(len(pcm) * 44100 / 48000)
        at_once = soxr.ResampleStream(48000, 44100, 2, dtype="int16").resample_chunk(pcm, last=True)
        assert np.abs(resampled.astype(int) - at_once).max() <= 2, "soxr dithers, and differently for other pieces"


def test_half_a_sample_is_refused() -> None:
    with pytest.raises(UsageError, match="7 bytes of PCM are not whole samples: push multiples of 4"):
        Converter(48000, 2, 48000, 2, 1.0).convert(bytes(7))


# --- what is missing ---------------------------------------------------------------------------------------------


def test_without_sounddevice_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(DeviceError, match=r"pip install 'mossnano-stdio\[play\]'") as caught:
        Player(48000, 2)
    assert caught.value.exit_status == ExitStatus.NO_DEVICE


def test_without_portaudio_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cffi")
    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(DeviceError, match="apt-get install libportaudio2"):
        output_devices()


def test_without_soxr_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(DeviceError, match=r"pip install 'mossnano-stdio\[audio\]', or choose another"):
        Converter(48000, 2, 44100, 2, 1.0)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prebuffer_ms": -1.0}, "a prebuffer of -1.0 ms"),
        ({"prebuffer_ms": float("nan")}, "a prebuffer of nan ms"),
        ({"volume": 4.5}, "a volume of 4.5"),
        ({"latency": 0.0}, "a latency of 0.0 ms"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_device_is_touched(asked: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Player(48000, 2, **asked)  # type: ignore[arg-type]


def error_of(environment: dict[str, str], code: str, before: str = "") -> str:
    """What a few lines that play raise: its kind and what it says."""
    told = 'print(json.dumps(f"{type(error).__name__}: {error}"))'
    lines = f"{before}\ntry:\n{indent(code.strip(), '    ')}\nexcept Exception as error:\n    {told}"
    message: str = run_player(environment, lines)
    return message


@needs_portaudio
def test_without_a_device_the_error_says_so(tmp_path: Path) -> None:
    if (cards := Path("/proc/asound/cards")).exists() and "no soundcards" not in cards.read_text():
        pytest.skip("this machine has a sound card")
    environment = {"HOME": str(tmp_path), "JACK_NO_START_SERVER": "1"}
    message = error_of(environment, "Player(48000, 2)")
    assert message.startswith("DeviceError: there is no sound device to play on")


# --- a file that keeps what was played ---------------------------------------------------------------------------

PLAY_NOISE = """
samples, options = int(sys.argv[1]), json.loads(sys.argv[2])
with Player(48000, 2, device="tofile", prebuffer_ms=ALL, **options) as player:
    pcm = loud_noise(samples).tobytes()
    for at in range(0, len(pcm), 10_000):
        assert player.push(pcm[at : at + 10_000])
    assert player.finish()
print(json.dumps({"position": player.position_samples, "underruns": player.underruns, "log": log, **player.stats()}))
"""


@needs_portaudio
@pytest.mark.parametrize("samples", [0, 1, 417, 3840, 250_001])
def test_the_first_and_the_last_sample_are_played_and_all_between(file_device: FileDevice, samples: int) -> None:
    told = run_player(file_device.environment, PLAY_NOISE, samples, "{}")
    played = file_device.played()
    assert np.array_equal(without_silence(played), loud_noise(samples))
    assert silent_runs(played) == []
    assert (told["position"], told["underruns"], told["log"]) == (samples, 0, [])


def from_the_first_sound(played: Samples) -> Samples:
    return played[np.flatnonzero(played.any(axis=1))[0] :]


@needs_portaudio
def test_volume_reaches_the_device(file_device: FileDevice) -> None:
    run_player(file_device.environment, PLAY_NOISE, 5000, '{"volume": 0.5}')
    expected = np.rint(loud_noise(5000) * 0.5).astype(np.int16)
    assert np.array_equal(from_the_first_sound(file_device.played())[:5000], expected)


REFUSE = """
import sounddevice
take = sounddevice.check_output_settings
def refuse(device, samplerate, channels, dtype):
    if (samplerate, channels) not in {taken}:
        raise sounddevice.PortAudioError("not this one")
    take(device=device, samplerate=samplerate, channels=channels, dtype=dtype)
sounddevice.check_output_settings = refuse
"""


@needs_portaudio
def test_a_mono_device_gets_the_mean(file_device: FileDevice) -> None:
    told = run_player(file_device.environment, REFUSE.format(taken="[(48000, 1)]") + PLAY_NOISE, 5000, "{}")
    assert told["log"] == ["tofile does not play 2 channels: mixed to 1"]
    expected = np.rint(loud_noise(5000).mean(axis=1, keepdims=True)).astype(np.int16)
    assert np.array_equal(from_the_first_sound(file_device.played(channels=1))[:5000], expected)


@needs_portaudio
def test_a_device_of_another_rate_gets_it_resampled_tail_included(file_device: FileDevice) -> None:
    soxr = pytest.importorskip("soxr")
    told = run_player(file_device.environment, REFUSE.format(taken="[(44100, 2)]") + PLAY_NOISE, 48_000, "{}")
    assert told["log"] == ["tofile does not play 48000 Hz: resampled to 44100 Hz"]
    assert (told["position"], told["played_seconds"], told["device_sample_rate"]) == (48_000, 1.0, 44_100)
    played = from_the_first_sound(file_device.played())
    difference = played[:44_100].astype(int) - soxr.resample(loud_noise(48_000), 48_000, 44_100)
    assert np.abs(difference).max() <= 2, "soxr dithers, and differently for other pieces"
    assert not played[44_100:].any()


@needs_portaudio
def test_a_device_that_takes_nothing_is_refused(file_device: FileDevice) -> None:
    refuse = REFUSE.format(taken="[]")
    message = error_of(file_device.environment, "Player(48000, 2, device='tofile')", before=refuse)
    assert message.startswith("DeviceError: tofile takes no 16-bit PCM, neither at 48000 Hz nor at 44100 Hz")
    assert "--list-devices" in message


@needs_portaudio
@pytest.mark.parametrize("asked", ["'nosuch'", "77"])
def test_an_unknown_device_is_answered_with_those_there_are(file_device: FileDevice, asked: str) -> None:
    message = error_of(file_device.environment, f"Player(48000, 2, device={asked})")
    assert message.startswith("DeviceError: ")
    assert asked in message
    assert "0 tofile" in message


@needs_portaudio
def test_a_stream_that_is_flushed_before_it_sounds_never_does(file_device: FileDevice) -> None:
    told = run_player(
        file_device.environment,
        """
with Player(48000, 2, prebuffer_ms=ALL) as player:
    player.push(loud_noise(5000, seed=1).tobytes())
    player.flush()
    player.push(loud_noise(700, seed=2).tobytes())
    player.finish()
print(json.dumps([player.position_samples, player.stats()["dropped_seconds"]]))
""",
    )
    assert told == [700, round(5000 / 48000, 3)]
    assert np.array_equal(without_silence(file_device.played()), loud_noise(700, seed=2))


BUG_IN_THE_CALLBACK = """
with Player(48000, 2) as player:
    player._feed.fill = lambda out, now, lead: 1 / 0
    player.push(loud_noise(50_000).tobytes())
    player.finish()
"""
PUSH_AFTER_THE_END = """
with Player(48000, 2) as player:
    player.push(bytes(4))
    player.finish()
    player.push(bytes(4))
"""
NO_START = """
class Stubborn(sounddevice.OutputStream):
    def start(self):
        raise sounddevice.PortAudioError("no start")
sounddevice.OutputStream = Stubborn
with Player(48000, 2, device="tofile") as player:
    player.push(loud_noise(50_000).tobytes())
"""
NO_OPENING = """
def fail(**options):
    raise sounddevice.PortAudioError("no opening")
sounddevice.OutputStream = fail
Player(48000, 2, device="tofile")
"""


@needs_portaudio
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (BUG_IN_THE_CALLBACK, "ZeroDivisionError: division by zero"),
        (PUSH_AFTER_THE_END, "UsageError: this player has finished: make a new one"),
        (NO_START, "DeviceError: tofile does not start: no start"),
        (NO_OPENING, "DeviceError: tofile cannot be opened: no opening"),
    ],
    ids=["bug in the callback", "push after the end", "no start", "no opening"],
)
def test_what_goes_wrong_is_raised_where_it_can_be_seen(file_device: FileDevice, code: str, message: str) -> None:
    assert error_of(file_device.environment, code, before="import sounddevice").split(";")[0] == message


# --- real time ---------------------------------------------------------------------------------------------------

PLAY_LIVE = """
chunks, stalls = int(sys.argv[1]), json.loads(sys.argv[2])
pcm = loud_noise(chunks * 3840)
with Player(48000, 2) as player:
    begun = time.monotonic()
    for chunk in range(chunks):
        time.sleep(max(0, begun + 0.08 * chunk - time.monotonic()))
        if str(chunk) in stalls:
            time.sleep(stalls[str(chunk)])
            begun += stalls[str(chunk)]
        assert player.push(pcm[chunk * 3840 : (chunk + 1) * 3840].tobytes())
    pushed = time.monotonic()
    assert player.finish()
    finish_seconds = time.monotonic() - pushed
print(json.dumps({"log": log, "finish_seconds": finish_seconds, "position": player.position_samples, **player.stats()}))
"""


@needs_sound_server
def test_a_live_producer_is_heard_to_the_last_sample_without_a_gap(sound_server: SoundServer) -> None:
    with sound_server.recording() as recording:
        told = run_player(sound_server.environment, PLAY_LIVE, 20, "{}")
    heard = recording.samples()
    assert np.array_equal(without_silence(heard), loud_noise(20 * CHUNK))
    assert silent_runs(heard) == []
    assert (told["underruns"], told["device_underflows"], told["log"]) == (0, 0, [])
    assert told["prebuffer_ms"] == 160
    assert 80 < told["latency_p50_ms"] < 400
    assert told["finish_seconds"] > 0.1, "finish must wait for the last sample, and not only hand it over"


@needs_sound_server
def test_a_producer_that_stalls_costs_silence_and_not_one_sample(sound_server: SoundServer) -> None:
    with sound_server.recording() as recording:
        told = run_player(sound_server.environment, PLAY_LIVE, 24, '{"5": 0.6, "14": 0.9}')
    heard = recording.samples()
    assert np.array_equal(without_silence(heard), loud_noise(24 * CHUNK))
    gaps = silent_runs(heard)
    assert len(gaps) == told["underruns"] == 2
    assert told["underrun_silence_ms"] == pytest.approx(sum(gaps) / 48, abs=1)
    assert told["prebuffer_ms"] == 640
    assert [line.split(":")[0] for line in told["log"]] == ["underrun 1", "underrun 2"]
    assert told["log"][0].endswith("the prebuffer is 320 ms from now on")


@needs_sound_server
def test_the_pause_between_two_streams_is_no_underrun(sound_server: SoundServer) -> None:
    with sound_server.recording() as recording:
        told = run_player(
            sound_server.environment,
            """
with Player(48000, 2) as player:
    for seed in (1, 2):
        player.push(loud_noise(3840, seed=seed).tobytes())
        player.end_stream()
        time.sleep(0.4)
    player.finish()
print(json.dumps([player.underruns, log]))
""",
        )
    assert told == [0, []]
    heard = recording.samples()
    expected = np.concatenate([loud_noise(CHUNK, seed=1), loud_noise(CHUNK, seed=2)])
    assert np.array_equal(without_silence(heard), expected)
    assert len(silent_runs(heard)) == 1


@needs_sound_server
def test_barge_in_drops_what_is_queued_and_plays_what_follows(sound_server: SoundServer) -> None:
    with sound_server.recording() as recording:
        run_player(
            sound_server.environment,
            """
with Player(48000, 2) as player:
    player.push(loud_noise(150_000, seed=1).tobytes())
    time.sleep(0.5)
    player.flush()
    player.push(loud_noise(30_000, seed=2).tobytes())
    player.finish()
print(json.dumps(player.underruns))
""",
        )
    heard = without_silence(recording.samples())
    first, second = loud_noise(150_000, seed=1), loud_noise(30_000, seed=2)
    assert np.array_equal(heard[-30_000:], second)
    stale = len(heard) - 30_000
    assert np.array_equal(heard[:stale], first[:stale])
    assert stale < 48_000 * 0.8, "0.5 s had passed, and the device held 0.1 s"


@needs_sound_server
def test_what_ended_before_the_latest_stream_is_heard_although_that_is_flushed(sound_server: SoundServer) -> None:
    with sound_server.recording() as recording:
        run_player(
            sound_server.environment,
            """
with Player(48000, 2) as player:
    player.push(loud_noise(20_000, seed=1).tobytes())
    player.end_stream()
    player.push(loud_noise(9_000, seed=2).tobytes())
    player.flush(keeps_ended=True)
    player.push(loud_noise(5_000, seed=3).tobytes())
    player.finish()
print(json.dumps(player.underruns))
""",
        )
    expected = np.concatenate([loud_noise(20_000, seed=1), loud_noise(5_000, seed=3)])
    assert np.array_equal(without_silence(recording.samples()), expected)


@needs_sound_server
def test_a_push_that_waits_for_room_can_be_interrupted_and_aborted(sound_server: SoundServer) -> None:
    told = run_player(
        sound_server.environment,
        """
import threading
pcm = loud_noise(300_000).tobytes()
with Player(48000, 2) as player:
    asked = time.monotonic() + 0.3
    interrupted = player.push(pcm, should_stop=lambda: time.monotonic() > asked)
    interrupt_seconds = time.monotonic() - asked
    threading.Timer(0.3, player.abort).start()
    aborting = time.monotonic() + 0.3
    aborted = player.push(pcm)
    abort_seconds = time.monotonic() - aborting
    after = player.push(pcm), player.end_stream(), player.finish()
print(json.dumps([interrupted, aborted, after, interrupt_seconds, abort_seconds]))
""",
    )
    interrupted, aborted, after, interrupt_seconds, abort_seconds = told
    assert (interrupted, aborted, after) == (False, False, [False, False, False])
    assert interrupt_seconds < 0.1
    assert abort_seconds < 0.1


@needs_sound_server
def test_finishing_can_be_interrupted(sound_server: SoundServer) -> None:
    told = run_player(
        sound_server.environment,
        """
with Player(48000, 2) as player:
    player.push(loud_noise(150_000).tobytes())
    asked = time.monotonic() + 0.3
    finished = player.finish(should_stop=lambda: time.monotonic() > asked)
print(json.dumps([finished, time.monotonic() - asked]))
""",
    )
    assert told[0] is False
    assert told[1] < 0.15


PLAY_UNTIL_LOST = """
import threading
from mossnano_stdio.playback import player as room
room._LOST_AFTER_SECONDS = 1.6  # a server that was idle is silent for a second before it asks for sound
pcm = loud_noise(48_000).tobytes()
with Player(48000, 2) as player:
    player.push(pcm)
    print("playing", file=sys.stderr, flush=True)
    begun = time.monotonic()
    try:
        while True:
            player.push(pcm)
    except DeviceError as error:
        message = str(error)
print(json.dumps(message))
"""


@needs_sound_server
def test_a_device_that_is_lost_while_playing_is_a_device_error(doomed_server: SoundServer) -> None:
    threading.Timer(2.0, doomed_server.kill_server).start()
    message = run_player(doomed_server.environment, PLAY_UNTIL_LOST)
    # PortAudio ends the stream, or, where ALSA waits for the dead server, just never calls back again.
    assert "stopped in the middle" in message or "has taken no sound" in message
    assert "--list-devices" in message


@needs_sound_server
def test_a_device_that_hangs_is_given_up_and_does_not_hang_us(doomed_server: SoundServer) -> None:
    threading.Timer(2.0, doomed_server.pause_server).start()
    message = run_player(doomed_server.environment, PLAY_UNTIL_LOST, timeout_seconds=20)
    assert "has taken no sound" in message


def test_the_word_for_a_device_is_the_one_of_the_tool() -> None:
    assert "--device" in devices.CHOOSE_ANOTHER
