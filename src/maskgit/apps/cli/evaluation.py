"""The commands that score images: `maskgit evaluate`, `stats` and `compare`.

torch and the evaluation code are imported inside the commands, so that `--help` answers at once.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from maskgit.apps.cli.evaluation_flags import (
    Also,
    Net,
    Place,
    ReconstructionFlags,
    SampleFlags,
    WorkFlags,
    load_also,
)
from maskgit.apps.cli.flags import Model, Sampler
from maskgit.apps.cli.scoring import COMMAND, Bars, complaints, print_report, score_table
from maskgit.errors import ConfigError, DataError, OutputError

if TYPE_CHECKING:
    from maskgit.evaluation.runs.evaluate import SampleEvaluation
    from maskgit.evaluation.runs.reconstruction import ReconstructionEvaluation


def evaluate(
    model: Positional[str],
    reference: Annotated[str, arg(metavar="DATA|FILE")],
    out: Path,
    net: Net,
    work: WorkFlags,
    samples: SampleFlags,
    reconstructions: ReconstructionFlags,
    sampler: Sampler,
) -> None:
    """Score a model's samples, or a tokenizer's reconstructions, and write OUT/report.json and report.html.

    Run the same command in several processes (torchrun, a Slurm array, several hosts) and they share the work. Run
    it again to resume after an interruption.

    Args:
        model: Name, folder or Hugging Face id of a model; with --reconstruction also a tokenizer's folder.
        reference: Real images, or their statistics, to compare with: anything that `maskgit stats` reads or writes,
            ADM's reference files, or statistics of pytorch-fid, clean-fid or torch-fidelity.
        out: Folder for the report and intermediate results.
    """
    evaluation: ReconstructionEvaluation | SampleEvaluation
    if reconstructions.reconstruction:
        samples.refuse()
        evaluation = _of_reconstructions(model, reference, net, work, reconstructions)
    elif (reconstructions.lpips or reconstructions.lpips_weights) and not samples.edits:
        raise ConfigError("LPIPS compares images with their originals; add --reconstruction or --edits.")
    else:
        evaluation = _of_samples(model, reference, out, net, work, samples, reconstructions, sampler)
    with Bars() as bars:
        path = evaluation.run(out, bars)
    print_report(out, path)


def _of_samples(
    model: str,
    reference: str,
    out: Path,
    net: Net,
    work: WorkFlags,
    samples: SampleFlags,
    reconstructions: ReconstructionFlags,
    sampler: Sampler,
) -> "SampleEvaluation":
    from maskgit.checkpoints.weights import weights_fingerprint
    from maskgit.data.picture_sets import open_fitting
    from maskgit.engine import build
    from maskgit.evaluation.runs.evaluate import EvaluationConfig, SampleEvaluation
    from maskgit.evaluation.runs.running import agreed_engine
    from maskgit.evaluation.runs.sampling import SampleConfig
    from maskgit.evaluation.scores.references import open_reference
    from maskgit.foundation.devices import own_device

    images = SampleConfig(
        50_000 if work.num_images is None else work.num_images,
        samples.labels,
        work.seed,
        work.batch_size,
        work.unit_size,
        samples.keep_images,
    )
    config = EvaluationConfig(
        work.splits,
        samples.num_training,
        samples.curve_images,
        show_training=samples.show_training,
        neighbours=samples.neighbours,
        neighbour_images=samples.neighbour_images,
        seeds=samples.seeds,
        edit_images=samples.edit_images if samples.edits else 0,
    )
    axes, device = samples.axes(), own_device(work.device)
    found = open_reference(reference, max_bad_share=work.max_bad_share)
    plain = Model(model, str(device)).plain()
    training = None
    if samples.training_data is not None:
        side = plain.config.image_size
        training = open_fitting(samples.training_data, side, max_bad_share=work.max_bad_share)
    stages = {"tokenizer": plain.tokenizer, "transformer": plain.transformer}
    lpips, lpips_name = reconstructions.measure(device)
    asked = {"device": plain.device, "dtype": work.dtype}
    evaluation = SampleEvaluation(
        model=plain,
        name=model,
        weights={name: weights_fingerprint(stage) for name, stage in stages.items()},
        net=net.load(device),
        features=net.features,
        reference=found,
        images=images,
        sampler=sampler.given(),
        config=config,
        training=training,
        curve=axes,
        also=load_also(samples.also, net.features, device),
        lpips=lpips,
        lpips_name=lpips_name,
        command=COMMAND.get(),
    )
    # What is wrong is told before anything is written.
    evaluation.works()
    return replace(evaluation, model=build(plain, agreed_engine(out, work.speed.mode, **asked)))


def _of_reconstructions(
    model: str, reference: str, net: Net, work: WorkFlags, flags: ReconstructionFlags
) -> "ReconstructionEvaluation":
    import torch

    from maskgit import hub
    from maskgit.checkpoints.weights import weights_fingerprint
    from maskgit.evaluation.runs.evaluate import EvaluationConfig
    from maskgit.evaluation.runs.reconstruction import ReconstructionEvaluation
    from maskgit.evaluation.scores.references import open_reference
    from maskgit.foundation.devices import own_device

    device = own_device(work.device)
    data = open_reference(reference, max_bad_share=work.max_bad_share).images
    if data is None:
        raise DataError(
            "Reconstructions are compared with the images they are made from; give images, not statistics, as "
            "--reference."
        )
    lpips, lpips_name = flags.measure(device)
    network = hub.load_tokenizer(model, device=device, dtype=getattr(torch, work.dtype or "float32"))
    return ReconstructionEvaluation(
        tokenizer=network,
        name=model,
        weights={"tokenizer": weights_fingerprint(network)},
        net=net.load(device),
        features=net.features,
        data=data,
        config=EvaluationConfig(work.splits),
        num_images=work.num_images,
        batch_size=work.batch_size,
        unit_size=work.unit_size,
        lpips=lpips,
        lpips_name=lpips_name,
        command=COMMAND.get(),
    )


def stats(
    data: Positional[str],
    out: Annotated[Path, arg(metavar="FILE.npz")],
    net: Net,
    split: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None,
    size: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the images')")] = None,
    num_images: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: all)")] = None,
    keep: int = 10_000,
    max_bad_share: float = 0.01,
    batch_size: int = 64,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Compute statistics of real images once, for `maskgit evaluate --reference FILE`.

    Args:
        data: A folder of images, Parquet files, WebDataset tars, IDX files, a packed folder, an .npz of images, or a
            dataset on the Hugging Face Hub.
        out: File to write.
        split: Split to read, by the source's name for it.
        size: Centre-crop each image to a square and resize it to this side in pixels.
        num_images: Number of images to use, evenly spaced over the data.
        keep: Number of images whose features are kept, for kernel distances, precision, recall and class agreement.
        max_bad_share: Share of images that may be unreadable, 0 to 1.
        batch_size: Images per batch.
        device: cuda, mps or cpu; auto picks the first available.
        overwrite: Replace an existing file.
    """
    if out.suffix != ".npz":
        raise OutputError(f"--out must end in .npz, but is {out}; choose another name.")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} already exists; choose another name, or add --overwrite.")
    from maskgit.data.picture_sets import open_pictures
    from maskgit.evaluation.runs.measure import measure
    from maskgit.evaluation.scores.statistics import write_statistics
    from maskgit.foundation.devices import own_device

    pictures = open_pictures(data, split=split, size=size, max_bad_share=max_bad_share)
    network = net.load(own_device(device))
    with Bars() as bars:
        found = measure(
            pictures, network, num_images=num_images, keep=keep, batch_size=batch_size, progress=bars
        )
    for line in (*complaints(found.skipped), *pictures.left_out):
        print(line)
    write_statistics(out, found.statistics, overwrite=overwrite)
    count, (height, width) = found.statistics.pooled.num_images, pictures.resolution
    print(f"{out}: {count:,} images of {height} × {width} pixels, {network.identity}")


