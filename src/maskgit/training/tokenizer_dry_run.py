"""What a run that trains a tokenizer would be, told before it starts."""

import torch

from maskgit.foundation.devices import choose_device
from maskgit.foundation.files import expand
from maskgit.networks.tokenizer import Tokenizer
from maskgit.training.inputs import open_images
from maskgit.training.numerics import autocast, choose_precision
from maskgit.training.objectives.discriminator import Discriminator
from maskgit.training.objectives.perceptual import PerceptualLoss
from maskgit.training.run.folder import check_run_folder
from maskgit.training.run.memory import memory_line, step_bytes
from maskgit.training.run.progress import duration, peak_flops
from maskgit.training.tokenizer_config import TokenizerTrainingConfig
from maskgit.training.tokenizer_parts import Reconstructor, flops_per_image, make_networks
from maskgit.training.train_tokenizer import adversarial_losses, frozen, judge, reconstruction_losses


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
    trained = sum(p.numel() for p in tokenizer.parameters() if p.requires_grad)
    counts = [sum(p.numel() for p in network.parameters()) for network in (tokenizer, discriminator)]
    if not config.adversarial_weight:
        counts[1] = 0
    # Weights of both networks, Adam's two averages of what is trained, and the tokenizer's EMA, float32.
    fixed = 4 * (2 * counts[0] + 2 * trained + 3 * counts[1])
    part = config.batch_size // (world * config.accumulate)
    parts = f"{config.accumulate} parts × " if config.accumulate > 1 else ""
    images = config.steps * config.batch_size
    adversarial = max(0, config.steps - config.adversarial_start) / config.steps
    flops = sum(
        share * flops_per_image(config, *networks, size, adversarial=on)
        for on, share in ((True, adversarial), (False, 1 - adversarial))
    )
    seconds = images * flops / peak_flops(device, precision) / world
    activations = activation_bytes(config, networks, size, part, precision)
    side = size // config.model.patch_size
    return "\n".join(
        (
            f"parameters     {counts[0]:,} of the tokenizer, {counts[1]:,} of the discriminator",
            f"data           {counted(inputs.train.num_images)} of {size} × {size} pixels, {side} × {side} tokens of "
            f"{config.model.codebook_size:,} codes",
            f"batch          {config.batch_size} = {world} processes × {parts}{part}",
            f"steps          {config.steps:,}, {passes(images, inputs.train.num_images)}",
            f"precision      {str(precision).removeprefix('torch.')} on {device}",
            memory_line(fixed, activations, device),
            f"compute        {flops / 1e9:.2f} GFLOP an image; {duration(seconds)} if the hardware reached its peak",
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


def activation_bytes(
    config: TokenizerTrainingConfig,
    networks: tuple[Tokenizer, Discriminator, PerceptualLoss],
    size: int,
    part: int,
    precision: torch.dtype,
) -> int:
    """Return the bytes that a step takes for a part of a process's share of a batch, beside weights and optimizers.

    All three networks count, and gradients; the networks are of no use afterwards.
    """
    tokenizer, discriminator, perceptual = networks
    num_tokens = (size // config.model.patch_size) ** 2

    def step() -> None:
        images = torch.zeros(part, 3, size, size).contiguous(memory_format=torch.channels_last)
        noise = None
        if config.model.quantizer == "gumbel":
            noise = torch.zeros(part, num_tokens * config.model.codebook_size)
        made = Reconstructor(tokenizer, precision)(images, noise)
        logs = reconstruction_losses(config, images, made, perceptual, precision)
        loss = logs["reconstruction_loss"] + logs["quantizer_loss"]
        if config.adversarial_weight:
            with frozen(discriminator), autocast(images.device, precision):
                fake_logits = discriminator(made.images)
            logs |= adversarial_losses(config, logs["reconstruction_loss"], fake_logits, tokenizer)
            loss = loss + logs["adversarial_weight"] * logs["generator_loss"]
        loss.backward()
        if config.adversarial_weight:
            # Step 0 is one with the R1 penalty.
            judged = judge(config, discriminator, images, made.images.detach(), 0, precision)
            judged["discriminator_total_loss"].backward()

    return step_bytes(networks, step)
