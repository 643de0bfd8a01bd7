"""The page's parts, without a browser, and the command that starts it."""

import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from maskgit import explain, images
from maskgit.apps.cli.flags import Marking
from maskgit.apps.webui import edits, pictures
from maskgit.apps.webui.forms import SamplerForm, SubjectForm
from maskgit.apps.webui.page import theme
from maskgit.apps.webui.pictures import KEPT, Shelf
from maskgit.apps.webui.serving import listen
from maskgit.apps.webui.session import Studio, whole
from maskgit.apps.webui.streaming import THREAD, Step, watch
from maskgit.errors import ConfigError, ImageError, RegionError
from maskgit.images import provenance
from maskgit.results import Output

PATIENCE = 120


@pytest.fixture
def studio(tiny, tmp_path) -> Studio:
    return Studio(tiny, "tiny", Shelf(tmp_path))


def made(count: int = 1) -> Output:
    return Output(torch.zeros(count, 3, 8, 8), torch.zeros(count, 2, 2, dtype=torch.int64))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


def test_watching_gives_each_step_while_the_next_waits():
    go_on = [threading.Event() for _ in range(3)]

    def make(callback):
        for step, event in enumerate(go_on):
            callback(step, torch.zeros(1), torch.full((1, 2, 2), step))
            assert event.wait(PATIENCE)
        return made()

    seen = []
    for news in watch(make):
        seen.append(news)
        if isinstance(news, Step):
            go_on[news.number].set()
    assert [news.number for news in seen[:-1]] == [0, 1, 2]
    assert isinstance(seen[-1], Output)


def test_who_looks_too_seldom_is_given_the_newest_step():
    looked, made_all = threading.Event(), threading.Event()

    def make(callback):
        callback(0, torch.zeros(1), torch.zeros(1, 2, 2))
        assert looked.wait(PATIENCE)
        for step in range(1, 6):
            callback(step, torch.zeros(1), torch.zeros(1, 2, 2))
        made_all.set()
        return made()

    steps = watch(make)
    assert next(steps).number == 0
    looked.set()
    assert made_all.wait(PATIENCE)
    newest = next(steps)
    # The result may have come by now; if not, the step is the last.
    assert isinstance(newest, Output) or newest.number == 5


def test_whoever_goes_away_stops_the_decoding():
    went, stopped = threading.Event(), []

    def make(callback):
        try:
            callback(0, torch.zeros(1), torch.zeros(1, 2, 2))
            assert went.wait(PATIENCE)
            callback(1, torch.zeros(1), torch.zeros(1, 2, 2))
        except Exception as error:
            stopped.append(error)
            raise
        return made()

    # Another test's thread may be about to end.
    others = threads()
    steps = watch(make)
    next(steps)
    steps.close()
    (thread,) = (thread for thread in threads() if thread not in others)
    went.set()
    thread.join(PATIENCE)
    assert len(stopped) == 1


def test_what_goes_wrong_while_decoding_is_raised_where_it_is_watched():
    def make(callback):
        raise ConfigError("no such thing")

    with pytest.raises(ConfigError, match="no such thing"):
        list(watch(make))


def test_a_shelf_gives_names_that_cannot_be_guessed_and_is_cleared(tmp_path, monkeypatch):
    shelf = Shelf(tmp_path)
    saved = [shelf.save(Image.new("RGB", (4, 4)), "frog", {"seed": 1}) for _ in range(2)]
    assert [one.name for one in saved] == ["frog.png", "frog.png"]
    keys = [one.url.split("/")[-2] for one in saved]
    assert keys[0] != keys[1]
    assert min(map(len, keys)) >= 32
    path = Path(saved[0].url.removeprefix("gradio_api/file="))
    assert images.read_settings(path) == {"seed": 1}
    late = pictures.time.time() + KEPT + 10
    monkeypatch.setattr(pictures.time, "time", lambda: late)
    shelf.place("ship.png")
    assert not path.exists()


def test_what_people_write_is_not_taken_for_html():
    nasty = '<img src=x onerror="alert(1)">'
    picture = Image.new("RGB", (4, 4))
    saved = pictures.Saved(nasty, "x")
    shown = [
        pictures.note(nasty),
        pictures.alert(nasty),
        pictures.empty(nasty),
        pictures.gallery([picture], [nasty], [saved]),
        pictures.before_and_after([(picture, picture)], [nasty], [saved]),
        pictures.film([picture, picture], nasty),
    ]
    for text in shown:
        assert "<img src=x" not in text
        assert 'onerror="' not in text


@pytest.mark.parametrize(
    ("size", "expected"), [((32, 32), (512, 512)), ((40, 20), (480, 240)), ((2000, 1000), (512, 256))]
)
def test_pictures_are_shown_at_a_size_to_look_at(size, expected):
    assert pictures.enlarged(Image.new("RGB", size)).size == expected


def test_small_pictures_are_enlarged_in_sharp_squares():
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    large = np.asarray(pictures.enlarged(Image.fromarray(array)))
    assert np.array_equal(large, array.repeat(16, 0).repeat(16, 1))


