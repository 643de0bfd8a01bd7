"""Training of the first stage: a tokenizer that turns images into codes and back.

The loop in `train_tokenizer` reads from top to bottom, in the same order of sections as the second stage's.

Shapes: B images of a step over all processes, b those of one process, K codes, D embedding_dim, h × w the
token grid, S pixels a side.
Source: paper §3.1 and §4.1; official configs/vqgan_config.py, libml/losses.py. The official training loop was
not released.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from maskgit.hub import save_tokenizer
from maskgit.noise import gumbel, uniform
from maskgit.quantizer import GumbelQuantizer, Quantized
from maskgit.tokenizer import Tokenizer
from maskgit.training.caches import ImageCache
from maskgit.training.checkpoint import Checkpoints, ModelAndOptimizer
from maskgit.training.codebook import GUMBEL, CodeUsage, revive_codes
from maskgit.training.tokenizer_config import TokenizerTrainingConfig
from maskgit.training.data import ImageBatches
from maskgit.training.discriminator import Discriminator
from maskgit.training.losses import (
    QUANTIZER_LOSSES,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    l1_loss,
    l2_loss,
    r1_penalty,
)
from maskgit.training.optim import (
    EMA,
    LR_SCHEDULES,
    clip_gradients,
    learning_rate,
    make_adam,
    set_learning_rate,
)
from maskgit.training.perceptual import PerceptualLoss, make_perceptual
from maskgit.training.run import (
    EXIT_INTERRUPTED,
    Distributed,
    Logger,
    StopSignal,
    Throughput,
    check_finite,
    parallelize,
    peak_flops,
    setup_run,
)
from maskgit.training.tokenizer_evaluation import evaluate_tokenizer

# What may differ when a run goes on, for it does not change what is computed.
MAY_CHANGE = (
    "out", "device", "num_workers", "log_every", "evaluate_every", "checkpoint_every", "keep_last", "keep_best",
    "async_checkpoints", "feature_net", "num_test_images",
)  # fmt: skip


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

    def __init__(self, tokenizer: Tokenizer, precision: torch.dtype) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.precision = precision

    def forward(self, images: Tensor, noise: Tensor | None = None, tau: float = 1.0) -> Reconstructed:
        """Encode, quantize and decode: float (b, 3, S, S) in [0, 1] → `Reconstructed`."""
        tokenizer, quantizer = self.tokenizer, self.tokenizer.quantizer
        with autocast(images.device, self.precision):
            features = tokenizer.encoder(images)
        # Distances decide which code is nearest, so they stay float32.
        features = features.float()
        if isinstance(quantizer, GumbelQuantizer):
            if noise is not None:
                noise = noise.view(len(features), *features.shape[2:], -1)
            quantized = quantizer(features, noise, tau)
        else:
            quantized = quantizer(features)
        with autocast(images.device, self.precision):
            reconstruction = tokenizer.decoder(quantized.features)
        return Reconstructed(reconstruction.float(), features, quantized)


def train_tokenizer(config: TokenizerTrainingConfig) -> Path:
    """Train a tokenizer, or go on with a run that was stopped.

    Args:
        config: the run; the same config goes on where its folder `out` stopped.

    Returns:
        The folder of the trained tokenizer, whose weights are the averaged ones.

    Raises:
        ConfigError: a setting does not fit the data or the run in `out`.
        DataError: the data are missing or have changed since the run's checkpoint.
        TrainingError: a loss or gradient is not finite.
        OutputError: the folder cannot be written.
        SystemExit: with code 75, after SIGTERM or SIGINT and a checkpoint; the same command goes on.
    """
    # Data
    cache = ImageCache.open(config.data)
    test_cache = ImageCache.open(config.test_data) if config.test_data else None
    size = config.image_size or cache.size
    distributed = Distributed.init(config.device)
    device = distributed.device
    num_tokens = (size // config.model.patch_size) ** 2
    data = {"train": cache.fingerprint} | ({"test": test_cache.fingerprint} if test_cache else {})
    run_dir = setup_run(config.out, config, data, distributed, may_change=MAY_CHANGE)

    # Networks
    precision = choose_precision(config.precision, device)
    tokenizer, discriminator, perceptual = make_networks(config, size, device)
    reconstructor = parallelize(Reconstructor(tokenizer, precision), distributed)
    parallel_discriminator = parallelize(discriminator, distributed)
    ema = EMA(tokenizer, config.ema_decay)
    usage = CodeUsage(config.model.codebook_size, config.usage_window, distributed)

    # Optimizers
    max_norm = math.inf if config.max_gradient_norm is None else config.max_gradient_norm
    optimizer = make_adam(tokenizer.parameters(), config.betas)
    discriminator_optimizer = make_adam(discriminator.parameters(), config.betas)

    # Checkpoints
    checkpoints = Checkpoints(
        run_dir,
        keep_last=config.keep_last,
        keep_best=config.keep_best,
        asynchronous=config.async_checkpoints,
    )
    state = {
        "tokenizer": ModelAndOptimizer(tokenizer, optimizer),
        "discriminator": ModelAndOptimizer(discriminator, discriminator_optimizer),
        "ema": ema,
        "usage": usage,
        "step": 0,
    }
    latest = checkpoints.latest()
    start = int(checkpoints.load(latest, state)["step"]) if latest else 0

    # Loop
    batches = iter(
        ImageBatches(
            cache,
            seed=config.seed,
            global_batch=config.batch_size,
            rank=distributed.rank,
            world=distributed.world,
            size=size,
            augment=config.augment,
            num_workers=config.num_workers,
            start_step=start,
        )
    )
    logger = Logger(run_dir, distributed, start_step=start)
    flops = flops_per_image(config, tokenizer, discriminator, perceptual, size)
    throughput = Throughput(config.batch_size, flops, peak_flops(device, precision) * distributed.world)
    score: float | None = None
    with StopSignal(distributed) as stop:
        for step in range(start, config.steps):
            batch = next(batches)
            images = batch.images.to(device, non_blocking=True).float() / 255
            images = images.contiguous(memory_format=torch.channels_last)
            adversarial = config.adversarial_weight > 0 and step >= config.adversarial_start
            rates = step_rates(config, step)
            set_learning_rate(optimizer, rates["learning_rate"])
            set_learning_rate(discriminator_optimizer, rates["discriminator_learning_rate"])

            # The tokenizer's loss
            made = reconstructor(images, *gumbel_noise(config, step, batch.sample_numbers.to(device), num_tokens))
            losses = QUANTIZER_LOSSES[config.model.quantizer](
                made.features,
                made.quantized,
                commitment_weight=config.commitment_weight,
                entropy_weight=config.entropy_weight,
                entropy_kind=config.entropy_kind,
                entropy_temperature=config.entropy_temperature,
            )
            logs = {f"{name}_loss": value for name, value in losses._asdict().items() if name != "total"}
            logs["l2_loss"], logs["l1_loss"] = l2_loss(images, made.images), l1_loss(images, made.images)
            with autocast(device, precision):
                logs["perceptual_loss"] = perceptual(made.images, images)
            reconstruction = (
                config.l2_weight * logs["l2_loss"]
                + config.l1_weight * logs["l1_loss"]
                + config.perceptual_weight * logs["perceptual_loss"]
            )
            loss = reconstruction + losses.total
            if adversarial:
                with frozen(discriminator), autocast(device, precision):
                    logs["generator_loss"] = generator_loss(
                        discriminator(made.images), config.adversarial_loss
                    )
                weight: float | Tensor = config.adversarial_weight
                if config.adaptive_weight:
                    last_layer = tokenizer.decoder.conv_out.weight
                    weight = weight * adaptive_weight(reconstruction, logs["generator_loss"], last_layer)
                    logs["adaptive_weight"] = weight
                loss = loss + weight * logs["generator_loss"]
            optimizer.zero_grad()
            loss.backward()
            logs["loss"] = loss

            # The discriminator's loss, on the same reconstructions and before either network moves
            if adversarial:
                penalty_due = config.r1_cost > 0 and step % config.r1_every == 0
                discriminator_optimizer.zero_grad()
                if penalty_due:
                    # In float32: second derivatives lose too much in bfloat16.
                    penalty, real_logits = r1_penalty(parallel_discriminator, images, config.r1_cost)
                    logs["r1_penalty"] = penalty
                else:
                    with autocast(device, precision):
                        real_logits = parallel_discriminator(images)
                with autocast(device, precision):
                    fake_logits = parallel_discriminator(made.images.detach())
                logs["discriminator_loss"] = discriminator_loss(
                    real_logits, fake_logits, config.adversarial_loss
                )
                total = logs["discriminator_loss"] + (penalty * config.r1_every if penalty_due else 0)
                total.backward()
                logs["real_logit"], logs["fake_logit"] = real_logits.float().mean(), fake_logits.float().mean()

            # The update
            logs["gradient_norm"] = clip_gradients(tokenizer.parameters(), max_norm)
            if adversarial:
                logs["discriminator_gradient_norm"] = clip_gradients(
                    discriminator.parameters(), max_norm
                )
            logs = average(logs, distributed)
            check_finite(step, **logs)
            optimizer.step()
            if adversarial:
                discriminator_optimizer.step()
            ema.update(tokenizer)
            usage.update(made.quantized.tokens)
            throughput.step()

            # The codebook
            done = step + 1
            if done % config.usage_window == 0:
                logs |= usage.read()
                warn_of_codes(logger, done, logs["code_usage"])
                if config.revive_codes and done < config.steps:
                    codebooks = [tokenizer.quantizer.codebook.data, ema.average["quantizer.codebook"]]
                    logs["revived_codes"] = revive_codes(
                        codebooks,
                        usage.totals() == 0,
                        made.features,
                        seed=config.seed,
                        step=step,
                        distributed=distributed,
                    )
                usage.restart()

            # What people watch, and checkpoints
            stopping = stop.agreed()
            last = done == config.steps
            if done % config.log_every == 0 or "code_usage" in logs or last:
                throughput.read()
                logger.scalars(done, {**logs, **rates, "images_per_second": throughput.images_per_second})
                logger.progress(done, config.steps, throughput, logs["loss"])
                warn_of_images(logger, done, made.images)
            if test_cache and (done % config.evaluate_every == 0 or last):
                with throughput.paused(), ema.applied(tokenizer):
                    scores, shown = evaluate_tokenizer(
                        tokenizer,
                        test_cache,
                        size=size,
                        precision=precision,
                        num_images=config.num_test_images,
                        feature_net=config.feature_net,
                        batch_size=config.batch_size // distributed.world,
                        distributed=distributed,
                    )
                score = scores["test_psnr"]
                logger.scalars(done, scores)
                logger.images(done, "reconstructions", shown)
                logger.say(
                    f"step {done}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
                )
            if done % config.checkpoint_every == 0 or stopping or last:
                with throughput.paused():
                    checkpoints.save(done, {**state, "step": done}, score)
            if stopping and not last:
                checkpoints.close()
                logger.say(f"Stopped after step {done}; the same command goes on.")
                logger.close()
                raise SystemExit(EXIT_INTERRUPTED)

    # The result
    checkpoints.close()
    logger.close()
    ema.copy_to(tokenizer)
    if distributed.is_main:
        save_tokenizer(tokenizer, run_dir / "model")
    distributed.barrier()
    return run_dir / "model"


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the type that networks compute in: bfloat16 for "auto" where the hardware has it."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return the context in which networks compute in `precision`; their weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)


def make_networks(
    config: TokenizerTrainingConfig, size: int, device: torch.device
) -> tuple[Tokenizer, Discriminator, PerceptualLoss]:
    """Return a run's three networks on a device, with first weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed % 2**63)
        tokenizer = Tokenizer(config.model)
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
    for network in (tokenizer, discriminator):
        network.to(device, memory_format=torch.channels_last)
    return tokenizer, discriminator, perceptual


