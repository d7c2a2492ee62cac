"""Reads Mimi's weights from a safetensors file, in Kyutai's layout or in Hugging Face's, and writes Kyutai's.

Rules of this room:

- The layout is recognised by the names of the tensors. A config beside the file, in either dialect, gives the numbers
  of the network; the file that Kyutai publishes has none, and then the numbers are those of the published network.
- A value of a config that decides how the network works and is unknown here is a BundleError that names it. All other
  keys only matter in training.
- Every tensor that the numbers call for must be there and no other (see tensors.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mossnano_stdio.build.convolutions import Conv, TransposedConv
from mossnano_stdio.build.mimi_model import RESAMPLED_BY, CodebookChain, ConvModule, MimiWeights, Residual
from mossnano_stdio.build.model import Array, LayerWeights, TransformerWeights
from mossnano_stdio.build.tensors import RenamedTensors, maybe_marked_file, replaced
from mossnano_stdio.errors import BundleError
from mossnano_stdio.tokens import CodecFormat
from mossnano_stdio.weights.checked_json import Entry, load_json

KYUTAI_MARK = "quantizer.rvq_first.input_proj.weight"  # a tensor that only this layout has
HUGGING_FACE_MARK = "quantizer.semantic_residual_vector_quantizer.input_proj.weight"
CONFIG_NAMES = ("mimi_config.json", "config.json")  # beside the file; the first is found first
KYUTAI_FILES = ("tokenizer-*.safetensors", "mimi-*.safetensors", "model.safetensors")

LEAST_USAGE = 1e-5  # by which a codebook's sums are divided where a row was never used


@dataclass(frozen=True)
class MimiNumbers:
    """What the tensors do not say of themselves, and what they must agree with. The defaults are the published ones."""

    sample_rate: int = 24_000
    features: int = 512
    filters: int = 64
    ratios: tuple[int, ...] = (8, 6, 5, 4)  # of the decoder, in its order
    kernel: int = 7
    residual_kernel: int = 3
    last_kernel: int = 3
    compress: int = 2
    layers: int = 8
    heads: int = 8
    hidden: int = 2_048
    context: int = 250  # tokens
    max_period: float = 10_000.0
    rvq: int = 256
    quantizers: int = 32
    semantic: int = 1
    codebook_size: int = 2_048

    @property
    def format(self) -> CodecFormat:
        frame_samples = int(np.prod(self.ratios)) * RESAMPLED_BY
        return CodecFormat(self.sample_rate, 1, frame_samples, self.quantizers, self.codebook_size)


PUBLISHED_NUMBERS = MimiNumbers()


def maybe_mimi_file(checkpoint: Path) -> Path | None:
    """The file with Mimi's tensors that `checkpoint`, a file or a folder, stands for; None where it holds none."""
    return maybe_marked_file(checkpoint, KYUTAI_FILES, (KYUTAI_MARK, HUGGING_FACE_MARK), several="Mimis")


def load_mimi(path: Path) -> MimiWeights:
    tensors = _KyutaiTensors(path)
    weights = _weights(tensors, _numbers_beside(path))
    tensors.refuse_leftovers()
    return weights


# --- configs -----------------------------------------------------------------------------------------------------


def _numbers_beside(path: Path) -> MimiNumbers:
    for config_path in (path.with_name(name) for name in CONFIG_NAMES):
        if config_path.exists():
            config, _ = load_json(config_path)
            if "seanet" in config.object():
                return _kyutai_numbers(config)
            if config.text_at("model_type", default="") == "mimi":
                return _hugging_face_numbers(config)
    return PUBLISHED_NUMBERS  # a config.json of something else: language models come with this file beside them