def test_a_painted_mask_survives_a_picture_s_settings():
    layer = np.zeros((40, 60, 4), np.uint8)
    layer[5:20, 10:30, 3] = 255
    other = np.zeros_like(layer)
    other[30, 50] = (0, 0, 0, 9)
    mask = edits.painted([Image.fromarray(layer), Image.fromarray(other)])
    assert np.array_equal(np.asarray(mask) > 0, (layer[..., 3] > 0) | (other[..., 3] > 0))
    assert np.array_equal(np.asarray(edits.unpack_mask(edits.pack_mask(mask))), np.asarray(mask))


def test_an_empty_mask_is_refused():
    for layers in ([], [Image.new("RGBA", (8, 8))]):
        with pytest.raises(RegionError, match="Nothing is painted"):
            edits.painted(layers)


def large_png() -> str:
    data = io.BytesIO()
    Image.new("1", (5000, 5000)).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


@pytest.mark.parametrize(
    "text", [None, 7, "no base64", base64.b64encode(b"no picture").decode(), large_png()]
)
def test_a_damaged_mask_is_refused(text):
    with pytest.raises(ImageError):
        edits.unpack_mask(text)


@pytest.mark.parametrize(
    "settings",
    [
        {"command": "inpaint", "dilate": 1},
        {"command": "edit"},
        {"command": "edit", "box": [[1, 2, 3]]},
        {"command": "edit", "box": [[1, 2, 3, 4], [1, 2, 3, 4]]},
        {"command": "edit", "box": [[1, 2, 3, "4"]]},
        {"command": "edit", "box": 5},
        {"command": "outpaint", "left": 16},
        {"command": "outpaint", "left": -1, "right": 0, "top": 0, "bottom": 0},
        {"command": "vary", "strength": "half"},
        {"command": "vary", "strength": 2},
        {"command": "edit", "box": [[1, 2, 3, 4]], "rule": "official"},
        {"command": "outpaint", "left": 1, "right": 0, "top": 0, "bottom": 0, "canvas": [64, 64]},
    ],
)
def test_settings_of_an_edit_are_checked(settings):
    with pytest.raises((ConfigError, ImageError)):
        edits.chosen_of(settings)


def test_settings_that_the_command_line_writes_are_understood():
    box = {"command": "edit", "box": [[1, 2, 3, 4]], "rule": "cover", "start_step": None}
    assert edits.chosen_of(box) == {"box": [[1, 2, 3, 4]]}
    sides = {"left": 1, "right": 0, "top": 0, "bottom": 2}
    assert edits.chosen_of({"command": "outpaint", **sides, "canvas": None, "position": None}) == sides
    assert edits.chosen_of({"command": "vary", "strength": 0.25}) == {"strength": 0.25}


def test_settings_of_another_model_or_command_are_refused(studio, tmp_path):
    path = tmp_path / "picture.png"
    picture = Image.new("RGB", (4, 4))
    for command, model in (("edit", "tiny"), ("generate", "other"), (["generate"], "tiny"), (None, None)):
        images.save_png(path, picture, settings={"command": command, "model": model})
        with pytest.raises(ConfigError, match=r"^picture\.png was made by"):
            studio.read_settings(str(path), "generate")
    images.save_png(path, picture)
    with pytest.raises(ImageError, match=r"^picture\.png holds no settings"):
        studio.read_settings(str(path), "generate")


def test_a_class_that_is_recorded_is_found_again(studio):
    for label in (3, "guess", None) if studio.pipe.config.label_dropout else (3, "guess"):
        choice = studio.choice(studio.class_name(label))
        assert studio.label(choice) == label


@pytest.mark.parametrize("text", ["", "seven", "1.5", "-1", "9" * 5000, None, str(2**64)])
def test_numbers_are_checked(text):
    with pytest.raises(ConfigError, match="seed"):
        whole("The seed", text, 2**64 - 1)


