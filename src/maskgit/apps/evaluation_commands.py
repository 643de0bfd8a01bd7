"""The commands that score images: `maskgit evaluate`, `stats` and `compare`.

torch and the evaluation code are imported inside the commands, so that `--help` answers at once.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from maskgit.apps.flags import Model, Sampler
from maskgit.apps.scoring import Bars, complaints, own_device, print_report, score_table
from maskgit.errors import ConfigError, DataError, OutputError

if TYPE_CHECKING:
    import torch

    from maskgit.evaluation.features import FeatureNet

Place = Annotated[str | None, arg(metavar="DATA", help_behavior_hint="")]
Weights = Annotated[str | None, arg(metavar="PATH|URL", help_behavior_hint="")]
Count = Annotated[int | None, arg(metavar="INT", help_behavior_hint="")]


def evaluate(
    model: Positional[str],
    reference: Annotated[str, arg(metavar="DATA|FILE")],
    out: Path,
    sampler: Sampler,
    num_images: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: 50000; all with --reconstruction)")
    ] = None,
    labels: Literal["balanced", "dataset"] = "balanced",
    features: Annotated[str, arg(metavar="NET")] = "effnet-lite0",
    weights: Weights = None,
    feature_size: Count = None,
    training_data: Place = None,
    curve: Annotated[tuple[str, ...], arg(metavar="KEY=A,B,…", help_behavior_hint="")] = (),
    curve_images: int = 1000,
    reconstruction: bool = False,
    lpips: Annotated[str | None, arg(metavar="{alex,vgg}", help_behavior_hint="")] = None,
    lpips_weights: Annotated[tuple[str, ...], arg(metavar="PATH|URL", help_behavior_hint="")] = (),
    classification_accuracy: Place = None,
    epochs: int = 14,
    keep_images: Literal["none", "npz", "png"] = "none",
    num_training: int = 50_000,
    splits: int = 10,
    seed: int = 0,
    batch_size: int = 64,
    unit_size: int = 512,
    stale_seconds: float = 300.0,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Score a model's images, or a tokenizer's reconstructions, and write OUT/report.json and OUT/report.html.

    Any number of processes may be given the same command and folder, under torchrun, in a Slurm array or on several
    hosts: they share the work. The same command goes on where it was stopped.

    Args:
        model: A model's name, its folder, or a Hugging Face id; with --reconstruction a tokenizer's folder will do.
        reference: Real images to compare with, or statistics of them: what `maskgit stats` reads and writes, or ADM's
            reference files.
        out: The folder of the report and of the work.
        num_images: How many images.
        labels: Classes in equal numbers, or drawn as often as the training data (else the reference) has them.
        features: The feature net; scores are named after it, and only Inception's are FID.
        weights: The feature net's weights, where they do not come with a package.
        feature_size: Pixels a side that effnet-lite0 sees.
        training_data: The images that the model was trained on, which are searched for copies.
        curve: Further, smaller runs with other sampler settings, such as steps=4,8,12 policy=confidence,halton: all
            combinations.
        curve_images: Images of each of these runs.
        reconstruction: Score the tokenizer's reconstructions of the reference images instead.
        lpips: With --reconstruction: measure LPIPS with this network.
        lpips_weights: Its two weights files: the network's and LPIPS's own.
        classification_accuracy: Labelled real test images: train a small classifier on the samples and test it on them.
        epochs: Passes over the samples when that classifier is trained.
        keep_images: Keep the samples in OUT/work/samples, as arrays or as PNG.
        num_training: Training images that are searched, spread evenly over them.
        splits: Parts of the images that intervals are taken over.
        seed: With an image's index decides it.
        batch_size: Images decoded together; part of what decides their last bit.
        unit_size: Images of a unit of work, which is lost when a process is killed.
        stale_seconds: How old the lock of another host's process must be to count as left behind.
        device: cuda, mps or cpu; auto takes the first that is there.
        dtype: The type the networks compute in.
    """
    from maskgit.apps.picture_sets import open_pictures, open_reference
    from maskgit.evaluation.evaluate import EvaluationConfig, SampleEvaluation
    from maskgit.evaluation.features import load_feature_net
    from maskgit.evaluation.sampling import SampleConfig
    from maskgit.training.checkpoint import weights_fingerprint

    config = EvaluationConfig(splits, num_training, curve_images, epochs, stale_seconds=stale_seconds)
    points = dict(_axis(text) for text in curve)
    chosen = own_device(device)
    found = open_reference(reference)
    net = load_feature_net(features, chosen, size=feature_size, weights=weights)
    if reconstruction:
        _only_for_samples(
            curve=curve, training_data=training_data, classification_accuracy=classification_accuracy
        )
        size = {"num_images": num_images, "batch_size": batch_size, "unit_size": unit_size}
        measure = _lpips(lpips, lpips_weights, chosen)
        _reconstruct(model, found.images, net, features, config, out, measure, dtype, size)
        return
    if lpips or lpips_weights:
        raise ConfigError("LPIPS compares reconstructions with their originals: say --reconstruction too.")
    wanted = SampleConfig(num_images or 50_000, labels, seed, batch_size, unit_size, keep_images)
    pipe = Model(model, str(chosen), dtype).load()
    evaluation = SampleEvaluation(
        pipe,
        model,
        {name: weights_fingerprint(getattr(pipe, name)) for name in ("tokenizer", "transformer")},
        net,
        features,
        found,
        wanted,
        sampler.given(),
        config,
        None if training_data is None else open_pictures(training_data),
        None if classification_accuracy is None else open_pictures(classification_accuracy),
        points,
    )
    with Bars() as bars:
        path = evaluation.run(out, bars)
    print_report(out, path)