def step_rates(config: TokenizerTrainingConfig, step: int) -> dict[str, float]:
    """Return both learning rates of a step by name; the discriminator's clock starts when it does."""
    delay = config.adversarial_start
    shape = {"schedule": config.lr_schedule, "warmup_steps": config.warmup_steps}
    return {
        "learning_rate": learning_rate(step, peak=config.learning_rate, total_steps=config.steps, **shape),
        "discriminator_learning_rate": learning_rate(
            max(0, step - delay),
            peak=config.discriminator_learning_rate,
            total_steps=config.steps - delay,
            **shape,
        ),
    }


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


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let gradients flow through a module but not into its weights inside a `with` block."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def average(values: dict[str, Tensor], distributed: Distributed) -> dict[str, Tensor]:
    """Return the means of scalars over all processes, in one exchange."""
    stacked = distributed.mean(torch.stack([value.detach().float() for value in values.values()]))
    return dict(zip(values, stacked.unbind(), strict=True))


def flops_per_image(
    config: TokenizerTrainingConfig,
    tokenizer: Tokenizer,
    discriminator: Discriminator,
    perceptual: PerceptualLoss,
    size: int,
) -> float:
    """Return the FLOPs that training spends on one image, without R1: a backward pass counts as two forward."""
    device = tokenizer.decoder.conv_in.weight.device
    image = torch.zeros(1, 3, size, size, device=device)

    def forward(module: nn.Module, *inputs: Tensor) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(*inputs)
        return counter.get_total_flops()

    total = 3 * forward(Reconstructor(tokenizer, torch.float32), image)
    # Both images forwards, and one of them backwards to its pixels alone.
    total += 1.5 * forward(perceptual, image, image)
    if config.adversarial_weight:
        # Once for the tokenizer, backwards to pixels alone, and on two images for the discriminator.
        total += (2 + 6) * forward(discriminator, image)
    return float(total)


def warn_of_codes(logger: Logger, step: int, code_usage: float | Tensor) -> None:
    """Say so if few codes are in use."""
    if code_usage < 0.05:
        logger.warn(
            "codes",
            step,
            f"the codebook collapses: {float(code_usage):.1%} of its codes are in use. Raise entropy_weight, lower "
            "the learning rate, or use a smaller codebook_size.",
        )


def warn_of_images(logger: Logger, step: int, reconstructions: Tensor) -> None:
    """Say so if all reconstructions look the same."""
    if len(reconstructions) > 1 and step > 100 and reconstructions.std(0).mean() < 1e-3:
        logger.warn(
            "images",
            step,
            "all reconstructions are alike. Lower the learning rate, or look at the data.",
        )
