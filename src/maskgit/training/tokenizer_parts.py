"""What the loop of the first stage is made of: networks, noise and rates, the cost, and the codebook's upkeep.

Shapes: B images of a step over all processes, b those of one process, K codes, D embedding_dim, h × w the token
grid, S pixels a side.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from maskgit import hub
from maskgit.errors import CheckpointError
from maskgit.evaluation.metrics import codebook_usage, perplexity
from maskgit.networks.quantizer import GumbelQuantizer, Quantized
from maskgit.networks.tokenizer import Tokenizer
from maskgit.sampler.noise import gumbel, uniform
from maskgit.training.distributed import Distributed, checkpoint_blocks
from maskgit.training.numerics import autocast, evaluating
from maskgit.training.objectives.discriminator import DISCRIMINATORS
from maskgit.training.objectives.losses import mean_choice
from maskgit.training.objectives.perceptual import PerceptualLoss, make_perceptual
from maskgit.training.optim import LR_SCHEDULES, final_decay, learning_rate
from maskgit.training.tokenizer_config import TokenizerTrainingConfig
from maskgit.training.warm_start import start_tokenizer_from


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

    def __init__(
        self, tokenizer: Tokenizer, precision: torch.dtype, freeze: str = "none", entropy_groups: int = 1
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.precision = precision
        self.freeze = freeze
        self.entropy_groups = entropy_groups

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
            quantized = quantizer(features, entropy_groups=self.entropy_groups)
        with autocast(images.device, self.precision):
            reconstruction = tokenizer.decoder(quantized.features)
        return Reconstructed(reconstruction.float(), features, quantized)


def make_reconstructor(
    config: TokenizerTrainingConfig, tokenizer: Tokenizer, precision: torch.dtype
) -> Reconstructor:
    """Return a run's tokenizer as it is trained."""
    groups = config.entropy_groups if config.entropy_weight else 0
    return Reconstructor(tokenizer, precision, config.freeze, groups)


def make_networks(
    config: TokenizerTrainingConfig, size: int, device: torch.device
) -> tuple[Tokenizer, nn.Module, PerceptualLoss]:
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
        discriminator = DISCRIMINATORS[config.discriminator](
            size if config.adversarial_weight else 8,
            config.discriminator_multiplier,
            config.blur_resample,
            config.discriminator_filters,
        )
        if config.gradient_checkpointing:
            checkpoint_blocks((*tokenizer.encoder.blocks, *tokenizer.decoder.blocks))
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
) -> list[Tensor] | None:
    """Return how often a whole batch that is cut into parts chooses each code, as the entropy loss reads it.

    The mean choice's entropy is not a mean of the parts' entropies, so all of them are encoded beforehand.

    Args:
        config: the run.
        reconstructor: not wrapped.
        parts: float32 (m, 3, S, S) each, in [0, 1].

    Returns:
        float32 (K,) for each group of distances, or None where there is one part or no entropy loss.
    """
    quantizer = reconstructor.tokenizer.quantizer
    if len(parts) == 1 or not config.entropy_weight or "entropy" not in quantizer.losses:
        return None
    means = [
        [
            mean_choice(-distances, config.entropy_kind, config.entropy_temperature)
            for distances in quantizer(
                reconstructor.features(images), entropy_groups=config.entropy_groups
            ).distances
        ]
        for images in parts
    ]
    return [torch.stack(of_parts).mean(0) for of_parts in zip(*means, strict=True)]


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
    discriminator: nn.Module,
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
        # In training, batch norm would count the black image among those that it has seen.
        with evaluating(module), FlopCounterMode(display=False) as counter:
            module(*inputs)
        return counter.get_total_flops()

    total = 3.0 * forward(make_reconstructor(config, tokenizer, torch.float32), image)
    # Both images forwards, and one of them backwards to its pixels alone.
    total += 1.5 * forward(perceptual, image, image)
    if adversarial and config.adversarial_weight:
        # Once for the tokenizer, backwards to pixels alone, and on two images for the discriminator.
        total += (2 + 6) * forward(discriminator, image)
    return total


