"""Crops and flips of training images: pure functions of an image and its random draws.

Images are uint8 (n, S, S, 3), RGB; draws are float32 (n, NUM_DRAWS), uniform in (0, 1); the result is uint8
(n, s, s, 3) with s ≤ S.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from maskgit.errors import ConfigError
from maskgit.foundation.checks import check_range

NUM_DRAWS = 4
# The side of a random crop as a share of the image's. Crops are square: a model would learn distortions.
CROP_SIDE = (0.8, 1.0)


def resize_and_centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side of an image to `size` and crop the central square.

    An image that is `size` × `size` already is returned as it is.

    Args:
        image: RGB, of any size.
        size: pixels a side.

    Returns:
        RGB, `size` × `size`.

    Source: Dhariwal & Nichol (ADM), guided-diffusion image_datasets.py, center_crop_arr: halved by averaging
    while it is at least twice too large, then resized bicubically.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def centre_crop(images: np.ndarray, size: int) -> np.ndarray:
    """Return the middle of images, uint8 (n, S, S, 3) → (n, s, s, 3)."""
    top = (images.shape[1] - size) // 2
    return images[:, top : top + size, top : top + size]


def flip(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Mirror the images whose draw, float (n,), is below one half."""
    mirrored = draws < 0.5
    images = images.copy()
    images[mirrored] = images[mirrored, :, ::-1]
    return images


def crop_boxes(draws: np.ndarray, side: int) -> np.ndarray:
    """Return square boxes of uniformly random side, within `CROP_SIDE` of the image's, and uniformly random position.

    Args:
        draws: float (n, 3), uniform in (0, 1).
        side: pixels a side of the images.

    Returns:
        float64 (n, 4): left, top, right, bottom in pixels, within [0, side].

    Source: Dhariwal & Nichol (ADM), guided-diffusion image_datasets.py, random_crop_arr.
    Differs: the box is cropped before scaling, so that it need not start at a whole pixel.
    """
    draws = draws.astype(np.float64)
    low, high = CROP_SIDE
    width = (low + draws[:, 0] * (high - low)) * side
    left, top = draws[:, 1] * (side - width), draws[:, 2] * (side - width)
    return np.stack([left, top, left + width, top + width], axis=1).clip(0, side)


def random_resized_crop(images: np.ndarray, draws: np.ndarray, size: int) -> np.ndarray:
    """Crop a random box from each image and resize it, bicubic and antialiased.

    Args:
        images: uint8 (n, S, S, 3).
        draws: float (n, 3), uniform in (0, 1).
        size: pixels per side of the result, s.

    Returns:
        uint8 (n, s, s, 3).
    """
    crops = np.empty((len(images), size, size, 3), np.uint8)
    for i, box in enumerate(crop_boxes(draws, images.shape[1])):
        image = Image.fromarray(images[i])
        crops[i] = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=tuple(box)))
    return crops


def corner_crop(images: np.ndarray, size: int, corner: int) -> np.ndarray:
    """Return a corner of images: 0 to 3 are top left, top right, bottom left, bottom right."""
    far = images.shape[1] - size
    top, left = far * (corner // 2), far * (corner % 2)
    return images[:, top : top + size, left : left + size]


def mirror(images: np.ndarray) -> np.ndarray:
    """Mirror images left to right."""
    return images[:, :, ::-1]


def _random_crop_and_flip(images: np.ndarray, draws: np.ndarray, size: int) -> np.ndarray:
    return flip(random_resized_crop(images, draws[:, 1:], size), draws[:, 0])


def _ten_crop(images: np.ndarray, draws: np.ndarray, size: int, view: int) -> np.ndarray:
    place = view % 5
    crops = centre_crop(images, size) if place == 0 else corner_crop(images, size, place - 1)
    return crops if view < 5 else mirror(crops)


def _centre_and_mirror(images: np.ndarray, draws: np.ndarray, size: int, view: int) -> np.ndarray:
    crops = centre_crop(images, size)
    return crops if view == 0 else mirror(crops)


# Augmentations, applied each time images are read: (images, draws, s) → images.
AUGMENTATIONS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "none": lambda images, draws, size: centre_crop(images, size),
    "flip": lambda images, draws, size: flip(centre_crop(images, size), draws[:, 0]),
    "crop+flip": _random_crop_and_flip,
}


@dataclass(frozen=True)
class Views:
    """Which crops of each image a token cache holds.

    Attributes:
        num_views: how many, or None if any number can be drawn.
        make: (images, draws, s, view) → the crops of one view.
        needs_margin: whether the images must be larger than the crops.
    """

    num_views: int | None
    make: Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]
    needs_margin: bool = False

    def check(self, num_views: int | None, cached: int, size: int) -> int:
        """Return the number of views after checking that they can be made.

        Args:
            num_views: the requested number, or None.
            cached: pixels a side of the images, S.
            size: pixels a side of the crops, s.

        Raises:
            ConfigError: the number is missing or wrong, or the images are too small.
        """
        if self.num_views is None and num_views is None:
            raise ConfigError("Set num_views to the number of random crops of each image.")
        if self.num_views is not None and num_views not in (None, self.num_views):
            raise ConfigError(
                f"There are {self.num_views} of these views per image, so num_views cannot be {num_views}."
            )
        least = size + self.needs_margin
        if cached < least:
            raise ConfigError(
                f"Crops of {size} pixels with these views need images of {least} or more, but the cached "
                f"ones have {cached}: choose smaller crops or other views, or pack the images again."
            )
        number = self.num_views or num_views
        assert number is not None
        check_range("num_views", number, 1, 1024)
        return number


VIEWS: dict[str, Views] = {
    "centre": Views(1, lambda images, draws, size, view: centre_crop(images, size)),
    "centre+flip": Views(2, _centre_and_mirror),
    # Centre and corners, and their mirror images.
    "ten_crop": Views(10, _ten_crop, needs_margin=True),
    "random": Views(None, lambda images, draws, size, view: _random_crop_and_flip(images, draws, size)),
}
