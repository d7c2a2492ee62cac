"""build/mimi_*.py and codecs/mimi.py: the sound and the codes that moshi gives to whole files, whatever the chunks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from mossnano_stdio import codecs
from mossnano_stdio.build.bundle import build_from_checkpoint, build_mimi_standin, save_mimi_bundle
from mossnano_stdio.build.mimi_checkpoint import PUBLISHED_NUMBERS, load_mimi, maybe_mimi_file
from mossnano_stdio.build.mimi_model import MimiWeights
from mossnano_stdio.build.tensors import save_tensors
from mossnano_stdio.codecs import mimi
from mossnano_stdio.codecs.moss import FastDecoder, StreamEncoder
from mossnano_stdio.errors import BundleError, CheckFailedError, DecodeError, TokenError, UsageError
from mossnano_stdio.process.stats import peak_resident_bytes
from mossnano_stdio.tokens import Codes
from mossnano_stdio.weights import SIDECAR_NAME, load_bundle
from tests.conftest import skip_if_nothing_can_be_built
from tests.oracle import Sound, furthest, in_chunks

REFERENCE = Path(__file__).parent / "reference" / "mimi"
KYUTAI = REFERENCE / "tokenizer-tiny.safetensors"
HUGGING_FACE = REFERENCE / "hf"
TOLERANCE = 1e-6  # of the goldens
PCM16_STEP = 1 / 32767
FRAMES, FRAME_SAMPLES, QUANTIZERS = 24, 1920, 32  # past the context, which is 5.5 frames


def golden(name: str) -> NDArray[Any]:
    """[frames, quantizers], or [samples, 1]."""
    columns: NDArray[Any] = np.load(REFERENCE / f"{name}.npy")[0].T
    return columns


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    skip_if_nothing_can_be_built()
    built = tmp_path_factory.mktemp("mimi")
    build_from_checkpoint(REFERENCE, built)
    return built


@pytest.fixture(scope="module")
def runtime(folder: Path) -> mimi.MimiRuntime:
    found = codecs.load_runtime(load_bundle(folder), threads=1)
    assert isinstance(found, mimi.MimiRuntime)
    return found


@pytest.fixture
def decoder(runtime: mimi.MimiRuntime) -> FastDecoder:
    return runtime.new_decoder()


@pytest.fixture(scope="module")
def encoder_runtime(folder: Path) -> codecs.EncoderRuntime:
    return codecs.load_encoder_runtime(load_bundle(folder), threads=1)


@pytest.fixture
def encoder(encoder_runtime: codecs.EncoderRuntime) -> StreamEncoder:
    found = encoder_runtime.new_encoder()
    assert isinstance(found, StreamEncoder)
    return found


CODES: Codes = golden("codes").astype(np.uint16)
AUDIO: Sound = golden("audio")
WAVE: Sound = np.ascontiguousarray(golden("wave"))
ENCODED = golden("encoded")


def encoded_in_chunks(encoder: StreamEncoder, wave: Sound, chunk_frames: int) -> Codes:
    chunk_samples = chunk_frames * FRAME_SAMPLES
    return np.concatenate(
        [encoder.step(wave[start : start + chunk_samples]) for start in range(0, len(wave), chunk_samples)]
    )


# --- goldens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_frames", [1, 2, 5, 8, 24])
def test_sound_in_chunks(decoder: FastDecoder, chunk_frames: int) -> None:
    assert furthest(in_chunks(decoder, CODES, chunk_frames), AUDIO) < TOLERANCE


@pytest.mark.parametrize(("codebooks", "name"), [(1, "audio_1_codebook"), (8, "audio_8_codebooks")])
def test_sound_of_the_first_codebooks(decoder: FastDecoder, codebooks: int, name: str) -> None:
    assert furthest(in_chunks(decoder, CODES[:, :codebooks], 3), golden(name)) < TOLERANCE


@pytest.mark.parametrize("codebooks", [2, 16, 31])
def test_codebooks_that_are_left_out_add_nothing(decoder: FastDecoder, tmp_path: Path, codebooks: int) -> None:
    """As if all their rows were zeros."""
    weights = load_mimi(KYUTAI)
    silenced = weights.acoustic.codebooks.copy()
    silenced[codebooks - 1 :] = 0  # one codebook is semantic
    other = replace(weights, acoustic=replace(weights.acoustic, codebooks=silenced))
    save_mimi_bundle(tmp_path, other, name="silenced", trial=False)
    expected = codecs.load_decoder(load_bundle(tmp_path), threads=1).step(CODES)
    assert furthest(decoder.step(CODES[:, :codebooks]), expected) < TOLERANCE


@pytest.mark.parametrize("chunk_frames", [1, 2, 5, 8, 24])
def test_codes_in_chunks(encoder: StreamEncoder, chunk_frames: int) -> None:
    assert np.array_equal(encoded_in_chunks(encoder, WAVE, chunk_frames), ENCODED)


def test_whole_files(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert furthest(codecs.load_full_decoder(bundle, threads=1).decode(CODES), AUDIO) < TOLERANCE
    encoder = codecs.load_full_encoder(bundle, threads=1)
    assert np.array_equal(encoder.encode(WAVE), ENCODED)
    assert np.array_equal(encoder.encode(WAVE[:8380]), golden("encoded_odd_length_8380"))


def test_whole_files_that_would_not_fit_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mossnano_stdio.codecs import whole

    full = codecs.load_full_decoder(load_bundle(folder), threads=1)
    monkeypatch.setattr(whole, "_free_bytes", lambda: 32 << 20)
    # 26 * (4 heads * 2^2 tokens) * 4,000^2 + 24 * 1,920 * 4 filters * 4,000
    with pytest.raises(UsageError, match=r"decoding 4000 frames as a whole needs about 6.9 GiB"):
        full.decode(np.zeros((4000, QUANTIZERS), np.uint16))


@pytest.mark.parametrize("checkpoint", [HUGGING_FACE, HUGGING_FACE / "model.safetensors", KYUTAI])
def test_both_layouts_hold_the_same(checkpoint: Path) -> None:
    path = maybe_mimi_file(checkpoint)
    assert path
    assert_equal(load_mimi(path), load_mimi(KYUTAI), "weights")


def assert_equal(here: Any, there: Any, where: str) -> None:
    if is_dataclass(here):
        assert type(here) is type(there), where
        for field in fields(here):
            assert_equal(getattr(here, field.name), getattr(there, field.name), f"{where}.{field.name}")
    elif isinstance(here, tuple):
        for index, (one, other) in enumerate(zip(here, there, strict=True)):
            assert_equal(one, other, f"{where}[{index}]")
    else:
        assert np.array_equal(here, there), where


# --- the state ----------------------------------------------------------------------------------------------------


def spoilt_states(snapshot: Any) -> list[tuple[str, Any]]:
    """The snapshot with one thing lost, each time another."""
    spoilt = []
    for index, state in enumerate(snapshot.states):
        states = [*snapshot.states]
        states[index] = np.zeros_like(state)
        spoilt.append((f"state {index}", replace(snapshot, states=tuple(states))))
    (window,) = snapshot.windows
    for ring in range(len(window)):
        lost = window.copy()
        lost[ring] = 0
        spoilt.append((f"ring {ring}", replace(snapshot, windows=(lost,))))
    return [*spoilt, ("position", replace(snapshot, next_frame=snapshot.next_frame + 1))]


def test_every_lost_state_is_heard(decoder: FastDecoder) -> None:
    decoder.step(CODES[:12])
    snapshot = decoder.snapshot()
    expected = decoder.step(CODES[12:16])
    spoilt = spoilt_states(snapshot)
    assert len(spoilt) == 11 + 2 * 2 + 1  # upsampling, 10 convolutions; keys and values of 2 layers
    for name, state in spoilt[:-1]:  # RoPE is relative, so another position alone changes nothing
        decoder.restore(state)
        assert furthest(decoder.step(CODES[12:16]), expected) > 100 * PCM16_STEP, name
    decoder.restore(snapshot)
    assert np.array_equal(decoder.step(CODES[12:16]), expected)


def test_every_lost_state_changes_codes(encoder: StreamEncoder) -> None:
    encoder.step(WAVE[: 12 * FRAME_SAMPLES])
    snapshot = encoder.snapshot()
    spoilt = spoilt_states(snapshot)
    assert len(spoilt) == 10 + 2 + 2 * 2 + 1  # convolutions; downsampling, and whether it began; keys and values
    for name, state in spoilt[:-1]:
        encoder.restore(state)
        assert (encoder.step(WAVE[12 * FRAME_SAMPLES :]) != ENCODED[12:]).any(), name
    encoder.restore(snapshot)
    assert np.array_equal(encoder.step(WAVE[12 * FRAME_SAMPLES :]), ENCODED[12:])


def test_a_reset_resets_everything(decoder: FastDecoder, encoder: StreamEncoder) -> None:
    """Among it that downsampling begins with copies of its first column; zeros would change 31 codes of frame 0."""
    decoder.step(CODES[::-1])
    decoder.reset()
    assert furthest(decoder.step(CODES[:8]), AUDIO[: 8 * FRAME_SAMPLES]) < TOLERANCE
    encoder.step(WAVE[::-1].copy())
    encoder.reset()
    assert np.array_equal(encoder.step(WAVE[: 3 * FRAME_SAMPLES]), ENCODED[:3])


def test_streams_beside_each_other(runtime: mimi.MimiRuntime) -> None:
    one, other = runtime.new_decoder(), runtime.new_decoder()
    for start in range(0, 12, 3):
        assert furthest(one.step(CODES[start : start + 3]), sound_from(start, 3)) < TOLERANCE
        other.step(CODES[20 - start : 23 - start])


def sound_from(frame: int, frames: int) -> Sound:
    return AUDIO[frame * FRAME_SAMPLES : (frame + frames) * FRAME_SAMPLES]


@pytest.mark.parametrize("good_runs", [0, 1])
def test_a_step_that_fails_leaves_the_stream_where_it_was(
    runtime: mimi.MimiRuntime, good_runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in its second run, when the first has moved everything on."""
    decoder = runtime.new_decoder()
    decoder.step(CODES[:7])
    stream = decoder._stream
    run = stream._run
    runs: list[None] = []

    def failing(*arguments: Any) -> None:
        if len(runs) == good_runs:
            raise DecodeError("as it was told to")
        runs.append(run(*arguments))

    monkeypatch.setattr(stream, "_run", failing)
    with pytest.raises(DecodeError, match="as it was told to"):
        decoder.step(CODES[7:23])
    monkeypatch.undo()
    assert decoder.next_frame == 7
    assert furthest(decoder.step(CODES[7:]), sound_from(7, FRAMES - 7)) < TOLERANCE


