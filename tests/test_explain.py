"""The pictures that show how an image came to be."""

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit.errors import ConfigError, ImageError, OutputError
from maskgit.explain import (
    CONFIDENCE_MAP,
    KNOWN,
    LEAST_CONFIDENCE,
    MASK_COLOUR,
    STEP_MAP,
    animation,
    colours,
    confidence_map,
    explain,
    save_animation,
    step_map,
)
from maskgit.results import Output, Trace


@pytest.fixture(scope="module")
def made(tiny):
    return tiny.generate([3, 7], steps=5, seed=1, return_steps=True)


@pytest.fixture(scope="module")
def edited(tiny):
    photo = torch.linspace(0, 1, 32).expand(3, 32, 32)
    return tiny.edit(photo, (8, 8, 16, 8), 3, steps=6, start_step=1, return_steps=True)


def luminance(rgb):
    """CIE lightness of sRGB, from its definition."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    y = linear @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)


@pytest.mark.parametrize("anchors", [STEP_MAP, CONFIDENCE_MAP])
def test_colours_go_evenly_from_dark_to_light_or_back(anchors):
    lightness = luminance(colours(np.linspace(0, 1, 9), anchors) / 255)
    steps = np.diff(lightness)
    assert abs(lightness[-1] - lightness[0]) > 60
    assert (np.sign(steps) == np.sign(steps[0])).all()
    assert abs(steps).max() / abs(steps).min() < 1.5


def test_colours_are_oklch_in_srgb():
    # Known values: white, and sRGB's red and blue in OKLCh.
    for lch, rgb in (
        ((1.0, 0.0, 0), (255, 255, 255)),
        ((0.62796, 0.25768, 29.234), (255, 0, 0)),
        ((0.45201, 0.31321, 264.052), (0, 0, 255)),
    ):
        assert np.abs(colours(np.array(0.5), [lch, lch]).astype(int) - rgb).max() <= 1


def corners(picture, cell):
    """The colour of each token, where no number is written: uint8 (h, w, 3)."""
    return np.asarray(picture)[1::cell, 1::cell]


@pytest.mark.parametrize("cell", [4, 16, 40])
def test_the_step_map_has_the_colour_of_each_step(cell):
    fixed_at = torch.tensor([[0, 1, 2], [3, -1, 0]])
    picture = step_map(fixed_at, 4, cell)
    assert picture.size == (3 * cell, 2 * cell)
    seen = corners(picture, cell)
    for (row, column), step in np.ndenumerate(fixed_at.numpy()):
        expected = KNOWN if step < 0 else colours(np.array(step / 3))
        assert tuple(seen[row, column]) == tuple(expected)
    # Numbers need room; a known token has none.
    filled = seen.repeat(cell, 0).repeat(cell, 1)
    written = (np.asarray(picture) != filled).any(-1).reshape(2, cell, 3, cell).any((1, 3))
    assert np.array_equal(written, (fixed_at.numpy() >= 0) & (cell >= 15))


def test_the_confidence_map_is_logarithmic():
    confidence = torch.tensor([[1.0, 0.1, 0.01, 0.001, 0.0, 0.5]])
    known = torch.tensor([[False, False, False, False, False, True]])
    seen = corners(confidence_map(confidence, known, 30), 30)[0]
    expected = [*colours(np.array([1, 2 / 3, 1 / 3, 0, 0]), CONFIDENCE_MAP), KNOWN]
    assert LEAST_CONFIDENCE == 0.001
    assert np.array_equal(seen, np.array(expected))


def tops(sheet, part, left):
    """The rows at which a part stands in a sheet, at a known column."""
    column = np.asarray(sheet)[:, left : left + part.width]
    rows = range(sheet.height - part.height + 1)
    return [y for y in rows if np.array_equal(column[y : y + part.height], np.asarray(part))]


@pytest.mark.parametrize("kind", ["made", "edited"])
def test_the_picture_shows_image_steps_and_confidence_in_a_row(kind, request):
    output = request.getfixturevalue(kind)
    sheet = explain(output, captions=["a caption"] * len(output.images), title="A title")
    trace = output.trace
    known = trace.fixed_at < 0
    for i, picture in enumerate(output.to_pil()):
        panels = (
            picture.resize((320, 320), Image.Resampling.NEAREST),
            step_map(trace.fixed_at[i], trace.tokens.shape[1], 40),
            confidence_map(trace.final_confidence[i], known[i], 40),
        )
        places = [tops(sheet, panel, 28 + n * (320 + 22)) for n, panel in enumerate(panels)]
        assert len(places[0]) == 1
        assert places[0] == places[1] == places[2]
    colours_seen = {tuple(colour) for colour in np.asarray(sheet).reshape(-1, 3)}
    assert {tuple(colour) for colour in colours(np.linspace(0, 1, trace.tokens.shape[1]))} <= colours_seen
    assert (KNOWN in colours_seen) == (kind == "edited")
    # Even margins.
    edges = np.asarray(sheet)
    assert (edges[:24] == 255).all()
    assert (edges[-24:] == 255).all()
    assert (edges[:, :24] == 255).all()
    assert (edges[:, -24:] == 255).all()


def test_frames_show_what_is_fixed(tiny, made):
    frames = animation(tiny, made, unfixed="masked", scale=4, columns=1, batch_size=1)
    assert len(frames) == 6
    pictures = [np.asarray(frame)[16 : 16 + 2 * 128 + 6, 16 : 16 + 128] for frame in frames]
    assert (pictures[0][:128] == MASK_COLOUR).all()
    for step in range(1, 6):
        before = made.trace.tokens[:, step - 1]
        expected = tiny.tokenizer.decode(before).clamp(0, 1)
        for i in range(2):
            shown = pictures[step][i * 134 : i * 134 + 128][::4, ::4]
            fixed = made.trace.fixed_at[i].numpy() < step
            fixed = fixed.repeat(4, 0).repeat(4, 1)
            exact = np.rint(expected[i].movedim(0, -1).numpy() * 255)
            assert np.abs(shown[fixed] - exact[fixed]).max() <= 1
            assert (shown[~fixed] == MASK_COLOUR).all()
    assert np.array_equal(pictures[5][:128][::4, ::4], np.asarray(made.to_pil()[0]))


def test_unfixed_tokens_can_be_shown_in_three_ways(tiny, made):
    third = {
        name: np.asarray(animation(tiny, made, unfixed=name)[3]) for name in ("faded", "masked", "sampled")
    }
    assert len({picture.tobytes() for picture in third.values()}) == 3
    distance = {name: np.abs(picture.astype(int) - third["masked"]).mean() for name, picture in third.items()}
    assert 0 < distance["faded"] < distance["sampled"]


def test_an_edit_starts_from_what_it_keeps_and_ends_as_it_was_returned(tiny, edited):
    frames = animation(tiny, edited)
    assert len(frames) == edited.trace.tokens.shape[1] + 1
    assert frames[0].width == 256 + 2 * 16
    first, last = (np.asarray(frames[i])[16:272, 16:272][::8, ::8] for i in (0, -1))
    mask = edited.token_mask.numpy().repeat(4, 0).repeat(4, 1)
    assert (first[mask] == MASK_COLOUR).all()
    assert not (first[~mask] == MASK_COLOUR).all(-1).any()
    assert np.array_equal(last, np.asarray(edited.to_pil()[0]))


@pytest.mark.parametrize("name", ["forming.gif", "deep/forming.webp"])
def test_animations_are_written_and_read_again(tiny, made, tmp_path, name):
    frames = animation(tiny, made)
    save_animation(tmp_path / name, frames, milliseconds=120, hold=1500)
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == len(frames)
        assert image.size == frames[0].size
        assert image.info["loop"] == 0
        durations = []
        for i, frame in enumerate(frames):
            image.seek(i)
            shown = np.asarray(image.convert("RGB")).astype(int)
            durations.append(image.info["duration"])
            # GIF has 256 colours, WebP is written without loss.
            assert np.abs(shown - np.asarray(frame)).mean() <= (4 if name.endswith("gif") else 0)
    assert durations == [120] * (len(frames) - 1) + [1500]
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [name.rpartition("/")[2]]


def test_wrong_arguments_are_told(tiny, made, tmp_path):
    bare = Output(made.images, made.tokens)
    for show in (explain, lambda output: animation(tiny, output)):
        with pytest.raises(ConfigError, match="return_steps=True"):
            show(bare)
    with pytest.raises(ConfigError, match="1 captions for 2 images"):
        explain(made, captions=["one"])
    with pytest.raises(ConfigError, match="Did you mean 'faded'"):
        animation(tiny, made, unfixed="fade")
    with pytest.raises(ConfigError, match="scale must be between"):
        animation(tiny, made, scale=0)
    with pytest.raises(ImageError, match="smaller scale"):
        animation(tiny, made, scale=1000)
    frames = [Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), "red")]
    with pytest.raises(OutputError, match=r"\.gif or \.webp"):
        save_animation(tmp_path / "a.mp4", frames)
    with pytest.raises(ImageError, match="same size"):
        save_animation(tmp_path / "a.gif", [*frames, Image.new("RGB", (5, 4))])
    with pytest.raises(ImageError, match="at least one frame"):
        save_animation(tmp_path / "a.gif", [])
    with pytest.raises(ConfigError, match="milliseconds must be between"):
        save_animation(tmp_path / "a.gif", frames, milliseconds=1)
    (tmp_path / "a.gif").write_bytes(b"kept")
    with pytest.raises(OutputError, match="exists already"):
        save_animation(tmp_path / "a.gif", frames, overwrite=False)
    assert (tmp_path / "a.gif").read_bytes() == b"kept"


def test_many_images_are_refused_before_memory_is_taken():
    tokens = torch.zeros(1, 1, 16, 16, dtype=torch.int64).expand(1200, -1, -1, -1)
    trace = Trace(tokens, torch.ones(1).bool().expand(tokens.shape), torch.ones(1).expand(tokens.shape))
    with pytest.raises(ImageError, match="show fewer images"):
        explain(Output(torch.zeros(1).expand(1200, 3, 256, 256), tokens[:, 0], trace))
