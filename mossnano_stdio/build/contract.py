"""The official contract of a bundle: names of files, inputs, outputs and states, and the metadata that lists them.

Rules of this room:

- For the published model's dimensions, `metadata` gives what was published, value for value.
- Graphs take their names and shapes from the metadata made here, so the two cannot differ.
"""

from __future__ import annotations

from typing import Any

from mossnano_stdio.build.builder import OPSET
from mossnano_stdio.build.model import CodecWeights, DecoderWeights, TransformerWeights, transformers
from mossnano_stdio.weights.folder import METADATA_VERSION

ENCODE_FILE = "moss_audio_tokenizer_encode.onnx"
ENCODE_DATA = "moss_audio_tokenizer_encode.data"
DECODE_FULL_FILE = "moss_audio_tokenizer_decode_full.onnx"
DECODE_STEP_FILE = "moss_audio_tokenizer_decode_step.onnx"
DECODE_DATA = "moss_audio_tokenizer_decode_shared.data"

ENCODE_INPUTS = ["waveform", "input_lengths"]
ENCODE_OUTPUTS = ["audio_codes", "audio_code_lengths"]
DECODE_INPUTS = ["audio_codes", "audio_code_lengths"]
DECODE_OUTPUTS = ["audio", "audio_lengths"]

STATES_OF_A_CACHE = ("offset", "cached_keys", "cached_values", "cached_positions")


def metadata(weights: CodecWeights, checkpoint_name: str) -> dict[str, Any]:
    """The content of METADATA_NAME."""
    codec = weights.format
    files = {"encode": ENCODE_FILE, "decode_full": DECODE_FULL_FILE, "decode_step": DECODE_STEP_FILE}
    data = {ENCODE_FILE: [ENCODE_DATA], DECODE_FULL_FILE: [DECODE_DATA], DECODE_STEP_FILE: [DECODE_DATA]}
    return {
        "format_version": METADATA_VERSION,
        "checkpoint_path": checkpoint_name,
        "files": files,
        "external_data_files": data,
        "codec_config": {
            "sample_rate": codec.sample_rate,
            "channels": codec.channels,
            "downsample_rate": codec.frame_samples,
            "num_quantizers": codec.quantizers,
        },
        "onnx": {
            "opset": OPSET,
            "encode_input_names": ENCODE_INPUTS,
            "encode_output_names": ENCODE_OUTPUTS,
            "decode_input_names": DECODE_INPUTS,
            "decode_output_names": DECODE_OUTPUTS,
            "decode_step_input_names": [*DECODE_INPUTS, *_state_names(weights.decoder, "input")],
            "decode_step_output_names": [*DECODE_OUTPUTS, *_state_names(weights.decoder, "output")],
        },
        "streaming_decode": streaming_decode(weights.decoder),
    }


def streaming_decode(decoder: DecoderWeights) -> dict[str, Any]:
    """The states of decode_step: one counter per transformer, four tensors per layer."""
    found = transformers(decoder.modules)
    layers = [(index, layer, module) for index, module in found for layer in range(len(module.layers))]
    return {
        "batch_size": 1,
        "transformer_offsets": [_offset(number, index) for number, (index, _) in enumerate(found)],
        "attention_caches": [_cache(number, *layer) for number, layer in enumerate(layers)],
    }


def _offset(number: int, decoder_index: int) -> dict[str, Any]:
    return {
        "index": number,
        "decoder_index": decoder_index,
        "input_name": f"transformer_offset_{number}",
        "output_name": f"transformer_offset_out_{number}",
        "shape": [1],
        "dtype": "int32",
    }


def _cache(number: int, decoder_index: int, layer: int, module: TransformerWeights) -> dict[str, Any]:
    cache: dict[str, Any] = {
        "index": number,
        "decoder_index": decoder_index,
        "layer_index": layer,
        "context": module.context,
        "num_heads": module.heads,
        "head_dim": module.head_dim,
    }
    for state in STATES_OF_A_CACHE:
        cache[f"{state}_input_name"] = f"attn_{state}_{number}"
        cache[f"{state}_output_name"] = f"attn_{state}_out_{number}"
    return cache | {
        "offset_shape": [1],
        "cache_shape": [1, module.heads, module.context, module.head_dim],
        "positions_shape": [1, module.context],
        "cache_dtype": "float32",
        "positions_dtype": "int32",
    }


def _state_names(decoder: DecoderWeights, side: str) -> list[str]:
    states = streaming_decode(decoder)
    counters = [entry[f"{side}_name"] for entry in states["transformer_offsets"]]
    caches = [cache[f"{state}_{side}_name"] for cache in states["attention_caches"] for state in STATES_OF_A_CACHE]
    return counters + caches
