"""Takes the weights out of a bundle in the official contract, whoever exported its graphs.

Rules of this room:

- A tensor is recognised by where it is used, not by its name: the matrix behind a layer's first norm is its in_proj.
  Each step back through a graph checks what it finds, so that the error names the node where a graph of another
  make departs.
- Sample rate, channels and samples per frame are taken from the metadata. All else is read from the graphs, and
  must agree with the metadata where that says it too.
- The arithmetic between the sites (masks, rotation, softmax) is not checked here: trial.py runs what was built from
  the weights beside the bundle's own decoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from mossnano_stdio.build.extract_transformer import extract_transformer
from mossnano_stdio.build.model import (
    Array,
    CodecWeights,
    DecoderWeights,
    DequantizerWeights,
    EncoderWeights,
    Module,
    PatchStep,
    QuantizerWeights,
    TransformerWeights,
    frame_values,
    transformers,
)
from mossnano_stdio.build.tracing import (
    Affine,
    Site,
    Sites,
    TracedGraph,
    affine,
    only,
    scalars,
    shaped,
)
from mossnano_stdio.errors import BundleError
from mossnano_stdio.tokens import CodecFormat
from mossnano_stdio.weights import Bundle


def extract_weights(bundle: Bundle) -> CodecWeights:
    """Read the weights out of a bundle's decode_step (or decode_full), and out of its encode where it has one."""
    name = "decode_step" if bundle.has_graph("decode_step") else "decode_full"
    decoder = _decoder(TracedGraph(bundle.graph(name).path), bundle)
    if not bundle.has_graph("encode"):
        return CodecWeights(decoder, None)
    encoder = _encoder(TracedGraph(bundle.graph("encode").path), decoder.format)
    if not np.array_equal(encoder.quantizer.codebooks, decoder.dequantizer.codebooks):
        raise BundleError(f"{bundle.folder}: encode and {name} hold different codebooks; they are of two models")
    return CodecWeights(decoder, encoder)


def _decoder(graph: TracedGraph, bundle: Bundle) -> DecoderWeights:
    found, sources = _transformers(graph, graph.sources("audio"))
    dequantizer = _dequantizer(graph, sources)
    modules: list[Module] = []
    features, tokens = dequantizer.output_proj_w.shape[0], 1
    for transformer in found:
        patch = _ratio(graph, features, transformer.inputs)
        tokens *= patch
        modules += [*_patch_steps(patch), replace(transformer, tokens_per_frame=tokens)]
        features = transformer.outputs
    modules += _patch_steps(features)
    quantizers, codebook_size, _ = dequantizer.codebooks.shape
    _agree(graph, "quantizers", quantizers, bundle.format.quantizers)
    _agree(graph, "rows of a codebook", codebook_size, bundle.format.codebook_size)
    _check_caches(graph, modules, bundle)
    return DecoderWeights(bundle.format, dequantizer, tuple(modules))


def _encoder(graph: TracedGraph, codec: CodecFormat) -> EncoderWeights:
    quantizer, sources = _quantizer(graph)
    found, sources = _transformers(graph, sources)
    if sources:
        raise graph.wrong(None, "something learned lies before the first transformer")
    modules: list[Module] = []
    features, tokens = 1, frame_values(codec)
    for transformer in found:
        patch = _ratio(graph, transformer.inputs, features)
        tokens = _ratio(graph, tokens, patch)
        modules += [*_patch_steps(patch), replace(transformer, tokens_per_frame=tokens)]
        features = transformer.outputs
    modules += _patch_steps(_ratio(graph, quantizer.input_proj_w.shape[1], features))
    return EncoderWeights(codec, tuple(modules), quantizer)


def _transformers(graph: TracedGraph, sources: Sites) -> tuple[list[TransformerWeights], Sites]:
    """Go back from `sources` through all transformers. Returns them first to last, and what flows into the first."""
    found: list[TransformerWeights] = []
    while sources and all(site.kind in ("MatMul", "Mul") for site in sources):
        transformer, sources = extract_transformer(graph, sources)
        found.insert(0, transformer)
    return found, sources


def _dequantizer(graph: TracedGraph, sources: Sites) -> DequantizerWeights:
    output_proj = affine(graph, None, sources)
    parts = [affine(graph, output_proj.site, [site]) for site in output_proj.sources]
    lookups = {part.site: only(graph, part.site, part.sources, "Gather") for part in parts}
    columns = {_column(graph, lookups[part.site]): part for part in parts}  # of the codes
    if sorted(columns) != list(range(len(parts))):
        raise graph.wrong(output_proj.site, f"{len(parts)} codebooks read the columns {sorted(columns)} of the codes")
    ordered = [columns[index] for index in range(len(parts))]
    rvq = output_proj.matrix.shape[1]
    codebooks = _stacked(graph, [(lookups[part.site], lookups[part.site].tensors[0]) for part in ordered])
    weights, biases = _stacked_projections(graph, ordered, rvq, codebooks.shape[2])
    return DequantizerWeights(codebooks, weights, biases, output_proj.matrix, output_proj.bias)


