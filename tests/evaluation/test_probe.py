"""The linear probe against least squares solved another way, and against leaving images out in fact."""

import numpy as np
import pytest

from maskgit.errors import DataError
from maskgit.evaluation.metrics.probe import PENALTIES, LinearProbe


def ridge(x, labels, penalty, num_classes):
    """Return the scores of ridge regression by least squares with rows for the penalty, as a function."""
    mean, scale = x.mean(0), x.std(0)
    z, targets = (x - mean) / scale, np.eye(num_classes)[labels]
    rows = np.vstack([z, np.sqrt(penalty * len(x)) * np.eye(x.shape[1])])
    right = np.vstack([targets - targets.mean(0), np.zeros((x.shape[1], num_classes))])
    weights = np.linalg.lstsq(rows, right, rcond=None)[0]
    return lambda q: (q - mean) / scale @ weights + targets.mean(0)


def noisy(seed=0, count=120, dim=10, num_classes=4):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % num_classes
    return rng.normal(size=(num_classes, dim))[labels] + rng.normal(0, 1.5, (count, dim)) + 7, labels


def test_classes_are_those_of_penalized_least_squares():
    x, labels = noisy()
    probe = LinearProbe(x, labels, 4)
    others = noisy(1)[0]
    assert (probe.classes(others) == ridge(x, labels, probe.penalty, 4)(others).argmax(1)).all()


def test_the_penalty_is_that_which_predicts_images_left_out():
    x, labels = noisy()

    def error(penalty):
        # Centred and scaled by all, as the closed form has it.
        z, targets = (x - x.mean(0)) / x.std(0), np.eye(4)[labels] - np.eye(4)[labels].mean(0)
        ones = np.hstack([z, np.ones((len(z), 1))])
        bound = np.diag([penalty * len(x)] * x.shape[1] + [0])
        total = 0.0
        for i in range(len(x)):
            rest = np.arange(len(x)) != i
            a, b = ones[rest], targets[rest]
            weights = np.linalg.solve(a.T @ a + bound, a.T @ b)
            total += np.square(targets[i] - ones[i] @ weights).sum()
        return total

    assert LinearProbe(x, labels, 4).penalty == min(PENALTIES, key=error)


def test_a_hub_sways_no_class():
    # An image of class 0 in the middle is everybody's nearest neighbour, yet costs no other class a vote.
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    x = np.where(labels[:, None] == 1, 1.0, -1.0) * np.eye(50)[0] * 2 + rng.normal(size=(200, 50))
    x[0] = 0
    probe = LinearProbe(x, labels, 2)
    others = np.where(labels[:, None] == 1, 1.0, -1.0) * np.eye(50)[0] * 2 + rng.normal(size=(200, 50))
    assert (probe.classes(others) == labels).mean() > 0.9
    nearest = np.square(others[:, None] - x).sum(-1).argmin(1)
    assert (nearest == 0).mean() > 0.5


def test_a_feature_that_never_changes_is_no_hindrance():
    x, labels = noisy()
    flat = np.hstack([x, np.full((len(x), 1), 3.0)])
    assert (LinearProbe(flat, labels, 4).classes(flat) == LinearProbe(x, labels, 4).classes(x)).all()


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (np.zeros(3, int), "a class number for each"),
        (np.full(120, 4), "0 to 3"),
        (np.full(120, -1), "0 to 3"),
        (np.zeros(120), "class number"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, match):
    with pytest.raises(DataError, match=match):
        LinearProbe(noisy()[0], labels, 4)
    with pytest.raises(DataError, match="9 and 10 dimensions"):
        LinearProbe(*noisy(), 4).classes(noisy()[0][:, 1:])
