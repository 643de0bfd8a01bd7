"""The command that finds a model's sampler settings."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from maskgit.apps.cli.flags import Model, Speed
from maskgit.errors import OutputError


def tune(
    model: Positional[str],
    reference: Annotated[Path, arg(metavar="FILE")],
    name: Annotated[str, arg(metavar="NAME")] = "tuned",
    out: Path = Path("presets"),
    features: Annotated[str, arg(metavar="NET")] = "effnet-lite0",
    distance: Annotated[str, arg(metavar="{kd,fd}")] = "kd",
    weights: Annotated[str | None, arg(metavar="PATH|URL", help_behavior_hint="")] = None,
    trials: int = 30,
    num_images: int = 1000,
    batch_size: int = 64,
    seed: int = 0,
    steps: tuple[int, ...] = (8, 12, 16),
    policies: tuple[str, ...] = ("confidence",),
    mask_schedules: tuple[str, ...] = ("cosine", "arccos"),
    temperature: tuple[float, float] = (0.8, 1.1),
    choice_temperature: tuple[float, float] = (1.0, 12.0),
    guidance_scale: tuple[float, float] = (1.0, 5.0),
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Search for the sampler settings with the best score, and write them as a preset for --preset.

    The score is a distance between samples and a reference in a network's features; lower is better. In Python, `maskgit.evaluation.runs.tuning.tune` takes any metric.

    Args:
        model: Name, folder or Hugging Face id of a model.
        reference: Statistics of real images, written by `maskgit stats` with the same feature network.
        name: Name of the preset; the file is OUT/NAME.json.
        out: Folder for the preset.
        features: Feature network: effnet-lite0, inception, inception-pytorch-fid, dinov2 or clip.
        distance: kd, the kernel distance, which is unbiased at any number of images, or fd, the Fréchet distance.
        weights: Its weights, if no installed package provides them.
        trials: Number of settings to try; the first are the model's own.
        num_images: Images per trial.
        batch_size: Images decoded together.
        seed: Random seed of images and search.
        steps: Step counts to try.
        policies: Policies to try.
        mask_schedules: Mask schedules to try.
        temperature: Range to search.
        choice_temperature: Range to search.
        guidance_scale: Range to search, if the model can be guided.
        device: cuda, mps or cpu; auto picks the first available.
        overwrite: Replace an existing preset.
    """
    path = out / f"{name}.json"
    if path.exists() and not overwrite:
        raise OutputError(f"{path} already exists; choose another name, or add --overwrite.")
    from maskgit.evaluation.networks.features import load_feature_net
    from maskgit.evaluation.runs.tuning import SearchSpace, feature_distance
    from maskgit.evaluation.runs.tuning import tune as search
    from maskgit.evaluation.scores.statistics import read_statistics
    from maskgit.foundation.devices import own_device
    from maskgit.sampler.presets import write_preset

    space = SearchSpace(steps, policies, mask_schedules, temperature, choice_temperature, guidance_scale)
    own = own_device(device)
    net = load_feature_net(features, own, weights=weights)
    statistics = read_statistics(reference)
    pipe = Model(model, str(own), speed=Speed(exact=True)).load()

    def report(number: int, settings: dict, score: float) -> None:
        print(f"{number:4}/{trials}  {score:10.3f}  " + ", ".join(f"{k} {v}" for k, v in settings.items()))

    found = search(
        pipe,
        feature_distance(net, statistics, distance),
        space=space,
        trials=trials,
        num_images=num_images,
        batch_size=batch_size,
        seed=seed,
        report=report,
    )
    about = {
        "model": model,
        "metric": f"{distance}_{features}",
        "score": round(found.score, 4),
        "own_score": round(found.trials[0][1], 4),
        "num_images": num_images,
        "seed": seed,
        "trials": trials,
    }
    print(write_preset(path, found.settings, about=about, overwrite=overwrite))
