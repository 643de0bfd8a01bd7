"""Training of the first stage: a tokenizer that turns images into codes and back.

The loop in `train_tokenizer` reads from top to bottom, in the same order of sections as the second stage's.

Shapes: B images of a step over all processes, b those of one process, m those of one part of an accumulated
batch, K codes, D embedding_dim, h × w the token grid, S pixels a side.
Source: paper §3.1 and §4.1; official configs/vqgan_config.py, libml/losses.py. The official training loop was
not released.
"""

import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from maskgit.foundation.devices import copies_aside, upload
from maskgit.hub import save_tokenizer
from maskgit.networks.quantizer import QUANTIZERS, VectorQuantizer
from maskgit.networks.tokenizer import Tokenizer
from maskgit.training.distributed import Distributed, compile_blocks, gradient_sync, parallelize
from maskgit.training.evaluation import evaluate_tokenizer, reconstruction_sheet
from maskgit.training.inputs import open_images
from maskgit.training.numerics import autocast, choose_precision, warnings_of_speed
from maskgit.training.objectives.losses import (
    LeCam,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    l1_loss,
    l2_loss,
    quantizer_loss,
    r1_penalty,
)
from maskgit.training.objectives.perceptual import PerceptualLoss
from maskgit.training.optim import EMA, clip_gradients, make_adam, set_learning_rate
from maskgit.training.run.card import save_card, telling
from maskgit.training.run.checkpoint import Checkpoints, ModelAndOptimizer
from maskgit.training.run.folder import held_run, setup_run
from maskgit.training.run.progress import (
    FORETELLING_STEPS,
    Logger,
    RunningMean,
    Throughput,
    host_numbers,
    peak_flops,
)
from maskgit.training.run.stopping import EXIT_INTERRUPTED, StopSignal, UpdateGate, Watch
from maskgit.training.stream_config import STREAM_MAY_CHANGE
from maskgit.training.tokenizer_config import TokenizerTrainingConfig
from maskgit.training.tokenizer_parts import (
    CodeUsage,
    Reconstructed,
    flops_per_image,
    gumbel_noise,
    make_networks,
    make_reconstructor,
    mean_choice_of_parts,
    revive_codes,
    step_rates,
    steps_by_flops,
)

# What may differ when a run goes on, for it does not change what is computed.
MAY_CHANGE = (
    "out", "tracker", "data", "test_data", "device", "num_workers", "log_every", "evaluate_every", "checkpoint_every",
    "keep_last", "keep_best", "async_checkpoints", "patience", "max_diverged_steps", "feature_net", "num_test_images", *STREAM_MAY_CHANGE,
)  # fmt: skip

# What may differ where the user says --change: from then on the run computes with it.
CHANGEABLE = (
    "steps", "learning_rate", "discriminator_learning_rate", "lr_schedule", "warmup_steps", "decay_steps",
    "schedule_steps", "max_gradient_norm", "ema_decay", "extra_ema_decays", "precision", "l2_weight", "l1_weight",
    "perceptual_weight", "commitment_weight", "entropy_weight", "entropy_temperature", "adversarial_start",
    "adaptive_weight", "lecam_weight", "r1_cost", "r1_every", "tau_max", "tau_min", "tau_warmup_steps", "tau_decay_steps",
    "revive_codes", "accumulate", "compile",
)  # fmt: skip


def train_tokenizer(config: TokenizerTrainingConfig, *, change: bool = False) -> Path:
    """Train a tokenizer, or go on with a run that was stopped.

    Args:
        config: the run; the same config goes on where its folder `out` stopped.
        change: whether settings in `CHANGEABLE` and the test data may differ from those that the run has had; from
            its newest checkpoint on it computes with the new ones.

    Returns:
        The folder of the trained tokenizer, whose weights are the averaged ones.

    Raises:
        ConfigError: a setting does not fit the data or the run in `out`.
        DataError: the data are missing or have changed since the run's checkpoint.
        TrainingError: the loss has diverged, or a loss or gradient is not finite.
        OutputError: the folder cannot be written, or another process trains in it.
        SystemExit: with code 75, after SIGTERM or SIGINT and a checkpoint; the same command goes on.
    """
    distributed = Distributed.init(config.device)
    with held_run(config.out, distributed):
        return _train(config, distributed, change)


