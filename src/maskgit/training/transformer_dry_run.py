"""What a run that trains a transformer would be, told before it starts."""

import torch

from maskgit.foundation.devices import choose_device, shapes_only
from maskgit.foundation.files import expand
from maskgit.networks.transformer import Transformer
from maskgit.training.inputs import open_tokens
from maskgit.training.numerics import autocast, choose_precision
from maskgit.training.objectives.losses import sequence_losses
from maskgit.training.run.folder import check_run_folder
from maskgit.training.run.memory import memory_line, step_bytes
from maskgit.training.run.progress import duration, peak_flops
from maskgit.training.tokenizer_dry_run import counted, passes
from maskgit.training.train_transformer import attention, flops_per_image
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
    # Weights, both averages of AdamW and the EMA, float32.
    fixed = 4 * 4 * parameters / shards
    activations = activation_bytes(config, part, precision)
    images = config.steps * config.batch_size
    flops = flops_per_image(config.model)
    seconds = images * flops / peak_flops(device, precision) / world
    return "\n".join(
        (
            f"parameters     {parameters:,}",
            f"data           {counted(num_images)}, {model.num_classes:,} classes, "
            f"{model.grid_size} × {model.grid_size} tokens of {model.num_codes:,} codes",
            f"batch          {config.batch_size} = {world} processes × {config.accumulate} parts × {part}",
            f"steps          {config.steps:,}, {passes(images, num_images)}",
            f"precision      {str(precision).removeprefix('torch.')} on {device}",
            memory_line(fixed, activations, device),
            f"compute        {flops / 1e9:.1f} GFLOP an image; {duration(seconds)} if the hardware reached its peak",
        )
    )


def activation_bytes(config: TransformerTrainingConfig, part: int, precision: torch.dtype) -> int:
    """Return the bytes that a step takes for a part of a batch, beside weights and optimizer, gradients included."""
    model = config.model
    with shapes_only():
        transformer = Transformer(model)
    transformer.to_empty(device="cpu")

    def step() -> None:
        tokens = torch.zeros(part, model.num_tokens, dtype=torch.int64)
        sequence = torch.zeros(part, model.num_tokens + 1, dtype=torch.int64)
        device = torch.device("cpu")
        with autocast(device, precision), attention(choose_device(config.device)):
            logits = transformer(sequence, codes=model.unit_codes)
        mask = torch.ones(part, model.num_tokens, dtype=torch.bool)
        sequence_losses(logits[:, 1:], tokens, mask, config.label_smoothing).mean().backward()

    return step_bytes([transformer], step)