def compare(
    a: Positional[str],
    b: Positional[str],
    net: Net,
    size: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the images')")] = None,
    training_data: Place = None,
    num_training: int = 50_000,
    also: Also = (),
    splits: int = 10,
    max_bad_share: float = 0.01,
    batch_size: int = 64,
    device: str = "auto",
    as_json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Score one set of images against another and print the scores.

    Args:
        a: The reference: real images or their statistics, anything that `maskgit stats` reads or writes.
        b: The images to score, such as a folder of samples.
        size: Centre-crop each image to a square and resize it to this side in pixels.
        training_data: The images that the model was trained on: measures the authenticity of B, the share of its
            images that are no copies of them.
        num_training: So many of them, spread evenly over them.
        also: Further networks, for distances by their features in the same pass: dinov2=FILE for FD-DINOv2, clip=FILE
            for CMMD.
        splits: Parts the images are split into to estimate confidence intervals.
        max_bad_share: Share of images that may be unreadable, 0 to 1.
        batch_size: Images per batch.
        device: cuda, mps or cpu; auto picks the first available.
        as_json: Print JSON instead of a table.
    """
    from maskgit.data.picture_sets import open_fitting, open_pictures
    from maskgit.evaluation.report.report import plain
    from maskgit.evaluation.runs.measure import compare_pictures
    from maskgit.evaluation.runs.sampling import about_samples
    from maskgit.evaluation.scores.references import open_reference
    from maskgit.foundation.devices import own_device

    first = open_reference(a, size=size, max_bad_share=max_bad_share)
    second = open_pictures(b, size=size, max_bad_share=max_bad_share)
    training = None
    if training_data is not None:
        training = open_fitting(training_data, second.resolution[0], max_bad_share=max_bad_share)
    network = net.load(own_device(device))
    others = load_also(also, net.features, network.device)
    with Bars() as bars:
        found = compare_pictures(
            first,
            second,
            network,
            net.features,
            training=training,
            num_training=num_training,
            splits=splits,
            batch_size=batch_size,
            also=others,
            progress=bars,
        )
    cost = about_samples(b).get("cost")
    sets = [data for data in (first.images, second, training) if data is not None]
    left_out = [f"{data.name}: {line}" for data in sets for line in data.left_out]
    if not as_json:
        costs = [] if cost is None else ["an image: " + ", ".join(f"{k} {v:.4g}" for k, v in cost.items())]
        print(
            "\n".join(
                [score_table(found.scores), *costs, *found.cautions, *complaints(found.skipped), *left_out]
            )
        )
        return
    values = {
        "metrics": {score.name: plain(score.value) for score in found.scores},
        "intervals": {score.name: plain(score.interval) for score in found.scores if score.interval},
        "cost": cost,
        "reference": a,
        "images": b,
        "evaluator": network.identity,
        "cautions": found.cautions,
        "skipped": {"count": len(found.skipped), "first": found.skipped[:100]},
        "left_out": left_out,
    }
    print(json.dumps(values, indent=1, ensure_ascii=False))
