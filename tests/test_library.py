"""library.py: Codec, as somebody who imports it meets it."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import tracemalloc
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mossnano_stdio
from mossnano_stdio import Codec, EncodedAudio
from mossnano_stdio.codecs import GraphName
from mossnano_stdio.errors import ArtifactError, BundleError
from mossnano_stdio.tokens import Codes, parse_artifact
from mossnano_stdio.weights import load_bundle
from tests.oracle import Sound, furthest

TOLERANCE = 2e-5  # of the goldens
PCM16_STEP = 1 / 32767
FRAME = 3840


@pytest.fixture(scope="module")
def ours(built_bundle: Path) -> Iterator[Codec]:
    """With our own graphs: any prefix, and a streaming encoder."""
    with Codec.load(built_bundle, threads=1) as codec:
        yield codec


@pytest.fixture(scope="module")
def official(tiny_bundle: Path) -> Iterator[Codec]:
    """With the official graphs only."""
    with Codec.load(tiny_bundle, threads=1) as codec:
        yield codec


@pytest.fixture(params=["ours", "official"])
def either(request: pytest.FixtureRequest) -> Codec:
    codec: Codec = request.getfixturevalue(request.param)
    return codec


@pytest.fixture(scope="module")
def wave(tiny_reference: Path) -> Sound:
    loaded: Sound = np.load(tiny_reference / "wave.npy")
    return loaded


# --- what it is ---------------------------------------------------------------------------------------------------


def test_what_it_says_of_itself(either: Codec) -> None:
    assert (either.sample_rate, either.channels, either.quantizers) == (48000, 2, 16)
    assert (either.codebook_size, either.frame_samples) == (1024, FRAME)
    assert either.context_seconds == 0.8
    assert either.warm_up_seconds == pytest.approx(2 * 0.8 + 0.64 + 0.48 + 2 * 0.32)


@pytest.mark.parametrize("graph", ["official", "fast"])
def test_nano_looks_back_as_far_as_it_should(nano_bundle: Path, graph: GraphName) -> None:
    with Codec.load(nano_bundle, graph=graph) as codec:
        assert (codec.context_seconds, codec.warm_up_seconds) == (10, 84)


def test_a_closed_codec_says_so(built_bundle: Path, codes: Codes) -> None:
    with Codec.load(built_bundle) as codec:
        pass
    with pytest.raises(ValueError, match="this Codec is closed"):
        codec.decode(codes)
    codec.close()


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere: is not there"):
        Codec.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"graph": "quick"}, "graph 'quick' is not known, allowed are official and fast"),
        ({"threads": 0}, "0 threads, allowed is a whole number from 1 to 1024"),
        ({"threads": 1.5}, "1.5 threads"),
        ({"threads": 2**40}, "threads, allowed"),
        ({"provider": "x"}, "provider 'x' is not known"),
    ],
)
def test_wishes_that_make_no_sense(wish: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Codec.load("demo", **wish)


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = "import sys, mossnano_stdio; print([m for m in ('numpy', 'onnxruntime') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'Decoder'"):
        mossnano_stdio.Decoder  # noqa: B018


# --- decoding -----------------------------------------------------------------------------------------------------


def test_goldens_in_every_order(either: Codec, codes: Codes, audio: Sound) -> None:
    for given in (codes, codes.T, codes.T[:, None], codes[None], codes.astype(np.int64), codes.tolist()):
        assert furthest(either.decode(given), audio.T) < TOLERANCE


@pytest.mark.parametrize("quantizers", [1, 8])
def test_prefix_goldens(ours: Codec, tiny_reference: Path, codes: Codes, quantizers: int) -> None:
    golden = np.load(tiny_reference / f"audio_q{quantizers}.npy")
    first = codes[:8]
    for given in (first, first.T, first[:, :quantizers].T, first[None], first.T[:, None]):
        assert furthest(ours.decode(given, num_quantizers=quantizers), golden) < TOLERANCE
    streamed = np.concatenate(list(ours.streaming_decode(first, 3, num_quantizers=quantizers)), axis=1)
    assert furthest(streamed, golden) < TOLERANCE


def test_a_prefix_that_the_graph_cannot_decode(official: Codec, codes: Codes) -> None:
    assert official.decode(codes, num_quantizers=16).shape == (2, 24 * FRAME)
    with pytest.raises(BundleError, match=r"official graph decodes all 16 quantizers only; `mossnano build .* DIR`"):
        official.decode(codes, num_quantizers=8)


def test_batches(ours: Codec, codes: Codes, audio: Sound) -> None:
    other = codes[::-1]
    batch = np.stack([codes, other])  # (batch, frames, quantizers)
    found = ours.decode(batch)
    assert found.shape == (2, 2, 24 * FRAME)
    assert furthest(found[0], audio.T) < TOLERANCE
    assert np.array_equal(found[1], ours.decode(other))
    assert np.array_equal(ours.decode(np.moveaxis(batch, 2, 0)), found)


@pytest.mark.parametrize("chunk_duration", [0.08, 0.16, 0.24, 0.56, 0.8])
def test_chunks_change_nothing(either: Codec, codes: Codes, audio: Sound, chunk_duration: float) -> None:
    assert furthest(either.decode(codes, chunk_duration=chunk_duration), audio.T) < TOLERANCE


def test_chunks_are_decoded_in_steps_of_that_size(ours: Codec, codes: Codes, monkeypatch: pytest.MonkeyPatch) -> None:
    from mossnano_stdio.codecs.moss import FastDecoder

    steps: list[int] = []
    genuine = FastDecoder.step

    def counting(self: FastDecoder, codes: Codes) -> Sound:
        steps.append(len(codes))
        return genuine(self, codes)

    monkeypatch.setattr(FastDecoder, "step", counting)
    ours.decode(codes, chunk_duration=0.4)
    assert steps == [5, 5, 5, 5, 4]


@pytest.mark.parametrize(
    ("chunk_duration", "says"),
    [
        (0, "allowed is above 0 and up to 0.8"),
        (-0.08, "allowed is above 0 and up to 0.8"),
        (float("nan"), "allowed is above 0 and up to 0.8"),
        (0.88, "allowed is above 0 and up to 0.8"),
        (0.1, "allowed are multiples of a frame, 0.08 seconds"),
        (0.0800001, "allowed are multiples of a frame"),
    ],
)
def test_chunks_that_are_none(ours: Codec, codes: Codes, wave: Sound, chunk_duration: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ours.decode(codes, chunk_duration=chunk_duration)
    with pytest.raises(ValueError, match=says):
        ours.encode(wave, chunk_duration=chunk_duration)


def test_chunks_of_a_batch_are_refused(ours: Codec, codes: Codes) -> None:
    with pytest.raises(ValueError, match="chunk_duration is for one stream, the codes are a batch of 2"):
        ours.decode(np.stack([codes, codes]), chunk_duration=0.08)


@pytest.mark.parametrize("wrong", [np.zeros((24, 16)), np.zeros((0, 16), int), [[1] * 16, [1]], np.full((16, 2), 1024)])
def test_wrong_codes_are_value_errors(ours: Codec, wrong: Any) -> None:
    for call in (ours.decode, ours.streaming_decode, lambda codes: ours.decode_range(codes, 0.0)):
        with pytest.raises(ValueError, match=r"^codes: "):
            call(wrong)
    with pytest.raises(ValueError, match=r"^entry 0: "):
        ours.batch_decode([wrong])


def test_batch_decode(ours: Codec, codes: Codes) -> None:
    entries = [codes, codes[:5].T, codes[None, 3:4]]
    found = ours.batch_decode(entries)
    assert [item.shape for item in found] == [(2, 24 * FRAME), (2, 5 * FRAME), (2, FRAME)]
    for entry, item in zip(entries, found, strict=True):
        assert np.array_equal(item, ours.decode(entry))
    assert ours.batch_decode([]) == []
    assert np.array_equal(ours.batch_decode([codes], num_quantizers=4)[0], ours.decode(codes, num_quantizers=4))
    with pytest.raises(ValueError, match="entry 1: a batch of 2, allowed is one stream"):
        ours.batch_decode([codes, np.stack([codes, codes])])


def test_threads_share_a_codec(either: Codec) -> None:
    random = np.random.default_rng(3)
    streams = [random.integers(0, 1024, (12, 16)) for _ in range(6)]
    expected = [either.decode(stream) for stream in streams]
    with ThreadPoolExecutor(len(streams)) as pool:
        found = list(pool.map(either.decode, streams))
    assert all(map(np.array_equal, found, expected))


# --- streams ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_frames", [1, 5, 24, 100])
def test_streaming(either: Codec, codes: Codes, audio: Sound, chunk_frames: int) -> None:
    for given in (codes, codes.T, iter(codes), (frame.tolist() for frame in codes)):
        pieces = list(either.streaming_decode(given, chunk_frames))
        assert [piece.shape[1] for piece in pieces[:-1]] == [chunk_frames * FRAME] * (len(pieces) - 1)
        assert furthest(np.concatenate(pieces, axis=1), audio.T) < TOLERANCE


def test_a_stream_gives_what_it_can_at_once(ours: Codec, codes: Codes) -> None:
    asked: list[int] = []

    def frames() -> Iterator[Codes]:
        for number, frame in enumerate(codes):
            asked.append(number)
            yield frame

    stream = ours.streaming_decode(frames(), chunk_frames=2)
    assert asked == []
    next(stream)
    assert asked == [0, 1]


def test_an_endless_stream_takes_no_more_memory(ours: Codec, codes: Codes) -> None:
    tracemalloc.start()
    try:
        stream = ours.streaming_decode(itertools.cycle(codes), chunk_frames=4)
        for _ in range(20):
            next(stream)
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(100):
            next(stream)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 10_000
    assert peak - before < 1_000_000
    stream.close()  # type: ignore[attr-defined]


def test_a_stream_can_be_closed_half_way(ours: Codec, codes: Codes) -> None:
    stream = ours.streaming_decode(iter(codes), chunk_frames=1)
    first = next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert list(stream) == []
    assert np.array_equal(next(ours.streaming_decode(codes, 1)), first)


def test_streams_do_not_touch_each_other(ours: Codec, codes: Codes) -> None:
    def whole(pieces: Iterable[Sound]) -> Sound:
        return np.concatenate(list(pieces), axis=1)

    in_turn = zip(ours.streaming_decode(codes, 3), ours.streaming_decode(codes[::-1], 3), strict=True)
    here, there = zip(*in_turn, strict=True)
    assert np.array_equal(whole(here), whole(ours.streaming_decode(codes, 3)))
    assert np.array_equal(whole(there), whole(ours.streaming_decode(codes[::-1], 3)))


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        ([0] * 15, r"frame 1: the shape is \(15,\), allowed is \(16,\)"),
        ([[0] * 16], r"frame 1: the shape is \(1, 16\)"),
        ([0.5] * 16, "frame 1: float64, allowed are integers"),
        ([1024] * 16, "frame 1: holds 1024, allowed are 0 to 1023"),
        ([-1] + [0] * 15, "frame 1: holds -1, allowed are 0 to 1023"),
        ([], "frame 1: empty"),
    ],
)
def test_a_wrong_frame_ends_the_stream_where_it_comes(ours: Codec, frame: Any, says: str) -> None:
    stream = ours.streaming_decode(iter([[0] * 16, frame]))
    assert next(stream).shape == (2, FRAME)
    with pytest.raises(ValueError, match=says):
        next(stream)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, None])
def test_chunks_of_streams_that_are_none(ours: Codec, codes: Codes, wrong: Any) -> None:
    with pytest.raises(ValueError, match="chunk_frames is"):
        ours.streaming_decode(codes, wrong)


# --- from the middle ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_codes() -> Codes:
    return np.random.default_rng(9).integers(0, 1024, (110, 16)).astype(np.uint16)


@pytest.mark.parametrize(("start", "duration"), [(5.0, 1.5), (7.777, 0.333), (0.0, 0.5), (8.7, None), (4.0, 100.0)])
def test_a_range_is_what_the_whole_has_there(
    either: Codec, long_codes: Codes, start: float, duration: float | None
) -> None:
    whole = either.decode(long_codes)
    end = whole.shape[1] if duration is None else round((start + duration) * 48000)
    expected = whole[:, round(start * 48000) : end]
    assert furthest(either.decode_range(long_codes.T, start, duration), expected) <= PCM16_STEP


def test_less_warm_up_is_further_off(ours: Codec, long_codes: Codes) -> None:
    whole = ours.decode(long_codes)[:, 6 * 48000 : 7 * 48000]
    errors = [
        furthest(ours.decode_range(long_codes, 6.0, 1.0, warm_up=seconds), whole) for seconds in (0, 0.8, 1.6, 3.36)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] > 10 * PCM16_STEP
    assert errors[3] <= PCM16_STEP


def test_a_range_of_the_demo_is_what_the_whole_has_there() -> None:
    """Its tones go on from where they were since the start, so nothing less than all before will do."""
    codes = np.random.default_rng(3).integers(0, 1024, (16, 100))
    with Codec.load("demo") as demo:
        whole = demo.decode(codes)
        assert furthest(demo.decode_range(codes, 5.0, 1.0), whole[:, 240_000:288_000]) <= PCM16_STEP
        assert demo.warm_up_seconds == math.inf


def test_a_range_may_be_longer_than_any_number(ours: Codec, codes: Codes) -> None:
    whole = ours.decode(codes)
    assert furthest(ours.decode_range(codes, 0.5, 1e308, warm_up=1e308), whole[:, 24_000:]) <= PCM16_STEP


def test_ranges_that_are_none(ours: Codec, codes: Codes) -> None:
    for start, duration, warm_up in ((2.0, None, None), (-1.0, None, None), (0.0, 0.0, None), (0.0, 1.0, -1.0)):
        with pytest.raises(ValueError, match=r"(start|duration|warm_up) is"):
            ours.decode_range(codes, start, duration, warm_up=warm_up)


# --- encoding -----------------------------------------------------------------------------------------------------


def test_encoder_goldens(either: Codec, wave: Sound, tiny_reference: Path) -> None:
    encoded = either.encode(wave)
    golden = np.load(tiny_reference / "encoded.npy")
    assert encoded.codes.shape == (16, 13)
    assert encoded.codes.dtype == np.uint16
    assert np.array_equal(encoded.codes[:, :12].T, golden[:12])
    assert encoded.original_samples == 47080
    assert (encoded.sample_rate, encoded.channels, encoded.quantizers) == (48000, 2, 16)
    assert (encoded.frames, encoded.codebook_size) == (13, 1024)


@pytest.mark.parametrize("samples", [1, FRAME - 1, FRAME, FRAME + 1, 47080])
def test_what_comes_back_is_as_long_as_what_came(either: Codec, wave: Sound, samples: int) -> None:
    encoded = either.encode(wave[:, :samples])
    assert encoded.frames == -(-samples // FRAME)
    assert either.decode(encoded).shape == (2, samples)
    assert either.batch_decode([encoded, encoded])[1].shape == (2, samples)
    assert either.decode(encoded.codes).shape == (2, encoded.frames * FRAME)


@pytest.mark.parametrize("chunk_duration", [0.08, 0.24, 0.8])
def test_chunks_change_no_code(ours: Codec, wave: Sound, chunk_duration: float) -> None:
    assert np.array_equal(ours.encode(wave, chunk_duration=chunk_duration).codes, ours.encode(wave).codes)


def test_the_whole_file_encoder_has_no_chunks(official: Codec, wave: Sound) -> None:
    with pytest.raises(BundleError, match=r"encodes recordings as a whole; `mossnano build .* DIR`"):
        official.encode(wave, chunk_duration=0.08)


def test_mono_goes_to_all_channels(ours: Codec, wave: Sound) -> None:
    expected = ours.encode(np.stack([wave[0], wave[0]])).codes
    assert np.array_equal(ours.encode(wave[0]).codes, expected)
    assert np.array_equal(ours.encode(wave[:1]).codes, expected)


@pytest.mark.parametrize("rate", [8000, 24000, 44100, 96000])
def test_other_rates_are_resampled(ours: Codec, rate: int) -> None:
    import soxr

    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)
    encoded = ours.encode(tone, sample_rate=rate)
    assert encoded.sample_rate == 48000
    assert encoded.original_samples == 48000
    assert np.array_equal(encoded.codes, ours.encode(soxr.resample(tone, rate, 48000)).codes)


@pytest.mark.parametrize("quantizers", [1, 8])
def test_fewer_quantizers_are_a_prefix(ours: Codec, wave: Sound, quantizers: int) -> None:
    encoded = ours.encode(wave, num_quantizers=quantizers)
    assert encoded.quantizers == quantizers
    assert np.array_equal(encoded.codes, ours.encode(wave).codes[:quantizers])
    assert ours.decode(encoded).shape == (2, 47080)
    assert furthest(ours.decode(encoded), ours.decode(ours.encode(wave), num_quantizers=quantizers)) == 0


def test_a_prefix_of_as_many_frames_is_not_turned_around(ours: Codec, wave: Sound) -> None:
    """8 quantizers and 16 frames: of an array, the frames would be taken for the quantizers."""
    encoded = ours.encode(np.tile(wave, 2)[:, : 16 * FRAME], num_quantizers=8)
    assert encoded.codes.shape == (8, 16)
    assert ours.decode(encoded).shape == (2, 16 * FRAME)
    assert sum(piece.shape[1] for piece in ours.streaming_decode(encoded, 5)) == 16 * FRAME


def test_a_wave_that_float32_cannot_hold(ours: Codec) -> None:
    with pytest.raises(ValueError, match="finite in float32"):
        ours.encode(np.full(100, 1e300))


def test_batch_encode(either: Codec, wave: Sound) -> None:
    waves = [wave, wave[0, :5000], wave[:, :1]]
    found = either.batch_encode(waves)
    assert [encoded.original_samples for encoded in found] == [47080, 5000, 1]
    for given, encoded in zip(waves, found, strict=True):
        assert np.array_equal(encoded.codes, either.encode(given).codes)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (np.zeros((2, 10), np.int16), "wave: int16"),
        (np.zeros((3, 10), np.float32), r"wave: the shape is \(3, 10\)"),
        (np.zeros((2, 0), np.float32), "wave: empty"),
        (np.full((2, 10), np.nan, np.float32), "wave: holds NaN"),
    ],
)
def test_wrong_waves_are_value_errors(ours: Codec, wrong: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ours.encode(wrong)
    with pytest.raises(ValueError, match=r"sample_rate is 0"):
        ours.encode(np.zeros(5), sample_rate=0)


def test_a_bundle_without_encoder() -> None:
    with (
        Codec.load("demo") as codec,
        pytest.raises(BundleError, match="has no encoder; `mossnano fetch --what encode`"),
    ):
        codec.encode(np.zeros(5))


# --- artifacts ----------------------------------------------------------------------------------------------------


def test_there_and_back_through_a_file(ours: Codec, wave: Sound, tmp_path: Path) -> None:
    encoded = ours.encode(wave)
    encoded.save(tmp_path / "x.mossnano")
    loaded = EncodedAudio.load(tmp_path / "x.mossnano")
    assert np.array_equal(loaded.codes, encoded.codes)
    assert vars(loaded) | {"codes": None} == vars(encoded) | {"codes": None}
    artifact = parse_artifact((tmp_path / "x.mossnano").read_bytes())
    assert np.array_equal(ours.decode(artifact), ours.decode(loaded))
    assert ours.decode_range(loaded, 0.5).shape == (2, 47080 - 24000)


@pytest.mark.parametrize("change", [65536, -65536, 0.5])
def test_codes_of_a_recording_are_looked_at_as_they_are(ours: Codec, codes: Codes, change: float) -> None:
    """Cast to 16 bits, they would be right."""
    changed: Any = codes.T.astype(int) + change
    recording = EncodedAudio(48_000, 2, 24 * FRAME, 16, 24, 1024, changed)
    with pytest.raises(ArtifactError, match="code"):
        ours.decode(recording)


def test_an_artifact_of_other_weights_is_refused(ours: Codec, official: Codec) -> None:
    codes = np.zeros((16, 2), np.uint16)
    with pytest.raises(ArtifactError, match="sample_rate is 44100"):
        ours.decode(EncodedAudio(44100, 2, 5000, 16, 2, 1024, codes))
    with pytest.raises(ArtifactError, match="quantizers are 8, these weights decode 16 only"):
        official.decode(EncodedAudio(48000, 2, 5000, 8, 2, 1024, codes[:8]))
    with pytest.raises(ArtifactError, match=r"codes are uint16 \[3, 16\], allowed are integers \[2, 16\]"):
        ours.decode(EncodedAudio(48000, 2, 5000, 16, 2, 1024, np.zeros((16, 3), np.uint16)))


def test_an_empty_artifact_is_no_sound(ours: Codec) -> None:
    empty = EncodedAudio(48000, 2, 0, 16, 0, 1024, np.zeros((16, 0), np.uint16))
    assert ours.decode(empty).shape == (2, 0)
    assert list(ours.streaming_decode(empty)) == []


def test_only_one_bundle_is_needed_to_hear_something() -> None:
    with Codec.load("demo") as codec:
        audio = codec.decode(np.random.default_rng(0).integers(0, 1024, (16, 10)))
        assert load_bundle(codec.bundle.folder).demo
        assert np.abs(audio).max() > 0.01
