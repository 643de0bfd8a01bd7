"""Training of the second stage: a transformer that predicts masked tokens.

The loop in `train_transformer` reads from top to bottom, in the same order of sections as the first stage's.

Shapes: B images of a step over all processes, b those of one process, m those of one part of an accumulated
batch, N image tokens, K codes, h × w the token grid.
Source: paper §3.1 and §4; official configs/maskgit_class_cond_config.py. The official training loop was not
released.
"""

import copy
import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from maskgit import hub
from maskgit.checkpoints.adapters import Adapter, AdapterConfig, save_adapter
from maskgit.checkpoints.weights import weights_fingerprint
from maskgit.config import ModelConfig
from maskgit.foundation.devices import copies_aside, upload
from maskgit.networks.config import TransformerConfig
from maskgit.networks.lora import adapter_state
from maskgit.networks.transformer import Transformer
from maskgit.networks.vocabulary import Vocabulary
from maskgit.pipeline import MaskGIT
from maskgit.training.distributed import (
    Distributed,
    checkpoint_blocks,
    compile_blocks,
    gradient_sync,
    parallelize,
)
from maskgit.training.evaluation import (
    RatioLosses,
    evaluate_loss,
    sample,
    warn_of_samples,
)
from maskgit.training.inputs import TokenInputs, open_tokens
from maskgit.training.numerics import attention, autocast, choose_precision, seed_step, warnings_of_speed
from maskgit.training.objectives.losses import sequence_losses
from maskgit.training.objectives.masking import draw_masks, draw_shape, draw_windows, hide_labels
from maskgit.training.optim import (
    EMA,
    clip_gradients,
    learning_rate,
    set_learning_rate,
    transformer_optimizers,
)
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
from maskgit.training.transformer_config import TransformerTrainingConfig
from maskgit.training.warm_start import first_transformer, trained_part

# What may differ when a run goes on, for it does not change what is computed.
MAY_CHANGE = (
    "out", "tracker", "data", "test_data", "tokenizer", "device", "num_workers", "log_every", "evaluate_every", "sample_every",
    "num_samples", "sampler", "checkpoint_every", "keep_last", "keep_best", "async_checkpoints", "patience", "max_diverged_steps",
    *STREAM_MAY_CHANGE,
)  # fmt: skip

# A loss this near to ln K is that of a model which has learned nothing.
STUCK = 0.02
STUCK_STEPS = 1000
# A loss this far above that of guessing is of a model that has diverged.
DIVERGED_LOSS = 1.0

# What may differ where the user says --change: from then on the run computes with it.
CHANGEABLE = (
    "steps", "learning_rate", "lr_schedule", "warmup_steps", "decay_steps", "schedule_steps", "weight_decay",
    "max_gradient_norm", "ema_decay", "extra_ema_decays", "precision", "label_smoothing", "label_dropout",
    "compute_loss_for_all", "mask_schedule", "accumulate", "compile", "gradient_checkpointing",
)  # fmt: skip


def train_transformer(config: TransformerTrainingConfig, *, change: bool = False) -> Path:
    """Train a transformer, or go on with a run that was stopped.

    Args:
        config: the run; the same config goes on where its folder `out` stopped.
        change: whether settings in `CHANGEABLE` and the test data may differ from those that the run has had; from
            its newest checkpoint on it computes with the new ones.

    Returns:
        The folder of the trained model, tokenizer and transformer with the averaged weights; or of the adapter.

    Raises:
        ConfigError: a setting does not fit the data or the run in `out`.
        CheckpointError: the tokenizer or the model to start from cannot be read.
        DataError: the data are missing, made by another tokenizer, or changed since the run's checkpoint.
        TrainingError: the loss has diverged, or the loss or the gradient is not finite.
        OutputError: the folder cannot be written, or another process trains in it.
        SystemExit: with code 75, after SIGTERM or SIGINT and a checkpoint; the same command goes on.
    """
    distributed = Distributed.init(config.device, group=config.fsdp)
    with held_run(config.out, distributed):
        return _train(config, distributed, change)