CHANGES = {
    "steps": ("steps", 3),
    "policy": ("policy", "halton"),
    "temperature": ("temperature", 0.5),
    "choice": ("choice_temperature", 1.0),
    "schedule": ("mask_schedule", "pow2.5"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_each_field_sets_what_it_says(studio, field):
    with gr.Blocks(analytics_enabled=False):
        form = SamplerForm(studio)
    values = {one: one.value for one in form.fields}
    own = studio.pipe.config.sampler
    assert form.read(values) == own
    setting, value = CHANGES[field]
    changed = form.read(values | {getattr(form, field): value})
    assert getattr(changed, setting) == value
    assert changed != own


def test_guidance_and_what_has_no_field_are_read(studio):
    with gr.Blocks(analytics_enabled=False):
        form = SamplerForm(studio)
    values = {one: one.value for one in form.fields}
    # The model was never trained without its class.
    with pytest.raises(ConfigError, match="force_guidance"):
        form.read(values | {form.guidance: 2})
    changed = form.read(values | {form.guidance: 2, form.kept: form.kept.value | {"force_guidance": True}})
    assert (changed.guidance_scale, changed.force_guidance) == (2, True)


def test_a_form_is_filled_with_every_setting(studio):
    with gr.Blocks(analytics_enabled=False):
        form = SamplerForm(studio)
    config = studio.pipe.sampler_config(
        steps=100,
        policy="remdm",
        policy_options={"form": "cap", "eta": 0.1},
        temperature=3.0,
        temperature_schedule="linear:1,0.5",
        mask_schedule="pow2",
    )
    filled = form.fill(config)
    values = {
        field: update["value"] if isinstance(update, dict) and "__type__" in update else update
        for field, update in filled.items()
    }
    assert set(values) == set(form.fields)
    assert form.read(values) == config
    # A slider reaches what it shows.
    assert filled[form.steps]["maximum"] == 100
    # What a picture's settings hold is as good.
    assert form.config(config.to_dict() | {"seed": 3, "class": "x"}) == config


def test_a_subject_is_filled_and_read(studio):
    with gr.Blocks(analytics_enabled=False):
        form = SubjectForm(studio, count=4)
    filled = form.fill({"class": "7", "seed": 2**64 - 1, "index": 12})
    label, shared = form.read(filled)
    assert label == 7
    assert (shared["seed"], shared["first_index"], shared["num_images"]) == (2**64 - 1, 12, 1)
    with pytest.raises(ConfigError):
        form.fill({"class": "7", "seed": "x", "index": 0})
    with pytest.raises(ConfigError):
        form.fill({"class": ["a", "b"], "seed": 0, "index": 0})


def test_the_theme_brings_no_fonts():
    assert not theme()._stylesheets
    assert "@font-face" not in theme()._get_theme_css()


def test_an_address_that_is_taken_is_answered_with_a_sentence():
    taken = socket.create_server(("127.0.0.1", 0))
    with taken, pytest.raises(ConfigError, match=r"in use\. Choose another --port or --host"):
        listen("127.0.0.1", taken.getsockname()[1])
    # An address for documentation, which is nobody's.
    with pytest.raises(ConfigError, match="Choose another --port or --host"):
        listen("192.0.2.1", 0)


def test_the_command_says_what_it_does_and_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "-m", "maskgit", "app", "--port", "0", "--device", "cpu"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    ) as running:
        assert running.stdout is not None
        lines = [running.stdout.readline() for _ in range(4)]
        assert [line.split()[0] for line in lines[:3]] == ["loading", "loading", "building"]
        found = re.match(r"http://127\.0\.0\.1:\d+", lines[3])
        assert found, lines
        with urllib.request.urlopen(found[0], timeout=PATIENCE) as answer:
            text = answer.read().decode()
        assert "MaskGIT" in text
        assert not re.findall(r'<(?:script|link)[^>]+(?:src|href)="https?://(?!127\.0\.0\.1)[^"]*"', text)
        assert list(tmp_path.glob("maskgit-page-*"))
        running.send_signal(signal.SIGTERM)
        rest = running.stdout.read()
        assert running.wait(PATIENCE) == 0
    assert rest == ""
    assert not list(tmp_path.glob("maskgit-page-*"))


def test_saved_pictures_say_what_they_are(tiny, tmp_path):
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(photo)
    made = {
        provenance.GENERATED: tiny.generate(1, steps=1),
        provenance.EDITED: tiny.edit(photo, (8, 8, 8, 8), 1, steps=1),
    }
    for mark in (True, False):
        page = Studio(tiny, "tiny", Shelf(tmp_path), Marking(mark=mark))
        for source, output in made.items():
            page.save(output, {"class": "1"}, 0, 0, photo)
            (path,) = page.shelf.folder.glob("*/1-0-00000.png")
            assert (source.encode() in path.read_bytes()) == mark
            path.unlink()


@pytest.mark.parametrize("mark", [True, False])
def test_shown_pictures_say_what_they_are(tiny, tmp_path, mark):
    page = Studio(tiny, "tiny", Shelf(tmp_path), Marking(mark=mark))
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((40, 200, 3), np.uint8)).resize((400, 80)).save(photo)
    output = tiny.generate(1, steps=1, return_steps=True)
    edited = tiny.edit(photo, (8, 8, 8, 8), 1, steps=1)
    step = Step(0, output.tokens)
    alts = ["a picture"]
    pairs = page.shown([after for _, after in edits.pairs(edits.read_photo(str(photo)), edited)])
    for source, html in (
        (provenance.GENERATED, pictures.gallery(page.decode(step), alts)),
        (provenance.EDITED, pictures.gallery(page.decode(step, provenance.EDITED), alts)),
        (provenance.GENERATED, pictures.gallery(page.shown(output.to_pil()), alts)),
        (provenance.GENERATED, pictures.film(page.shown(explain.animation(tiny, output)), "a film")),
        # Large enough to be sent as JPEG.
        (provenance.EDITED, pictures.gallery(pairs, alts)),
    ):
        sent = [base64.b64decode(data) for data in re.findall(r'base64,([^"]+)"', html)]
        assert sent
        assert all((source.encode() in data) == mark for data in sent)
    # A photo itself says nothing, and its own metadata are not sent along.
    assert "base64" in pictures.image(Image.open(photo), "a photo")
