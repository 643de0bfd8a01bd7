"""A model from a run's checkpoint: of any step, and of whichever average of the weights does best."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskgit.errors import CheckpointError, ConfigError, OutputError
from maskgit.foundation.files import expand
from maskgit.hub import save_tokenizer
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.vocabulary import Vocabulary
from maskgit.training.distributed import Distributed
from maskgit.training.evaluation import evaluate_loss, evaluate_tokenizer
from maskgit.training.fine_tuning import trained_part
from maskgit.training.inputs import open_images, open_tokens
from maskgit.training.optim import EMA
from maskgit.training.run.card import save_card
from maskgit.training.run.checkpoint import Checkpoints, Committed
from maskgit.training.run.folder import RUN
from maskgit.training.tokenizer_config import TokenizerTrainingConfig
from maskgit.training.train_transformer import save_result, starting_transformer
from maskgit.training.transformer_config import TransformerTrainingConfig

RAW = "raw"


class SavedModel(NamedTuple):
    """A model that was saved.

    Attributes:
        path: its folder.
        step: the checkpoint's.
        ema: which weights were taken: a decay as text, or "raw".
        scores: the test scores that decided, by those names: losses of a transformer (lower is better), PSNRs of a
            tokenizer (higher is better); empty where there was nothing to decide.
    """

    path: Path
    step: int
    ema: str
    scores: dict[str, float]


def save_model(
    run_dir: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    best: bool = False,
    ema: str | None = None,
) -> SavedModel:
    """Write a model folder from one of a run's checkpoints, on the CPU.

    A checkpoint's metadata is unpickled: give runs of your own.

    Args:
        run_dir: the run's folder, which nothing is written to.
        out: the folder to write.
        step: the checkpoint's; None takes the newest.
        best: take the checkpoint of the best test score instead.
        ema: a decay that the run keeps, such as "0.999", or "raw" for the weights as they are trained. None takes the
            only average, or of several the one that does best on the run's test data.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        ConfigError: there is no such average, or something that the run was given is not there any more.
        OutputError: the folder does not hold a run that can be read, or `out` cannot be written.
    """
    run_dir = expand(run_dir)
    try:
        values = json.loads((run_dir / RUN).read_text("utf-8"))["config"]
        stage = "transformer" if "mask_schedule" in values else "tokenizer"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{run_dir} does not hold a training run that can be read.") from error
    checkpoints = Checkpoints(run_dir)
    chosen = _chosen(checkpoints, run_dir, step, best)
    kind = TransformerTrainingConfig if stage == "transformer" else TokenizerTrainingConfig
    # Where the folder is now, and what it takes to read rather than to train.
    config: Any = kind.from_dict({**values, "out": str(run_dir)})
    if stage == "transformer":
        inputs = open_tokens(config)
        transformer = starting_transformer(config, inputs)
        network: nn.Module = transformer
        trained = trained_part(transformer, config.lora)
    else:
        trained = network = Tokenizer(config.model)
    state: dict[str, Any] = {
        "ema": EMA(trained, config.ema_decay),
        "extra_emas": {str(decay): EMA(trained, decay) for decay in config.extra_ema_decays},
        stage: {"model": trained.state_dict()},
    }
    loaded = checkpoints.load(chosen.path, state, newer=("extra_emas",))
    candidates: dict[str, dict[str, Tensor]] = {str(config.ema_decay): loaded["ema"].average}
    candidates |= {name: average.average for name, average in loaded["extra_emas"].items()}
    if ema is not None:
        known = {**candidates, RAW: loaded[stage]["model"]}
        if ema not in known:
            raise ConfigError(f"ema is one of {', '.join(known)} in this run, but was given as {ema}.")
        candidates = {ema: known[ema]}
    alone = Distributed(0, 1, torch.device("cpu"))
    scores: dict[str, float] = {}
    if stage == "transformer":
        if len(candidates) > 1 and inputs.test_cache is not None:
            for name, weights in candidates.items():
                trained.load_state_dict(weights)
                scores[name] = evaluate_loss(
                    network,
                    inputs.test_cache,
                    Vocabulary.of(config.model),
                    classes=inputs.test_classes,
                    seed=config.seed,
                    batch_size=config.batch_size,
                    mask_schedule=config.mask_schedule,
                    precision=torch.float32,
                    distributed=alone,
                )
        name = min(scores, key=lambda key: scores[key]) if scores else next(iter(candidates))
        path = save_result(config, inputs, candidates[name], expand(out))
    else:
        images = open_images(config)
        assert isinstance(network, Tokenizer)
        if len(candidates) > 1 and images.test_cache is not None:
            for name, weights in candidates.items():
                network.load_state_dict(weights)
                scores[name] = evaluate_tokenizer(
                    network,
                    images.test_cache,
                    size=images.size,
                    seed=config.seed,
                    precision=torch.float32,
                    num_images=config.num_test_images,
                    feature_net=None,
                    batch_size=config.batch_size,
                    distributed=alone,
                )["test_psnr"]
        name = max(scores, key=lambda key: scores[key]) if scores else next(iter(candidates))
        network.load_state_dict(candidates[name])
        path = save_tokenizer(network, expand(out))
    measured = "test_loss" if stage == "transformer" else "test_psnr"
    save_card(
        path, run_dir, chosen.step, {f"{measured} of EMA {key}": value for key, value in scores.items()}
    )
    return SavedModel(path, chosen.step, name, scores)


def _chosen(checkpoints: Checkpoints, run_dir: Path, step: int | None, best: bool) -> Committed:
    """Return the checkpoint that is asked for."""
    committed = checkpoints.committed()
    if step is not None and best:
        raise ConfigError("Give either step or best: both name a checkpoint.")
    if best:
        found = checkpoints.best()
        if found is None:
            raise CheckpointError(
                f"No checkpoint in {run_dir} has a test score. They have one where checkpoint_every is a multiple of "
                "evaluate_every and the run has test_data; leave --best out to take the newest."
            )
        return found
    for entry in reversed(committed):
        if step in (None, entry.step):
            return entry
    there = ", ".join(str(entry.step) for entry in committed) or "none"
    raise CheckpointError(
        f"{run_dir} holds no whole checkpoint{'' if step is None else f' of step {step}'}; those of steps: {there}."
    )
