"""How well a model fills in parts of real images, beside the tokenizer's reconstructions and the untouched images.

Shapes: N images, K kinds of masks, D feature dimensions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskgit.evaluation.metrics import FeatureStatistics, Interval, bootstrap_interval
from maskgit.evaluation.metrics.intervals import mean_interval, share_interval
from maskgit.evaluation.metrics.probe import LinearProbe
from maskgit.evaluation.scores.classwise import MAX_FITTED, Labelled, spread_rows
from maskgit.evaluation.scores.names import Names
from maskgit.evaluation.scores.scores import split_distance
from maskgit.foundation.units import Arrays

# What a masked part may hold: what was there, that through the tokenizer, or what the model fills in.
STATES = {"real": "untouched", "reconstructions": "reconstructions", "edits": "edits"}
# What the arrays of each kind of mask are called before the state.
_MEASURES = ("region_", "whole_", "seam_", "lpips_")


class EditScore(NamedTuple):
    """One score of edits with one kind of mask.

    Attributes:
        name: what it is called in report.json.
        title: what people call it.
        better: "lower", "higher", or "" where neither is.
        values: by the names of `STATES`.
        interval: of the edits' value, at the level that `names.level` tells; None where no method is known to hold that.
    """

    name: str
    title: str
    better: str
    values: dict[str, float]
    interval: Interval | None


class Edited(NamedTuple):
    """All scores of edits with one kind of mask.

    Attributes:
        mask: the kind of mask.
        num_images: N, how many images were edited.
        scores: in the order of importance.
    """

    mask: str
    num_images: int
    scores: list[EditScore]


def edit_scores(arrays: Arrays, masks: Sequence[str], names: Names, known: Labelled | None) -> list[Edited]:
    """Return the scores of edits by kind of mask.

    Args:
        arrays: of all units of `maskgit.evaluation.runs.edits.Edits`.
        masks: the K kinds, in their order.
        names: of scores.
        known: real images that were not edited, with the model's classes, which teach the probe that class
            agreement is told by; None where the classes are not known.
    """
    labels = arrays["label"]
    probe = None
    if known is not None and len(known.labels) >= 2 and (labels >= 0).any():
        fitted = known.rows(spread_rows(len(known.labels), MAX_FITTED))
        num_classes = int(max(fitted.labels.max(), labels.max())) + 1
        probe = LinearProbe(fitted.features, fitted.labels, num_classes)
    found = []
    for kind, mask in enumerate(masks):
        own = {name: array[:, kind] for name, array in arrays.items() if name.startswith(_MEASURES)}
        scores = [_region_distance(own, names), _feature_distance(own, names), *_lpips(own), _seam_ratio(own)]
        if probe is not None:
            scores.append(_agreement(own, labels, probe, names))
        found.append(Edited(mask, len(labels), scores))
    return found


def _region_distance(own: Arrays, names: Names) -> EditScore:
    others = FeatureStatistics(own["region_others"].shape[1])
    others.update(own["region_others"])
    gaussian = others.gaussian()
    values = {state: split_distance(own[f"region_{state}"], gaussian) for state in STATES}
    return EditScore(f"region_{names.name('fd')}", f"Region {names.title('fd')}", "lower", values, None)


def _feature_distance(own: Arrays, names: Names) -> EditScore:
    found = {state: cosine_distances(own["region_real"], own[f"region_{state}"]) for state in STATES}
    values = {state: float(distances.mean()) for state, distances in found.items()}
    name = f"feature_distance_{names.features}"
    return EditScore(name, "Feature distance", "lower", values, mean_interval(found["edits"]))


def _lpips(own: Arrays) -> list[EditScore]:
    if "lpips_edits" not in own:
        return []
    values = {state: float(own[f"lpips_{state}"].mean()) for state in STATES}
    return [EditScore("lpips", "LPIPS", "lower", values, mean_interval(own["lpips_edits"]))]


def _seam_ratio(own: Arrays) -> EditScore:
    values = {state: _median(own[f"seam_{state}"]) for state in STATES}
    finite = own["seam_edits"][np.isfinite(own["seam_edits"])]
    interval = bootstrap_interval(finite, _median) if len(finite) > 1 else None
    # Neither way is better: a border fainter than the image's own edges is no virtue.
    return EditScore("seam_ratio", "Seam ratio", "", values, interval)


def _agreement(own: Arrays, labels: NDArray[np.int32], probe: LinearProbe, names: Names) -> EditScore:
    judged = labels >= 0
    hits = {state: probe.classes(own[f"whole_{state}"][judged]) == labels[judged] for state in STATES}
    values = {state: float(hit.mean()) for state, hit in hits.items()}
    kind = "class_agreement"
    return EditScore(names.name(kind), names.title(kind), "higher", values, share_interval(hits["edits"]))


def cosine_distances(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Return 1 less the cosine of each pair of features: float (N, D) twice → float64 (N,) in [0, 2]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = np.divide((a * b).sum(1), lengths, out=np.zeros(len(a)), where=lengths > 0)
    # Rounding takes the cosine of a vector with itself beyond 1.
    return (1 - cosines).clip(0, 2)


def _median(values: NDArray[Any]) -> float:
    """Return the median of seam ratios; they are infinite or no number where a region is of a single colour."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else float("nan")
