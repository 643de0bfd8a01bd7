"""What the loop of the first stage is made of: the networks, the gumbel quantizer's noise, the cost.

Shapes: b images of one process, K codes, D embedding_dim, h × w the token grid, S pixels a side.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from maskgit import hub
from maskgit.networks.quantizer import GumbelQuantizer, Quantized
from maskgit.networks.tokenizer import Tokenizer
from maskgit.sampler.noise import gumbel, uniform
from maskgit.training.codebook import GUMBEL
from maskgit.training.fine_tuning import start_tokenizer_from
from maskgit.training.numerics import autocast
from maskgit.training.objectives.discriminator import Discriminator
from maskgit.training.objectives.losses import mean_choice
from maskgit.training.objectives.perceptual import PerceptualLoss, make_perceptual
from maskgit.training.optim import LR_SCHEDULES, final_decay, learning_rate
from maskgit.training.tokenizer_config import TokenizerTrainingConfig


class Reconstructed(NamedTuple):
    """What a forward pass of the tokenizer in training returns, all float32.

    Attributes:
        images: (b, 3, S, S), the reconstruction.
        features: (b, D, h, w), the encoder's.
        quantized: what the quantizer made of them.
    """

    images: Tensor
    features: Tensor
    quantized: Quantized


class Reconstructor(nn.Module):
    """A tokenizer with the gradients that training needs, as one module that DDP can wrap."""

    def __init__(self, tokenizer: Tokenizer, precision: torch.dtype, freeze: str = "none") -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.precision = precision
        self.freeze = freeze

    def features(self, images: Tensor) -> Tensor:
        """Encode: float (b, 3, S, S) in [0, 1] → float32 (b, D, h, w)."""
        encoder = self.tokenizer.encoder
        if self.freeze == "encoder":
            # Otherwise the statistics of batch norm would move.
            encoder.eval()
        with autocast(images.device, self.precision):
            features = encoder(images)
        # Distances decide which code is nearest, so they stay float32.
        return features.float()

    def forward(self, images: Tensor, noise: Tensor | None = None, tau: float = 1.0) -> Reconstructed:
        """Encode, quantize and decode: float (b, 3, S, S) in [0, 1] → `Reconstructed`."""
        tokenizer, quantizer = self.tokenizer, self.tokenizer.quantizer
        features = self.features(images)
        if isinstance(quantizer, GumbelQuantizer):
            if noise is not None:
                noise = noise.view(len(features), *features.shape[2:], -1)
            quantized = quantizer(features, noise, tau)
        else:
            quantized = quantizer(features)
        with autocast(images.device, self.precision):
            reconstruction = tokenizer.decoder(quantized.features)
        return Reconstructed(reconstruction.float(), features, quantized)


def make_networks(
    config: TokenizerTrainingConfig, size: int, device: torch.device
) -> tuple[Tokenizer, Discriminator, PerceptualLoss]:
    """Return a run's three networks on a device, with first weights of `init_from` or drawn from the seed.

    Raises:
        CheckpointError, ConfigError, DownloadError: `init_from` is not there, damaged, or of another shape.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed % 2**63)
        tokenizer = Tokenizer(config.model)
        if config.init_from is not None:
            start_tokenizer_from(tokenizer, hub.load_tokenizer(config.init_from))
        if config.freeze == "encoder":
            tokenizer.encoder.requires_grad_(False)
            tokenizer.quantizer.requires_grad_(False)
        discriminator = Discriminator(
            size if config.adversarial_weight else 8,
            config.discriminator_multiplier,
            config.blur_resample,
            config.discriminator_filters,
        )
    perceptual = make_perceptual(
        config.perceptual if config.perceptual_weight else "none",
        weights=config.perceptual_files or None,
        depth=config.perceptual_depth,
        min_size=config.perceptual_min_size,
        device=device,
    )
    # Typed as a tensor's `to`, because Module's stub lacks memory_format.
    networks: list[Any] = [tokenizer, discriminator]
    for network in networks:
        network.to(device, memory_format=torch.channels_last)
    return tokenizer, discriminator, perceptual