def test_in_the_middle(runtime: mimi.MimiRuntime) -> None:
    """As far as the layers and the convolutions look back, and no further, decides what is heard."""
    look_back = codecs.maybe_warm_up_frames(runtime)
    assert look_back == 2 * 6 + 5  # two layers of 11 tokens at 2 a frame; convolutions
    decoder = runtime.new_decoder()
    codecs.seek(decoder, CODES, 20, look_back)
    assert furthest(decoder.step(CODES[20:]), sound_from(20, 4)) < 1e-5
    codecs.seek(decoder, CODES, 20, 2)
    assert furthest(decoder.step(CODES[20:]), sound_from(20, 4)) > 100 * PCM16_STEP


# --- age ----------------------------------------------------------------------------------------------------------

MINUTE_FRAMES = 750


@pytest.mark.parametrize("minute", [1, 120])
def test_a_stream_that_stands_late_sounds_the_same(decoder: FastDecoder, encoder: StreamEncoder, minute: int) -> None:
    decoder.reset(minute * MINUTE_FRAMES)
    assert furthest(in_chunks(decoder, CODES, 5), AUDIO) < TOLERANCE
    encoder.reset(minute * MINUTE_FRAMES)
    assert np.array_equal(encoded_in_chunks(encoder, WAVE, 5), ENCODED)


@pytest.mark.slow
def test_two_hours_in_one_stream(decoder: FastDecoder, encoder: StreamEncoder) -> None:
    """Past what decides what is heard, the same codes sound the same; with -s, it says how far from moshi's whole file.

    No memory grows meanwhile.
    """
    reached, resident = {}, {}
    look_back = 17  # frames, see test_in_the_middle
    for minute in range(120):
        for _ in range(MINUTE_FRAMES // FRAMES):
            audio = in_chunks(decoder, CODES, 8)
            found = encoded_in_chunks(encoder, WAVE, 8)
        reached[minute] = furthest(audio[look_back * FRAME_SAMPLES :], sound_from(look_back, FRAMES - look_back))
        assert np.array_equal(found[look_back:], ENCODED[look_back:])
        resident[minute] = peak_resident_bytes() or 0
    assert decoder.next_frame > 119 * MINUTE_FRAMES
    print(f"after a minute {reached[0]:.2e}, after two hours {reached[119]:.2e}")
    assert max(reached.values()) < 1.5 * TOLERANCE  # moshi's own rounding, 0.6e-6, is in it
    assert resident[119] < resident[1] + (8 << 20)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [64, 2048, 65535])
def test_codes_outside_of_the_codebook(decoder: FastDecoder, code: int) -> None:
    codes = CODES[:2].copy()
    codes[1, 3] = code
    with pytest.raises(TokenError, match=rf"frame 1, quantizer 3: code {code}, allowed is 0 to 63"):
        decoder.step(codes)


