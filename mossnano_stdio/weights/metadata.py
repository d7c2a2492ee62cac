"""`codec_browser_onnx_meta.json`, as official bundles have it: how it is parsed, and how it is built.

For the published model's numbers, `build_metadata` gives what was published, value for value. Graphs that we build take
the names and shapes of their states from what was built here, so the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mossnano_stdio.errors import BundleError
from mossnano_stdio.tokens import CodecFormat
from mossnano_stdio.weights.checked_json import Entry, load_json
from mossnano_stdio.weights.graphs import EMPTY_POSITION, CacheSpec, GraphSpec, StateSpec

METADATA_NAME = "codec_browser_onnx_meta.json"
METADATA_VERSION = 2

ENCODE_FILE = "moss_audio_tokenizer_encode.onnx"
ENCODE_DATA = "moss_audio_tokenizer_encode.data"
DECODE_FULL_FILE = "moss_audio_tokenizer_decode_full.onnx"
DECODE_STEP_FILE = "moss_audio_tokenizer_decode_step.onnx"
DECODE_DATA = "moss_audio_tokenizer_decode_shared.data"

OFFICIAL_FILES = {  # graph -> its file and the files of its external data
    "encode": (ENCODE_FILE, ENCODE_DATA),
    "decode_full": (DECODE_FULL_FILE, DECODE_DATA),
    "decode_step": (DECODE_STEP_FILE, DECODE_DATA),
}

ENCODE_INPUTS = ["waveform", "input_lengths"]
ENCODE_OUTPUTS = ["audio_codes", "audio_code_lengths"]
DECODE_INPUTS = ["audio_codes", "audio_code_lengths"]
DECODE_OUTPUTS = ["audio", "audio_lengths"]

STATES_OF_A_CACHE = ("offset", "cached_keys", "cached_values", "cached_positions")


# --- building ------------------------------------------------------------------------------------


def build_metadata(
    checkpoint_name: str,
    codec: CodecFormat,
    files: Mapping[str, Sequence[str]],
    streaming: Mapping[str, Any],
    opset: int,
) -> dict[str, Any]:
    """The content of METADATA_NAME. `files` is made like OFFICIAL_FILES, `streaming` by `build_streaming`."""
    names: dict[str, Any] = {"opset": opset}
    if "encode" in files:
        names |= {"encode_input_names": ENCODE_INPUTS, "encode_output_names": ENCODE_OUTPUTS}
    states = states_of(streaming)
    names |= {
        "decode_input_names": DECODE_INPUTS,
        "decode_output_names": DECODE_OUTPUTS,
        "decode_step_input_names": [*DECODE_INPUTS, *(state.input_name for state in states)],
        "decode_step_output_names": [*DECODE_OUTPUTS, *(state.output_name for state in states)],
    }
    return {
        "format_version": METADATA_VERSION,
        "checkpoint_path": checkpoint_name,
        "files": {name: file for name, (file, *_) in files.items()},
        "external_data_files": {file: data for file, *data in files.values()},
        "codec_config": {
            "sample_rate": codec.sample_rate,
            "channels": codec.channels,
            "downsample_rate": codec.frame_samples,
            "num_quantizers": codec.quantizers,
        },
        "onnx": names,
        "streaming_decode": streaming,
    }


def build_streaming(counters: Sequence[Mapping[str, Any]], caches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of decode_step: a counter for each transformer, a cache of four tensors for each of its layers."""
    return {"batch_size": 1, "transformer_offsets": counters, "attention_caches": caches}


def states_of(streaming: Mapping[str, Any]) -> tuple[StateSpec, ...]:
    """The same, as whoever parses the metadata will find them."""
    return _parse_states(Entry(streaming, "streaming_decode"))


def build_counter(number: int, decoder_index: int) -> dict[str, Any]:
    return {
        "index": number,
        "decoder_index": decoder_index,
        "input_name": f"transformer_offset_{number}",
        "output_name": f"transformer_offset_out_{number}",
        "shape": [1],
        "dtype": "int32",
    }


def build_cache(
    number: int, decoder_index: int, layer_index: int, *, context: int, heads: int, head_dim: int
) -> dict[str, Any]:
    names = {}
    for state in STATES_OF_A_CACHE:
        names[f"{state}_input_name"] = f"attn_{state}_{number}"
        names[f"{state}_output_name"] = f"attn_{state}_out_{number}"
    return {
        "index": number,
        "decoder_index": decoder_index,
        "layer_index": layer_index,
        "context": context,
        "num_heads": heads,
        "head_dim": head_dim,
        **names,
        "offset_shape": [1],
        "cache_shape": [1, heads, context, head_dim],
        "positions_shape": [1, context],
        "cache_dtype": "float32",
        "positions_dtype": "int32",
    }


# --- parsing -------------------------------------------------------------------------------------


def load_metadata(folder: Path) -> tuple[Entry, bytes]:
    """The metadata of `folder`, of a version that we can parse, and the file's bytes."""
    metadata, content = load_json(folder / METADATA_NAME)
    if (version := metadata.at("format_version").whole()) != METADATA_VERSION:
        raise BundleError(
            f"{metadata.where}: format_version is {version}, {METADATA_VERSION} is what this program reads"
        )
    return metadata, content