def _train(config: TransformerTrainingConfig, distributed: Distributed, change: bool) -> Path:
    # Data
    device = distributed.device
    inputs = open_tokens(config, distributed.rank, distributed.world)
    test_cache = inputs.test_cache
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

    # Network
    precision = choose_precision(config.precision, device)
    vocabulary = whole_vocabulary = Vocabulary.of(config.model)
    tokenizer = inputs.tokenizer.to(device)
    transformer = starting_transformer(config, inputs).to(device)
    if config.compile:
        compile_blocks(transformer.layers)
    if config.gradient_checkpointing:
        checkpoint_blocks(transformer.layers, lambda: attention(device, compiled=config.compile))
    network = parallelize(transformer, distributed, fsdp=config.fsdp, blocks=transformer.layers)
    trained = trained_part(transformer, config.lora)
    ema = EMA(trained, config.ema_decay)
    extra_emas = {str(decay): EMA(trained, decay) for decay in config.extra_ema_decays}

    # Optimizer
    optimizers = transformer_optimizers(
        transformer, config.optimizer, weight_decay=config.weight_decay, betas=config.betas
    )
    max_norm = math.inf if config.max_gradient_norm is None else config.max_gradient_norm

    # Checkpoints
    guess = math.log(config.model.num_codes)
    watch = Watch(
        "loss",
        guess + DIVERGED_LOSS,
        f"guessing is {guess:.2f}",
        max_diverged_steps=config.max_diverged_steps,
        patience=config.patience,
    )
    checkpoints = Checkpoints(
        run_dir,
        keep_last=config.keep_last,
        keep_best=config.keep_best,
        asynchronous=config.async_checkpoints,
    )
    state = {"transformer": ModelAndOptimizer(trained, *optimizers), "ema": ema, "step": 0}
    state |= {"watch": watch} | ({"extra_emas": extra_emas} if extra_emas else {})
    latest = checkpoints.latest()
    start = int(checkpoints.load(latest, state, newer=("extra_emas", "watch"))["step"]) if latest else 0

    # Loop
    logger = Logger(run_dir, distributed, start_step=start, tracker=config.tracker)
    result = run_dir / ("adapter" if config.lora.rank else "model")

    def save_model(step: int, score: float | None) -> None:
        weights = {name: whole(value) for name, value in ema.average.items()}
        if distributed.is_main:
            scores = {} if score is None else {"test_loss": -score}
            with telling(logger, step < config.steps):
                save_card(save_result(config, inputs, weights, result), run_dir, step, scores)

    checkpoints.report = logger.say
    for sentence in (*inputs.notes, *warnings_of_speed(config.precision, device, compiles=config.compile)):
        logger.say(sentence)
    peak = peak_flops(device, precision) * distributed.world
    flops = flops_per_image(config.model)
    throughput = Throughput(config.batch_size, flops, peak)
    mean_loss = RunningMean()
    ratio_losses = RatioLosses(device)
    # Muon cannot be told to stand still; the gate stops the run before what it spoils is kept.
    gate = UpdateGate(device, optimizers[0], watch=watch)
    transformer.train()
    pin = copies_aside(device)
    with StopSignal(distributed) as stop, closing(inputs.train.from_step(start, pin=pin)) as batches:
        done = start
        for step in range(start, start if watch.exhausted else config.steps):
            batch = next(batches)
            score: float | None = None
            rate = learning_rate(
                step,
                peak=config.learning_rate,
                schedule=config.lr_schedule,
                warmup_steps=config.warmup_steps,
                total_steps=config.steps,
                decay_steps=config.decay_steps,
                schedule_steps=config.schedule_steps,
            )
            set_learning_rate(optimizers, rate)
            seed_step(config.seed, step, distributed.rank)

            # The loss
            if config.windows:
                rows, columns = draw_shape(config.seed, step, config.windows)
                vocabulary = replace(whole_vocabulary, grid_size=rows, grid_columns=columns)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = torch.zeros((), device=device)
            uploaded = (upload(tensor, device).chunk(config.accumulate) for tensor in batch)
            parts = list(zip(*uploaded, strict=True))
            for i, (tokens, labels, numbers) in enumerate(parts):
                if config.windows:
                    tokens = draw_windows(config.seed, numbers, tokens, vocabulary.shape)
                masks = draw_masks(
                    config.seed,
                    numbers,
                    vocabulary.shape,
                    groups=vocabulary.groups,
                    mask_schedule=config.mask_schedule,
                    label_dropout=config.label_dropout,
                )
                sequence = vocabulary.sequence(hide_labels(labels, masks.drop_label), tokens, masks.mask)
                with gradient_sync(network, i == len(parts) - 1):
                    with autocast(device, precision), attention(device, compiled=config.compile):
                        logits = network(sequence, codes=vocabulary.num_codes, grid=vocabulary.shape)
                    counted = torch.ones_like(masks.mask) if config.compute_loss_for_all else masks.mask
                    losses = sequence_losses(
                        logits[:, 1:],
                        vocabulary.split(tokens).flatten(1),
                        counted.flatten(1),
                        config.label_smoothing,
                    )
                    part_loss = losses.sum() / len(batch.labels)
                    part_loss.backward()
                loss += part_loss.detach()
                ratio_losses.update(losses, masks.ratio)

            # The update
            norm = clip_gradients(trained.parameters(), max_norm)
            logs = {"loss": distributed.mean(loss), "gradient_norm": norm}
            gate.check(step, logs)
            mean_loss.update(logs["loss"])
            for optimizer in optimizers:
                optimizer.step()
            for held in (ema, *extra_emas.values()):
                held.update(trained, step)
            throughput.step()

            # What people watch, and checkpoints
            done = step + 1
            stopping = stop.agreed()
            last = done == config.steps
            logging = done % config.log_every == 0 or last
            foretelling = done - start == FORETELLING_STEPS < config.log_every
            evaluating = test_cache is not None and (done % config.evaluate_every == 0 or last)
            sampling = done % config.sample_every == 0 or last
            saving = done % config.checkpoint_every == 0 or stopping or last
            if logging or foretelling or evaluating or sampling or saving:
                gate.read()
                watch.check(done, last=last, warn=logger.warn)
            if logging or foretelling:
                throughput.read()
                left = throughput.time_left({flops: config.steps - done})
            if foretelling:
                logger.foretell(left)
            if logging:
                numbers_read = host_numbers({**logs, "mean_loss": mean_loss.read()})
                by_ratio = ratio_losses.read(distributed)
                speed = {"images_per_second": throughput.images_per_second, "mfu": throughput.mfu}
                speed["hours"] = logger.hours
                logger.scalars(done, {**numbers_read, **by_ratio, "learning_rate": rate, **speed})
                logger.progress(
                    done,
                    config.steps,
                    loss=numbers_read["mean_loss"],
                    learning_rate=rate,
                    throughput=throughput,
                    left=left,
                )
                warn_if_stuck(logger, config, done, numbers_read["loss"])
            if evaluating and test_cache is not None:
                with throughput.paused(), ema.applied(trained):
                    test_loss = evaluate_loss(
                        network,
                        test_cache,
                        whole_vocabulary,
                        classes=inputs.test_classes,
                        seed=config.seed,
                        batch_size=config.batch_size,
                        mask_schedule=config.mask_schedule,
                        precision=precision,
                        distributed=distributed,
                    )
                score = -test_loss
                logger.scalars(done, {"test_loss": test_loss})
            if sampling:
                with throughput.paused(), ema.applied(trained):
                    samples = sample(
                        network,
                        tokenizer,
                        whole_vocabulary,
                        class_names=inputs.train.class_names,
                        num_images=config.num_samples,
                        seed=config.seed,
                        sampler=config.sampler,
                        precision=precision,
                    )
                logger.sheet(done, "samples", samples.sheet)
                warn_of_samples(logger, done, samples.tokens)
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
    # Its reducer holds on to the group, and would end after it otherwise.
    del network
    distributed.close()
    if stopped:
        raise SystemExit(EXIT_INTERRUPTED)
    return result


