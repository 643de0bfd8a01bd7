"""Masks that are probably not what is meant, and masks the other way round."""

import numpy as np
import pytest
from PIL import Image

from maskgit.apps.cli import commands as cli
from maskgit.apps.cli import output
from maskgit.editing import masks, photos
from maskgit.errors import RegionError
from maskgit.foundation.notes import PictureWarning, listening
from pictures import encoded, noise

PHOTO = photos.Photo(Image.fromarray(noise(40, 40)))


def hinted(mask, **options):
    """Return what a mask marks, and the notes made meanwhile."""
    notes = []
    with listening(notes.append):
        return masks.read_mask(mask, PHOTO, **options), notes


def square(side):
    mask = np.zeros((40, 40), np.bool_)
    mask[:side, :side] = True
    return mask


@pytest.mark.parametrize("side", [1, 6, 20, 37])
def test_a_mask_of_a_part_is_nothing_to_remark_on(side):
    painted, notes = hinted(square(side))
    assert painted.sum() == side**2
    assert notes == []


@pytest.mark.parametrize("mask", [square(0), Image.new("L", (40, 40)), Image.new("RGBA", (40, 40))])
def test_a_mask_that_marks_nothing_is_remarked_on(mask):
    painted, notes = hinted(mask)
    assert not painted.any()
    assert len(notes) == 1
    assert "marks nothing" in notes[0]
    assert "--invert" in notes[0]


@pytest.mark.parametrize("mask", [~square(8), square(39), Image.new("L", (40, 40), "white")])
def test_a_mask_that_marks_nearly_everything_is_remarked_on(mask):
    painted, notes = hinted(mask)
    assert painted.mean() > 0.9
    assert len(notes) == 1
    assert f"marks {painted.mean():.0%} of the photo" in notes[0]
    with pytest.warns(PictureWarning, match="other way round"):
        masks.read_mask(mask, PHOTO)


def test_an_inverted_mask_marks_the_rest():
    for mask in (square(9), Image.fromarray(square(9)), square(9).astype(np.float32)):
        assert np.array_equal(hinted(~square(9), invert=True)[0], square(9))
        assert np.array_equal(hinted(mask, invert=True)[0], ~square(9))
    assert "leave out invert" in hinted(square(2), invert=True)[1][0]
    assert hinted(~square(9), invert=True)[1] == []


def test_transparency_the_other_way_round():
    array = noise(40, 40, 4)
    array[..., 3] = np.where(square(20), 0, 255)
    photo = photos.read_photo(array)
    assert np.array_equal(masks.read_mask("alpha", photo), square(20))
    assert np.array_equal(masks.read_mask("alpha", photo, invert=True), ~square(20))


def test_alpha_that_is_opaque_everywhere_is_refused(tiny, tmp_path):
    array = noise(40, 40, 4)
    array[..., 3] = 255
    level = Image.fromarray(array[..., 0])
    level.putalpha(255)
    for photo in (array, encoded(Image.fromarray(array)), level):
        with pytest.raises(RegionError, match="opaque everywhere"):
            tiny.inpaint(photo, "alpha", 1, steps=1)


def test_the_pipeline_inverts(tiny):
    photo = noise(32, 32)
    one = tiny.inpaint(photo, square(32)[:32, :32] & (np.arange(32) < 16), 1, steps=1)
    other = tiny.inpaint(photo, square(32)[:32, :32] & (np.arange(32) >= 16), 1, invert=True, steps=1)
    assert np.array_equal(np.asarray(one.photos[0]), np.asarray(other.photos[0]))


def test_the_command_line_inverts_and_says_its_notes(tiny_folder, tmp_path, capsys):
    Image.fromarray(noise(40, 40)).save(tmp_path / "photo.png")
    Image.fromarray(~square(8)).save(tmp_path / "mask.png")
    command = ["inpaint", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png"), "--class", "1"]
    command += ["--steps", "1", "--model", str(tiny_folder)]
    assert cli.main([*command, "--out", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().err
    assert said.startswith("maskgit: The mask marks 96% of the photo")
    assert said.count("\n") == 1
    assert cli.main([*command, "--invert", "--out", str(tmp_path / "b")]) == 0
    assert capsys.readouterr().err == ""
    (path,) = (p for p in (tmp_path / "b").iterdir() if p.name != output.SHEET)
    with Image.open(path) as made:
        assert np.array_equal(np.asarray(made)[30:], np.asarray(Image.open(tmp_path / "photo.png"))[30:])
