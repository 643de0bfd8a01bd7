"""A model from a run's checkpoint: of any step, and of whichever average of the weights does best."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskgit.data.image_cache import ImageCache
from maskgit.errors import CheckpointError, ConfigError, OutputError
from maskgit.evaluation.networks.features import load_feature_net
from maskgit.evaluation.runs.measure import measure
from maskgit.evaluation.runs.tuning import feature_distance
from maskgit.evaluation.scores.references import open_reference
from maskgit.foundation.files import expand
from maskgit.hub import load_model, save_tokenizer
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.vocabulary import Vocabulary
from maskgit.training.distributed import Distributed
from maskgit.training.evaluation import evaluate_loss, evaluate_tokenizer
from maskgit.training.inputs import TokenInputs, open_images, open_tokens
from maskgit.training.optim import EMA
from maskgit.training.run.card import save_card
from maskgit.training.run.checkpoint import Checkpoints, Committed
from maskgit.training.run.folder import RUN
from maskgit.training.tokenizer_config import TokenizerTrainingConfig
from maskgit.training.train_transformer import save_result, starting_transformer
from maskgit.training.transformer_config import TransformerTrainingConfig
from maskgit.training.warm_start import trained_part

RAW = "raw"
# The feature net of --reference, which needs no download.
FEATURES = "effnet-lite0"


class SavedModel(NamedTuple):
    """A model that was saved.

    Attributes:
        path: its folder.
        step: the checkpoint's.
        ema: which weights were taken: a decay as text, or "raw".
        measure: what decided: "test_loss", "test_psnr" (higher is better), "EffNet-FD" of samples or "EffNet-rFD" of
            reconstructions.
        scores: its values by those names; empty where there was nothing to decide.
    """

    path: Path
    step: int
    ema: str
    measure: str
    scores: dict[str, float]


def save_model(
    run_dir: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    best: bool = False,
    ema: str | None = None,
    reference: str | Path | None = None,
    num_images: int = 1000,
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
        reference: real images to compare averages by instead: by the Fréchet distance in EfficientNet-Lite0's features
            of samples to them for a transformer (images or statistics, as `open_reference` takes them), and of their
            reconstructions to them for a tokenizer (a packed image cache).
        num_images: samples for each average, where there is a reference.

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
        network: Any = transformer
        trained: Any = trained_part(transformer, config.lora)
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
    if stage == "transformer":
        measured, score = _transformer_score(config, inputs, network, trained, reference, num_images)
    else:
        measured, score = _tokenizer_score(config, network, reference)
    scores: dict[str, float] = {}
    if len(candidates) > 1 and score is not None:
        for name, weights in candidates.items():
            trained.load_state_dict(weights)
            scores[name] = score()
    better = max if measured == "test_psnr" else min
    name = better(scores, key=lambda key: scores[key]) if scores else next(iter(candidates))
    if stage == "transformer":
        path = save_result(config, inputs, candidates[name], expand(out))
    else:
        network.load_state_dict(candidates[name])
        path = save_tokenizer(network, expand(out))
    save_card(
        path, run_dir, chosen.step, {f"{measured} of EMA {key}": value for key, value in scores.items()}
    )
    return SavedModel(path, chosen.step, name, measured, scores)


def _transformer_score(
    config: TransformerTrainingConfig,
    inputs: TokenInputs,
    transformer: nn.Module,
    trained: nn.Module,
    reference: str | Path | None,
    num_images: int,
) -> tuple[str, Callable[[], float] | None]:
    """Return what the weights in `trained`, of `transformer`, are compared by, and how; None where nothing is there."""
    cache = inputs.test_cache
    if reference is not None:
        net = load_feature_net(FEATURES, torch.device("cpu"))
        real = open_reference(reference)
        statistics = real.statistics
        if statistics is None:
            assert real.images is not None
            statistics = measure(real.images, net).statistics
        distance = feature_distance(net, statistics, "fd")
        labels = torch.arange(num_images) % config.model.num_classes

        def of_samples() -> float:
            with tempfile.TemporaryDirectory() as folder:
                model = load_model(save_result(config, inputs, trained.state_dict(), Path(folder) / "model"))
                return float(distance(model.generate(labels, seed=config.seed).images, labels))

        return "EffNet-FD", of_samples
    if cache is None:
        return "test_loss", None

    def of_test_data() -> float:
        return evaluate_loss(
            transformer,
            cache,
            Vocabulary.of(config.model),
            classes=inputs.test_classes,
            seed=config.seed,
            batch_size=config.batch_size,
            mask_schedule=config.mask_schedule,
            precision=torch.float32,
            distributed=Distributed(0, 1, torch.device("cpu")),
        )

    return "test_loss", of_test_data


def _tokenizer_score(
    config: TokenizerTrainingConfig, tokenizer: Tokenizer, reference: str | Path | None
) -> tuple[str, Callable[[], float] | None]:
    """Return what a tokenizer's weights are compared by, and how; None where nothing is there."""
    inputs = open_images(config)
    cache = inputs.test_cache if reference is None else ImageCache.open(expand(reference))
    name = "test_psnr" if reference is None else "test_rfd"
    if cache is None:
        return name, None

    def score() -> float:
        return evaluate_tokenizer(
            tokenizer,
            cache,
            size=inputs.size,
            seed=config.seed,
            precision=torch.float32,
            num_images=config.num_test_images if reference is None else None,
            feature_net=None if reference is None else FEATURES,
            batch_size=config.batch_size,
            distributed=Distributed(0, 1, torch.device("cpu")),
        )[name]

    return "test_psnr" if reference is None else "EffNet-rFD", score


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