def _train(config: TokenizerTrainingConfig, distributed: Distributed, change: bool) -> Path:
    # Data
    device = distributed.device
    inputs = open_images(config, distributed.rank, distributed.world)
    size, test_cache = inputs.size, inputs.test_cache
    num_tokens = (size // config.model.patch_size) ** 2
    run_dir = setup_run(
        config.out,
        config,
        inputs.fingerprints,
        distributed,
        may_change=MAY_CHANGE,
        changeable=CHANGEABLE,
        change=change,
        caches=inputs.caches,
    )

    # Networks
    precision = choose_precision(config.precision, device)
    networks = make_networks(config, size, device)
    tokenizer, discriminator, perceptual = networks
    flops = {on: flops_per_image(config, *networks, size, adversarial=on) for on in (False, True)}
    if config.compile:
        # The discriminator is not: R1 differentiates twice, which torch.compile cannot.
        compile_blocks((tokenizer.encoder, tokenizer.decoder))
    alone = make_reconstructor(config, tokenizer, precision)
    reconstructor = parallelize(alone, distributed)
    parallel_discriminator = parallelize(discriminator, distributed)
    ema = EMA(tokenizer, config.ema_decay)
    extra_emas = {str(decay): EMA(tokenizer, decay) for decay in config.extra_ema_decays}
    usage = CodeUsage(config.model.codebook_size, config.usage_window, distributed)

    # Optimizers
    max_norm = math.inf if config.max_gradient_norm is None else config.max_gradient_norm
    optimizer = make_adam([p for p in tokenizer.parameters() if p.requires_grad], config.betas)
    discriminator_optimizer = make_adam(discriminator.parameters(), config.betas)

    # Checkpoints
    watch = Watch(
        "l2_loss",
        1.0,
        "no image in [0, 1] is further than 1 from another",
        max_diverged_steps=config.max_diverged_steps,
        patience=config.patience,
    )
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
    lecam = LeCam().to(device)
    state |= {"watch": watch} | ({"extra_emas": extra_emas} if extra_emas else {})
    state |= {"lecam": lecam} if config.lecam_weight else {}
    latest = checkpoints.latest()
    start = int(checkpoints.load(latest, state, newer=("extra_emas", "watch"))["step"]) if latest else 0

    # Loop
    logger = Logger(run_dir, distributed, start_step=start, tracker=config.tracker)

    def save_model(step: int, score: float | None) -> None:
        if distributed.is_main:
            scores = {} if score is None else {"test_psnr": score}
            with ema.applied(tokenizer), telling(logger, step < config.steps):
                save_card(save_tokenizer(tokenizer, run_dir / "model"), run_dir, step, scores)

    checkpoints.report = logger.say
    for sentence in (*inputs.notes, *warnings_of_speed(config.precision, device, compiles=config.compile)):
        logger.say(sentence)
    throughput = Throughput(config.batch_size, peak=peak_flops(device, precision) * distributed.world)
    mean_loss = RunningMean()
    gate = UpdateGate(device, optimizer, discriminator_optimizer, watch=watch)
    pin = copies_aside(device)
    with StopSignal(distributed) as stop, closing(inputs.train.from_step(start, pin=pin)) as batches:
        done = start
        for step in range(start, start if watch.exhausted else config.steps):
            batch = next(batches)
            score: float | None = None
            images = upload(batch.images, device).float() / 255
            images = images.contiguous(memory_format=torch.channels_last)
            adversarial = config.adversarial_weight > 0 and step >= config.adversarial_start
            rates = step_rates(config, step)
            set_learning_rate([optimizer], rates["learning_rate"])
            set_learning_rate([discriminator_optimizer], rates["discriminator_learning_rate"])

            # Both networks' losses, of one part of the batch after the other
            optimizer.zero_grad()
            if adversarial:
                discriminator_optimizer.zero_grad()
            parts = images.chunk(config.accumulate)
            sample_numbers = upload(batch.sample_numbers, device).chunk(config.accumulate)
            whole_means = mean_choice_of_parts(config, alone, parts)
            of_parts: list[dict[str, Tensor]] = []
            features, tokens = [], []
            for i, (part, part_numbers) in enumerate(zip(parts, sample_numbers, strict=True)):
                is_last = i == len(parts) - 1
                with gradient_sync(reconstructor, is_last), gradient_sync(parallel_discriminator, is_last):
                    # The tokenizer's loss
                    noise, tau = gumbel_noise(config, step, part_numbers, num_tokens)
                    made = reconstructor(part, noise, tau)
                    logs = reconstruction_losses(config, part, made, perceptual, precision, whole_means)
                    if adversarial:
                        with frozen(discriminator), autocast(device, precision):
                            fake_logits = discriminator(made.images)
                        logs |= adversarial_losses(
                            config, logs["reconstruction_loss"], fake_logits, tokenizer
                        )
                    logs["loss"] = logs["reconstruction_loss"] + logs["quantizer_loss"]
                    if adversarial:
                        logs["loss"] = logs["loss"] + logs["adversarial_weight"] * logs["generator_loss"]
                    (logs["loss"] / len(parts)).backward()

                    # The discriminator's loss, on the same reconstructions and before either network moves
                    if adversarial:
                        judged = judge(
                            config, parallel_discriminator, lecam, part, made.images.detach(), step, precision
                        )
                        (judged["discriminator_total_loss"] / len(parts)).backward()
                        logs |= judged
                of_parts.append({name: value.detach() for name, value in logs.items()})
                features.append(made.features.detach())
                tokens.append(made.quantized.tokens)

            # The update
            logs = {name: torch.stack([p[name] for p in of_parts]).mean(0) for name in of_parts[0]}
            logs["gradient_norm"] = clip_gradients(tokenizer.parameters(), max_norm)
            if adversarial:
                logs["discriminator_gradient_norm"] = clip_gradients(discriminator.parameters(), max_norm)
            logs = average(logs, distributed)
            gate.check(step, logs)
            mean_loss.update(logs["loss"])
            optimizer.step()
            if adversarial:
                discriminator_optimizer.step()
            for held in (ema, *extra_emas.values()):
                held.update(tokenizer, step)
            throughput.step(flops[adversarial])

            # The codebook; a step after a window's end, so that no run ends with codes that nothing trained
            done = step + 1
            codes: dict[str, float] = {}
            if step > 0 and step % config.usage_window == 0:
                quantizer = tokenizer.quantizer
                revives = config.revive_codes and config.freeze == "none"
                if revives and isinstance(quantizer, VectorQuantizer):
                    codebook = quantizer.codebook
                    codes["revived_codes"] = revive_codes(
                        [
                            codebook.data,
                            *(e.average["quantizer.codebook"] for e in (ema, *extra_emas.values())),
                        ],
                        usage.unused(),
                        torch.cat(features),
                        [optimizer.state[codebook][name] for name in ("exp_avg", "exp_avg_sq")],
                        seed=config.seed,
                        step=step,
                        distributed=distributed,
                    )
                usage.restart()
            usage.update(torch.cat(tokens))
            if done % config.usage_window == 0:
                codes |= usage.read()
                warn_of_codes(logger, done, codes["code_usage"])

            # What people watch, and checkpoints
            stopping = stop.agreed()
            last = done == config.steps
            logging = done % config.log_every == 0 or last
            foretelling = done - start == FORETELLING_STEPS < config.log_every
            evaluating = test_cache is not None and (done % config.evaluate_every == 0 or last)
            saving = done % config.checkpoint_every == 0 or stopping or last
            if codes or logging or foretelling or evaluating or saving:
                gate.read()
                watch.check(done, last=last, warn=logger.warn)
            if codes:
                logger.scalars(done, codes)
            if logging or foretelling:
                throughput.read()
                left = throughput.time_left(steps_by_flops(config, done, flops))
            if foretelling:
                logger.foretell(left)
            if logging:
                numbers = host_numbers({**logs, "mean_loss": mean_loss.read()})
                speed = {"images_per_second": throughput.images_per_second, "mfu": throughput.mfu}
                speed["hours"] = logger.hours
                logger.scalars(done, {**numbers, **rates, **speed})
                logger.progress(
                    done,
                    config.steps,
                    loss=numbers["mean_loss"],
                    learning_rate=rates["learning_rate"],
                    throughput=throughput,
                    left=left,
                )
                warn_of_images(logger, done, made.images)
            if evaluating and test_cache is not None:
                with throughput.paused(), ema.applied(tokenizer):
                    scores = evaluate_tokenizer(
                        tokenizer,
                        test_cache,
                        size=size,
                        seed=config.seed,
                        precision=precision,
                        num_images=config.num_test_images,
                        feature_net=config.feature_net,
                        batch_size=config.batch_size // distributed.world,
                        distributed=distributed,
                    )
                    if distributed.is_main:
                        sheet = reconstruction_sheet(
                            tokenizer, test_cache, size=size, seed=config.seed, precision=precision
                        )
                        logger.sheet(done, "reconstructions", sheet)
                score = scores["test_psnr"]
                logger.scalars(done, scores)
                logger.say(
                    f"step {done}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
                )
            if score is not None:
                watch.count_test(score)
            if (saving or watch.exhausted) and not watch.diverged:
                with throughput.paused():
                    checkpoints.save(done, {**state, "step": done}, score)
                    save_model(done, score)
            if stopping or watch.exhausted:
                break

    # The result
    checkpoints.close()
    stopped = done < config.steps and not watch.exhausted
    if stopped:
        logger.say(f"Stopped after step {done}; the same command goes on.")
    best = checkpoints.best() if watch.exhausted else None
    if best is not None:
        checkpoints.load(best.path, {"ema": ema})
        logger.say(f"The test has not got better for long enough; the model is that of step {best.step}.")
        save_model(best.step, best.score)
    elif done == start:
        # Nothing was left to do; a setting of the model itself, such as its sampler, may be new.
        save_model(done, checkpoints.committed()[-1].score)
    logger.close()
    distributed.barrier()
    # Their reducers hold on to the group, and would end after it otherwise.
    del reconstructor, parallel_discriminator
    distributed.close()
    if stopped:
        raise SystemExit(EXIT_INTERRUPTED)
    return run_dir / "model"


def reconstruction_losses(
    config: TokenizerTrainingConfig,
    images: Tensor,
    made: Reconstructed,
    perceptual: PerceptualLoss,
    precision: torch.dtype,
    whole_means: list[Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the losses that need no discriminator, by name, weights included only in the sums.

    Args:
        config: the run.
        images: float32 (b, 3, S, S) in [0, 1].
        made: what the tokenizer made of them.
        perceptual: the frozen network's loss.
        precision: what that network computes in.
        whole_means: as `quantizer_loss` takes them.

    Returns:
        float32 () each: the parts, and two sums: `reconstruction_loss` and `quantizer_loss`.
    """
    quantizer = quantizer_loss(
        made.quantized,
        QUANTIZERS[config.model.quantizer].losses,
        commitment_weight=config.commitment_weight,
        entropy_weight=config.entropy_weight,
        entropy_kind=config.entropy_kind,
        entropy_temperature=config.entropy_temperature,
        whole_means=whole_means,
    )
    logs = {
        "l2_loss": l2_loss(images, made.images),
        "l1_loss": l1_loss(images, made.images),
        "commitment_loss": quantizer.commitment,
        "codebook_loss": quantizer.codebook,
        "entropy_loss": quantizer.entropy,
        "quantizer_loss": quantizer.total,
    }
    with autocast(images.device, precision):
        logs["perceptual_loss"] = perceptual(made.images, images)
    logs["reconstruction_loss"] = (
        config.l2_weight * logs["l2_loss"]
        + config.l1_weight * logs["l1_loss"]
        + config.perceptual_weight * logs["perceptual_loss"]
    )
    return logs


def adversarial_losses(
    config: TokenizerTrainingConfig, reconstruction_loss: Tensor, fake_logits: Tensor, tokenizer: Tokenizer
) -> dict[str, Tensor]:
    """Return the tokenizer's adversarial loss and its weight, by name, float32 () each."""
    loss = generator_loss(fake_logits, config.adversarial_loss)
    weight = torch.full_like(loss, config.adversarial_weight, requires_grad=False)
    if config.adaptive_weight:
        weight = weight * adaptive_weight(reconstruction_loss, loss, tokenizer.decoder.conv_out.weight)
    return {"generator_loss": loss, "adversarial_weight": weight}


def judge(
    config: TokenizerTrainingConfig,
    discriminator: nn.Module,
    lecam: LeCam,
    images: Tensor,
    reconstructions: Tensor,
    step: int,
    precision: torch.dtype,
) -> dict[str, Tensor]:
    """Return what the discriminator minimizes, and its parts, by name.

    Args:
        config: the run.
        discriminator: the network, as DDP wrapped it.
        lecam: its regularization, which follows its logits.
        images: float32 (b, 3, S, S) in [0, 1].
        reconstructions: the same, without gradient.
        step: the present one; every `r1_every`-th has the R1 penalty, that many times.
        precision: what the network computes in.

    Returns:
        float32 () each; `discriminator_total_loss` is the one to minimize.
    """
    logs: dict[str, Tensor] = {}
    penalty: float | Tensor = 0.0
    if config.r1_cost > 0 and step % config.r1_every == 0:
        # In float32: second derivatives lose too much in bfloat16.
        penalty, real_logits = r1_penalty(discriminator, images, config.r1_cost)
        logs["r1_penalty"] = penalty
    else:
        with autocast(images.device, precision):
            real_logits = discriminator(images)
    with autocast(images.device, precision):
        fake_logits = discriminator(reconstructions)
    loss = discriminator_loss(real_logits, fake_logits, config.adversarial_loss)
    total = loss + penalty * config.r1_every
    if config.lecam_weight:
        logs["lecam_loss"] = lecam(real_logits.float(), fake_logits.float())
        total = total + config.lecam_weight * logs["lecam_loss"]
    return {
        **logs,
        "discriminator_loss": loss,
        "discriminator_total_loss": total,
        "real_logit": real_logits.float().mean(),
        "fake_logit": fake_logits.float().mean(),
    }


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
