"""Training and test images: by class and seed, and near-duplicates on one side."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from maskgit.apps.cli import commands as cli
from maskgit.data.image_cache import ImageCache
from maskgit.data.splitting import near_duplicates, split_images
from maskgit.data.splitting import test_share as share_of
from maskgit.errors import ConfigError


def scene(seed: int, side: int = 48) -> Image.Image:
    """A picture of large soft patches, as photographs have them."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def recompressed(image: Image.Image) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=40)
    return Image.open(io.BytesIO(data.getvalue()))


COPIES = {
    "the same": lambda image: image,
    "recompressed": recompressed,
    "halved": lambda image: image.resize((24, 24)).resize((48, 48)),
    "cut": lambda image: image.crop((1, 1, 47, 47)).resize((48, 48)),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "brighter": lambda image: image.point(lambda value: min(255, value + 6)),
}


@pytest.mark.parametrize("copy", COPIES)
def test_copies_are_near_and_other_pictures_are_not(copy):
    images = [scene(seed) for seed in range(30)]
    images.insert(20, COPIES[copy](images[3]))
    groups = near_duplicates(np.stack([np.asarray(image) for image in images]))
    assert groups.tolist() == [*range(20), 3, *range(21, 31)]


def test_a_chain_of_near_duplicates_is_one_group_wherever_its_images_lie():
    # More images than are looked at together, and a chain across them all.
    images = np.random.default_rng(0).integers(0, 256, (2100, 8, 8, 3)).astype(np.uint8)
    places = [2050, 7, 1030]
    for step, place in enumerate(places):
        images[place] = np.clip(images[places[0]].astype(int) + 7 * step, 0, 255)
    groups = near_duplicates(images)
    assert np.flatnonzero(groups != np.arange(2100)).tolist() == [1030, 2050]
    assert groups[places].tolist() == [7, 7, 7]


def test_pictures_of_one_colour_are_near_only_to_those_of_the_same():
    images = np.full((4, 8, 8, 3), 100, np.uint8)
    images[2:] = 103
    assert near_duplicates(images).tolist() == [0, 0, 2, 2]


def test_every_class_has_its_share_by_seed():
    images = np.random.default_rng(0).integers(0, 256, (230, 8, 8, 3)).astype(np.uint8)
    labels = np.repeat([0, 1, 2, 3], [100, 120, 9, 1])
    split = split_images(images, labels, 0.1, 5)
    assert np.bincount(labels[split.test], minlength=4).tolist() == [10, 12, 1, 0]
    assert (split.num_near, split.num_groups) == (0, 0)
    assert np.array_equal(split_images(images, labels, 0.1, 5).test, split.test)
    assert not np.array_equal(split_images(images, labels, 0.1, 6).test, split.test)


@pytest.mark.parametrize("seed", range(5))
def test_near_duplicates_stay_on_one_side(seed):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
    # Bursts of four, and a class that is all one burst.
    images[:20] = images[:20:4].repeat(4, 0)
    images[36:] = images[36]
    labels = np.repeat([0, 1], [36, 4])
    split = split_images(images, labels, 0.2, seed)
    assert (split.num_near, split.num_groups) == (24, 6)
    sides = split.test[:20].reshape(5, 4)
    assert (sides.all(1) | ~sides.any(1)).all()
    assert split.test.sum() == round(0.2 * 36)
    assert not split.test[36:].any()


def test_shares_are_told_from_names_of_splits():
    assert share_of("0.9/0.1") == pytest.approx(0.1)
    assert share_of(".75/.25") == pytest.approx(0.25)
    assert share_of("train") is None
    for wrong in ("0.9/0.2", "1/0", "90/10"):
        with pytest.raises(ConfigError, match="add up to 1"):
            share_of(wrong)


def test_pack_writes_both_parts_or_neither(tmp_path, capsys):
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(10):
            scene(i + 100 * (label == "dog")).save(tmp_path / "photos" / label / f"{i}.png")
    recompressed(scene(4)).save(tmp_path / "photos" / "cat" / "again.jpg")
    pack = ["pack", str(tmp_path / "photos"), str(tmp_path / "data"), "--size", "16"]
    assert cli.main([*pack, "--split", "0.8/0.2"]) == 0
    told = capsys.readouterr().out
    assert "Near-duplicates kept on one side: 2 images (groups: 1)." in told
    train, test = (ImageCache.open(tmp_path / "data" / name) for name in ("train", "test"))
    assert (len(train), len(test)) == (17, 4)
    assert train.class_names == test.class_names == ("cat", "dog")
    assert np.bincount(test.labels).tolist() == [2, 2]
    train.verify()
    test.verify()
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["test", "train"]
    # Together they are what is packed whole.
    assert cli.main([*pack[:2], str(tmp_path / "whole"), "--size", "16"]) == 0
    whole = ImageCache.open(tmp_path / "whole").images
    both = np.concatenate([train.images, test.images])
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in whole)
    assert cli.main([*pack, "--split", "0.8/0.2"]) == 2
    assert "already exists" in capsys.readouterr().err
    assert (
        cli.main(
            ["pack", str(tmp_path / "photos"), str(tmp_path / "x"), "--size", "16", "--split", "0.8/0.1"]
        )
        == 2
    )
    assert not (tmp_path / "x").exists()