@torch.no_grad()
def mean_choice_of_parts(
    config: TokenizerTrainingConfig, reconstructor: Reconstructor, parts: Sequence[Tensor]
) -> Tensor | None:
    """Return how often a whole batch that is cut into parts chooses each code, as the entropy loss reads it.

    The mean choice's entropy is not a mean of the parts' entropies, so all of them are encoded beforehand.

    Args:
        config: the run.
        reconstructor: not wrapped.
        parts: float32 (m, 3, S, S) each, in [0, 1].

    Returns:
        float32 (K,), or None where there is one part or no entropy loss.
    """
    if len(parts) == 1 or not config.entropy_weight or config.model.quantizer == "gumbel":
        return None
    quantizer = reconstructor.tokenizer.quantizer
    means = [
        mean_choice(
            -quantizer(reconstructor.features(images)).distances,
            config.entropy_kind,
            config.entropy_temperature,
        )
        for images in parts
    ]
    return torch.stack(means).mean(0)


def step_rates(config: TokenizerTrainingConfig, step: int) -> dict[str, float]:
    """Return both learning rates of a step by name; the discriminator's clock starts when it does."""

    def rate(peak: float, delay: int) -> float:
        return learning_rate(
            max(0, step - delay),
            peak=peak,
            schedule=config.lr_schedule,
            warmup_steps=config.warmup_steps,
            total_steps=config.steps - delay,
            decay_steps=final_decay(config.lr_schedule, config.steps, config.decay_steps),
            schedule_steps=None if config.schedule_steps is None else config.schedule_steps - delay,
        )

    return {
        "learning_rate": rate(config.learning_rate, 0),
        "discriminator_learning_rate": rate(config.discriminator_learning_rate, config.adversarial_start),
    }


def steps_by_flops(
    config: TokenizerTrainingConfig, done: int, flops: Mapping[bool, float]
) -> dict[float, int]:
    """Return how many steps are left by the FLOPs that each spends on an image.

    Args:
        config: the run.
        done: steps that were made.
        flops: of an image without (False) and with (True) the discriminator.
    """
    start = config.adversarial_start if config.adversarial_weight > 0 else config.steps
    before = max(0, min(start, config.steps) - done)
    counts = Counter({flops[False]: before})
    counts[flops[True]] += config.steps - done - before
    return counts


def gumbel_noise(
    config: TokenizerTrainingConfig, step: int, sample_numbers: Tensor, num_tokens: int
) -> tuple[Tensor | None, float]:
    """Return the noise that the `gumbel` quantizer adds to distances, and its temperature.

    Args:
        config: the run.
        step: the present one.
        sample_numbers: int64 (b,), which the noise is a function of.
        num_tokens: h · w.

    Returns:
        noise: float32 (b, h · w · K), or None for the `vq` quantizer, which draws none.
        tau: the temperature; of no effect for `vq`.
    """
    if config.model.quantizer != "gumbel":
        return None, 1.0
    count = num_tokens * config.model.codebook_size
    return gumbel(uniform(config.seed, sample_numbers, 0, GUMBEL, count)), gumbel_tau(config, step)


def gumbel_tau(config: TokenizerTrainingConfig, step: int) -> float:
    """Return the temperature of the `gumbel` quantizer: its maximum first, then a cosine to its minimum.

    Source: official configs/vqgan_config.py, tau_anneal, whose curve was not released.
    """
    progress = (step - config.tau_warmup_steps) / max(1, config.tau_decay_steps)
    share = LR_SCHEDULES["cosine"](min(max(progress, 0.0), 1.0))
    return config.tau_min + (config.tau_max - config.tau_min) * share


def flops_per_image(
    config: TokenizerTrainingConfig,
    tokenizer: Tokenizer,
    discriminator: Discriminator,
    perceptual: PerceptualLoss,
    size: int,
    *,
    adversarial: bool = True,
) -> float:
    """Return the FLOPs that training spends on one image, without R1: a backward pass counts as two forward.

    The discriminator counts if the step is `adversarial` and the run has one at all.
    """
    device = tokenizer.decoder.conv_in.weight.device
    image = torch.zeros(1, 3, size, size, device=device)

    def forward(module: nn.Module, *inputs: Tensor) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(*inputs)
        return counter.get_total_flops()

    total = 3.0 * forward(Reconstructor(tokenizer, torch.float32, config.freeze), image)
    # Both images forwards, and one of them backwards to its pixels alone.
    total += 1.5 * forward(perceptual, image, image)
    if adversarial and config.adversarial_weight:
        # Once for the tokenizer, backwards to pixels alone, and on two images for the discriminator.
        total += (2 + 6) * forward(discriminator, image)
    return total
