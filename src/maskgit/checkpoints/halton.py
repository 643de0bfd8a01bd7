"""Halton-MaskGIT's transformers and LlamaGen's tokenizers, as their authors publish them.

Sources: valeoai/Halton-MaskGIT, Network/transformer.py and Network/vq_model.py (commit f61b0a1);
FoundationVision/LlamaGen, tokenizer/tokenizer_image/vq_model.py.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from maskgit.checkpoints.torch_files import Source
from maskgit.errors import CheckpointError
from maskgit.networks.config import TokenizerConfig, TransformerConfig

# Of the published sizes, by width; the head count leaves no trace in shapes.
HEADS = {384: 6, 512: 6, 768: 12, 1024: 16, 1152: 16}


def transformer_of_halton(
    state: Mapping[str, Tensor], *, num_heads: int | None = None
) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """Return a Halton-MaskGIT transformer's config, and its weights by the names that `Transformer` gives them.

    Args:
        state: the published weights by name.
        num_heads: attention heads; None is those of the published model of this width.

    Raises:
        CheckpointError: something is missing, left over, or of a shape that does not fit.
    """
    source = Source(state, "Halton-MaskGIT")
    vocabulary, width = source.shape("tok_emb.weight")
    grid = round(source.shape("pos_emb.weight")[0] ** 0.5)
    if num_heads is None and width not in HEADS:
        raise CheckpointError(
            f"No published Halton-MaskGIT is {width} wide: say how many heads this one has."
        )
    config = TransformerConfig(
        num_codes=vocabulary - 1,
        num_classes=source.shape("cls_emb.weight")[0] - 1,
        grid_size=grid,
        hidden_size=width,
        num_layers=source.count("transformer.layers.{}."),
        num_heads=num_heads or HEADS[width],
        intermediate_size=source.shape("transformer.layers.0.ff.w1.weight")[0],
        dropout=0.0,
        block="modern",
        conditioning="adaln",
        class_embedding="own",
        query_key_norm="width",
        registers=source.shape("reg_tokens.weight")[0] if "reg_tokens.weight" in source else 0,
        predict_mask=True,
    )
    made = {
        "token_embedding.weight": source.take("tok_emb.weight"),
        "class_embedding.weight": source.take("cls_emb.weight"),
        "position_embedding.weight": source.take("pos_emb.weight"),
        "head.bias": source.take("head.bias"),
    }
    source.drop("head.weight")  # The token embedding once more.
    if config.registers:
        made["register_embedding.weight"] = source.take("reg_tokens.weight")
    for number in range(config.num_layers):
        theirs, ours = f"transformer.layers.{number}", f"layers.{number}"
        made |= {
            f"{ours}.modulation.weight": source.take(f"{theirs}.mlp.1.weight"),
            f"{ours}.modulation.bias": source.take(f"{theirs}.mlp.1.bias"),
            f"{ours}.attention_norm.weight": source.take(f"{theirs}.ln1.weight"),
            f"{ours}.attention.qkv.weight": torch.cat(
                [source.take(f"{theirs}.attn.w{p}.weight") for p in "qkv"]
            ),
            f"{ours}.attention.out.weight": source.take(f"{theirs}.attn.wo.weight"),
            f"{ours}.mlp_norm.weight": source.take(f"{theirs}.ln2.weight"),
            f"{ours}.mlp.gate_up.weight": torch.cat([source.take(f"{theirs}.ff.w{p}.weight") for p in "13"]),
            f"{ours}.mlp.down.weight": source.take(f"{theirs}.ff.w2.weight"),
        }
    # Their last norm adds a bias b before it is scaled by 1 + s and shifted; b·(1 + s) is part of the shift.
    weight, bias = source.take("last_norm.mlp.1.weight"), source.take("last_norm.mlp.1.bias")
    added = source.take("last_norm.norm_final.bias")
    shift, scale = weight.chunk(2)
    shift_bias, scale_bias = bias.chunk(2)
    made |= {
        "head.norm.weight": source.take("last_norm.norm_final.weight"),
        "head.modulation.weight": torch.cat([shift + added[:, None] * scale, scale]),
        "head.modulation.bias": torch.cat([shift_bias + added * (1 + scale_bias), scale_bias]),
    }
    source.finish()
    return config, made


def tokenizer_of_llamagen(state: Mapping[str, Tensor]) -> tuple[TokenizerConfig, dict[str, Tensor]]:
    """Return a LlamaGen tokenizer's config, and its weights by the names that `Tokenizer` gives them.

    Raises:
        CheckpointError: something is missing or left over.
    """
    source = Source(state, "LlamaGen's tokenizer")
    filters = source.shape("encoder.conv_in.weight")[0]
    levels = source.count("encoder.conv_blocks.{}.")
    widths = [source.shape(f"encoder.conv_blocks.{level}.res.0.conv2.weight")[0] for level in range(levels)]
    codes, dim = source.shape("quantize.embedding.weight")
    config = TokenizerConfig(
        filters=filters,
        num_res_blocks=source.count("encoder.conv_blocks.0.res.{}."),
        channel_multipliers=tuple(width // filters for width in widths),
        embedding_dim=dim,
        codebook_size=codes,
        conv_downsample=True,
        normalize_codes=True,
        downsample_kernel=3,
        block="taming",
        attention=True,
        decoder_res_blocks=source.count("decoder.conv_blocks.0.res.{}."),
        latent_channels=source.shape("quant_conv.weight")[1],
        symmetric_pixels=True,
    )
    made = {"quantizer.codebook": source.take("quantize.embedding.weight")}
    source.drop("quantize.codebook_used")
    for ours, theirs in {"encoder.projection": "quant_conv", "decoder.projection": "post_quant_conv"}.items():
        made |= {f"{ours}.{part}": value for part, value in source.norm(theirs).items()}
    for part in ("encoder", "decoder"):
        made |= _network(source, part, config)
    source.finish()
    return config, made


def _network(source: Source, part: str, config: TokenizerConfig) -> dict[str, Tensor]:
    """Return the encoder's or decoder's weights."""
    made: dict[str, Tensor] = {}

    def move(theirs: str, ours: str) -> None:
        made.update(
            {f"{part}.{ours}.{name}": value for name, value in source.norm(f"{part}.{theirs}").items()}
        )

    def block(theirs: str, number: int) -> None:
        for name in ("norm1", "conv1", "norm2", "conv2"):
            move(f"{theirs}.{name}", f"blocks.{number}.{name}")
        if f"{part}.{theirs}.nin_shortcut.weight" in source:
            move(f"{theirs}.nin_shortcut", f"blocks.{number}.shortcut")

    def attention(theirs: str, number: int) -> None:
        move(f"{theirs}.norm", f"attentions.{number}.norm")
        move(f"{theirs}.proj_out", f"attentions.{number}.out")
        layers = [source.norm(f"{part}.{theirs}.{name}") for name in "qkv"]
        for name in ("weight", "bias"):
            made[f"{part}.attentions.{number}.qkv.{name}"] = torch.cat([layer[name] for layer in layers])

    levels = len(config.channel_multipliers)
    decodes = part == "decoder"
    each = config.decoder_res_blocks if decodes else config.num_res_blocks
    for name in ("conv_in", "norm_out", "conv_out"):
        move(name, name)
    first = 2 if decodes else 0  # The decoder begins with the middle, and the encoder ends with it.
    coarsest = 0 if decodes else levels - 1
    for level in range(levels):
        for number in range(each):
            block(f"conv_blocks.{level}.res.{number}", first + level * each + number)
            if level == coarsest:
                attention(f"conv_blocks.{level}.attn.{number}", first + level * each + number)
        if level < levels - 1:
            where = "upsample" if decodes else "downsample"
            move(f"conv_blocks.{level}.{where}.conv", f"{'ups' if decodes else 'downs'}.{level}")
    middle = 0 if decodes else levels * each
    block("mid.0", middle)
    attention("mid.1", middle)
    block("mid.2", middle + 1)
    return made