def stats(
    data: Positional[str],
    out: Annotated[Path, arg(metavar="FILE.npz")],
    features: Annotated[str, arg(metavar="NET")] = "effnet-lite0",
    weights: Weights = None,
    feature_size: Count = None,
    split: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None,
    size: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the images')")] = None,
    num_images: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: all)")] = None,
    keep: int = 10_000,
    max_bad_share: float = 0.01,
    batch_size: int = 64,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Measure real images once, so that samples can be compared with them: `maskgit evaluate --reference FILE`.

    Args:
        data: A folder of pictures, Parquet files, WebDataset tars, IDX files, a packed folder, an .npz of images, or a
            name on the Hugging Face Hub.
        out: The file to write.
        features: The feature net.
        weights: Its weights, where they do not come with a package.
        feature_size: Pixels a side that effnet-lite0 sees.
        split: Which part, as the source names it.
        size: Cut the middle square of each picture and resize it to so many pixels a side.
        num_images: So many images, spread evenly over the data.
        keep: Images whose features are kept, for kernel distances, precision, recall and class agreement.
        max_bad_share: Largest share of images that may be unreadable.
        batch_size: Images read together.
        device: cuda, mps or cpu; auto takes the first that is there.
        overwrite: Replace a file that is there.
    """
    if out.suffix != ".npz":
        raise OutputError(f"Statistics are written as .npz, but --out is {out}: choose another name.")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} is there already; choose another name, or say --overwrite.")
    from maskgit.apps.picture_sets import open_pictures
    from maskgit.evaluation.features import load_feature_net
    from maskgit.evaluation.measure import measure
    from maskgit.evaluation.statistics import write_statistics

    net = load_feature_net(features, own_device(device), size=feature_size, weights=weights)
    pictures = open_pictures(data, split=split, size=size, max_bad_share=max_bad_share)
    with Bars() as bars:
        found = measure(pictures, net, num_images=num_images, keep=keep, batch_size=batch_size, progress=bars)
    for line in complaints(found.skipped):
        print(line)
    write_statistics(out, found.statistics, overwrite=overwrite)
    height, width = pictures.resolution
    print(
        f"{out}: {found.statistics.pooled.num_images:,} images of {height} × {width} pixels, {net.identity}"
    )


def compare(
    a: Positional[str],
    b: Positional[str],
    features: Annotated[str, arg(metavar="NET")] = "effnet-lite0",
    weights: Weights = None,
    feature_size: Count = None,
    size: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the images')")] = None,
    splits: int = 10,
    max_bad_share: float = 0.01,
    batch_size: int = 64,
    device: str = "auto",
    as_json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Score the images of one place against those of another, and print the scores.

    Args:
        a: The reference: a folder of real images, or whatever else `maskgit stats` reads or writes.
        b: The images to score, such as a folder of samples.
        features: The feature net; scores are named after it, and only Inception's are FID.
        weights: Its weights, where they do not come with a package.
        feature_size: Pixels a side that effnet-lite0 sees.
        size: Cut the middle square of each picture and resize it to so many pixels a side.
        splits: Parts of the images that intervals are taken over.
        max_bad_share: Largest share of images that may be unreadable.
        batch_size: Images read together.
        device: cuda, mps or cpu; auto takes the first that is there.
        as_json: Print JSON in place of a table.
    """
    from maskgit.apps.picture_sets import open_pictures, open_reference
    from maskgit.evaluation.features import load_feature_net
    from maskgit.evaluation.measure import compare_pictures
    from maskgit.evaluation.references import Reference
    from maskgit.evaluation.report import plain

    net = load_feature_net(features, own_device(device), size=feature_size, weights=weights)
    options: dict[str, Any] = {"size": size, "max_bad_share": max_bad_share}
    if a.endswith(".npz"):
        first = open_reference(a)
    else:
        real = open_pictures(a, **options)
        first = Reference(real.name, None, real, real.fingerprint)
    second = open_pictures(b, **options)
    with Bars() as bars:
        found = compare_pictures(
            first, second, net, features, splits=splits, batch_size=batch_size, progress=bars
        )
    if as_json:
        print(
            json.dumps(
                {
                    "metrics": {score.name: plain(score.value) for score in found.scores},
                    "intervals": {
                        score.name: list(score.interval) for score in found.scores if score.interval
                    },
                    "reference": a,
                    "images": b,
                    "evaluator": net.identity,
                    "cautions": found.cautions,
                    "skipped": found.skipped[:100],
                },
                indent=1,
            )
        )
        return
    print(score_table(found.scores))
    for line in (*found.cautions, *complaints(found.skipped)):
        print(line)