def _kyutai_numbers(config: Entry) -> MimiNumbers:
    seanet, quantizer, transformer = (config.at(key) for key in ("seanet", "quantizer", "transformer"))
    _demand(config, channels=1)
    _demand(seanet, channels=1, causal=True, activation="ELU", n_residual_layers=1, norm="none", pad_mode="constant")
    _demand(seanet, true_skip=True)
    _demand(transformer, causal=True, gating="none", norm="layer_norm", positional_embedding="rope")
    features = seanet.at("dimension").whole(least=1)
    for entry, keys in ((quantizer, ("input_dimension", "output_dimension")), (transformer, ("d_model",))):
        _demand(entry, **dict.fromkeys(keys, features))
    numbers = MimiNumbers(
        sample_rate=config.at("sample_rate").whole(least=1),
        features=features,
        filters=seanet.at("n_filters").whole(least=1),
        ratios=seanet.at("ratios").shape(),
        kernel=seanet.at("kernel_size").whole(least=1),
        residual_kernel=seanet.at("residual_kernel_size").whole(least=1),
        last_kernel=seanet.at("last_kernel_size").whole(least=1),
        compress=seanet.at("compress").whole(least=1),
        layers=transformer.at("num_layers").whole(least=1),
        heads=transformer.at("num_heads").whole(least=1),
        hidden=transformer.at("dim_feedforward").whole(least=1),
        context=transformer.at("context").whole(least=1),
        max_period=float(transformer.at("max_period").whole(least=2)),
        rvq=quantizer.at("dimension").whole(least=1),
        quantizers=quantizer.at("n_q").whole(least=2),
        codebook_size=quantizer.at("bins").whole(2, 65_536),
    )
    return _checked(numbers, config)


def kyutai_config(numbers: MimiNumbers) -> dict[str, Any]:
    """What `_kyutai_numbers` reads."""
    return {
        "sample_rate": numbers.sample_rate,
        "channels": 1,
        "frame_rate": numbers.format.frames_per_second,
        "seanet": {
            "channels": 1,
            "causal": True,
            "activation": "ELU",
            "n_residual_layers": 1,
            "norm": "none",
            "pad_mode": "constant",
            "true_skip": True,
            "dimension": numbers.features,
            "n_filters": numbers.filters,
            "ratios": list(numbers.ratios),
            "kernel_size": numbers.kernel,
            "residual_kernel_size": numbers.residual_kernel,
            "last_kernel_size": numbers.last_kernel,
            "compress": numbers.compress,
        },
        "quantizer": {
            "dimension": numbers.rvq,
            "n_q": numbers.quantizers,
            "bins": numbers.codebook_size,
            "input_dimension": numbers.features,
            "output_dimension": numbers.features,
        },
        "transformer": {
            "causal": True,
            "gating": "none",
            "norm": "layer_norm",
            "positional_embedding": "rope",
            "d_model": numbers.features,
            "num_heads": numbers.heads,
            "num_layers": numbers.layers,
            "context": numbers.context,
            "max_period": round(numbers.max_period),
            "dim_feedforward": numbers.hidden,
        },
    }


def _hugging_face_numbers(config: Entry) -> MimiNumbers:
    features, heads = config.at("hidden_size").whole(least=1), config.at("num_attention_heads").whole(least=1)
    _demand(config, audio_channels=1, use_causal_conv=True, num_residual_layers=1, pad_mode="constant")
    _demand(config, use_conv_shortcut=False, hidden_act="gelu", num_key_value_heads=heads, upsample_groups=features)
    rope = config.maybe_at("rope_theta") or config.at("rope_parameters").at("rope_theta")  # where newer programs put it
    numbers = MimiNumbers(
        sample_rate=config.at("sampling_rate").whole(least=1),
        features=features,
        filters=config.at("num_filters").whole(least=1),
        ratios=config.at("upsampling_ratios").shape(),
        kernel=config.at("kernel_size").whole(least=1),
        residual_kernel=config.at("residual_kernel_size").whole(least=1),
        last_kernel=config.at("last_kernel_size").whole(least=1),
        compress=config.at("compress").whole(least=1),
        layers=config.at("num_hidden_layers").whole(least=1),
        heads=heads,
        hidden=config.at("intermediate_size").whole(least=1),
        context=config.at("sliding_window").whole(least=1),
        max_period=_positive(rope),
        rvq=config.at("vector_quantization_hidden_dimension").whole(least=1),
        quantizers=config.at("num_quantizers").whole(least=2),
        semantic=config.at("num_semantic_quantizers").whole(least=1),
        codebook_size=config.at("codebook_size").whole(2, 65_536),
    )
    return _checked(numbers, config)


def _demand(entry: Entry, **needed: object) -> None:
    """The only values that graphs can be built for."""
    for key, value in needed.items():
        if (found := entry.at(key)).value != value:
            raise found.wrong(json.dumps(value))


def _positive(entry: Entry) -> float:
    if isinstance(entry.value, bool) or not isinstance(entry.value, int | float) or not 0 < entry.value < float("inf"):
        raise entry.wrong("a number above 0")
    return float(entry.value)


