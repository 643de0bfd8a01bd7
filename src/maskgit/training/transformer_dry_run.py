"""What a run that trains a transformer would be, told before it starts."""

import torch

from maskgit.foundation.devices import choose_device, shapes_only
from maskgit.foundation.files import expand
from maskgit.networks.config import TransformerConfig
from maskgit.networks.transformer import Transformer
from maskgit.training.inputs import open_tokens
from maskgit.training.numerics import choose_precision
from maskgit.training.run.folder import check_run_folder
from maskgit.training.run.progress import peak_flops
from maskgit.training.tokenizer_dry_run import counted, passes
from maskgit.training.train_transformer import flops_per_image
from maskgit.training.transformer_config import TransformerTrainingConfig


def dry_run(config: TransformerTrainingConfig, world: int = 1) -> str:
    """Return what a run would be, in lines for people, after checking all that it reads.

    Args:
        config: the run.
        world: number of processes.

    Raises:
        ConfigError, CheckpointError, DataError: as the run would.
    """
    check_run_folder(expand(config.out))
    inputs = open_tokens(config, world=world)
    num_images, model = inputs.train.num_images, config.model
    with shapes_only():
        parameters = sum(p.numel() for p in Transformer(config.model).parameters())
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    part = config.batch_size // (world * config.accumulate)
    shards = world if config.fsdp else 1
    # Weights, gradients, both averages of AdamW and the EMA, float32.
    fixed = 5 * 4 * parameters / shards
    activations = part * activation_bytes(config.model, precision, plain_attention=device.type == "cpu")
    images = config.steps * config.batch_size
    flops = flops_per_image(config.model)
    days = images * flops / peak_flops(device, precision) / world / 86_400
    return "\n".join(
        (
            f"parameters     {parameters:,}",
            f"data           {counted(num_images)}, {model.num_classes:,} classes, "
            f"{model.grid_size} × {model.grid_size} tokens of {model.num_codes:,} codes",
            f"batch          {config.batch_size} = {world} processes × {config.accumulate} parts × {part}",
            f"steps          {config.steps:,}, {passes(images, num_images)}",
            f"precision      {str(precision).removeprefix('torch.')} on {device}",
            f"memory         about {(fixed + activations) / 2**30:.2f} GiB a process: {fixed / 2**30:.2f} for "
            f"weights and optimizer, {activations / 2**30:.2f} for activations",
            f"compute        {flops / 1e9:.1f} GFLOP an image; {days * 24:.1f} h if the hardware reached its peak",
        )
    )


def activation_bytes(config: TransformerConfig, precision: torch.dtype, *, plain_attention: bool) -> float:
    """Return an estimate of the memory that one image's activations take in training."""
    length = config.num_tokens + 1
    layer = length * (12 * config.hidden_size + 3 * config.intermediate_size)
    if plain_attention or config.dropout:
        layer += 3 * config.num_heads * length**2
    return config.num_layers * layer * precision.itemsize + 3 * 4 * length * config.num_codes