# The streams of `noise.uniform` that tokenizer training draws from.
GUMBEL, REVIVE = 72, 73


def count_codes(counts: Tensor, tokens: Tensor) -> None:
    """Add to counts, int64 (K,), how often each code is among tokens, int64 of any shape."""
    codes = tokens.flatten()
    # `bincount` would make a GPU's host wait, for it reads the largest code.
    counts.scatter_add_(0, codes, torch.ones_like(codes))


class CodeUsage:
    """How often each code was chosen over a window of steps, in all processes together."""

    def __init__(self, codebook_size: int, window: int, distributed: Distributed) -> None:
        """Start an empty window.

        Args:
            codebook_size: K.
            window: steps of one window.
            distributed: the processes.
        """
        self.window = window
        self.counts = torch.zeros(codebook_size, dtype=torch.int64, device=distributed.device)
        self._distributed = distributed

    def update(self, tokens: Tensor) -> None:
        """Count the tokens of this process's share of a step, int64 (b, h, w)."""
        count_codes(self.counts, tokens)

    def totals(self) -> Tensor:
        """Return the counts over all processes, int64 (K,); all must call it."""
        totals = self.counts.clone()
        if self._distributed.world > 1:
            dist.all_reduce(totals)
        return totals

    def read(self) -> dict[str, float]:
        """Return the share of codes used in the window so far and their perplexity; all processes call it."""
        totals = self.totals().cpu().numpy()
        if not totals.any():
            return {}
        return {"code_usage": codebook_usage(totals), "code_perplexity": perplexity(totals)}

    def unused(self) -> Tensor:
        """Return which codes nothing chose, bool (K,), none if nothing was counted; all processes call it."""
        totals = self.totals()
        return (totals == 0) & (totals.sum() > 0)

    def restart(self) -> None:
        """Begin a new window."""
        self.counts.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the counts over all processes."""
        return {"counts": self.totals()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with counts that were saved, whatever the number of processes then."""
        if state["counts"].shape != self.counts.shape:
            raise CheckpointError(
                f"The checkpoint counts {len(state['counts'])} codes, but the codebook has {len(self.counts)}."
            )
        # One process holds them, so that the sum over all is right.
        self.counts.copy_(state["counts"] if self._distributed.is_main else torch.zeros_like(self.counts))


@torch.no_grad()
def revive_codes(
    codebooks: list[Tensor],
    dead: Tensor,
    features: Tensor,
    moments: Iterable[Tensor] = (),
    *,
    seed: int,
    step: int,
    distributed: Distributed,
) -> int:
    """Give codes that are not in use the encoder's features at random places of the present batch.

    The places depend on (seed, step, code) and the whole batch alone, so every process writes the same.

    Args:
        codebooks: float (K, D) each, changed in place: the codebook and its average.
        dead: bool (K,), the codes to be replaced.
        features: float (b, D, h, w), this process's share of the batch.
        moments: float (K, D) each, the optimizer's averages of the codebook's gradients; the rows of codes that
            are replaced become 0, for they are of the vectors that were there.
        seed: the run's.
        step: the present one.
        distributed: the processes.

    Returns:
        How many codes were replaced.
    """
    codes = dead.nonzero().flatten()
    if len(codes) == 0:
        return 0
    vectors = features.detach().float().movedim(1, -1).flatten(0, -2)
    count = len(vectors) * distributed.world
    # In float32 the product could round up to the count.
    places = (uniform(seed, codes, step, REVIVE, 1).flatten() * count).long().clamp(max=count - 1)
    places = places - distributed.rank * len(vectors)
    mine = (places >= 0) & (places < len(vectors))
    rows = torch.where(mine[:, None], vectors[places.clamp(0, len(vectors) - 1)], 0.0)
    if distributed.world > 1:
        dist.all_reduce(rows)
    for codebook in codebooks:
        codebook[codes] = rows.to(codebook.dtype)
    for moment in moments:
        moment[codes] = 0
    return len(codes)
