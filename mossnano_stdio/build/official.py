"""The three graphs of the official contract: decode_step, decode_full and encode.

Rules of this room:

- decode_step appends the new tokens to the cache, attends, and gives the last `context` entries back, oldest first.
  So stepping is the same arithmetic as decoding the whole, past every context too.
- Each layer attends with the offset and the positions of its own cache, so that a state which is lost, swapped or fed
  twice is heard. A transformer's offset is only counted up.
- decode_full and encode attend from every token to every token, so their memory grows with the square of the length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mossnano_stdio.build import blocks
from mossnano_stdio.build.blocks import FLOAT, Heads
from mossnano_stdio.build.builder import DataFile, GraphBuilder
from mossnano_stdio.build.model import (
    DecoderWeights,
    EncoderWeights,
    LayerWeights,
    Module,
    TransformerWeights,
    transformers,
)
from mossnano_stdio.weights import STATES_OF_A_CACHE, build_cache, build_counter, build_streaming, states_of

Attention = Callable[[GraphBuilder, str, str, LayerWeights], str]  # graph, tokens, name of the layer, its weights
AttentionOf = Callable[[GraphBuilder, str, int, TransformerWeights], Attention]  # graph, tokens, module's index, module
Cache = Mapping[str, Any]


def decode_full(decoder: DecoderWeights, maybe_data: DataFile | None = None) -> GraphBuilder:
    """Codes of a whole recording -> its audio."""
    graph = GraphBuilder("decode_full", maybe_data)
    _decode(graph, decoder, WholeAttention)
    return graph


def decode_step(decoder: DecoderWeights, maybe_data: DataFile | None = None) -> GraphBuilder:
    """Codes of the next frames and the states before them -> their audio and the states after them."""
    graph = GraphBuilder("decode_step", maybe_data)
    streaming = streaming_decode(decoder)
    caches = {(cache["decoder_index"], cache["layer_index"]): cache for cache in streaming["attention_caches"]}
    counters = {counter["decoder_index"]: counter for counter in streaming["transformer_offsets"]}

    def attention_of(graph: GraphBuilder, x: str, index: int, module: TransformerWeights) -> Attention:
        count = blocks.count_along(graph, x, axis=1)
        graph.op("Add", counters[index]["input_name"], count, result=counters[index]["output_name"])
        own = [caches[index, layer] for layer in range(len(module.layers))]
        return _CachedAttention(module, count, own)

    _decode(graph, decoder, attention_of)
    for state in states_of(streaming):
        graph.input(state.input_name, state.dtype, state.shape)
        graph.output(state.output_name, state.dtype, state.shape)
    return graph


def encode(encoder: EncoderWeights, maybe_data: DataFile | None = None) -> GraphBuilder:
    """The samples of a whole recording -> its codes. A last frame that is not full is filled up with silence."""
    codec = encoder.format
    graph = GraphBuilder("encode", maybe_data)
    waveform = graph.input("waveform", np.float32, [1, codec.channels, "waveform_length"])
    lengths = graph.input("input_lengths", np.int32, [1])
    with graph.scope("frames"):
        length = graph.op("Gather", graph.op("Shape", waveform), graph.constant([2]), axis=0)
        missing = graph.op("Mod", graph.op("Neg", length), graph.constant([codec.frame_samples]))
        pads = graph.op("Concat", graph.constant([0, 0, 0, 0, 0]), missing, axis=0)
        whole = graph.op("Pad", waveform, pads)
        x = graph.op("Reshape", graph.op("Transpose", whole, perm=[0, 2, 1]), graph.constant([1, -1, 1]))
    x = run_modules(graph, x, "encoder", encoder.modules, 1, WholeAttention)
    graph.op("Div", lengths, graph.constant([codec.frame_samples], np.int32), result="audio_code_lengths")
    with graph.scope("quantizer"):
        # 1 for each frame that `input_lengths` counts in, 0 for the others.
        count = blocks.count_along(graph, x, axis=1)
        frames = blocks.new_positions(graph, graph.constant([0], np.int32), count)
        as_float = graph.op("Cast", graph.op("Less", frames, "audio_code_lengths"), to=FLOAT)
        counted = graph.op("Unsqueeze", as_float, graph.constant([1]))
        codes = blocks.quantize(graph, x, counted, encoder.quantizer)
    graph.op("Identity", codes, result="audio_codes")
    graph.output("audio_codes", np.int32, [1, "code_length", codec.quantizers])
    graph.output("audio_code_lengths", np.int32, [1])
    return graph


def streaming_decode(maybe_decoder: DecoderWeights | None) -> dict[str, Any]:
    """The states of decode_step, as the metadata lists them: a counter a transformer, a cache a layer."""
    found = transformers(maybe_decoder.modules) if maybe_decoder else []
    layers = [(index, layer, module) for index, module in found for layer in range(len(module.layers))]
    return build_streaming(
        [build_counter(number, index) for number, (index, _) in enumerate(found)],
        [
            build_cache(number, index, layer, context=module.context, heads=module.heads, head_dim=module.head_dim)
            for number, (index, layer, module) in enumerate(layers)
        ],
    )


class WholeAttention:
    """Attention among all tokens of one transformer, the first at position 0."""

    def __init__(self, graph: GraphBuilder, x: str, index: int, module: TransformerWeights) -> None:
        self._module = module
        count = blocks.count_along(graph, x, axis=1)
        positions = blocks.new_positions(graph, graph.constant([0], np.int32), count)
        self._turn = blocks.rotation(graph, positions, module)
        self._visible = blocks.visibility(graph, positions, positions, module.context)

    def __call__(self, graph: GraphBuilder, x: str, name: str, layer: LayerWeights) -> str:
        heads = blocks.project_heads(graph, x, name, layer, self._module.heads, self._turn)
        return blocks.attend(graph, heads, self._visible, self._module.head_dim)


class _CachedAttention:
    """Attention of new tokens to a layer's cache and to each other. The cache then holds the last of both."""

    def __init__(self, module: TransformerWeights, count: str, caches: list[Cache]) -> None:
        self._module = module
        self._count = count
        self._caches = iter(caches)

    def __call__(self, graph: GraphBuilder, x: str, name: str, layer: LayerWeights) -> str:
        module, cache = self._module, next(self._caches)
        offset, old_keys, old_values, old_positions = (cache[f"{state}_input_name"] for state in STATES_OF_A_CACHE)
        new_positions = blocks.new_positions(graph, offset, self._count)
        turn = blocks.rotation(graph, new_positions, module)
        heads = blocks.project_heads(graph, x, name, layer, module.heads, turn)
        keys = graph.op("Concat", old_keys, heads.keys, axis=2)
        values = graph.op("Concat", old_values, heads.values, axis=2)
        new_row = graph.op("Unsqueeze", new_positions, graph.constant([0]))
        positions = graph.op("Concat", old_positions, new_row, axis=1)
        graph.op("Add", offset, self._count, result=cache["offset_output_name"])
        for kept, axis, state in (
            (keys, 2, "cached_keys"),
            (values, 2, "cached_values"),
            (positions, 1, "cached_positions"),
        ):
            start, end = graph.constant([-module.context]), graph.constant([np.iinfo(np.int64).max])
            result = cache[f"{state}_output_name"]
            graph.op("Slice", kept, start, end, graph.constant([axis]), result=result)
        key_positions = graph.op("Squeeze", positions, graph.constant([0]))
        visible = blocks.visibility(graph, new_positions, key_positions, module.context)
        return blocks.attend(graph, Heads(heads.queries, keys, values), visible, module.head_dim)


