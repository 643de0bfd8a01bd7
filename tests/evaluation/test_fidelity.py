"""PSNR and SSIM against scikit-image, and measures of edits against loops over pixels."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from maskgit.errors import ImageError, RegionError
from maskgit.evaluation.metrics import (
    boundary_gradient_ratio,
    psnr,
    ssim,
)


@pytest.fixture(scope="module")
def pairs():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(3, 3, 24, 37, generator=generator)
    noise = torch.rand(a.shape, generator=generator)
    amount = torch.tensor([0.02, 0.3, 1.0]).view(3, 1, 1, 1)
    return a, torch.lerp(a, noise, amount)


def as_image(tensor):
    return tensor.permute(1, 2, 0).double().numpy()


def test_psnr_matches_scikit_image(pairs):
    expected = [
        peak_signal_noise_ratio(as_image(x), as_image(y), data_range=1) for x, y in zip(*pairs, strict=True)
    ]
    assert np.allclose(psnr(*pairs), expected, atol=1e-9)


def test_psnr_of_equal_images_is_infinite(pairs):
    assert torch.isposinf(psnr(pairs[0], pairs[0])).all()


def test_ssim_matches_scikit_image(pairs):
    expected = [
        structural_similarity(
            as_image(x),
            as_image(y),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=2,
        )
        for x, y in zip(*pairs, strict=True)
    ]
    assert np.allclose(ssim(*pairs), expected, atol=1e-7)


def test_ssim_of_equal_images_is_one(pairs):
    assert torch.allclose(ssim(pairs[0], pairs[0]), torch.ones(3, dtype=torch.float64))


def test_float32_images_lose_nothing_in_the_sums(pairs):
    a, b = pairs
    for metric in (psnr, ssim):
        assert metric(a, b).dtype == torch.float64
        assert torch.equal(metric(a, b), metric(a.double(), b.double()))


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 15)),
        (torch.rand(3, 16, 16), torch.rand(3, 16, 16)),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)),
    ],
)
def test_images_that_do_not_fit_are_refused(metric, a, b):
    with pytest.raises(ImageError, match="must"):
        metric(a, b)


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ImageError, match="at least 11"):
        ssim(torch.rand(1, 3, 10, 32), torch.rand(1, 3, 10, 32))


@pytest.fixture(scope="module")
def masks():
    masks = torch.zeros(3, 24, 37, dtype=torch.bool)
    masks[0, 5:12, 8:30] = True
    masks[1, :9, :4] = True
    masks[2] = torch.rand(24, 37, generator=torch.Generator().manual_seed(1)) < 0.5
    return masks


def steps(image, mask):
    """Loop over the pairs of neighbours: those across the border, and those inside."""
    across, inside = [], []
    height, width = mask.shape
    for y in range(height):
        for x in range(width):
            for v, u in ((y, x + 1), (y + 1, x)):
                if v < height and u < width:
                    step = np.abs(image[:, y, x] - image[:, v, u])
                    if mask[y, x] != mask[v, u]:
                        across.append(step.mean())
                    elif mask[y, x]:
                        inside.append(step.mean())
    return np.mean(across), np.mean(inside)


def test_the_boundary_gradient_ratio_is_its_definition(pairs, masks):
    image = pairs[1]
    for one, mask, ratio in zip(image, masks, boundary_gradient_ratio(image, masks), strict=True):
        across, inside = steps(one.double().numpy(), mask.numpy())
        assert ratio == pytest.approx(across / inside)


def test_a_seam_raises_the_boundary_gradient_ratio_and_none_is_about_one():
    generator = torch.Generator().manual_seed(0)
    texture = 0.3 + 0.1 * torch.rand(1, 3, 64, 64, generator=generator)
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[16:40, 20:50] = True
    ratios = [boundary_gradient_ratio(texture + step * mask, mask).item() for step in (0.0, 0.1, 0.2, 0.4)]
    assert ratios[0] == pytest.approx(1, abs=0.1)
    assert sorted(ratios) == ratios
    assert ratios[-1] > 5


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (torch.zeros(24, 37), "must be bool"),
        (torch.ones(24, 36, dtype=torch.bool), "must be bool of shape"),
        (torch.zeros(24, 37, dtype=torch.bool), "no border"),
    ],
)
def test_masks_that_do_not_fit_are_refused(pairs, mask, match):
    with pytest.raises(RegionError, match=match):
        boundary_gradient_ratio(pairs[0], mask)


def test_a_mask_without_border_or_inside_is_refused(pairs):
    with pytest.raises(RegionError, match="no border"):
        boundary_gradient_ratio(pairs[0], torch.ones(24, 37, dtype=torch.bool))
    dots = torch.zeros(24, 37, dtype=torch.bool)
    dots[3, 3] = True
    with pytest.raises(RegionError, match="no two neighbouring"):
        boundary_gradient_ratio(pairs[0], dots)