def starting_transformer(config: TransformerTrainingConfig, inputs: TokenInputs) -> Transformer:
    """Return the transformer that a run begins with, on the CPU."""
    return first_transformer(
        config.model,
        config.seed,
        source=inputs.source,
        class_names=inputs.train.class_names,
        init_classes=config.init_classes,
        lora=config.lora,
    )


def warn_if_stuck(logger: Logger, config: TransformerTrainingConfig, step: int, loss: float) -> None:
    """Say in words if the loss is still that of guessing all codes alike."""
    guess = math.log(config.model.unit_codes)
    if step >= config.warmup_steps + STUCK_STEPS and loss > guess - STUCK:
        logger.warn(
            "stuck",
            step,
            f"The loss is {loss:.2f}, no better than guessing (ln {config.model.unit_codes} = {guess:.2f}). Try a "
            "lower learning rate or a longer warm-up, and look at the tokenizer's reconstructions.",
        )


def flops_per_image(config: TransformerConfig) -> float:
    """Return the floating-point operations of a forward and a backward pass for one image.

    Matrix products alone; the backward pass counts twice the forward one.
    """
    places, width = config.num_tokens // config.groups, config.hidden_size
    modern, adaptive = config.block == "modern", config.conditioning == "adaln"
    length = places + config.registers + (not adaptive)
    heads = config.num_heads * config.head_size
    mlp = (3 if modern else 2) * width * config.intermediate_size
    layer = 2 * length * (4 * width * heads + mlp) + 4 * length**2 * heads
    modulations = 2 * width**2 * (6 * config.num_layers + 2) if adaptive else 0
    scored = places + 1
    head = 2 * scored * (0 if modern else width**2)
    head += 2 * (scored if config.groups == 1 else places) * width * config.groups * config.unit_codes
    return 3.0 * (config.num_layers * layer + modulations + head)


def whole(value: Tensor) -> Tensor:
    """Return a tensor with all its shards, on the CPU; all processes must call it."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu()


def save_result(
    config: TransformerTrainingConfig, inputs: TokenInputs, weights: dict[str, Tensor], path: Path
) -> Path:
    """Write a run's model folder, or its adapter's, and return it."""
    if config.lora.rank:
        assert inputs.source is not None
        assert config.init_from is not None
        about = AdapterConfig(
            base=config.init_from,
            base_fingerprint=weights_fingerprint(inputs.source.transformer),
            lora=config.lora,
            num_classes=config.model.num_classes,
            class_names=inputs.train.class_names,
            label_dropout=config.label_dropout,
            sampler=config.sampler,
        )
        return save_adapter(Adapter(about, adapter_state(weights)), path)
    transformer = Transformer(config.model)
    transformer.load_state_dict(weights, strict=True)
    model_config = ModelConfig(
        tokenizer=inputs.tokenizer.config,
        transformer=config.model,
        image_size=inputs.tokenizer.patch_size * config.model.grid_size,
        class_names=inputs.train.class_names,
        label_dropout=config.label_dropout,
        sampler=config.sampler,
    )
    tokenizer = copy.deepcopy(inputs.tokenizer).cpu()
    return hub.save_model(MaskGIT(model_config, tokenizer, transformer.eval()), path)
