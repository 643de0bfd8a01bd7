"""PSNR and SSIM against scikit-image, and measures of edits against loops over pixels."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from maskgit.errors import ImageError, RegionError
from maskgit.evaluation.metrics import (
    boundary_gradient_error,
    boundary_gradient_ratio,
    change_outside,
    masked_psnr,
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


def test_masked_psnr_is_that_of_the_pixels_inside(pairs, masks):
    a, b = pairs
    expected = [
        peak_signal_noise_ratio(x[:, m].numpy(), y[:, m].numpy(), data_range=1)
        for x, y, m in zip(a.double(), b.double(), masks, strict=True)
    ]
    assert np.allclose(masked_psnr(a, b, masks), expected, atol=1e-9)
    whole = torch.ones(24, 37, dtype=torch.bool)
    assert torch.allclose(masked_psnr(a, b, whole), psnr(a, b), atol=1e-9)
    assert torch.isposinf(masked_psnr(a, torch.where(masks[:, None], a, b), masks)).all()


def test_a_change_outside_the_mask_is_seen_and_inside_it_is_not(pairs, masks):
    original = pairs[0]
    edited = torch.where(masks[:, None], pairs[1], original)
    assert torch.equal(change_outside(edited, original, masks), torch.zeros(3, dtype=torch.float64))
    edited[1, 2, 20, 30] = original[1, 2, 20, 30] + 1 / 255
    changes = change_outside(edited, original, masks)
    assert changes[1] == pytest.approx(1 / 255, rel=1e-5)
    assert changes[0] == changes[2] == 0
    everywhere = torch.ones(24, 37, dtype=torch.bool)
    assert not change_outside(pairs[1], original, everywhere).any()


def steps(image, mask, original=None):
    """Loop over the pairs of neighbours: those across the border, and those inside."""
    across, inside = [], []
    height, width = mask.shape
    for y in range(height):
        for x in range(width):
            for v, u in ((y, x + 1), (y + 1, x)):
                if v < height and u < width:
                    step = np.abs(image[:, y, x] - image[:, v, u])
                    if original is not None:
                        step = np.abs(step - np.abs(original[:, y, x] - original[:, v, u]))
                    if mask[y, x] != mask[v, u]:
                        across.append(step.mean())
                    elif mask[y, x]:
                        inside.append(step.mean())
    return np.mean(across), np.mean(inside)


def test_boundary_gradients_are_their_definition(pairs, masks):
    a, b = pairs
    ratio, error = boundary_gradient_ratio(b, masks), boundary_gradient_error(b, a, masks)
    for i in range(3):
        x, y, m = a[i].double().numpy(), b[i].double().numpy(), masks[i].numpy()
        across, inside = steps(y, m)
        assert ratio[i] == pytest.approx(across / inside)
        assert error[i] == pytest.approx(steps(y, m, x)[0])


def test_a_seam_raises_both_boundary_measures_and_none_is_about_one():
    generator = torch.Generator().manual_seed(0)
    texture = 0.3 + 0.1 * torch.rand(1, 3, 64, 64, generator=generator)
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[16:40, 20:50] = True
    ratios, errors = [], []
    for step in (0.0, 0.1, 0.2, 0.4):
        edited = texture + step * mask
        ratios.append(boundary_gradient_ratio(edited, mask).item())
        errors.append(boundary_gradient_error(edited, texture, mask).item())
    assert ratios[0] == pytest.approx(1, abs=0.1)
    assert errors[0] == 0
    assert sorted(ratios) == ratios
    assert sorted(errors) == errors
    assert ratios[-1] > 5


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (torch.zeros(24, 37), "must be bool"),
        (torch.ones(24, 36, dtype=torch.bool), "must be bool of shape"),
        (torch.zeros(24, 37, dtype=torch.bool), "empty|no border"),
    ],
)
def test_masks_that_do_not_fit_are_refused(pairs, mask, match):
    a, b = pairs
    with pytest.raises(RegionError, match=match):
        masked_psnr(a, b, mask)
    with pytest.raises(RegionError, match=match):
        boundary_gradient_ratio(a, mask)
    with pytest.raises(RegionError, match=match):
        boundary_gradient_error(a, b, mask)


def test_a_mask_without_border_or_inside_is_refused(pairs):
    with pytest.raises(RegionError, match="no border"):
        boundary_gradient_ratio(pairs[0], torch.ones(24, 37, dtype=torch.bool))
    dots = torch.zeros(24, 37, dtype=torch.bool)
    dots[3, 3] = True
    with pytest.raises(RegionError, match="no two neighbouring"):
        boundary_gradient_ratio(pairs[0], dots)