def test_another_graph(folder: Path) -> None:
    with pytest.raises(UsageError, match="'fast' is not known, mimi has one graph that decodes"):
        codecs.load_runtime(load_bundle(folder), graph="fast")


def spoilt_checkpoint(folder: Path, changes: Mapping[str, Any], config: tuple[str, str] | None = None) -> Path:
    tensors = {**load_file(KYUTAI), **changes}
    path = folder / "tokenizer-spoilt.safetensors"
    save_tensors(path, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    text = (REFERENCE / "mimi_config.json").read_text("utf-8")
    (folder / "mimi_config.json").write_text(text.replace(*config) if config else text, "utf-8")
    return path


SOME = "decoder.model.3.block.1.conv.conv.weight"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({SOME: None}, rf"the tensor {SOME} \[16, 32, 3\] is missing"),
        ({SOME: np.zeros((16, 32, 5), np.float32)}, r"has shape \[16, 32, 5\], Mimi calls for \[16, 32, 3\]"),
        ({SOME: np.zeros((16, 32, 3), np.float16)}, "is F16; F32 is needed"),
        ({SOME: np.full((16, 32, 3), np.nan, np.float32)}, "holds NaN or infinity"),
        ({"another": np.zeros(1, np.float32)}, "unexpected tensor another"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, changes: Mapping[str, Any], said: str) -> None:
    with pytest.raises(BundleError, match=said):
        load_mimi(spoilt_checkpoint(tmp_path, changes))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (('"causal": true', '"causal": false'), "causal is false, allowed is true"),
        (('"pad_mode": "constant"', '"pad_mode": "reflect"'), 'pad_mode is "reflect", allowed is "constant"'),
        (('"context": 11', '"context": 0'), "context is 0, allowed is a whole number from 1"),
        (('"num_heads": 4', '"num_heads": 5'), "32 features over 5 heads give no even size"),
        (('"frame_rate": 12.5', '"frame_rate": 25.0'), "frame_rate is 25.0, allowed is 12.5"),
    ],
)
def test_configs_that_no_graph_can_be_built_for(tmp_path: Path, config: tuple[str, str], said: str) -> None:
    with pytest.raises(BundleError, match=said):
        load_mimi(spoilt_checkpoint(tmp_path, {}, config))


