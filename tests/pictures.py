"""Pictures for the tests, made of noise, and the files that hold them."""

import io

import numpy as np
from PIL import Image

from maskgit import images


def noise(height, width, channels=3, dtype=np.uint8, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def picture(height=12, width=9, seed=0):
    return Image.fromarray(noise(height, width, seed=seed))


def encoded(image, kind="PNG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def as_array(source, **options):
    image = images.read_image(source, **options)
    assert image.mode == "RGB"
    assert image.info == {}
    return np.asarray(image)


def over_white(rgba):
    """Lay (H, W, 4) in [0, 255] over white, by the definition of alpha."""
    rgba = rgba.astype(np.float64)
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)