def _checked(numbers: MimiNumbers, config: Entry) -> MimiNumbers:
    if numbers.features % (2 * numbers.heads):
        raise BundleError(f"{config.where}: {numbers.features} features over {numbers.heads} heads give no even size")
    if numbers.semantic >= numbers.quantizers:
        raise BundleError(f"{config.where}: {numbers.semantic} of {numbers.quantizers} codebooks cannot be semantic")
    frames_per_second = config.maybe_at("frame_rate")
    if frames_per_second and _positive(frames_per_second) != numbers.format.frames_per_second:
        # The transformers run at twice the rate of the codes. Whatever else a rate means was never published.
        raise frames_per_second.wrong(f"{numbers.format.frames_per_second:g}, as the strides and the sample rate say")
    return numbers


# --- layouts -----------------------------------------------------------------------------------------------------

HUGGING_FACE_NAMES = (  # Kyutai's, as a pattern -> theirs; all that fit are replaced, in this order
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"(\.conv(tr)?)+\.", ".conv."),
    (r"_transformer\.transformer\.", "_transformer."),
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
    (r"\.norm1\.", ".input_layernorm."),
    (r"\.norm2\.", ".post_attention_layernorm."),
    (r"\.linear([12])\.", r".mlp.fc\1."),
    (r"\.layer_scale_1\.", ".self_attn_layer_scale."),
    (r"\.layer_scale_2\.", ".mlp_layer_scale."),
    (r"\.rvq_first\.", ".semantic_residual_vector_quantizer."),
    (r"\.rvq_rest\.", ".acoustic_residual_vector_quantizer."),
    (r"\.vq\.layers\.", ".layers."),
    (r"\._codebook\.", ".codebook."),
    (r"\.embedding_sum$", ".embed_sum"),
    (r"\._initialized$", ".initialized"),
)


def hugging_face_name(name: str) -> str:
    """What a tensor is called there.

    >>> hugging_face_name("decoder.model.3.block.1.conv.conv.weight")
    'decoder.layers.3.block.1.conv.weight'
    """
    return replaced(name, HUGGING_FACE_NAMES)


class _KyutaiTensors(RenamedTensors):
    """Tensors by Kyutai's names, whatever the file calls them."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "Mimi", KYUTAI_MARK, hugging_face_name)

    def in_proj(self, prefix: str, model: int, heads: int) -> Array:
        """The rows of q, k and v. The pairs that RoPE turns lie side by side."""
        if not self.is_renamed:
            return self.take(f"{prefix}.in_proj_weight", 3 * model, model)
        queries, keys, values = (self.take(f"{prefix}.{part}_proj.weight", model, model) for part in "qkv")
        # There the halves of a head are turned against each other: row (p, j) of a head was (j, p) in training.
        together = [rows.reshape(heads, 2, -1, model).swapaxes(1, 2).reshape(model, model) for rows in (queries, keys)]
        return np.concatenate([*together, values])


# --- weights -----------------------------------------------------------------------------------------------------


def _weights(tensors: _KyutaiTensors, numbers: MimiNumbers) -> MimiWeights:
    features = numbers.features
    return MimiWeights(
        format=numbers.format,
        encoder=tuple(_encoder(tensors, numbers)),
        encoder_transformer=_transformer("encoder_transformer", tensors, numbers),
        downsample=tensors.take("downsample.conv.conv.conv.weight", features, features, 2 * RESAMPLED_BY),
        semantic=_chain("quantizer.rvq_first", numbers.semantic, tensors, numbers),
        acoustic=_chain("quantizer.rvq_rest", numbers.quantizers - numbers.semantic, tensors, numbers),
        upsample=tensors.take("upsample.convtr.convtr.convtr.weight", features, 1, 2 * RESAMPLED_BY),
        decoder_transformer=_transformer("decoder_transformer", tensors, numbers),
        decoder=tuple(_decoder(tensors, numbers)),
    )


def _encoder(tensors: _KyutaiTensors, numbers: MimiNumbers) -> Iterator[ConvModule]:
    """Modules with weights only: an ELU takes a place in the file's numbering, too."""
    channels = numbers.filters
    yield _conv(tensors, "encoder.model.0", (channels, 1, numbers.kernel))
    place = 1
    for stride in reversed(numbers.ratios):
        yield _residual(tensors, f"encoder.model.{place}", channels, numbers)
        yield _conv(tensors, f"encoder.model.{place + 2}", (2 * channels, channels, 2 * stride), stride)
        channels, place = 2 * channels, place + 3
    yield _conv(tensors, f"encoder.model.{place + 1}", (numbers.features, channels, numbers.last_kernel))