def test_the_published_file_needs_no_config(tmp_path: Path) -> None:
    """Without one, these numbers hold, and every tensor of this small model has another shape."""
    assert (PUBLISHED_NUMBERS.format.frame_samples, PUBLISHED_NUMBERS.format.frame_bytes) == (1920, 44)
    path = spoilt_checkpoint(tmp_path, {})
    path.with_name("mimi_config.json").write_text('{"model_type": "csm"}')  # a language model's own
    with pytest.raises(
        BundleError, match=r"encoder.model.0.conv.conv.weight has shape .*, Mimi calls for \[64, 1, 7\]"
    ):
        load_mimi(path)


def test_several_in_one_folder(tmp_path: Path) -> None:
    path = spoilt_checkpoint(tmp_path, {})
    assert maybe_mimi_file(tmp_path) == path
    (tmp_path / "mimi-other.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(BundleError, match="holds several Mimis"):
        maybe_mimi_file(tmp_path)


def test_a_wrong_graph_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial compares steps with whole files, which share no arithmetic."""
    from mossnano_stdio.build import bundle, mimi_steps

    def with_another_context(folder: Path, weights: MimiWeights) -> Any:
        other = replace(weights, decoder_transformer=replace(weights.decoder_transformer, context=12))
        return mimi_steps.save_mimi_decode_step(folder, other)

    monkeypatch.setattr(bundle, "save_mimi_decode_step", with_another_context)
    with pytest.raises(CheckFailedError, match=r"stepping departs from .* at frame 5"):
        build_from_checkpoint(REFERENCE, tmp_path)
    assert [*tmp_path.iterdir()] == []


# --- stand-ins ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    skip_if_nothing_can_be_built()
    built = tmp_path_factory.mktemp("standin")
    build_mimi_standin(built, "tiny", seed=3)
    return built


def test_a_standin(standin: Path) -> None:
    bundle = load_bundle(standin)
    assert bundle.name == "mimi tiny stand-in, seed 3"
    assert bundle.format == PUBLISHED_NUMBERS.format
    assert (bundle.format.bits_per_code, bundle.format.frame_bytes) == (11, 44)
    decoder = codecs.load_decoder(bundle, threads=1)
    codes = np.random.default_rng(0).integers(0, 2048, (24, 32)).astype(np.uint16)
    audio = decoder.step(codes)
    assert 0.05 < audio.std() < 0.3
    decoder.reset()
    decoder.step(codes[:12])
    snapshot = decoder.snapshot()
    for name, state in spoilt_states(snapshot)[:-1]:
        decoder.restore(state)
        assert furthest(decoder.step(codes[12:]), audio[12 * FRAME_SAMPLES :]) > 10 * PCM16_STEP, name


def test_its_sidecar_says_everything(standin: Path, tmp_path: Path) -> None:
    """Nothing is left of a weights folder without `mossnano.json`, and nothing else describes the codec."""
    assert (
        sorted(path.suffix for path in standin.iterdir() if path.is_file()) == [".data"] * 4 + [".json"] + [".onnx"] * 4
    )
    text = (standin / SIDECAR_NAME).read_text("utf-8")
    other = tmp_path / SIDECAR_NAME
    for old, new, said in (
        ('"channels": 1', '"channels": 0', "channels is 0, allowed is a whole number from 1"),
        ('"family": "mimi"', '"family": "other"', "is of no codec that is known here"),
        ('"look_back_frames": 5', '"look_back": 5', "'look_back_frames' is missing"),
        ('"shape": [\n            1,\n            32\n          ]', '"shape": [1, 31]', "the metadata says float32"),
    ):
        assert old in text
        other.write_text(text.replace(old, new), "utf-8")
        for path in standin.glob("mimi_*"):
            if not (tmp_path / path.name).exists():
                (tmp_path / path.name).write_bytes(path.read_bytes())
        with pytest.raises(BundleError, match=said):
            codecs.maybe_warm_up_frames(codecs.load_runtime(load_bundle(tmp_path), threads=1))
