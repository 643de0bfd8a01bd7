"""A model's images, made, scored and written up by any number of processes.

The report is a function of the finished units alone, which are read in their order, so that it is the same
after a kill, and whoever made them.

Shapes: N samples.
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskgit.data.picture_sets import Pictures, as_floats
from maskgit.data.rows import check_share
from maskgit.errors import DataError
from maskgit.evaluation.networks.features import FeatureNet
from maskgit.evaluation.networks.lpips import LPIPS
from maskgit.evaluation.report.report import Picture, Point, Repeats, Report
from maskgit.evaluation.runs.cost import cost_of_samples
from maskgit.evaluation.runs.edits import MASKS, Edits
from maskgit.evaluation.runs.running import Progress, run_works
from maskgit.evaluation.runs.sampling import (
    RealImages,
    SampleConfig,
    Samples,
    gather,
    join_samples,
    rebuild,
    shown_indices,
)
from maskgit.evaluation.scores import memorisation
from maskgit.evaluation.scores.baselines import Context, of_halves, of_training
from maskgit.evaluation.scores.classwise import (
    ClassJudge,
    Labelled,
    Matched,
    best_and_worst,
    matched_classes,
)
from maskgit.evaluation.scores.edits import Edited, edit_scores
from maskgit.evaluation.scores.names import Names, Score, with_baselines
from maskgit.evaluation.scores.references import (
    Reference,
    evaluator_identity,
    of_net,
    reference_statistics,
)
from maskgit.evaluation.scores.scores import distances, manifolds
from maskgit.evaluation.scores.statistics import ImageStatistics
from maskgit.foundation.checks import Config, check_range
from maskgit.foundation.files import expand
from maskgit.foundation.units import Arrays, Units, Work
from maskgit.pipeline import MaskGIT

# The samples in one file, beside the report, where they are kept as npz.
SAMPLES = "samples.npz"
# Real images whose reconstructions stand beside the samples.
NUM_REBUILT = 16


@dataclass(frozen=True)
class EvaluationConfig(Config):
    """How thoroughly images are scored.

    Attributes:
        splits: parts of the images that intervals are taken over.
        num_training: training images that are searched for copies, spread evenly over them.
        curve_images: images of each run of a curve.
        num_examples: pictures of each class that is shown.
        show_training: whether the page shows training images beside the samples that they are nearest to; a page
            that is published may not be free to.
        neighbours: the neighbour that decides the radius of a ball, for precision, recall, density and coverage.
        neighbour_images: of so many samples and real images these are, at most.
        edit_images: real images of which parts are filled in with each kind of mask; 0 leaves edits out.
        seeds: seeds that the samples, and the edits, are made with, from the images' own one on.
    """

    splits: int = 10
    num_training: int = 50_000
    curve_images: int = 1000
    num_examples: int = 4
    show_training: bool = True
    neighbours: int = 3
    neighbour_images: int = 2000
    edit_images: int = 0
    seeds: int = 1

    def validate(self) -> None:
        check_range("splits", self.splits, 2, 1000)
        check_range("num_training", self.num_training, 2, 10_000_000)
        check_range("curve_images", self.curve_images, 2, 10_000_000)
        check_range("num_examples", self.num_examples, 1, 32)
        check_range("neighbours", self.neighbours, 1, 1000)
        check_range("neighbour_images", self.neighbour_images, 2, 20_000)
        check_range("edit_images", self.edit_images, 0, 10_000_000)
        check_range("seeds", self.seeds, 1, 100)


class Seen(NamedTuple):
    """A reference by the features of one net.

    Attributes:
        reference: statistics of its images.
        names: of scores.
        also: the net's name, where it is one of the others; see `of_net`.
    """

    reference: ImageStatistics
    names: Names
    also: str = ""


@dataclass(frozen=True)
class SampleEvaluation:
    """An evaluation of a model's images.

    Attributes:
        model: the model.
        name: what it is called.
        weights: SHA-256 of its networks by name.
        net: what features are computed with, and `features` its name in `FEATURE_NETS`.
        reference: what samples are compared with.
        images: which images are made.
        sampler: the sampler's settings that are not the model's own.
        config: how thoroughly they are scored.
        training: the images that the model was trained on, searched for copies.
        curve: sampler settings of smaller runs: all combinations of these values.
        also: by name in `FEATURE_NETS`, other nets by whose features distances are told too, to the reference's images.
        lpips: computes LPIPS of edits, if it is wanted, and `lpips_name` says which it is.
        command: what was typed to begin it, for the report.
    """

    model: MaskGIT
    name: str
    weights: dict[str, str]
    net: FeatureNet
    features: str
    reference: Reference
    images: SampleConfig
    sampler: dict[str, Any]
    config: EvaluationConfig
    training: Pictures | None = None
    curve: Mapping[str, Sequence[Any]] | None = None
    also: Mapping[str, FeatureNet] = field(default_factory=dict)
    lpips: LPIPS | None = None
    lpips_name: str | None = None
    command: str = ""

    def run(self, out: str | Path, progress: Progress | None = None) -> Path | None:
        """Make the images, score them and write the report; see `run_works`.

        Raises:
            ConfigError: a setting is not allowed, or the folder was begun with others.
            DataError: the reference does not belong to the net or the model, or data cannot be read.
        """
        return run_works(expand(out), self.works(), self._write, progress=progress)

    def works(self) -> dict[str, Work]:
        """Return what is to be done, by name; nothing is done or written yet.

        Raises:
            ConfigError: a setting is not allowed.
            DataError: the reference does not belong to the net or the model.
        """
        side = self.model.config.image_size
        self.reference.check(self.net, (side, side), self.also)
        works: dict[str, Work] = {"samples": self._samples(self.images, {}, show=True)}
        for name, data in (("reference", self.reference.images), ("training", self.training)):
            if data is not None:
                count = self.config.num_training if name == "training" else None
                works[name] = RealImages(data, self.net, num_images=count, also=self.also)
        if through := self.training or self.reference.images:
            works["reconstructions"] = RealImages(
                through,
                self.net,
                num_images=None if self.training is None else self.config.num_training,
                batch_size=self.images.batch_size,
                through=self.model.tokenizer,
                weights=self.weights["tokenizer"],
                also=self.also,
            )
        if self.training is not None and self.training.resolution != (side, side):
            raise DataError(
                f"The training data {self.training.name} has {self.training.resolution[0]} × "
                f"{self.training.resolution[1]} pixels and the samples {side} × {side}: pack it with "
                f"--size {side}."
            )
        if self.config.edit_images:
            works["edits"] = self._edits(self.images)
        for seed in self._other_seeds():
            images = replace(self.images, seed=seed, keep_images="none")
            works[f"samples-seed-{seed}"] = self._samples(images, {}, show=False)
            if self.config.edit_images:
                works[f"edits-seed-{seed}"] = self._edits(images)
        for point in self._points():
            small = replace(self.images, num_images=self.config.curve_images, keep_images="none")
            works[curve_name(point)] = self._samples(small, point, show=False)
        return works

    def _samples(self, images: SampleConfig, settings: dict[str, Any], *, show: bool) -> Samples:
        given = dict(self.sampler)
        if "policy" in settings:
            given.pop("policy_options", None)
        counts = None
        sources = [data for data in (self.training, self.reference.images) if data is not None]
        if images.labels == "dataset":
            for data in sources:
                numbers, _ = self._matched(data.class_names, data.num_classes, data.name)
                if numbers is not None:
                    counts = np.empty(len(numbers), np.int64)
                    counts[numbers] = data.count_labels()
                    break
        return Samples(
            self.model,
            self.net,
            images,
            weights=self.weights,
            sampler=self.model.sampler_config(**(given | settings)),
            class_counts=counts,
            show=show,
            also=self.also,
        )

    def _other_seeds(self) -> range:
        return range(self.images.seed + 1, self.images.seed + self.config.seeds)

    def _edits(self, images: SampleConfig) -> Edits:
        data = self.reference.images
        if data is None:
            raise DataError(
                f"Edits are made of real images, but {self.reference.name} holds statistics alone: give images as "
                "--reference, or leave out --edits."
            )
        return Edits(
            self.model,
            data,
            self.net,
            images,
            weights=self.weights,
            sampler=self.model.sampler_config(**self.sampler),
            num_images=self.config.edit_images,
            classes=self._matched(data.class_names, data.num_classes, data.name).numbers,
            lpips=self.lpips,
            lpips_name=self.lpips_name,
        )

    def _points(self) -> list[dict[str, Any]]:
        axes = self.curve or {}
        if not axes:
            return []
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]

    def _write(self, units: dict[str, Units]) -> Report:
        """Turn finished units into a report."""
        names, done = Names(self.features, self.net), units["samples"]
        work = done.work
        assert isinstance(work, Samples)
        arrays = gather(done).arrays
        measured: ImageStatistics | None = None
        skipped: list[str] = []
        if self.reference.images is not None:
            measured, skipped = reference_statistics(units["reference"], self.reference.images, self.net)
        reference, no_classes, notes = self._labelled(self.reference.joined(measured))
        notes += self.reference.cautions
        for data in (self.reference.images, self.training):
            notes += [] if data is None else [f"{data.name}: {line}" for line in data.left_out]
        others = self._others(units)
        scores, cautions = self._scores(arrays, reference, names, self._strata(arrays))
        baselines, judge = self._context(units, reference, arrays, names)
        scores += self._agreement(arrays, judge, names)
        beside = [with_baselines(scores, baselines)]
        for other in others:
            found, more = self._distances(arrays, other, self._strata(arrays))
            beside.append(
                with_baselines(found, self._context(units, other.reference, arrays, *other[1:]).baselines)
            )
            scores, cautions = scores + found, cautions + more
        copies, of_copies = self._copies(units, arrays, reference, names)
        seen = [Seen(reference, names), *others]
        curves, small = self._curves(units, seen, judge)
        cost = cost_of_samples(done, self.model, work.sampler)
        edits, pictures, unread = self._edited(units, "edits", names)
        report = Report(
            title=self.name,
            kind="samples",
            num_images=len(arrays["pooled"]),
            scores=list(itertools.chain(*beside, of_copies)),
            cautions=cautions + notes + small,
            sheet=[],
            settings=done.plan,
            identities=self._identities(reference, names),
            skipped=list(dict.fromkeys(skipped + unread)),
            classes=[]
            if judge is None
            else judge.table(judge.agrees(arrays["pooled"], arrays["labels"]), arrays["labels"]),
            no_classes=no_classes,
            class_names=self.model.class_names or (),
            memorisation=copies,
            curves=curves,
            curve_images=self.config.curve_images,
            edits=edits,
            repeats=self._repeats(units, scores, edits, seen, judge),
            edit_pictures=pictures if self.config.show_training else [],
            cost=cost,
            run=({"command": self.command} if self.command else {})
            | {
                "date": time.strftime("%Y-%m-%d", time.gmtime()),
                "seconds": done.seconds(),
                "device": str(self.model.device),
            },
        )
        sheet = [
            Picture(pixels, report.class_name(int(arrays["labels"][index])))
            for index, pixels in zip(work.shown, arrays["shown"], strict=True)
        ]
        report = replace(report, sheet=sheet, examples=self._examples(report, work, arrays["labels"]))
        report = replace(report, rebuilt=self._rebuilt())
        if self.images.keep_images == "npz":
            about = {"model": self.name, "settings": done.plan, "cost": cost._asdict()}
            join_samples(done, done.folder.parent.parent / SAMPLES, about)
        return report

    def _matched(self, names: tuple[str, ...] | None, count: int, whose: str) -> Matched:
        """Return which of the model's classes those of other images are."""
        num_classes = self.model.config.transformer.num_classes
        return matched_classes(names, count, self.model.class_names, num_classes, whose)

    def _labelled(self, reference: ImageStatistics) -> tuple[ImageStatistics, str, list[str]]:
        """Return the reference with the model's labels, or why there are none, and cautions."""
        if reference.labels is None:
            return reference, "The reference's classes are not known.", []
        names, present = reference.class_names, len(np.unique(reference.labels))
        count = int(reference.labels.max()) + 1 if names is None else len(names)
        numbers, reason = self._matched(names, count, "The reference")
        if numbers is not None and present < count:
            numbers, reason = None, f"The reference has images of {present:,} of the {count:,} classes alone."
        if numbers is None:
            reason += " So scores by class are left out."
            return replace(reference, labels=None, class_names=None), reason, [reason]
        labels = numbers[reference.labels]
        return (
            replace(reference, labels=labels, class_names=self.model.class_names),
            "",
            [reason] if reason else [],
        )

    def _others(self, units: dict[str, Units]) -> list[Seen]:
        """Return the reference by the features of the other nets."""
        found = []
        for name, net in self.also.items():
            assert self.reference.images is not None, "works() has asked for images"
            measured, _ = reference_statistics(units["reference"], self.reference.images, net, also=name)
            found.append(Seen(measured, Names(name, net), name))
        return found

    def _context(
        self,
        units: dict[str, Units],
        reference: ImageStatistics,
        arrays: Arrays,
        names: Names,
        also: str = "",
    ) -> Context:
        """Return what samples are seen beside; class agreement is told by the first net alone."""
        count = len(arrays["pooled"])

        def scoring(other: Arrays, against: ImageStatistics) -> list[Score]:
            if also:
                return distances(other, against, names, splits=self.config.splits)[0]
            return self._scores(other, against, names, None)[0]

        if self.training is not None:
            data = self.training
            training, rebuilt = gather(units["training"]), gather(units["reconstructions"])
            check_share(data.name, units["training"].work.count, training.skipped, data.max_bad_share)
            if self.reference.digest != data.fingerprint:
                numbers = self._matched(data.class_names, data.num_classes, data.name).numbers
                own, through = of_net(training.arrays, also), of_net(rebuilt.arrays, also)
                return of_training(scoring, reference, own, through, numbers, count, names, judged=not also)
        halved = None
        if self.reference.images is not None and self.training is None:
            halved, _ = reference_statistics(
                units["reconstructions"], self.reference.images, names.net, also=also
            )
        return of_halves(scoring, reference, halved, count, names, judged=not also)

    def _agreement(self, arrays: Arrays, judge: ClassJudge | None, names: Names) -> list[Score]:
        """Return the share of images that look like their class, where that can be said."""
        if judge is None:
            return []
        return [judge.score(judge.agrees(arrays["pooled"], arrays["labels"]), names, self._strata(arrays))]

    def _strata(self, arrays: Arrays) -> NDArray[np.int32] | None:
        """Return the classes of samples where other samples would be of the same ones."""
        return arrays["labels"] if self.images.labels == "balanced" else None

    def _copies(
        self, units: dict[str, Units], arrays: Arrays, reference: ImageStatistics, names: Names
    ) -> tuple[memorisation.Memorisation | None, list[Score]]:
        """Return what the search for copies of training images found, if these were given."""
        if self.training is None:
            return None, []
        work = units["samples"].work
        assert isinstance(work, Samples)
        tokenizer = self.model.tokenizer
        gallery = memorisation.Gallery(
            self.training,
            gather(units["training"]).arrays,
            gather(units["reconstructions"]).arrays,
            lambda images: rebuild(tokenizer, as_floats(images))[0],
        )
        return memorisation.search(
            arrays["pooled"],
            work.shown,
            lambda i: work.pictures(i, i + 1)[0],
            gallery,
            self._held_out(units, reference),
            names,
            show=self.config.show_training,
        )

    def _held_out(self, units: dict[str, Units], reference: ImageStatistics) -> memorisation.Held | None:
        """Return real images that the model was not trained on, if the reference holds some."""
        # Training images are their own nearest, which says nothing.
        if self.training is None or self.reference.digest == self.training.fingerprint:
            return None
        data = self.reference.images
        if data is None:
            return None if reference.features is None else memorisation.Held(reference.features)
        arrays = gather(units["reference"]).arrays
        numbers = arrays["numbers"]
        return memorisation.Held(arrays["pooled"], lambda row: data.read([int(numbers[row])]).images[0])

    def _scores(
        self,
        arrays: Arrays,
        reference: ImageStatistics,
        names: Names,
        strata: NDArray[np.int32] | None,
    ) -> tuple[list[Score], list[str]]:
        scores, cautions = self._distances(arrays, Seen(reference, names), strata)
        scores += manifolds(
            arrays["pooled"],
            reference,
            names,
            device=self.net.device,
            strata=strata,
            k=self.config.neighbours,
            num_images=self.config.neighbour_images,
        )
        return scores, cautions

    def _distances(
        self, arrays: Arrays, seen: Seen, strata: NDArray[np.int32] | None
    ) -> tuple[list[Score], list[str]]:
        """Return the distances to the reference by a net's features, and cautions."""
        reference, names, also = seen
        own = of_net(arrays, also)
        scores, cautions = distances(own, reference, names, splits=self.config.splits, strata=strata)
        if names.net.published is False:
            cautions.append(
                f"The feature net's weights are not the published ones of {names.features}: its scores "
                "compare only with scores made with the same file."
            )
        return scores, cautions

    def _curves(
        self, units: dict[str, Units], seen: list[Seen], judge: ClassJudge | None
    ) -> tuple[list[Point], list[str]]:
        """Return the runs with other settings, and cautions of all of them, each once."""
        points: list[Point] = []
        cautions: dict[str, None] = {}
        for settings in self._points():
            done = units[curve_name(settings)]
            assert isinstance(done.work, Samples)
            arrays = gather(done).arrays
            found = [self._distances(arrays, one, self._strata(arrays)) for one in seen]
            scores = [score for part, _ in found for score in part]
            scores += self._agreement(arrays, judge, seen[0].names)
            points.append(Point(settings, scores, cost_of_samples(done, self.model, done.work.sampler)))
            texts = [text for _, part in found for text in part]
            cautions |= dict.fromkeys(f"Runs with other settings: {text}" for text in texts)
        return points, list(cautions)

    def _edited(
        self, units: dict[str, Units], name: str, names: Names
    ) -> tuple[list[Edited], list[Picture], list[str]]:
        """Return the scores of edits, pictures of them, and sentences about images that could not be read."""
        data = self.reference.images
        if name not in units or data is None:
            return [], [], []
        found, real = gather(units[name]), gather(units["reference"]).arrays
        work = units[name].work
        assert isinstance(work, Edits)
        if len(found.arrays.get("number", ())) < 2:
            raise DataError(f"{data.name} holds fewer than two images that can be read and edited.")
        known = None
        if work.classes is not None:
            unseen = ~np.isin(real["numbers"], work.edited) & (real["labels"] >= 0)
            known = Labelled(real["pooled"][unseen], work.classes[real["labels"][unseen]])
        captions = ("masked", "filled in", "untouched")
        pictures = [
            Picture(pixels, caption)
            for images in found.arrays.get("shown", ())
            for pixels, caption in zip(images, captions, strict=True)
        ]
        return edit_scores(found.arrays, list(MASKS), names, known), pictures, found.skipped

    def _rebuilt(self) -> list[Picture]:
        """Return real images of the reference, each before its reconstruction, where they may be shown."""
        data = self.reference.images
        if data is None or not self.config.show_training:
            return []
        found = data.read(shown_indices(len(data), 0)[:NUM_REBUILT].tolist())
        pictures = []
        for number, pixels in zip(found.numbers, found.images, strict=True):
            # Alone, as the search for copies has them too.
            rebuilt = rebuild(self.model.tokenizer, as_floats(pixels[None]))[0][0]
            pictures += [Picture(pixels, f"real {number}"), Picture(rebuilt, "reconstruction")]
        return pictures

    def _repeats(
        self,
        units: dict[str, Units],
        scores: list[Score],
        edits: list[Edited],
        seen: list[Seen],
        judge: ClassJudge | None,
    ) -> Repeats | None:
        """Return the scores of all seeds, those of the report first."""
        if self.config.seeds == 1:
            return None
        repeats = [_values(scores, edits)]
        for seed in self._other_seeds():
            arrays = gather(units[f"samples-seed-{seed}"]).arrays
            (reference, names, _), *others = seen
            found = self._scores(arrays, reference, names, self._strata(arrays))[0]
            found += self._agreement(arrays, judge, names)
            for other in others:
                found += self._distances(arrays, other, self._strata(arrays))[0]
            repeats.append(_values(found, self._edited(units, f"edits-seed-{seed}", names)[0]))
        seeds = [self.images.seed, *self._other_seeds()]
        return Repeats(seeds, {name: [one[name] for one in repeats] for name in repeats[0]})

    def _examples(self, report: Report, work: Samples, labels: NDArray) -> dict[int, list[Picture]]:
        """Return the first pictures by index of the best and the worst classes."""
        examples = {}
        for entry in best_and_worst(report.classes):
            indices = np.flatnonzero(labels == entry.label)[: self.config.num_examples].tolist()
            examples[entry.label] = [Picture(work.pictures(i, i + 1)[0], f"image {i}") for i in indices]
        return examples

    def _identities(self, reference: ImageStatistics, names: Names) -> dict[str, dict[str, Any]]:
        found = {
            "model": {"name": self.name, "weights": self.weights, "image_size": self.model.config.image_size},
            "evaluator": evaluator_identity(names) | {"neighbours": self.config.neighbours},
            "reference": self.reference.identity(reference),
        }
        if self.also:
            others = {name: evaluator_identity(Names(name, net)) for name, net in self.also.items()}
            found["evaluator"]["also"] = others
        if self.training is not None:
            data = self.training
            found["training"] = {"name": data.name, "sha256": data.fingerprint, "num_images": len(data)}
        return found


def _values(scores: list[Score], edits: list[Edited]) -> dict[str, float]:
    """Return the scores of one seed by name, those of edits with the mask's before it."""
    values = {score.name: score.value for score in scores}
    for edited in edits:
        values |= {f"{edited.mask} {score.name}": score.values["edits"] for score in edited.scores}
    return values


def curve_name(settings: dict[str, Any]) -> str:
    """Return the name of the work of one run of a curve."""
    text = "-".join(f"{name}-{value}" for name, value in settings.items())
    return "curve-" + "".join(c if c.isalnum() or c in "-._" else "_" for c in text)