def parse_graphs(metadata: Entry, precision: str) -> dict[str, GraphSpec]:
    """The official graphs that there are."""
    names = metadata.at("onnx")
    states = _parse_states(metadata.at("streaming_decode"))
    graphs = {}
    for name, prefix in (("decode_step", "decode_step"), ("decode_full", "decode"), ("encode", "encode")):
        entry = metadata.at("files").maybe_at(name)
        if entry is None:
            continue
        file_name = entry.file_name()
        data = metadata.at("external_data_files").items_at(file_name)
        inputs, outputs = names.at(f"{prefix}_input_names"), names.at(f"{prefix}_output_names")
        own_states = states if name == "decode_step" else ()
        graphs[name] = GraphSpec(
            file=file_name,
            data=tuple(item.file_name() for item in data),
            precision=precision,
            states=own_states,
            input_names=_without_states(inputs, [state.input_name for state in own_states]),
            output_names=_without_states(outputs, [state.output_name for state in own_states]),
        )
    return graphs


def parse_codec_config(metadata: Entry) -> tuple[int, int, int, int]:
    """Sample rate, channels, samples of a frame and quantizers. How large a codebook is, the metadata does not say."""
    config = metadata.at("codec_config")
    keys = ("sample_rate", "channels", "downsample_rate", "num_quantizers")
    sample_rate, channels, frame_samples, quantizers = (config.at(key).whole(least=1) for key in keys)
    return sample_rate, channels, frame_samples, quantizers


def parse_caches(metadata: Entry) -> tuple[CacheSpec, ...]:
    return tuple(
        CacheSpec(
            decoder_index=entry.at("decoder_index").whole(),
            layer_index=entry.at("layer_index").whole(),
            heads=entry.at("num_heads").whole(least=1),
            context_tokens=entry.at("context").whole(least=1),
            offset_input_name=entry.at("offset_input_name").text(),
        )
        for entry in metadata.at("streaming_decode").at("attention_caches").items()
    )


def _parse_states(streaming: Entry) -> tuple[StateSpec, ...]:
    """Token counters first, then per attention its counter, keys, values and positions."""
    if (batch := streaming.at("batch_size").whole()) != 1:
        raise BundleError(f"{streaming.where}: batch_size is {batch}, 1 is what this program runs")
    states = [
        StateSpec(
            input_name=entry.at("input_name").text(),
            output_name=entry.at("output_name").text(),
            shape=_counter_shape(entry.at("shape")),
            dtype=_counter_dtype(entry.at("dtype")),
            initial=0,
        )
        for entry in streaming.at("transformer_offsets").items()
    ]
    for entry in streaming.at("attention_caches").items():
        states += _parse_cache_states(entry)
    return tuple(states)


def _parse_cache_states(entry: Entry) -> list[StateSpec]:
    counter = _counter_dtype(entry.at("positions_dtype"))
    cache = np.dtype(entry.at("cache_dtype").one_of("float32", "float16"))
    cache_shape, positions_shape = entry.at("cache_shape").shape(), entry.at("positions_shape").shape()
    context = entry.at("context").whole(least=1)
    expected = (1, entry.at("num_heads").whole(least=1), context, entry.at("head_dim").whole(least=1))
    if cache_shape != expected or positions_shape != (1, context):
        raise BundleError(
            f"{entry.where}: cache_shape {list(cache_shape)} and positions_shape {list(positions_shape)} do not fit "
            f"num_heads, context and head_dim, which need {list(expected)} and {[1, context]}"
        )
    shapes = (_counter_shape(entry.at("offset_shape")), expected, expected, (1, context))
    dtypes = (counter, cache, cache, counter)
    initials = (0, 0, 0, EMPTY_POSITION)
    return [
        StateSpec(
            input_name=entry.at(f"{state}_input_name").text(),
            output_name=entry.at(f"{state}_output_name").text(),
            shape=shape,
            dtype=dtype,
            initial=initial,
        )
        for state, shape, dtype, initial in zip(STATES_OF_A_CACHE, shapes, dtypes, initials, strict=True)
    ]


def _counter_shape(entry: Entry) -> tuple[int, ...]:
    if (shape := entry.shape()) != (1,):
        raise entry.wrong("[1]")
    return shape


def _counter_dtype(entry: Entry) -> np.dtype[Any]:
    return np.dtype(entry.one_of("int32", "int64"))


def _without_states(listed: Entry, state_names: Sequence[str]) -> tuple[str, ...]:
    """The two names in the list that no state has; every state's name must be in the list once."""
    names = listed.texts()
    if len(set(names)) != len(names) or len(set(state_names)) != len(state_names):
        repeated = [name for name in {*names} if max(names.count(name), state_names.count(name)) > 1]
        raise BundleError(f"{listed.where}: {', '.join(repeated)} comes twice, every tensor has a name of its own")
    if missing := set(state_names) - set(names):
        raise BundleError(f"{listed.where}: lacks {', '.join(sorted(missing))}, which streaming_decode describes")
    rest = tuple(name for name in names if name not in state_names)
    if len(rest) != 2:
        raise BundleError(
            f"{listed.where}: has {len(rest)} names that streaming_decode does not describe as state "
            f"({', '.join(rest)}), 2 are needed: the values and their lengths"
        )
    return rest