def _reconstruct(
    model: str,
    data: Any,
    net: "FeatureNet",
    features: str,
    config: Any,
    out: Path,
    measure: tuple[Any, str | None],
    dtype: str,
    size: dict[str, Any],
) -> None:
    import torch

    from maskgit import hub
    from maskgit.evaluation.reconstruction import ReconstructionEvaluation
    from maskgit.training.checkpoint import weights_fingerprint

    if data is None:
        raise DataError(
            "Reconstructions are compared with the images they are made from: give --reference images, "
            "not statistics."
        )
    network = hub.load_tokenizer(model, device=net.device, dtype=getattr(torch, dtype))
    evaluation = ReconstructionEvaluation(
        network,
        model,
        {"tokenizer": weights_fingerprint(network)},
        net,
        features,
        data,
        config,
        lpips=measure[0],
        lpips_name=measure[1],
        **size,
    )
    with Bars() as bars:
        path = evaluation.run(out, bars)
    print_report(out, path)


def _only_for_samples(**flags: Any) -> None:
    for name, value in flags.items():
        if value:
            raise ConfigError(
                f"--{name.replace('_', '-')} is about samples: leave it out with --reconstruction."
            )


def _lpips(name: str | None, weights: tuple[str, ...], device: "torch.device") -> tuple[Any, str | None]:
    """Return the LPIPS network and what it is called with its weights, if any is asked for."""
    if name is None:
        if weights:
            raise ConfigError("--lpips-weights are given, but no --lpips: say which network, alex or vgg.")
        return None, None
    from maskgit.download import sha256
    from maskgit.evaluation.lpips import load_lpips
    from maskgit.evaluation.weights import local_file

    network = load_lpips(name, weights=weights, device=device)
    digests = "+".join(sha256(local_file(place))[:12] for place in weights)
    return network, f"{name}, weights {digests}"


def _axis(text: str) -> tuple[str, tuple[Any, ...]]:
    """Return a sampler setting and its values of "key=a,b,…"."""
    name, equals, values = text.partition("=")
    if not equals or not name or not all(values.split(",")):
        raise ConfigError(f"--curve takes KEY=A,B,…, such as steps=4,8,12, but was given {text!r}.")

    def value(word: str) -> Any:
        try:
            return json.loads(word)
        except ValueError:
            return word

    return name.replace("-", "_"), tuple(value(word) for word in values.split(","))
