"""MaskBit's generators and tokenizers, and Google's tokenizer as torch projects publish it.

Sources: markweberdev/maskbit, modeling/bert.py and modeling/conv_vqgan.py (commit 5ea3d73); for Google's tokenizer also
bytedance/1d-tokenizer, modeling/maskgit_vqgan.py (commit 942a96f), whose layout open-muse shares.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from maskgit.checkpoints.torch_files import Source
from maskgit.errors import CheckpointError
from maskgit.networks.config import TokenizerConfig, TransformerConfig


def transformer_of_maskbit(
    state: Mapping[str, Tensor], *, num_heads: int | None = None
) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """Return a MaskBit generator's config, and its weights by the names that `Transformer` gives them.

    Its bits enter through a linear layer; here each group has a row for every pattern of its bits, which is what the
    layer makes of them, so the function is the same. The class, which stands last there, stands first.

    Args:
        state: the published weights by name.
        num_heads: attention heads; None is the 16 of the published models.

    Raises:
        CheckpointError: something is missing or left over.
    """
    source = Source(state, "MaskBit's generator")
    # Published files name the input layer either way.
    bits_layer = next((name for name in ("input_proj", "token_emb") if f"{name}.weight" in source), None)
    if bits_layer:
        width, bits = source.shape(f"{bits_layer}.weight")
        outputs = source.shape("prediction_layer.weight")[0]
        groups = next((g for g in range(1, bits + 1) if bits % g == 0 and g * 2 ** (bits // g) == outputs), 0)
        if not groups:
            raise CheckpointError(f"{outputs} outputs are no whole number of groups of {bits} bits.")
        codes = 2**bits
    else:
        groups = source.count("tok_emb_list.{}.")
        rows, width = source.shape("tok_emb_list.0.weight")
        codes = (rows - 1) ** groups
    pre_norm = "norm_after_transformer.weight" in source
    config = TransformerConfig(
        num_codes=codes,
        num_classes=source.shape("class_emb.weight")[0] - 1,
        grid_size=round((source.shape("pos_emb")[1] - 1) ** 0.5),
        hidden_size=width,
        num_layers=source.count("transformer.layers.{}."),
        num_heads=num_heads or 16,
        intermediate_size=source.shape("transformer.layers.0.1.net.0.weight")[0],
        block="pre_norm" if pre_norm else "official",
        activation="gelu",
        class_embedding="own",
        groups=groups,
        tie_embeddings=not bits_layer,
        output_bias="codes" if bits_layer else "positions",
    )
    positions = source.take("pos_emb")[0]
    made = {
        "class_embedding.weight": source.take("class_emb.weight"),
        "position_embedding.weight": torch.cat([positions[-1:], positions[:-1]]),
    }
    if bits_layer:
        made["token_embedding.weight"] = _rows_of_bits(
            source.take(f"{bits_layer}.weight"), source.take(f"{bits_layer}.bias"), groups
        )
        made |= {f"head.{name}": value for name, value in source.norm("prediction_layer").items()}
    else:
        made["token_embedding.weight"] = torch.cat(
            [source.take(f"tok_emb_list.{group}.weight") for group in range(groups)]
        )
        biases = [source.take(f"bias.{group}") for group in range(groups)]
        made["head.bias"] = torch.stack(biases, dim=1).flatten()
    moved = {"first_layer.0": "embedding_norm", "last_layer.0": "head.dense", "last_layer.2": "head.norm"}
    if pre_norm:
        moved["norm_after_transformer"] = "final_norm"
    for number in range(config.num_layers):
        theirs, ours = f"transformer.layers.{number}", f"layers.{number}"
        made |= {
            f"{ours}.attention.qkv.{name}": source.take(f"{theirs}.0.mha.in_proj_{name}")
            for name in ("weight", "bias")
        }
        moved |= {
            f"{theirs}.0.mha.out_proj": f"{ours}.attention.out",
            f"{theirs}.0.norm": f"{ours}.attention.norm",
            f"{theirs}.1.net.0": f"{ours}.mlp.up",
            f"{theirs}.1.net.2": f"{ours}.mlp.down",
            f"{theirs}.1.norm": f"{ours}.mlp.norm",
        }
    for theirs, ours in moved.items():
        made |= {f"{ours}.{name}": value for name, value in source.norm(theirs).items()}
    source.drop("bits_to_indices")
    source.finish()
    return config, made


def _rows_of_bits(weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """Return an embedding row for each pattern of each group's bits, and one of zeros for its mask.

    Args:
        weight, bias: of the layer that reads bits as ±1, float (E, bits) and (E,).
        groups: g; bit i of group j is the layer's input j · bits / g + i.

    Returns:
        float32 (g · (2^(bits/g) + 1), E). The bias is part of the first group's rows: one of each group is read.
    """
    each = weight.shape[1] // groups
    numbers, places = (torch.arange(n, device=weight.device) for n in (2**each, each))
    signs = 2.0 * ((numbers[:, None] >> places) & 1) - 1
    tables = [torch.cat([signs @ part.T, bias.new_zeros(1, len(bias))]) for part in weight.split(each, dim=1)]
    tables[0] = tables[0] + bias
    return torch.cat(tables)


def tokenizer_of_torch(state: Mapping[str, Tensor]) -> tuple[TokenizerConfig, dict[str, Tensor]]:
    """Return the config and weights of MaskBit's or VQGAN+'s tokenizer, or of Google's in torch form.

    Google's comes in two layouts, whose decoders list their levels from the finest; MaskBit's own list them from the
    coarsest.

    Raises:
        CheckpointError: something is missing or left over.
    """
    source = Source(state, "MaskBit's or Google's tokenizer")
    blocks = "res_blocks" if "encoder.down.0.res_blocks.0.conv1.weight" in source else "block"
    filters = source.shape("encoder.conv_in.weight")[0]
    levels = source.count("encoder.down.{}.")
    widths = [source.shape(f"encoder.down.{level}.{blocks}.0.conv2.weight")[0] for level in range(levels)]
    looks_up = "quantize.embedding.weight" in source
    dim = source.shape("encoder.conv_out.weight")[0]
    convolves = "encoder.down.0.down_conv.weight" in source
    encoder_blocks = source.count(f"encoder.down.0.{blocks}.{{}}.")
    decoder_blocks = source.count(f"decoder.up.0.{blocks}.{{}}.")
    config = TokenizerConfig(
        filters=filters,
        num_res_blocks=encoder_blocks,
        channel_multipliers=tuple(width // filters for width in widths),
        embedding_dim=dim,
        codebook_size=source.shape("quantize.embedding.weight")[0] if looks_up else 2**dim,
        conv_downsample=convolves,
        downsample_kernel=3 if convolves else 4,
        quantizer="vq" if looks_up else "lfq",
        decoder_res_blocks=0 if decoder_blocks == encoder_blocks else decoder_blocks,
    )
    made = {"quantizer.codebook": source.take("quantize.embedding.weight")} if looks_up else {}
    source.drop("quantize.bits_to_indices", "quantize.codebook")
    # Where all levels are alike nothing else tells, but an up-sampling stands after every level but the finest.
    finest_first = "decoder.up.0.upsample_conv.weight" not in source
    for part in ("encoder", "decoder"):
        made |= _network(source, part, config, blocks, finest_first)
    source.finish()
    return config, made


def _network(
    source: Source, part: str, config: TokenizerConfig, blocks: str, finest_first: bool
) -> dict[str, Tensor]:
    """Return the encoder's or decoder's weights."""
    made: dict[str, Tensor] = {}
    levels = len(config.channel_multipliers)
    decodes = part == "decoder"
    each = (config.decoder_res_blocks if decodes else 0) or config.num_res_blocks
    middle_name = "mid.res_blocks" if blocks == "res_blocks" else "mid"

    def block(theirs: str, number: int) -> None:
        for name in ("norm1", "norm2"):
            for kind, value in source.norm(f"{part}.{theirs}.{name}").items():
                made[f"{part}.blocks.{number}.{name}.{kind}"] = value
        for name, ours in {"conv1": "conv1", "conv2": "conv2", "nin_shortcut": "shortcut"}.items():
            if name != "nin_shortcut" or f"{part}.{theirs}.{name}.weight" in source:
                made[f"{part}.blocks.{number}.{ours}.weight"] = source.take(f"{part}.{theirs}.{name}.weight")

    middle = source.count(f"{part}.{middle_name}.{{}}.")
    first = middle if decodes else 0
    for number in range(middle):
        block(f"{middle_name}.{number}", number if decodes else levels * each + number)
    for level in range(levels):
        theirs = f"up.{levels - 1 - level if finest_first else level}" if decodes else f"down.{level}"
        for number in range(each):
            block(f"{theirs}.{blocks}.{number}", first + level * each + number)
        if level < levels - 1 and (decodes or config.conv_downsample):
            layer = source.norm(f"{part}.{theirs}.{'upsample_conv' if decodes else 'down_conv'}")
            made |= {f"{part}.{'ups' if decodes else 'downs'}.{level}.{name}": v for name, v in layer.items()}
    if not decodes:
        made["encoder.conv_in.weight"] = source.take("encoder.conv_in.weight")
    for name in ("norm_out", "conv_out") + (("conv_in",) if decodes else ()):
        made |= {f"{part}.{name}.{kind}": value for kind, value in source.norm(f"{part}.{name}").items()}
    return made
