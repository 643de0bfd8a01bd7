"""The search for copies of training images."""

import numpy as np
import pytest
import torch

from maskgit.errors import DataError
from maskgit.evaluation.metrics import authenticity
from maskgit.evaluation.metrics.copies import SUSPICIOUS, candidates, pixel_agreement
from maskgit.evaluation.metrics.vectors import nearest_neighbours
from maskgit.evaluation.networks.features import FeatureNet, Features
from maskgit.evaluation.runs.sampling import measured
from maskgit.evaluation.scores.memorisation import Gallery, Held, search
from maskgit.evaluation.scores.names import Names
from small_evaluation import DIM, ArrayPictures, real_images, toy_net

NAMES = Names("toy", toy_net())


def gallery_of(data, rng, count=15, step=2):
    pooled = rng.normal(size=(count, DIM)).astype(np.float32)
    return Gallery(data, {"pooled": pooled, "numbers": np.arange(0, count * step, step)})


def test_copies_are_found_and_shown():
    data, rng = real_images(30), np.random.default_rng(0)
    gallery = gallery_of(data, rng)
    samples = rng.normal(size=(20, DIM)).astype(np.float32)
    samples[13] = gallery.pooled[4]
    noise = rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    noise[13] = data.images[8]
    found, (authentic, copies) = search(samples, np.arange(20), lambda i: noise[i], gallery, None, NAMES)
    assert (found.nearest[0].sample, found.nearest[0].numbers[0], found.nearest[0].distances[0]) == (13, 8, 0)
    assert found.nearest[0].suspicion == 0
    assert (found.nearest[0].neighbours[0] == data.images[8]).all()
    assert (found.nearest[0].image == noise[13]).all()
    assert [row.sample for row in found.random] == list(range(0, 16, 2))
    assert authentic.name == "authenticity_toy"
    assert authentic.value == pytest.approx(authenticity(gallery.pooled, samples))
    assert authentic.value < 1
    assert (copies.name, copies.value, found.flagged) == ("copies_toy", 1 / 20, 1)
    assert found.real_distance is None
    assert not authentic.baselines
    hidden, _ = search(samples, np.arange(20), lambda i: noise[i], gallery, None, NAMES, show=False)
    assert all(not row.neighbours for row in (*hidden.random, *hidden.nearest))
    assert hidden.to_dict() == found.to_dict()
    with pytest.raises(DataError, match="at least two samples"):
        search(samples[:1], np.arange(1), lambda i: noise[i], gallery, None, NAMES)
    with pytest.raises(DataError, match="a reconstruction of each"):
        Gallery(data, {"pooled": samples, "numbers": np.arange(20)}, {"pooled": samples[:3]})


def test_real_images_are_asked_the_same():
    data, rng = real_images(30), np.random.default_rng(0)
    gallery = gallery_of(data, rng)
    real = rng.normal(size=(12, DIM)).astype(np.float32)
    real[:3] = gallery.pooled[:3]
    pictures = rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    pictures[:3] = data.images[:6:2]
    arguments = real + 1, np.arange(12), lambda i: pictures[i], gallery
    found, (authentic, copies) = search(*arguments, Held(real, lambda i: pictures[i]), NAMES)
    assert found.real_authenticity == authenticity(gallery.pooled, real)
    assert authentic.baselines["real"].value == found.real_authenticity
    assert copies.baselines["real"].value == found.real_flagged == 3 / 12
    found, (authentic, copies) = search(*arguments, Held(real), NAMES)
    assert (found.real_flagged, copies.baselines) == (None, {})
    assert authentic.baselines["real"].num_images == 12


def test_an_image_and_its_reconstruction_are_one_candidate():
    rng = np.random.default_rng(0)
    images, rebuilt = rng.normal(size=(2, 30, DIM))
    queries = rng.normal(size=(12, DIM))
    found = candidates([nearest_neighbours(queries, form, k=5) for form in (images, rebuilt)])
    both = np.minimum(*(np.linalg.norm(queries[:, None] - form, axis=2) for form in (images, rebuilt)))
    assert (found.rows == np.argsort(both, 1)[:, :5]).all()
    expected = np.sort(both, 1)[:, :5]
    assert found.distances == pytest.approx(expected)
    assert found.ratios == pytest.approx(expected[:, 0] / expected[:, 1:].mean(1))


