"""Token masks against the official records and plain loops over pixels; blending against its formula."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskgit.editing import regions
from maskgit.errors import ConfigError, RegionError
from maskgit.networks.vocabulary import Vocabulary

GREY_LEVEL = 1 / 255
FLOAT16_STEP = 2**-11
NUM_CASES = 12


@pytest.fixture(scope="module")
def edit(golden):
    return np.load(golden / "edit.npz")


def official_box(edit, case):
    top, left, height, width = edit[f"{case}_box_top_left_height_width"].tolist()
    return left, top, width, height


def official_mask(edit, case):
    size = int(edit[f"{case}_size"])
    return regions.box_to_token_mask(official_box(edit, case), size, patch=16, rule="official")


def check_composite(edit, case):
    image, generated, expected = (
        torch.from_numpy(edit[f"{case}_{name}"]).float().movedim(-1, 0)
        for name in ("image", "generated", "composite")
    )
    blended = regions.composite(image, generated, official_mask(edit, case))
    assert (blended - expected).abs().max() <= GREY_LEVEL + FLOAT16_STEP


@pytest.mark.parametrize("case", range(NUM_CASES))
def test_official_masks_and_sequences(edit, case):
    mask = official_mask(edit, case)
    assert np.array_equal(mask.numpy(), edit[f"{case}_token_mask"])

    vocabulary = Vocabulary(num_codes=1024, num_classes=1000, grid_size=mask.shape[0])
    tokens = torch.from_numpy(edit[f"{case}_tokens"])
    sequence = vocabulary.sequence(torch.tensor([207]), tokens, mask)
    sequence[sequence == vocabulary.mask] = -1
    assert np.array_equal(sequence.numpy(), edit[f"{case}_sequence"])


@pytest.mark.parametrize("case", [3, 4, 9])
def test_official_composites(edit, case):
    check_composite(edit, case)


def test_all_official_composites(shared_golden):
    edit = np.load(shared_golden / "edit.npz")
    for case in range(NUM_CASES):
        check_composite(edit, case)


@st.composite
def boxes_in_images(draw):
    patch = draw(st.sampled_from([1, 2, 4, 8, 16]))
    image_width, image_height = (patch * draw(st.integers(1, 9)) for _ in range(2))
    left, top = draw(st.integers(0, image_width - 1)), draw(st.integers(0, image_height - 1))
    width, height = draw(st.integers(1, image_width - left)), draw(st.integers(1, image_height - top))
    return (left, top, width, height), (image_width, image_height), patch


def paint(box, size):
    left, top, width, height = box
    pixels = torch.zeros(size[1], size[0], dtype=torch.bool)
    pixels[top : top + height, left : left + width] = True
    return pixels


@given(boxes_in_images())
def test_cover_masks_what_the_box_touches_and_no_more(drawn):
    box, size, patch = drawn
    pixels = paint(box, size)
    mask = regions.box_to_token_mask(box, size, patch)
    assert mask.shape == (size[1] // patch, size[0] // patch)
    for row in range(mask.shape[0]):
        for column in range(mask.shape[1]):
            cell = pixels[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            assert bool(mask[row, column]) == bool(cell.any())


@given(boxes_in_images())
def test_a_painted_box_masks_the_same_tokens(drawn):
    box, size, patch = drawn
    painted = regions.pixels_to_token_mask(paint(box, size), patch)
    assert torch.equal(painted, regions.box_to_token_mask(box, size, patch))


@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 6),
    st.floats(0, 1),
    st.integers(0, 7),
    st.integers(0),
)
def test_a_share_of_painted_pixels_masks_a_token_and_its_neighbours(
    patch, rows, columns, share, dilate, seed
):
    pixels = torch.from_numpy(np.random.default_rng(seed).random((rows * patch, columns * patch)) < 0.4)
    mask = regions.pixels_to_token_mask(pixels, patch, share=share, dilate=dilate)
    for row in range(rows):
        for column in range(columns):
            near = [
                pixels[y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
                for y in range(max(0, row - dilate), min(rows, row + dilate + 1))
                for x in range(max(0, column - dilate), min(columns, column + dilate + 1))
            ]
            enough = [int(cell.sum()) >= max(1, share * patch**2 - 1e-6) for cell in near]
            assert bool(mask[row, column]) == any(enough)


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_pixels_are_dealt_to_the_cell_that_their_middle_lies_in(height, width, data):
    grid = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    pixels = np.random.default_rng(height * width).random((height, width)) < 0.5
    cells = [[] for _ in range(grid[0] * grid[1])]
    for y, x in np.ndindex(height, width):
        row, column = (2 * y + 1) * grid[0] // (2 * height), (2 * x + 1) * grid[1] // (2 * width)
        cells[row * grid[1] + column].append(pixels[y, x])
    expected = torch.tensor([np.mean(cell) for cell in cells], dtype=torch.float64)
    torch.testing.assert_close(regions.cell_shares(pixels, grid).flatten(), expected)


@pytest.mark.parametrize(
    "options", [{"share": -0.1}, {"share": 1.1}, {"share": float("nan")}, {"dilate": -1}]
)
def test_shares_and_growths_that_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        regions.pixels_to_token_mask(torch.ones(16, 16) > 0, **options)


@given(boxes_in_images(), st.sampled_from(sorted(regions.RULES)))
def test_every_rule_masks_something_and_transposes_with_the_image(drawn, rule):
    (left, top, width, height), size, patch = drawn
    mask = regions.box_to_token_mask((left, top, width, height), size, patch, rule)
    turned = regions.box_to_token_mask((top, left, height, width), size[::-1], patch, rule)
    assert mask.any()
    assert torch.equal(mask.T, turned)


def test_the_official_rule_can_leave_a_part_of_the_box():
    box = (15, 15, 31, 31)
    covered = regions.box_to_token_mask(box, 64)
    official = regions.box_to_token_mask(box, 64, rule="official")
    assert (covered & ~official).any()


def test_several_boxes():
    first, second = (0, 0, 16, 16), (40, 3, 5, 5)
    both = regions.boxes_to_token_mask([first, second], 64)
    assert both.nonzero().tolist() == [[0, 0], [0, 2]]
    with pytest.raises(RegionError, match="no boxes"):
        regions.boxes_to_token_mask([], 64)


def test_numpy_integers_are_whole_numbers():
    mask = regions.box_to_token_mask(tuple(np.array([0, 16, 16, 16])), 64)
    assert mask.nonzero().tolist() == [[1, 0]]


@pytest.mark.parametrize(
    "box",
    [
        (-1, 0, 16, 16),
        (0, -1, 16, 16),
        (0, 0, 65, 16),
        (50, 0, 16, 16),
        (0, 50, 16, 16),
        (0, 64, 1, 1),
        (0, 0, 0, 16),
        (0, 0, 16, -16),
        (0, 0, 16.0, 16),
        (0, 0, "16", 16),
        (False, 0, True, 16),
        "1234",
        (0, 0, 16),
        (0, 0, 16, 16, 16),
        5,
        None,
    ],
)
@pytest.mark.parametrize("rule", sorted(regions.RULES))
def test_boxes_that_are_refused(box, rule):
    with pytest.raises(RegionError, match="64 × 64"):
        regions.box_to_token_mask(box, 64, rule=rule)


@pytest.mark.parametrize("size", [0, -16, 15, 40, (64, 40), (64,), (64, 64, 64), 10**9, 64.0, "64", None])
def test_image_sizes_that_are_refused(size):
    with pytest.raises(RegionError, match="multiples of 16"):
        regions.box_to_token_mask((0, 0, 1, 1), size)


def test_an_unknown_rule_lists_the_choices():
    with pytest.raises(ConfigError, match="cover, official"):
        regions.box_to_token_mask((0, 0, 1, 1), 64, rule="oficial")


@pytest.mark.parametrize("pixels", [torch.ones(16, 16), torch.ones(16, 20) > 0, torch.ones(1, 16, 16) > 0])
def test_pixel_masks_that_are_refused(pixels):
    with pytest.raises(RegionError):
        regions.pixels_to_token_mask(pixels)


def random_images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("feather", [None, 0, 3.5])
def test_nothing_masked_returns_the_image_and_all_masked_the_generated_one(feather):
    image, generated = random_images(2, 3, 64, 96), random_images(2, 3, 64, 96, seed=1)
    nothing = torch.zeros(4, 6, dtype=torch.bool)
    assert torch.equal(regions.composite(image, generated, nothing, feather=feather), image)
    assert torch.equal(regions.composite(image, generated, ~nothing, feather=feather), generated)


@pytest.mark.parametrize(("patch", "size"), [(16, (64, 128)), (8, (128, 64)), (4, (64, 64))])
def test_the_default_radius_is_a_sixteenth_of_the_shorter_side_less_one(patch, size):
    image, generated = random_images(3, *size), random_images(3, *size, seed=1)
    mask = regions.box_to_token_mask((0, 0, 20, 20), size[::-1], patch)
    default = regions.composite(image, generated, mask, patch)
    assert torch.equal(default, regions.composite(image, generated, mask, patch, feather=3))
    assert not torch.equal(default, regions.composite(image, generated, mask, patch, feather=2))


def test_a_wider_feather_reaches_further_and_far_pixels_stay_exactly():
    image, generated = torch.zeros(3, 128, 128), torch.ones(3, 128, 128)
    mask = regions.box_to_token_mask((0, 0, 32, 128), 128)
    reached = []
    for feather in (0, 2, 8):
        weights = regions.composite(image, generated, mask, feather=feather)[0, 64]
        assert (weights.diff() <= 0).all()
        assert weights[0] == 1
        assert weights[-1] == 0
        reached.append(int((weights > 0).sum()))
    assert reached == sorted(set(reached))
    # With no blur, the bicubic enlargement of the mask reaches at most two tokens beyond it.
    assert reached[0] <= 32 + 2 * 16


def test_images_and_masks_of_a_batch_are_blended_one_by_one():
    images, generated = random_images(3, 3, 32, 32), random_images(3, 3, 32, 32, seed=1)
    masks = random_images(3, 8, 8) < 0.5
    together = regions.composite(images, generated, masks, patch=4)
    alone = [regions.composite(*one, patch=4) for one in zip(images, generated, masks, strict=True)]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 3, 32, 32)])
def test_one_image_serves_all_generated_ones(shape):
    image, generated = random_images(*shape), random_images(4, 3, 32, 32, seed=1)
    mask = regions.box_to_token_mask((0, 0, 8, 8), 32, 4)
    blended = regions.composite(image, generated, mask, patch=4)
    assert torch.equal(blended, regions.composite(image.expand(4, 3, 32, 32), generated, mask, patch=4))


@pytest.mark.parametrize(
    ("image", "generated", "mask"),
    [
        (torch.zeros(3, 32, 32), torch.zeros(3, 32, 48), torch.zeros(2, 2) > 0),
        (torch.zeros(3, 32, 32), torch.zeros(3, 32, 32), torch.zeros(2, 3) > 0),
        (torch.zeros(3, 32, 32), torch.zeros(3, 32, 32), torch.zeros(2, 2)),
        (torch.zeros(3, 32, 32), torch.zeros(3, 32, 32), torch.zeros(2) > 0),
        (torch.zeros(1, 32, 32), torch.zeros(3, 32, 32), torch.zeros(2, 2) > 0),
        (torch.zeros(3, 30, 30), torch.zeros(3, 30, 30), torch.zeros(2, 2) > 0),
        (torch.zeros(2, 3, 32, 32), torch.zeros(3, 3, 32, 32), torch.zeros(2, 2) > 0),
        (torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 32), torch.zeros(3, 2, 2) > 0),
        (torch.zeros(3, 32, 32).byte(), torch.zeros(3, 32, 32), torch.zeros(2, 2) > 0),
    ],
)
def test_shapes_that_do_not_fit_are_refused(image, generated, mask):
    with pytest.raises(RegionError):
        regions.composite(image, generated, mask)


@pytest.mark.parametrize("feather", [-1, float("nan"), 1e9])
def test_radii_that_are_refused(feather):
    image = torch.zeros(3, 32, 32)
    with pytest.raises(ConfigError, match="feather"):
        regions.composite(image, image, torch.zeros(2, 2) > 0, feather=feather)