def _decode(graph: GraphBuilder, decoder: DecoderWeights, attention_of: AttentionOf) -> None:
    """audio_codes -> audio and audio_lengths."""
    codec = decoder.format
    graph.input("audio_codes", np.int32, [1, "code_length", codec.quantizers])
    graph.input("audio_code_lengths", np.int32, [1])
    with graph.scope("quantizer"):
        x = blocks.dequantize(graph, "audio_codes", decoder.dequantizer)
    x = run_modules(graph, x, "decoder", decoder.modules, decoder.dequantizer.output_proj_w.shape[0], attention_of)
    samples = graph.op("Reshape", x, graph.constant([1, -1, codec.channels]))
    graph.op("Transpose", samples, perm=[0, 2, 1], result="audio")
    frame_samples = graph.constant([codec.frame_samples], np.int32)
    graph.op("Mul", "audio_code_lengths", frame_samples, result="audio_lengths")
    graph.output("audio", np.float32, [1, codec.channels, "audio_length"])
    graph.output("audio_lengths", np.int32, [1])


def run_modules(
    graph: GraphBuilder, x: str, side: str, modules: tuple[Module, ...], features: int, attention_of: AttentionOf
) -> str:
    """All modules of a decoder or an encoder, one after the other."""
    for index, module in enumerate(modules):
        name = f"{side}.{index}"
        with graph.scope(name):
            if isinstance(module, TransformerWeights):
                attention = attention_of(graph, x, index, module)
                if module.maybe_input_proj is not None:
                    x = blocks.linear(graph, x, f"{name}.input_proj.weight", module.maybe_input_proj)
                for number, layer in enumerate(module.layers):
                    with graph.scope(f"layers.{number}"):
                        x = _layer(graph, x, f"{name}.transformer.layers.{number}", layer, attention)
                if module.maybe_output_proj is not None:
                    x = blocks.linear(graph, x, f"{name}.output_proj.weight", module.maybe_output_proj)
                features = module.outputs
            elif side == "decoder":
                x = blocks.patch_up(graph, x, module, features)
                features //= module.patch
            else:
                x = blocks.patch_down(graph, x, module, features)
                features *= module.patch
    return x


def _layer(graph: GraphBuilder, x: str, name: str, layer: LayerWeights, attention: Attention) -> str:
    with graph.scope("attention"):
        normed = blocks.norm(graph, x, f"{name}.norm1", layer.norm1_w, layer.norm1_b)
        seen = attention(graph, normed, name, layer)
        change = blocks.linear(graph, seen, f"{name}.self_attn.out_proj.weight", layer.out_proj)
        x = blocks.add_scaled(graph, x, change, f"{name}.layer_scale_1", layer.scale1)
    with graph.scope("ffn"):
        normed = blocks.norm(graph, x, f"{name}.norm2", layer.norm2_w, layer.norm2_b)
        change = blocks.feed_forward(graph, normed, name, layer)
        return blocks.add_scaled(graph, x, change, f"{name}.layer_scale_2", layer.scale2)
