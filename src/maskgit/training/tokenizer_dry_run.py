"""What a run that trains a tokenizer would be, told before it starts."""

import torch

from maskgit.foundation.devices import choose_device
from maskgit.foundation.files import expand
from maskgit.networks.config import TokenizerConfig
from maskgit.training.inputs import open_images
from maskgit.training.numerics import choose_precision
from maskgit.training.run.folder import check_run_folder
from maskgit.training.run.progress import peak_flops
from maskgit.training.tokenizer_config import TokenizerTrainingConfig
from maskgit.training.tokenizer_parts import flops_per_image, make_networks


def dry_run(config: TokenizerTrainingConfig, world: int = 1) -> str:
    """Return what a run would be, in lines for people, after checking all that it reads.

    Args:
        config: the run.
        world: number of processes.

    Raises:
        ConfigError, DataError: as the run would.
    """
    check_run_folder(expand(config.out))
    inputs = open_images(config, world=world)
    size = inputs.size
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    networks = make_networks(config, size, torch.device("cpu"))
    tokenizer, discriminator, _ = networks
    counts = [sum(p.numel() for p in network.parameters()) for network in (tokenizer, discriminator)]
    if not config.adversarial_weight:
        counts[1] = 0
    # Weights, gradients and Adam's two averages of both networks, and the tokenizer's EMA, float32.
    fixed = 4 * (4 * sum(counts) + counts[0])
    share = config.batch_size // world
    activations = share * activation_bytes(config.model, size, precision)
    images = config.steps * config.batch_size
    adversarial = max(0, config.steps - config.adversarial_start) / config.steps
    flops = sum(
        part * flops_per_image(config, *networks, size, adversarial=on)
        for on, part in ((True, adversarial), (False, 1 - adversarial))
    )
    hours = images * flops / peak_flops(device, precision) / world / 3600
    side = size // config.model.patch_size
    return "\n".join(
        (
            f"parameters     {counts[0]:,} of the tokenizer, {counts[1]:,} of the discriminator",
            f"data           {counted(inputs.train.num_images)} of {size} × {size} pixels, {side} × {side} tokens of "
            f"{config.model.codebook_size:,} codes",
            f"batch          {config.batch_size} = {world} processes × {share}",
            f"steps          {config.steps:,}, {passes(images, inputs.train.num_images)}",
            f"precision      {str(precision).removeprefix('torch.')} on {device}",
            f"memory         about {(fixed + activations) / 2**30:.2f} GiB a process: {fixed / 2**30:.2f} for "
            f"weights and optimizers, {activations / 2**30:.2f} for the tokenizer's activations and distances",
            f"compute        {flops / 1e9:.2f} GFLOP an image; {hours:.2g} h if the hardware reached its peak",
        )
    )


def counted(num_images: int | None) -> str:
    """Return how many images there are, in words; None is a stream, whose end is not known."""
    return "a stream of images" if num_images is None else f"{num_images:,} images"


def passes(num_read: int, num_images: int | None) -> str:
    """Return how often a run reads its images, in words."""
    if num_images is None:
        return f"{num_read:,} images; how often through the data is not known of a stream"
    return f"{num_read / num_images:.1f} times through the data"


def activation_bytes(config: TokenizerConfig, size: int, precision: torch.dtype) -> float:
    """Return an estimate of the memory that one image's activations take in the tokenizer's training."""
    pixels, values = size * size, 0.0
    for level, multiplier in enumerate(config.channel_multipliers):
        # Norm, activation and convolution twice and a sum, in every block of the encoder and of the decoder.
        blocks = 2 * config.num_res_blocks + 1
        values += 7 * blocks * pixels / 4**level * config.filters * multiplier
    tokens = (size // config.patch_size) ** 2
    # The entropy loss holds about eight float32 matrices of (tokens, codes).
    return values * precision.itemsize + 8 * 4 * tokens * config.codebook_size
