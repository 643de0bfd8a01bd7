"""The explicit table from every official Flax parameter to ours.

Source: google-research/maskgit, nets/vqgan_tokenizer.py and nets/maskgit_transformer.py (Flax numbers the
submodules of a class in the order in which they are first called).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from maskgit.networks.config import TokenizerConfig, TransformerConfig


class Layout(NamedTuple):
    """How one kind of official array becomes a tensor and back."""

    to_torch: Callable[[np.ndarray], np.ndarray]
    to_flax: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


PLAIN = Layout(lambda a: a, lambda a, shape: a)
VECTOR = Layout(lambda a: a.reshape(-1), lambda a, shape: a.reshape(shape))
CONV = Layout(lambda a: a.transpose(3, 2, 0, 1), lambda a, shape: a.transpose(2, 3, 1, 0))
# Dense kernels are (in, out); a head's are (in, heads, size) going in and (heads, size, out) coming out.
DENSE = Layout(lambda a: a.T, lambda a, shape: a.T)
HEADS_IN = Layout(lambda a: a.reshape(a.shape[0], -1).T, lambda a, shape: a.T.reshape(shape))
HEADS_OUT = Layout(lambda a: a.reshape(-1, a.shape[-1]).T, lambda a, shape: a.T.reshape(shape))


class Row(NamedTuple):
    """One row of the table.

    Attributes:
        path: the official parameter, such as "params/encoder/Conv_0/kernel".
        shape: its official shape.
        name: our parameter.
        layout: how one becomes the other.
        part: for the fused query, key and value, which third of our parameter it is.
    """

    path: str
    shape: tuple[int, ...]
    name: str
    layout: Layout
    part: int | None = None


FLAX_NORMS = {"GN": "GroupNorm", "LN": "LayerNorm", "BN": "BatchNorm"}


def tokenizer_table(config: TokenizerConfig) -> list[Row]:
    """Return a row for every parameter of an official tokenizer."""
    table = [
        Row(
            "params/quantizer/codebook",
            (config.codebook_size, config.embedding_dim),
            "quantizer.codebook",
            PLAIN,
        )
    ]
    for half in ("encoder", "decoder"):
        table += _half_rows(half, config)
    return table


def _half_rows(half: str, config: TokenizerConfig) -> Iterator[Row]:
    widths = [config.filters * m for m in config.channel_multipliers]
    if half == "encoder":
        first = (3, config.filters, 3, False)
        levels = widths
        strided = [(w, w, 4, True) for w in widths[:-1]] if config.conv_downsample else []
        last = (widths[-1], config.embedding_dim, 1, True)
        # As many blocks again stand after the levels, before them in the decoder.
        block_widths = [w for w in [*levels, levels[-1]] for _ in range(config.num_res_blocks)]
        channels = config.filters
    else:
        levels = widths[::-1]
        first = (config.embedding_dim, levels[0], 3, True)
        strided = [(w, w, 3, True) for w in levels[:-1]]
        last = (levels[-1], 3, 3, True)
        block_widths = [w for w in [levels[0], *levels] for _ in range(config.num_res_blocks)]
        channels = levels[0]
    resample = "downs" if half == "encoder" else "ups"
    names = ["conv_in", *(f"{resample}.{i}" for i in range(len(strided))), "conv_out"]
    for i, (name, conv) in enumerate(zip(names, [first, *strided, last], strict=True)):
        yield from _conv_rows(f"{half}/Conv_{i}", f"{half}.{name}", *conv)
    for i, width in enumerate(block_widths):
        yield from _block_rows(f"{half}/ResBlock_{i}", f"{half}.blocks.{i}", channels, width, config.norm)
        channels = width
    yield from _norm_rows(f"{half}/{FLAX_NORMS[config.norm]}_0", f"{half}.norm_out", channels, config.norm)


def _conv_rows(path: str, name: str, inputs: int, outputs: int, size: int, bias: bool) -> Iterator[Row]:
    yield Row(f"params/{path}/kernel", (size, size, inputs, outputs), f"{name}.weight", CONV)
    if bias:
        yield Row(f"params/{path}/bias", (outputs,), f"{name}.bias", PLAIN)


def _block_rows(path: str, name: str, inputs: int, width: int, norm: str) -> Iterator[Row]:
    yield from _norm_rows(f"{path}/{FLAX_NORMS[norm]}_0", f"{name}.norm1", inputs, norm)
    yield from _conv_rows(f"{path}/Conv_0", f"{name}.conv1", inputs, width, 3, False)
    yield from _norm_rows(f"{path}/{FLAX_NORMS[norm]}_1", f"{name}.norm2", width, norm)
    yield from _conv_rows(f"{path}/Conv_1", f"{name}.conv2", width, width, 3, False)
    if inputs != width:
        yield from _conv_rows(f"{path}/Conv_2", f"{name}.shortcut", width, width, 1, False)


def _norm_rows(path: str, name: str, channels: int, norm: str) -> Iterator[Row]:
    yield Row(f"params/{path}/scale", (channels,), f"{name}.weight", PLAIN)
    yield Row(f"params/{path}/bias", (channels,), f"{name}.bias", PLAIN)
    if norm == "BN":
        yield Row(f"batch_stats/{path}/mean", (channels,), f"{name}.running_mean", PLAIN)
        yield Row(f"batch_stats/{path}/var", (channels,), f"{name}.running_var", PLAIN)


def transformer_table(config: TransformerConfig) -> list[Row]:
    """Return a row for every parameter of an official transformer."""
    size, vocab, mlp = config.hidden_size, config.vocab_size, config.intermediate_size
    heads = (config.num_heads, size // config.num_heads)

    def norm(path: str, name: str) -> list[Row]:
        return [
            Row(f"params/{path}/scale", (size,), f"{name}.weight", PLAIN),
            Row(f"params/{path}/bias", (size,), f"{name}.bias", PLAIN),
        ]

    def dense(path: str, name: str, inputs: int, outputs: int) -> list[Row]:
        return [
            Row(f"params/{path}/kernel", (inputs, outputs), f"{name}.weight", DENSE),
            Row(f"params/{path}/bias", (outputs,), f"{name}.bias", PLAIN),
        ]

    table = [
        Row("params/Embed_0/word_embeddings/embedding", (vocab, size), "token_embedding.weight", PLAIN),
        Row(
            "params/Embed_0/position_embeddings/embedding",
            (config.num_tokens + 1, size),
            "position_embedding.weight",
            PLAIN,
        ),
        *norm("Embed_0/embeddings_ln", "embedding_norm"),
        *dense("MlmLayer_0/mlm_dense", "head.dense", size, size),
        *norm("MlmLayer_0/mlm_ln", "head.norm"),
        Row("params/MlmLayer_0/mlm_bias/bias", (vocab,), "head.bias", PLAIN),
    ]
    for i in range(config.num_layers):
        path, name = f"TransformerLayer_{i}", f"layers.{i}"
        attention = f"{path}/Attention_0/self_attention"
        for part, kind in enumerate(("query", "key", "value")):
            qkv = f"{name}.attention.qkv"
            table.append(
                Row(f"params/{attention}/{kind}/kernel", (size, *heads), f"{qkv}.weight", HEADS_IN, part)
            )
            table.append(Row(f"params/{attention}/{kind}/bias", heads, f"{qkv}.bias", VECTOR, part))
        table += [
            Row(f"params/{attention}/out/kernel", (*heads, size), f"{name}.attention.out.weight", HEADS_OUT),
            Row(f"params/{attention}/out/bias", (size,), f"{name}.attention.out.bias", PLAIN),
            *norm(f"{path}/Attention_0/attention_output_ln", f"{name}.attention.norm"),
            *dense(f"{path}/Mlp_0/intermediate_output", f"{name}.mlp.up", size, mlp),
            *dense(f"{path}/Mlp_0/layer_output", f"{name}.mlp.down", mlp, size),
            *norm(f"{path}/Mlp_0/layer_output_ln", f"{name}.mlp.norm"),
        ]
    return table