def _decoder(tensors: _KyutaiTensors, numbers: MimiNumbers) -> Iterator[ConvModule]:
    channels = numbers.filters << len(numbers.ratios)
    yield _conv(tensors, "decoder.model.0", (channels, numbers.features, numbers.kernel))
    place = 1
    for stride in numbers.ratios:
        prefix = f"decoder.model.{place + 1}.convtr.convtr"
        weight = tensors.take(f"{prefix}.weight", channels, channels // 2, 2 * stride)
        yield TransposedConv(weight, tensors.take(f"{prefix}.bias", channels // 2))
        channels //= 2
        yield _residual(tensors, f"decoder.model.{place + 2}", channels, numbers)
        place += 3
    yield _conv(tensors, f"decoder.model.{place + 1}", (1, channels, numbers.last_kernel))


def _residual(tensors: _KyutaiTensors, prefix: str, channels: int, numbers: MimiNumbers) -> Residual:
    inner = channels // numbers.compress
    return Residual(
        _conv(tensors, f"{prefix}.block.1", (inner, channels, numbers.residual_kernel)),
        _conv(tensors, f"{prefix}.block.3", (channels, inner, 1)),
    )


def _conv(tensors: _KyutaiTensors, prefix: str, shape: tuple[int, int, int], stride: int = 1) -> Conv:
    weight = tensors.take(f"{prefix}.conv.conv.weight", *shape)
    return Conv(weight, tensors.take(f"{prefix}.conv.conv.bias", shape[0]), stride)


def _transformer(name: str, tensors: _KyutaiTensors, numbers: MimiNumbers) -> TransformerWeights:
    layers = range(numbers.layers)
    return TransformerWeights(
        maybe_input_proj=None,
        layers=tuple(_layer(f"{name}.transformer.layers.{layer}", tensors, numbers) for layer in layers),
        maybe_output_proj=None,
        model=numbers.features,
        heads=numbers.heads,
        context=numbers.context,
        tokens_per_frame=RESAMPLED_BY,
        max_period=numbers.max_period,
    )


def _layer(prefix: str, tensors: _KyutaiTensors, numbers: MimiNumbers) -> LayerWeights:
    model, hidden = numbers.features, numbers.hidden
    return LayerWeights(
        norm1_w=tensors.take(f"{prefix}.norm1.weight", model),
        norm1_b=tensors.take(f"{prefix}.norm1.bias", model),
        in_proj=tensors.in_proj(f"{prefix}.self_attn", model, numbers.heads),
        out_proj=tensors.take(f"{prefix}.self_attn.out_proj.weight", model, model),
        scale1=tensors.take(f"{prefix}.layer_scale_1.scale", model),
        norm2_w=tensors.take(f"{prefix}.norm2.weight", model),
        norm2_b=tensors.take(f"{prefix}.norm2.bias", model),
        ffn_up=tensors.take(f"{prefix}.linear1.weight", hidden, model),
        ffn_down=tensors.take(f"{prefix}.linear2.weight", model, hidden),
        scale2=tensors.take(f"{prefix}.layer_scale_2.scale", model),
    )


def _chain(prefix: str, quantizers: int, tensors: _KyutaiTensors, numbers: MimiNumbers) -> CodebookChain:
    input_proj = tensors.take(f"{prefix}.input_proj.weight", numbers.rvq, numbers.features, 1)[:, :, 0]
    output_proj = tensors.take(f"{prefix}.output_proj.weight", numbers.features, numbers.rvq, 1)[:, :, 0]
    codebooks = [_codebook(f"{prefix}.vq.layers.{index}._codebook", tensors, numbers) for index in range(quantizers)]
    return CodebookChain(input_proj, output_proj, np.stack(codebooks))


def _codebook(prefix: str, tensors: _KyutaiTensors, numbers: MimiNumbers) -> Array:
    """Training kept a sum of all vectors that chose a row, and their number: the row is what they are on average."""
    sums = tensors.take(f"{prefix}.embedding_sum", numbers.codebook_size, numbers.rvq)
    usage = tensors.take(f"{prefix}.cluster_usage", numbers.codebook_size)
    tensors.pass_over(f"{prefix}._initialized")
    return np.divide(sums, np.maximum(usage, np.float32(LEAST_USAGE))[:, np.newaxis], dtype=np.float32)