def textured(count, seed=0):
    """Return smooth pictures with detail, uint8 (count, 32, 32, 3)."""
    rng = np.random.default_rng(seed)
    spectrum = rng.normal(size=(count, 32, 17, 3)) + 1j * rng.normal(size=(count, 32, 17, 3))
    y, x = np.meshgrid(np.fft.fftfreq(32) * 32, np.arange(17), indexing="ij")
    weights = 1 / (1 + np.hypot(x, y)) ** 1.5
    waves = np.fft.irfft2(spectrum * weights[..., None], axes=(1, 2))
    waves /= waves.std((1, 2, 3), keepdims=True)
    return (128 + 40 * waves).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        lambda x: np.clip(x * 0.8 + 30, 0, 255).astype(np.uint8),
        lambda x: x[:, ::-1],
        lambda x: np.roll(x, (2, -3), (0, 1)),
        lambda x: enlarged(x[4:, 4:]),
    ],
)
def test_pixels_agree_with_those_that_were_changed(change):
    pictures = textured(12)
    for number in range(3):
        agreement = pixel_agreement(change(pictures[number]), pictures)
        assert agreement.argmax() == number
        assert agreement[number] > 0.85
        assert np.delete(agreement, number).max() < agreement[number] - 0.1


def enlarged(x):
    from maskgit.images import to_pil

    image = to_pil(torch.from_numpy(np.ascontiguousarray(x)).movedim(-1, 0)[None].float() / 255)[0]
    return np.array(image.resize((32, 32)))


def test_flat_pictures_agree_with_nothing():
    flat = np.full((2, 32, 32, 3), 130, np.uint8)
    flat[1] += np.random.default_rng(0).integers(0, 2, (32, 32, 3), dtype=np.uint8)
    assert pixel_agreement(flat[0], flat[1:])[0] < 0.1


def test_planted_reconstructions_come_first_and_hubs_do_not():
    # A net that sees coarse colours; reconstructions are blurred pictures; the gallery holds flat ones.
    pictures = textured(120, 1)
    pictures[:20] = pictures[:20] // 16 + 120
    blurred = np.stack([blur(x) for x in pictures])
    mix = torch.randn(192, 40, generator=torch.Generator().manual_seed(0))

    def compute(images):
        return Features(torch.tanh(torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1) @ mix))

    net = FeatureNet("Coarse", 40, 8, "average", "0" * 64, compute, torch.device("cpu"))

    def features(images):
        return {"pooled": measured(net, torch.from_numpy(images).movedim(-1, 1).float() / 255)["pooled"]}

    gallery = Gallery(
        ArrayPictures(pictures),
        features(pictures) | {"numbers": np.arange(120)},
        features(blurred),
        lambda images: np.stack([blur(x) for x in images]),
    )
    samples = textured(60, 2)
    planted = np.arange(3, 60, 6)
    samples[planted] = blurred[50 + planted]
    found, _ = search(features(samples)["pooled"], np.arange(60), lambda i: samples[i], gallery, None, NAMES)
    assert {row.sample for row in found.nearest[:10]} == set(planted.tolist())
    assert all(row.numbers[0] == 50 + row.sample for row in found.nearest[:10])
    assert all(row.suspicion < SUSPICIOUS for row in found.nearest[:10])
    assert found.flagged < 20
    assert found.reconstructions


def blur(x):
    padded = np.pad(x.astype(np.int64), ((1, 1), (1, 1), (0, 0)), "edge")
    return (sum(padded[i : i + 32, j : j + 32] for i in range(3) for j in range(3)) // 9).astype(np.uint8)


def test_the_training_images_are_read_twice_alone():
    data, reads = real_images(30), []
    read = data.read
    data.read = lambda numbers: reads.append(list(numbers)) or read(numbers)
    rng = np.random.default_rng(0)
    gallery = gallery_of(data, rng, 30, 1)
    samples = rng.normal(size=(20, DIM)).astype(np.float32)
    blank = np.zeros((32, 32, 3), np.uint8)
    found, _ = search(samples, np.arange(20), lambda i: blank, gallery, None, NAMES)
    # To compare pixels, and to show.
    assert len(reads) == 2
    assert reads[1] == sorted({n for row in (*found.random, *found.nearest) for n in row.numbers})
    for row in (*found.random, *found.nearest):
        assert (np.array(row.neighbours) == data.images[row.numbers]).all()
