"""What an evaluation found, as one JSON file for programs and one HTML page for people.

report.json    metrics, intervals, cautions, classes, neighbours, curves, settings, identities, versions
report.html    the same with pictures, in one file that asks nothing of the network
"""

import math
import platform
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from numpy.typing import NDArray

from maskgit.evaluation.scores.classwise import ClassScore
from maskgit.evaluation.scores.edits import Edited
from maskgit.evaluation.scores.memorisation import Memorisation
from maskgit.evaluation.scores.names import Score
from maskgit.foundation import __version__

FORMAT = 1
JSON_NAME, PAGE_NAME = "report.json", "report.html"


class Picture(NamedTuple):
    """A picture with what stands under it.

    Attributes:
        pixels: uint8 (H, W, 3).
        caption: a few words.
    """

    pixels: NDArray[np.uint8]
    caption: str


class Cost(NamedTuple):
    """What one image costs, as a mean over all.

    Attributes:
        forward_passes: of the transformer; a guided step takes two.
        flops: floating-point operations of the networks' products and convolutions, a multiplication and an addition
            counted as two; of the plain networks, so that an engine that avoids work does not lower it.
        seconds: of making it, without measuring it, on whatever machines made them; None where units of before do
            not say it.
    """

    forward_passes: float
    flops: float
    seconds: float | None

    def to_dict(self) -> dict[str, float]:
        """Return what the settings decide as plain JSON values: all but the seconds."""
        return {"forward_passes": self.forward_passes, "flops": self.flops}


class Point(NamedTuple):
    """One run of a curve.

    Attributes:
        settings: the sampler's fields that the curve varies.
        scores: of that run.
        cost: of one of its images.
    """

    settings: dict[str, Any]
    scores: list[Score]
    cost: Cost | None = None


class Repeats(NamedTuple):
    """The same evaluation with several seeds.

    Attributes:
        seeds: the report's own first.
        values: of each score by its name in the report, a value for each seed.
    """

    seeds: list[int]
    values: dict[str, list[float]]

    def spread(self, name: str) -> tuple[float, float]:
        """Return the mean and the standard deviation (unbiased) of a score over the seeds."""
        values = self.values[name]
        return float(np.mean(values)), float(np.std(values, ddof=1))


@dataclass(frozen=True)
class Report:
    """All that one evaluation found.

    Attributes:
        title: what was evaluated.
        kind: "samples" or "reconstructions".
        num_images: how many images the scores are of.
        scores: in the order of importance.
        cautions: a sentence for each reason why a number may mislead.
        sheet: pictures chosen by index before any was made.
        rebuilt: real images, each before its reconstruction, to stand beside the samples.
        pairs: whether the sheet's pictures are originals, each before its reconstruction.
        settings: the plan that decides every image.
        identities: what was compared with what: model, evaluator, reference, training data, each a
            dictionary.
        skipped: sentences about images that could not be read.
        classes: how each class fares.
        no_classes: why that is not said, where it is not.
        class_names: names by class number.
        examples: pictures of some classes, their first ones by index.
        memorisation: what the search for copies found.
        curves: smaller runs with other settings, all of as many images.
        edits: how well parts of real images are filled in, by kind of mask.
        edit_pictures: images masked, filled in and untouched, three by three.
        repeats: the scores with other seeds; None where there is one seed.
        cost: of one image; None for reconstructions.
        run: the command, date, seconds and devices: what may differ between two runs of the same settings.
    """

    title: str
    kind: str
    num_images: int
    scores: list[Score]
    cautions: list[str]
    sheet: list[Picture]
    settings: dict[str, Any]
    identities: dict[str, dict[str, Any]]
    rebuilt: list[Picture] = field(default_factory=list)
    pairs: bool = False
    skipped: list[str] = field(default_factory=list)
    classes: list[ClassScore] = field(default_factory=list)
    no_classes: str = ""
    class_names: tuple[str, ...] = ()
    examples: dict[int, list[Picture]] = field(default_factory=dict)
    memorisation: Memorisation | None = None
    curves: list[Point] = field(default_factory=list)
    curve_images: int = 0
    edits: list[Edited] = field(default_factory=list)
    edit_pictures: list[Picture] = field(default_factory=list)
    repeats: Repeats | None = None
    cost: Cost | None = None
    run: dict[str, Any] = field(default_factory=dict)

    def class_name(self, label: int) -> str:
        """Return what a class is called: its first name, or its number."""
        return self.class_names[label].split(",")[0] if label < len(self.class_names) else str(label)

    def to_dict(self) -> dict[str, Any]:
        """Return all but the pictures as plain JSON values."""
        return {
            "format": FORMAT,
            "title": self.title,
            "kind": self.kind,
            "num_images": self.num_images,
            "metrics": {score.name: plain(score.value) for score in self.scores},
            "intervals": {
                score.name: [plain(end) for end in score.interval] for score in self.scores if score.interval
            },
            "baselines": {
                score.name: {
                    name: {part: plain(value) for part, value in baseline._asdict().items()}
                    for name, baseline in score.baselines.items()
                }
                for score in self.scores
                if score.baselines
            },
            "cautions": self.cautions,
            "skipped": {"count": len(self.skipped), "first": self.skipped[:100]},
            "classes": [
                {"class": entry.label, "name": self.class_name(entry.label)}
                | {name: plain(value) for name, value in entry._asdict().items() if name != "label"}
                for entry in self.classes
            ],
            "no_classes": self.no_classes or None,
            "memorisation": None if self.memorisation is None else self.memorisation.to_dict(),
            "curves": [
                {
                    "settings": point.settings,
                    "num_images": self.curve_images,
                    "metrics": {score.name: plain(score.value) for score in point.scores},
                    "intervals": {
                        score.name: list(score.interval) for score in point.scores if score.interval
                    },
                    "cost": None if point.cost is None else point.cost.to_dict(),
                }
                for point in self.curves
            ],
            "edits": [
                {
                    "mask": edited.mask,
                    "num_images": edited.num_images,
                    "metrics": {
                        score.name: {state: plain(value) for state, value in score.values.items()}
                        for score in edited.scores
                    },
                    "intervals": {
                        score.name: plain(tuple(score.interval)) for score in edited.scores if score.interval
                    },
                }
                for edited in self.edits
            ],
            "repeats": None if self.repeats is None else self._repeats(self.repeats),
            "cost": None if self.cost is None else self.cost.to_dict(),
            "settings": self.settings,
            **self.identities,
            "versions": versions(),
            "run": self.run | self._seconds(),
        }

    def _repeats(self, repeats: Repeats) -> dict[str, Any]:
        metrics = {}
        for name, values in repeats.values.items():
            mean, deviation = repeats.spread(name)
            metrics[name] = {
                "values": plain(tuple(values)),
                "mean": plain(mean),
                "deviation": plain(deviation),
            }
        return {"seeds": repeats.seeds, "metrics": metrics}

    def _seconds(self) -> dict[str, Any]:
        """Return the seconds of an image, which may differ between two runs of the same settings."""
        own = {} if self.cost is None else {"seconds_per_image": plain(self.cost.seconds)}
        points = [None if point.cost is None else point.cost.seconds for point in self.curves]
        return own | ({"curve_seconds_per_image": points} if points else {})


def plain(value: Any) -> Any:
    """Return a number as JSON can hold it; what is not finite becomes None."""
    if isinstance(value, tuple):
        return [plain(part) for part in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def versions() -> dict[str, str]:
    """Return the versions of all that computed."""
    return {
        "maskgit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }
