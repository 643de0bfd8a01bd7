"""Cutting a data set into training and test images: by class and seed, near-duplicates on one side.

A test image that is almost one of the training images measures memory, so two shots of one scene, or a picture and its
recompressed copy, must not be parted.

Shapes: N images, S pixels a side.
"""

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from maskgit.data.batches import Shuffler
from maskgit.data.image_cache import ImageCache, new_image_cache
from maskgit.data.pack import pack_images
from maskgit.errors import ConfigError, OutputError
from maskgit.foundation.files import destination, new_folder

TRAIN, TEST = "train", "test"
THUMBNAIL = 8
# Two images are near-duplicates if their thumbnails differ by at most this share of their contrast, root mean square
# over pixels and colours. Photographs recompressed, halved in size or cut by 3 % a side stay below it; of 1,500 different
# ones, fewer than one in a hundred is that near to another.
NEAR = 0.2
_BLOCK = 1024


class Split(NamedTuple):
    """How images were shared out.

    Attributes:
        test: bool (N,), those to test on.
        num_near: images that have a near-duplicate.
        num_groups: groups of near-duplicates.
    """

    test: np.ndarray
    num_near: int
    num_groups: int


def test_share(text: str) -> float | None:
    """Return the share of test images of shares such as "0.9/0.1"; None where the text is the name of a split.

    Raises:
        ConfigError: they are not two shares of a whole.
    """
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)/([0-9]*\.?[0-9]+)", text.strip())
    if not found:
        return None
    train, test = map(float, found.groups())
    if abs(train + test - 1) > 1e-6 or not 0 < test < 1:
        raise ConfigError(
            f"--split {text}: the shares of training and test images must add up to 1, as in 0.9/0.1."
        )
    return test


def pack_split(
    source: str | Path, out: str | Path, *, share: float, seed: int = 0, **options: Any
) -> tuple[ImageCache, ImageCache, Split]:
    """Pack a data set into `out`/train and `out`/test.

    Args:
        source: as `pack_images` takes it.
        out: the folder to make.
        share: of test images, in (0, 1).
        seed: decides which.
        options: as `pack_images` takes them.

    Returns:
        The two caches, opened, and how the images were shared out.

    Raises:
        ConfigError: there are too few images for two parts.
        DataError, OutputError: as `pack_images`; nothing is left behind.
    """
    out = destination(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} already exists. Remove it, or choose another folder.")
    with new_folder(out) as new:
        whole = pack_images(source, new / "whole", **options)
        split = split_images(whole.images, whole.labels, share, seed)
        if not split.test.any():
            raise ConfigError(
                f"{whole.source} cannot be split: of its {len(whole)} images, {split.num_near} are near-duplicates of "
                "others, and every class must keep images to train on. Add images, or pack without shares."
            )
        facts: dict[str, Any] = {
            "num_enlarged": whole.num_enlarged,
            "num_skipped": whole.num_skipped,
            "skipped": list(whole.skipped),
            "left_out": list(whole.left_out),
        }
        for name, mask in ((TRAIN, ~split.test), (TEST, split.test)):
            with new_image_cache(new / name, whole.size) as writer:
                chosen = np.flatnonzero(mask)
                for start in range(0, len(chosen), _BLOCK):
                    writer.add(whole.images[chosen[start : start + _BLOCK]])
                described = f"{whole.source}, {name} ({len(chosen):,} of {len(whole):,}, seed {seed})"
                writer.finish(whole.labels[chosen], whole.class_names, source=described, **facts)
            # What was left out, was so once.
            facts = {"num_enlarged": 0, "num_skipped": 0, "skipped": [], "left_out": []}
        shutil.rmtree(new / "whole")
    return ImageCache.open(out / TRAIN), ImageCache.open(out / TEST), split


def split_images(images: np.ndarray, labels: np.ndarray, share: float, seed: int) -> Split:
    """Share images out.

    Of each class about `share` are to test on, and at least one where its images are not all near-duplicates of each
    other; never all of them. A group of near-duplicates of several classes counts for that of its first image.

    Args:
        images: uint8 (N, S, S, 3).
        labels: int (N,).
        share: of test images, in (0, 1).
        seed: decides which, in [0, 2⁶⁴).
    """
    groups = near_duplicates(images)
    members: dict[int, list[int]] = {}
    for image, group in enumerate(groups.tolist()):
        members.setdefault(group, []).append(image)
    by_class: dict[int, list[list[int]]] = {}
    # Groups are named by their first image.
    for group in (int(i) for i in Shuffler(len(labels), seed).order(0)):
        if group in members:
            by_class.setdefault(int(labels[group]), []).append(members[group])
    test = np.zeros(len(labels), bool)
    for own in by_class.values():
        wanted = max(1, round(share * sum(map(len, own))))
        # The largest group stays with the training images.
        kept = max(own, key=len)
        for group_members in own:
            if group_members is not kept and len(group_members) <= wanted:
                test[group_members] = True
                wanted -= len(group_members)
    sizes = [len(found) for found in members.values() if len(found) > 1]
    return Split(test, sum(sizes), len(sizes))


def near_duplicates(images: np.ndarray) -> np.ndarray:
    """Return the group of each image, int64 (N,): the first image that it is joined to by near-duplicates.

    Args:
        images: uint8 (N, S, S, 3).
    """
    thumbnails = np.stack([_thumbnail(image) for image in images])
    # Brightness first: images cannot be nearer to each other than their means are, so few pairs are looked at.
    brightness = thumbnails.mean(1)
    order = np.argsort(brightness, kind="stable")
    sorted_means, points = brightness[order], thumbnails[order]
    contrast = NEAR * points.std(1)
    # Off the centre of grey, so that float32 keeps small differences of large squares apart.
    points -= 127.5
    squares = (points**2).mean(1)
    first = np.arange(len(images))
    for start in range(0, len(points), _BLOCK):
        stop = min(start + _BLOCK, len(points))
        reach = sorted_means[stop - 1] + contrast[start:stop].max()
        for left in range(start, int(np.searchsorted(sorted_means, reach, side="right")), _BLOCK):
            right = min(left + _BLOCK, len(points))
            products = points[start:stop] @ points[left:right].T / points.shape[1]
            distances = squares[start:stop, None] + squares[None, left:right] - 2 * products
            limit = np.minimum(contrast[start:stop, None], contrast[None, left:right])
            # A hundredth of a grey level, for what rounding leaves of equal images.
            rows, columns = np.nonzero(distances <= limit**2 + 1e-4)
            for a, b in zip(order[rows + start].tolist(), order[columns + left].tolist(), strict=True):
                if a != b:
                    _join(first, a, b)
    return np.array([_first(first, image) for image in range(len(images))], np.int64)


def _thumbnail(image: np.ndarray) -> np.ndarray:
    small = Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, np.float32).ravel()


def _first(first: np.ndarray, image: int) -> int:
    while first[image] != image:
        first[image] = first[first[image]]
        image = int(first[image])
    return image


def _join(first: np.ndarray, a: int, b: int) -> None:
    a, b = _first(first, a), _first(first, b)
    first[max(a, b)] = min(a, b)
