"""The search for copies of training images."""

import numpy as np
import pytest

from maskgit.errors import DataError
from maskgit.evaluation.metrics import authenticity
from maskgit.evaluation.scores.memorisation import search
from maskgit.evaluation.scores.names import Names
from small_evaluation import DIM, real_images, toy_net


def test_copies_are_found_and_shown():
    data = real_images(30)
    rng = np.random.default_rng(0)
    gallery = rng.normal(size=(15, DIM)).astype(np.float32)
    training = {"pooled": gallery, "numbers": np.arange(0, 30, 2)}
    samples = rng.normal(size=(20, DIM)).astype(np.float32)
    samples[13] = gallery[4]
    blank = np.zeros((32, 32, 3), np.uint8)
    found, score = search(
        samples, np.arange(20), lambda i: blank + i, training, data, None, Names("toy", toy_net())
    )
    assert (found.nearest[0].sample, found.nearest[0].numbers[0], found.nearest[0].distances[0]) == (13, 8, 0)
    assert (found.nearest[0].neighbours[0] == data.images[8]).all()
    assert (found.nearest[0].image == 13).all()
    assert [row.sample for row in found.random] == list(range(0, 16, 2))
    assert score.name == "authenticity_toy"
    assert score.value == pytest.approx(authenticity(gallery, samples))
    assert score.value < 1
    assert found.real_distance is None
    hidden, _ = search(
        samples, np.arange(20), lambda i: blank + i, training, None, None, Names("toy", toy_net())
    )
    assert all(not row.neighbours for row in (*hidden.random, *hidden.nearest))
    assert hidden.to_dict() == found.to_dict()
    with pytest.raises(DataError, match="at least two"):
        search(samples[:1], np.arange(1), lambda i: blank, training, data, None, Names("toy", toy_net()))


def test_the_training_images_are_read_once():
    data = real_images(30)
    reads = []
    read = data.read
    data.read = lambda numbers: reads.append(list(numbers)) or read(numbers)
    rng = np.random.default_rng(0)
    training = {"pooled": rng.normal(size=(30, DIM)).astype(np.float32), "numbers": np.arange(30)}
    samples = rng.normal(size=(20, DIM)).astype(np.float32)
    blank = np.zeros((32, 32, 3), np.uint8)
    found, _ = search(samples, np.arange(20), lambda i: blank, training, data, None, Names("toy", toy_net()))
    assert reads == [sorted({n for row in (*found.random, *found.nearest) for n in row.numbers})]
    for row in (*found.random, *found.nearest):
        assert (np.array(row.neighbours) == data.images[row.numbers]).all()
