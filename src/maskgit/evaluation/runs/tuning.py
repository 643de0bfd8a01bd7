"""The search for a model's sampler settings, by Optuna.

Every trial makes the same images, from the same seed, so that settings and not luck are compared.

Shapes: B images, H × W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskgit.errors import ConfigError, DataError, install_extra
from maskgit.evaluation.metrics.distributions import kernel_distance
from maskgit.evaluation.networks.features import FeatureNet
from maskgit.evaluation.scores.statistics import Collector, ImageStatistics, check_comparable, compare
from maskgit.foundation.checks import Config, check_choice, check_count, check_range, check_seed
from maskgit.pipeline import MaskGIT
from maskgit.sampler.policies import POLICIES
from maskgit.sampler.schedules import check_mask_schedule

# Images float32 (B, 3, H, W) in [0, 1] and their labels int64 (B,) → a score.
Metric = Callable[[Tensor, Tensor], float]
DIRECTIONS = ("minimize", "maximize")


@dataclass(frozen=True)
class SearchSpace(Config):
    """What is tried: choices, and ranges (low, high) of which the ends are included.

    Attributes:
        steps: numbers of steps.
        policies: names in `policies.POLICIES`, with their own parameters as they are.
        mask_schedules: names in `schedules`.
        temperature, choice_temperature, guidance_scale: ranges; one of equal ends is fixed.
    """

    steps: tuple[int, ...] = (8, 12, 16)
    policies: tuple[str, ...] = ("confidence",)
    mask_schedules: tuple[str, ...] = ("cosine", "arccos")
    temperature: tuple[float, ...] = (0.8, 1.1)
    choice_temperature: tuple[float, ...] = (1.0, 12.0)
    guidance_scale: tuple[float, ...] = (1.0, 5.0)

    def validate(self) -> None:
        for name in ("steps", "policies", "mask_schedules"):
            if not getattr(self, name):
                raise ConfigError(f"{name} lists nothing to try.")
        for steps in self.steps:
            check_range("steps", steps, 1, 10_000)
        for policy in self.policies:
            check_choice("policy", policy, POLICIES)
        for schedule in self.mask_schedules:
            check_mask_schedule(schedule)
        for name in ("temperature", "choice_temperature", "guidance_scale"):
            low_and_high = getattr(self, name)
            if len(low_and_high) != 2 or not 0 <= low_and_high[0] <= low_and_high[1] <= 1e6:
                raise ConfigError(f"{name} must be a range LOW HIGH from 0 on, but is {list(low_and_high)}.")


class Tuned(NamedTuple):
    """The best trial, and all of them.

    Attributes:
        settings: fields of `SamplerConfig`.
        score: the metric's.
        trials: (settings, score) of every trial, in order.
    """

    settings: dict[str, Any]
    score: float
    trials: list[tuple[dict[str, Any], float]]


def tune(
    model: MaskGIT,
    metric: Metric,
    *,
    space: SearchSpace | None = None,
    direction: str = "minimize",
    trials: int = 30,
    num_images: int = 500,
    batch_size: int = 64,
    seed: int = 0,
    report: Callable[[int, dict[str, Any], float], None] | None = None,
) -> Tuned:
    """Find sampler settings by which a model scores best.

    Args:
        model: the model; its classes are asked for in equal numbers.
        metric: scores images float32 (B, 3, H, W) in [0, 1] and their labels int64 (B,); with many images
            of a large model, remember that all of them are held at once.
        space: what is tried; a model without label dropout is not guided, whatever it says. None is the default.
        direction: "minimize" or "maximize".
        trials: settings that are tried; the first are the model's own.
        num_images: images of a trial.
        batch_size: images decoded together.
        seed: of the images and of the search.
        report: called after each trial with its number, settings and score.

    Returns:
        The best settings; a metric that looks at few images flatters them, so score them again on others.

    Raises:
        ConfigError: a setting is out of range, or Optuna is not installed.

    Source: Akiba et al. (arXiv 1907.10902), with its TPE sampler.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(f"Tuning needs Optuna: {install_extra('tune')}.") from error
    space = space or SearchSpace()
    trials = check_count("trials", trials, 1, 100_000)
    num_images = check_count("num_images", num_images, 1, 1_000_000)
    seed = check_seed(seed)
    check_choice("direction", direction, DIRECTIONS)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction=direction,  # type: ignore[arg-type]
        sampler=optuna.samplers.TPESampler(seed=seed % 2**32),
    )
    guided = bool(model.config.label_dropout)
    labels = torch.arange(num_images) % model.config.transformer.num_classes
    done: list[tuple[dict[str, Any], float]] = []

    def score(settings: dict[str, Any]) -> float:
        made = model.generate(labels, seed=seed, batch_size=batch_size, **settings)
        value = float(metric(made.images, labels))
        done.append((settings, value))
        if report is not None:
            report(len(done), settings, value)
        return value

    own = model.config.sampler
    first = {name: getattr(own, name) for name in ("steps", "policy", "mask_schedule", "temperature")}
    score(first | {"choice_temperature": own.choice_temperature, "guidance_scale": own.guidance_scale})
    study.optimize(lambda trial: score(_suggest(trial, space, guided)), n_trials=trials - 1)
    best = (min if direction == "minimize" else max)(done, key=lambda trial: trial[1])
    return Tuned(*best, done)


def _suggest(trial: Any, space: SearchSpace, guided: bool) -> dict[str, Any]:
    settings = {
        "steps": trial.suggest_categorical("steps", space.steps),
        "policy": trial.suggest_categorical("policy", space.policies),
        "mask_schedule": trial.suggest_categorical("mask_schedule", space.mask_schedules),
    }
    for name in ("temperature", "choice_temperature"):
        settings[name] = round(trial.suggest_float(name, *getattr(space, name)), 3)
    if guided:
        settings["guidance_scale"] = round(trial.suggest_float("guidance_scale", *space.guidance_scale), 3)
    return settings


DISTANCES = ("kd", "fd")


def feature_distance(
    net: FeatureNet, reference: ImageStatistics, distance: str = "kd", *, batch_size: int = 64
) -> Metric:
    """Return the metric that is a distance of a net's features to a reference; lower is better.

    Args:
        net: the feature net.
        reference: statistics that it made.
        distance: "kd", the kernel distance, which is unbiased however few images there are; or "fd", the Fréchet
            distance, whose bias at a few thousand images is larger than what settings change.
        batch_size: images measured at once.

    Raises:
        DataError: the reference keeps no features, which a kernel distance reads; or, when the metric is asked, it was
            made with another net.
    """
    check_choice("distance", distance, DISTANCES)
    batch_size = check_count("batch_size", batch_size, 1, 65_536)
    real = reference.features
    if distance == "kd" and (real is None or len(real) < 2):
        raise DataError(
            "The reference keeps no features, which a kernel distance reads: make it with `maskgit stats`, or choose "
            "fd."
        )

    def metric(images: Tensor, labels: Tensor) -> float:
        collector = Collector(net, keep=len(images) if distance == "kd" else 0)
        for batch in images.split(batch_size):
            collector.add(batch)
        found = collector.finish()
        if distance == "fd" or real is None or found.features is None:
            return compare(reference, found).pooled.distance
        check_comparable(reference, found)
        size = min(len(real), len(found.features))
        return kernel_distance(real, found.features, subsets=1, subset_size=size).mean

    return metric