def _quantizer(graph: TracedGraph) -> tuple[QuantizerWeights, Sites]:
    """The quantizer, and what flows into it."""
    in_projs = [affine(graph, None, [site]) for site in graph.sources("audio_codes")]
    # Each codebook is searched for what all codebooks before it left, so one more part flows into each in_proj.
    in_projs.sort(key=lambda part: len(part.sources))
    if not in_projs:
        raise graph.wrong(None, "no learned place before audio_codes")
    input_proj = affine(graph, in_projs[0].site, in_projs[0].sources)
    out_projs: list[Affine] = []
    tables: list[tuple[Site, Array]] = []
    for part in in_projs:
        new = part.sources - {input_proj.site} - {known.site for known in out_projs}
        if tables:
            out_projs.append(affine(graph, part.site, new))
            lookup = only(graph, out_projs[-1].site, out_projs[-1].sources, "Gather")
            if graph.sources_of(lookup) != {tables[-1][0]} or not np.array_equal(lookup.tensors[0], tables[-1][1]):
                raise graph.wrong(lookup, "it must look up the code that the codebook before it gave")
        elif new:
            raise graph.wrong(part.site, "the first codebook must see input_proj only")
        tables.append((part.site, _searched_table(graph, part)))
    order = [frozenset([part.site]) for part in in_projs]
    joins = [node for node in graph.way_into("audio_codes") if node.op_type == "Concat"]
    if not any([graph.sources(name) for name in join.input] == order for join in joins):
        raise graph.wrong(None, "no Concat puts the codes together in the order of their codebooks")
    rvq = input_proj.matrix.shape[0]
    codebooks = _stacked(graph, tables)
    size = codebooks.shape[2]
    out_w, out_b = _stacked_projections(graph, out_projs, rvq, size)
    in_w, in_b = _stacked_projections(graph, in_projs, size, rvq)
    weights = QuantizerWeights(input_proj.matrix, input_proj.bias, codebooks, in_w, in_b, out_w, out_b)
    return weights, input_proj.sources


def _searched_table(graph: TracedGraph, in_proj: Affine) -> Array:
    """The codebook that is searched for the row nearest to in_proj's result, its rows not normalised."""
    searches = [node for node in graph.nodes("ArgMax") if graph.sources(node.output[0]) == {in_proj.site}]
    size = in_proj.matrix.shape[0]
    found: dict[int, Array] = {}
    for node in (node for search in searches for node in graph.way_into(search.output[0])):
        for name in node.input:
            constant = graph.maybe_constant(name)
            if constant is not None and constant.ndim == 2 and constant.shape[1] == size and len(constant) > 1:
                found[id(constant)] = constant
    if len(searches) != 1 or len(found) != 1:
        raise graph.wrong(
            in_proj.site, f"one search (ArgMax) in one codebook must follow, found {len(searches)} in {len(found)}"
        )
    return found.popitem()[1]


def _column(graph: TracedGraph, lookup: Site) -> int:
    """Which column of the codes a codebook is looked up with."""
    for node in graph.way_into(lookup.node.input[1]):
        if node.op_type == "Gather" and (indices := scalars(graph, node)):
            return int(indices[0])
    raise graph.wrong(lookup, "no Gather before it takes one column of the codes")


def _stacked(graph: TracedGraph, tables: Iterable[tuple[Site, Array]]) -> Array:
    """Stack tables, which must have one shape, as [tables, rows, columns]."""
    checked: list[Array] = []
    for site, table in tables:
        shape = checked[0].shape if checked else (None, None)
        checked.append(shaped(graph, site, table, *shape))
    return np.stack(checked)


def _stacked_projections(graph: TracedGraph, parts: Sequence[Affine], outputs: int, inputs: int) -> tuple[Array, Array]:
    weights = [shaped(graph, part.site, part.matrix, outputs, inputs) for part in parts]
    biases = [shaped(graph, part.site, part.bias, outputs) for part in parts]
    return np.reshape(weights, (-1, outputs, inputs)), np.reshape(biases, (-1, outputs))


def _ratio(graph: TracedGraph, larger: int, smaller: int) -> int:
    """The size of a patch, from the features before and after it."""
    if larger % smaller:
        raise graph.wrong(None, f"between modules {larger} features become {smaller}, which is no whole patch")
    return larger // smaller


def _patch_steps(patch: int) -> list[Module]:
    """A patch of one token changes nothing, and no checkpoint lists it."""
    return [PatchStep(patch)] if patch > 1 else []


def _check_caches(graph: TracedGraph, modules: Sequence[Module], bundle: Bundle) -> None:
    """Check that the metadata lists a cache for each layer found, with its context, heads and sizes."""
    layers = [(index, layer, module) for index, module in transformers(modules) for layer in range(len(module.layers))]
    found = [(index, layer, module.context) for index, layer, module in layers]
    said = [(cache.decoder_index, cache.layer_index, cache.context_tokens) for cache in bundle.caches]
    _agree(graph, "attention caches (module, layer, context)", found, said)
    shapes = [(1, module.heads, module.context, module.head_dim) for _, _, module in layers for _ in "kv"]
    states = [state.shape for state in bundle.graphs["decode_step"].states if len(state.shape) == 4]
    _agree(graph, "cached keys and values", shapes, states)


def _agree(graph: TracedGraph, what: str, found: object, said: object) -> None:
    if found != said:
        raise graph.wrong(None, f"its {what}: {found}; the metadata says {said}")
