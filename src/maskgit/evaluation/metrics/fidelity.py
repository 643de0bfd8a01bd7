"""How near an image is to another: PSNR, SSIM, and how visible the seam of an edit is.

Shapes: B batch, H × W pixels. Images are float tensors (B, 3, H, W) in [0, 1]; pixel masks are True where the
image was edited. Sums are float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit.errors import ImageError, RegionError


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.ndim != 4 or a.shape != b.shape or 0 in a.shape[1:]:
        raise ImageError(
            "Two batches of images must have one shape (B, 3, H, W), "
            f"but are {tuple(a.shape)} and {tuple(b.shape)}."
        )
    if not (a.is_floating_point() and b.is_floating_point()):
        raise ImageError(f"Images must be float in [0, 1], but are {a.dtype} and {b.dtype}.")


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each pair of images, in decibels.

    Args:
        a: float (B, 3, H, W) in [0, 1].
        b: the same.

    Returns:
        float64 (B,), −10 · log₁₀ of the mean squared difference; infinite where images are equal.

    Raises:
        ImageError: the shapes or types do not fit.
    """
    _check_pair(a, b)
    error = (a.double() - b.double()).square().mean((1, 2, 3))
    return -10 * error.log10()


SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity of each pair of images.

    Each channel is compared within an 11 × 11 Gaussian window (σ 1.5, K₁ 0.01, K₂ 0.03), only where the
    window lies wholly inside the image, and averaged.

    Args:
        a: float (B, 3, H, W) in [0, 1], at least 11 pixels a side.
        b: the same.

    Returns:
        float64 (B,), at most 1, which only equal images reach.

    Raises:
        ImageError: the shapes or types do not fit.

    Source: Wang, Bovik, Sheikh, Simoncelli: Image quality assessment, IEEE TIP 2004, eq. 13.
    """
    _check_pair(a, b)
    if min(a.shape[2:]) < SSIM_WINDOW:
        raise ImageError(
            f"SSIM needs images of at least {SSIM_WINDOW} pixels a side, not {tuple(a.shape[2:])}."
        )
    a, b = a.double(), b.double()
    offsets = torch.arange(SSIM_WINDOW, dtype=a.dtype, device=a.device) - SSIM_WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    window /= window.sum()

    def blur(x: Tensor) -> Tensor:
        planes = x.flatten(0, 1)[:, None]
        planes = F.conv2d(F.conv2d(planes, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
        return planes.view(x.shape[0], x.shape[1], *planes.shape[2:])

    mean_a, mean_b = blur(a), blur(b)
    variance_a = blur(a * a) - mean_a**2
    variance_b = blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).mean((1, 2, 3))


def boundary_gradient_ratio(image: Tensor, mask: Tensor) -> Tensor:
    """Return how much steeper an image is across a mask's border than inside it: how visible the seam is.

    With d the mean over channels of the absolute difference of two neighbouring pixels (to the right or
    below), it is the mean of d over pairs of which one pixel lies in the mask and one does not, divided by
    the mean of d over pairs that lie in the mask.

    Args:
        image: float (B, 3, H, W) in [0, 1].
        mask: bool (B, H, W) or (H, W), True where the image was edited; it needs a border inside the image
            and two neighbouring pixels.

    Returns:
        float64 (B,): about 1 without a seam; infinite or NaN where the inside is a single colour.

    Raises:
        ImageError: the shape or type does not fit.
        RegionError: the mask is not bool, does not fit, or has no border or no inside.

    Source: our own definition. That a seam is a gradient across the border which does not belong is the idea
    of Pérez, Gangnet, Blake: Poisson Image Editing, SIGGRAPH 2003, §2, which removes it.
    """
    _check_pair(image, image)
    mask = batch_mask(mask, image)
    return _pair_mean(image, mask, across=True) / _pair_mean(image, mask, across=False)


def batch_mask(mask: Tensor, images: Tensor) -> Tensor:
    """Return a pixel mask for each image: bool (B, H, W) on the images' device.

    Raises:
        RegionError: it is not bool, or does not fit the images.
    """
    size = (len(images), *images.shape[2:])
    if mask.dtype != torch.bool or tuple(mask.shape) not in (size, size[1:]):
        raise RegionError(
            f"A pixel mask must be bool of shape {size} or {size[1:]} for these images, "
            f"but is {mask.dtype} of {tuple(mask.shape)}."
        )
    return mask.to(images.device).expand(size)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of each map within its mask.

    Args:
        values: float (B, H, W).
        mask: bool (B, H, W).

    Returns:
        float64 (B,).

    Raises:
        RegionError: a mask is empty.
    """
    area = mask.sum((1, 2))
    if not area.all():
        raise RegionError("A mask is empty: there is nothing to compare inside it.")
    return (values.double() * mask).sum((1, 2)) / area


def _pair_mean(image: Tensor, mask: Tensor, *, across: bool) -> Tensor:
    """Average steps over the pairs of neighbours across the mask's border, or those inside: (B,)."""
    total = torch.zeros(len(image), dtype=torch.float64, device=image.device)
    count = torch.zeros_like(total)
    for dim in (-1, -2):
        step = image.double().diff(dim=dim).abs()
        length = mask.shape[dim] - 1
        first, second = mask.narrow(dim, 0, length), mask.narrow(dim, 1, length)
        chosen = first ^ second if across else first & second
        total += (step.mean(1) * chosen).sum((1, 2))
        count += chosen.sum((1, 2))
    if not count.all():
        raise RegionError(
            "A mask has no border inside the image: leave some pixels unmasked and some masked."
            if across
            else "A mask has no two neighbouring pixels: choose a larger one."
        )
    return total / count
