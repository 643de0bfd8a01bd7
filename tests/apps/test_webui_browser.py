"""The page, as somebody uses it in a browser: Debian's Chromium, driven by Playwright.

Pictures of the page are written to the folder that MASKGIT_SCREENSHOTS names, or else to a temporary one.
"""

import io
import os
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from PIL import Image, ImageColor
from playwright.sync_api import Page, TimeoutError, expect, sync_playwright

from maskgit import MaskGIT, images
from maskgit.apps.webui.edits import PAINT_COLOUR
from maskgit.apps.webui.page import mount
from maskgit.apps.webui.serving import listen
from maskgit.apps.webui.streaming import THREAD

# Milliseconds that a busy machine may take; nothing waits so long on an idle one.
PATIENCE = 120_000
expect.set_options(timeout=PATIENCE)
# The colours in the middle of the photo and of what is painted over it.
MIDDLE, PAINT = (96, 96, 175), ImageColor.getrgb(PAINT_COLOUR)[:3]
WIDE, NARROW = (1280, 900), (390, 844)
NAME_OF_FOCUS = """(e => e.ariaLabel || (e.labels?.length ? e.labels[0] : e).innerText.trim())
(document.activeElement)"""


@pytest.fixture(scope="module")
def pipe():
    return MaskGIT.from_pretrained()


@pytest.fixture(scope="module")
def url(pipe):
    """The page's address, on a port that was free."""
    listening = listen("127.0.0.1", 0)
    app = mount(FastAPI(), pipe, "cifar10")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join()
    listening.close()


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium")
    if path is None:
        pytest.fail(
            "These tests drive Debian's Chromium; install it: apt-get install chromium fonts-dejavu-core"
        )
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def visit(browser, url):
    """A function that opens the page as somebody new; at the end, nothing asked for was elsewhere or broke."""
    asked: list[str] = []
    broken: list[str] = []
    contexts = []

    def open_page(size=WIDE, dark=False) -> Page:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]},
            color_scheme="dark" if dark else "light",
            accept_downloads=True,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(url)
        page.get_by_role("button", name="Generate", exact=True).wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not [address for address in asked if not address.startswith((url, "data:", "blob:"))]
    assert not broken


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """A photo of 96 × 64 pixels."""
    rows, columns = np.mgrid[0:64, 0:96]
    array = np.stack([rows * 3, columns * 2, 255 - rows - columns], axis=-1).astype(np.uint8)
    path = tmp_path_factory.mktemp("photo") / "meadow.png"
    Image.fromarray(array).save(path)
    return path


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def said(page: Page, pattern: str) -> None:
    """Wait until the line above the pictures says something."""
    try:
        page.locator(".status:visible", has_text=re.compile(pattern)).wait_for()
    except TimeoutError:
        pytest.fail(
            f"waited for {pattern!r}; the page says {page.locator('.status:visible').all_inner_texts()}"
        )


def choose_class(page: Page, name: str) -> None:
    """Search a class by its name."""
    field = page.get_by_label("Class").locator("visible=true").first
    field.fill(name)
    field.press("Enter")
    expect(field).to_have_value(name)


def saved(page: Page, folder: Path, number: int = 0) -> Path:
    """Download a result."""
    with page.expect_download() as download:
        page.locator("a.save:visible", has_text="Save PNG").nth(number).click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def choose_file(page: Page, button: str, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name=button).locator("visible=true").click()
    chooser.value.set_files(path)


def upload(page: Page, path: Path) -> None:
    page.locator(".upload input[type=file]").set_input_files(path)


def drag(page: Page, canvas: str, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Move the pointer over a canvas while it is down; places are shares of its sides."""
    page.locator(canvas).first.scroll_into_view_if_needed()
    seen = page.locator(canvas).first.bounding_box()
    assert seen is not None
    places = [(seen["x"] + x * seen["width"], seen["y"] + y * seen["height"]) for x, y in (start, end)]
    page.mouse.move(*places[0])
    page.mouse.down()
    page.mouse.move(*places[1], steps=6)
    page.mouse.up()


def wait_for_colour(page: Page, colour: tuple[int, ...]) -> None:
    """Wait until the middle of what is painted on is seen in a colour."""
    canvas, seen = page.locator(".canvas canvas").first, (0, 0, 0)
    deadline = time.monotonic() + PATIENCE / 1000
    while np.abs(np.subtract(seen, colour)).max() > 40:
        assert time.monotonic() < deadline, f"waited for the colour {colour}, but see {seen}"
        page.wait_for_timeout(50)
        with Image.open(io.BytesIO(canvas.screenshot())) as shot:
            seen = shot.convert("RGB").getpixel((shot.width // 2, shot.height // 2))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def decoding() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


def wait_until_idle() -> None:
    """Wait until nothing is decoded any more."""
    for thread in decoding():
        thread.join(PATIENCE / 1000)
    assert not decoding()


def held(monkeypatch, pipe) -> threading.Event:
    """Let decoding wait after its first step until the event that is returned is set."""
    go_on = threading.Event()
    generate = pipe.generate

    def waiting(*args, callback, **settings):
        def told(step, *rest):
            callback(step, *rest)
            if step == 0:
                assert go_on.wait(PATIENCE / 1000)

        return generate(*args, callback=told, **settings)

    monkeypatch.setattr(pipe, "generate", waiting)
    return go_on


def endless(monkeypatch, pipe) -> list[int]:
    """Let decoding begin anew for ever, slowly; the steps that were made are noted in the list."""
    steps: list[int] = []
    generate = pipe.generate

    def repeating(*args, callback, **settings):
        def told(step, *rest):
            steps.append(step)
            time.sleep(0.02)
            callback(step, *rest)

        while True:
            generate(*args, callback=told, **settings)

    monkeypatch.setattr(pipe, "generate", repeating)
    return steps


def test_the_first_step_is_seen_before_the_second_is_made(visit, pipe, monkeypatch):
    go_on = held(monkeypatch, pipe)
    page = visit()
    press(page, "Generate")
    said(page, "Step 1 of 12")
    expect(page.locator(".pictures img:visible")).to_have_count(4)
    expect(page.locator("a.save:visible")).to_have_count(0)
    go_on.set()
    said(page, "4 images in")
    expect(page.locator("a.save:visible")).to_have_count(4)


def test_a_picture_is_downloaded_with_its_settings_and_made_again(visit, pipe, tmp_path):
    page = visit()
    choose_class(page, "frog")
    page.get_by_label("Seed").locator("visible=true").fill("5")
    page.get_by_label("number input for Steps").locator("visible=true").fill("6")
    page.get_by_label("number input for Steps").locator("visible=true").press("Tab")
    expect(page.get_by_label("range slider for Steps").locator("visible=true")).to_have_value("6")
    press(page, "Generate")
    said(page, "4 images in")
    first = saved(page, tmp_path, 2)
    assert first.name == "frog-5-00002.png"
    settings = images.read_settings(first)
    assert [settings[name] for name in ("command", "class", "seed", "index", "steps")] == [
        "generate", "frog", 5, 2, 6,
    ]  # fmt: skip
    expected = pipe.generate("frog", seed=5, first_index=2, steps=6).to_pil()[0]
    assert np.abs(pixels(first) - np.asarray(expected)).max() <= 1

    again = visit()
    choose_file(again, "Load settings from a PNG", first)
    said(again, "Settings loaded from frog-5-00002.png")
    press(again, "Generate")
    said(again, "1 image in")
    second = saved(again, tmp_path / "again")
    assert images.read_settings(second) == settings
    assert np.abs(pixels(first) - pixels(second)).max() <= 1


def test_what_is_painted_is_filled_in_and_can_be_painted_again(visit, photo, tmp_path):
    page = visit()
    tab(page, "Edit")
    upload(page, photo)
    said(page, "meadow.png, 96 × 64 pixels")
    wait_for_colour(page, MIDDLE)
    drag(page, ".canvas canvas", (0.45, 0.5), (0.55, 0.5))
    wait_for_colour(page, PAINT)
    choose_class(page, "frog")
    press(page, "Edit")
    said(page, "1 image in")
    first = saved(page, tmp_path)
    settings = images.read_settings(first)
    assert (settings["command"], settings["class"], settings["photo"]) == ("inpaint", "frog", "meadow.png")
    changed = (pixels(first) != pixels(photo)).any(-1)
    assert changed[32, 48]
    assert not changed[:, :20].any()
    assert not changed[:, -20:].any()

    # The slider between before and after goes by keys.
    slider = page.get_by_label("How much of the original is shown")
    slider.focus()
    slider.press("Home")
    assert page.locator(".stage").evaluate("e => e.style.getPropertyValue('--at')") == "0%"

    again = visit()
    tab(again, "Edit")
    choose_file(again, "Load settings from a PNG", first)
    said(again, "was made from meadow.png; upload that photo first")
    upload(again, photo)
    said(again, "meadow.png, 96 × 64 pixels")
    choose_file(again, "Load settings from a PNG", first)
    said(again, "Settings loaded from")
    press(again, "Edit")
    said(again, "1 image in")
    second = saved(again, tmp_path / "again")
    assert images.read_settings(second) == settings
    assert np.array_equal(pixels(first), pixels(second))


def test_a_box_is_drawn_and_replaced(visit, photo, tmp_path):
    page = visit()
    tab(page, "Edit")
    page.get_by_label("Replace a box").check()
    upload(page, photo)
    page.locator(".boxer img").wait_for()
    drag(page, ".boxer", (0.25, 0.25), (0.5, 0.75))
    expect(page.get_by_label("Width", exact=True)).not_to_have_value("0")
    box = [
        int(page.get_by_label(name, exact=True).input_value()) for name in ("Left", "Top", "Width", "Height")
    ]
    assert np.abs(np.array(box) - [24, 16, 24, 32]).max() <= 1
    choose_class(page, "ship")
    press(page, "Edit")
    said(page, "1 image in")
    path = saved(page, tmp_path)
    assert images.read_settings(path)["box"] == [box]
    changed = (pixels(path) != pixels(photo)).any(-1)
    assert changed[box[1] : box[1] + box[3], box[0] : box[0] + box[2]].mean() > 0.9
    assert not changed[:, 80:].any()

    # Numbers move what is drawn.
    page.get_by_label("Left", exact=True).fill("48")
    expect(page.locator(".boxer i")).to_have_attribute("style", re.compile("left: 50%"))


def test_a_box_is_there_before_the_server_answers(visit, photo):
    page = visit()
    tab(page, "Edit")
    page.get_by_label("Replace a box").check()
    upload(page, photo)
    page.locator(".boxer img").wait_for()
    # Nothing that is asked from now on is answered.
    page.route("**/gradio_api/run/**", lambda route: None)
    drag(page, ".boxer", (0.25, 0.25), (0.5, 0.75))
    expect(page.get_by_label("Width", exact=True)).not_to_have_value("0")
    press(page, "Edit")
    said(page, "1 image in")


def test_a_photo_goes_on_beyond_its_edges(visit, photo, tmp_path):
    page = visit()
    tab(page, "Edit")
    upload(page, photo)
    said(page, "meadow.png")
    page.get_by_label("Extend beyond the edges").check()
    page.get_by_label("left", exact=True).uncheck()
    press(page, "Edit")
    said(page, "1 image in")
    path = saved(page, tmp_path)
    # Its shorter side is the model's 32 pixels then, and 16 are added.
    assert Image.open(path).size == (48 + 16, 32)
    settings = images.read_settings(path)
    assert [settings[side] for side in ("left", "right", "top", "bottom")] == [0, 16, 0, 0]
    assert settings["class"] == "none"


def test_a_photo_is_varied(visit, photo, tmp_path):
    page = visit()
    tab(page, "Edit")
    upload(page, photo)
    said(page, "meadow.png")
    page.get_by_label("Vary the whole image").check()
    press(page, "Edit")
    said(page, "guessed class")
    assert images.read_settings(saved(page, tmp_path))["strength"] == 0.5


def test_two_policies_are_compared_on_one_seed(visit, tmp_path):
    page = visit()
    tab(page, "Compare")
    press(page, "Compare")
    said(page, "A took .* B took")
    expect(page.locator(".sides section")).to_have_count(2)
    assert "halton" in page.locator(".sides section").nth(1).inner_text()
    files = [saved(page, tmp_path / side, number) for side, number in (("a", 0), ("b", 4))]
    ours, theirs = (images.read_settings(path) for path in files)
    assert (ours["policy"], theirs["policy"]) == ("confidence", "halton")
    # A policy brings the settings that belong to it.
    assert theirs["mask_schedule"] == "arccos"
    assert all(ours[name] == theirs[name] for name in ("class", "seed", "index", "steps"))


def test_a_picture_is_looked_into(visit, pipe):
    page = visit()
    tab(page, "Inside")
    press(page, "Look inside")
    said(page, "Decoded in")
    codes = [int(text) for text in page.locator(".tokens span").all_inner_texts()]
    assert codes == pipe.generate(0, seed=0).tokens.flatten().tolist()
    expect(page.locator("a.save:visible")).to_have_text(["Image", "Explanation", "Animation"])
    slider = page.get_by_label("Step", exact=True)
    slider.focus()
    slider.press("Home")
    expect(page.locator(".frame:visible")).to_have_attribute("alt", re.compile("after step 0"))


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n and then nothing of the kind", b"<b>text</b>"])
def test_a_bad_upload_is_answered_with_a_sentence(visit, tmp_path, content):
    path = tmp_path / "bad.png"
    path.write_bytes(content or b"\n")
    page = visit()
    tab(page, "Edit")
    upload(page, path)
    line = page.locator("p[role=alert]:visible")
    line.wait_for()
    text = line.inner_text()
    assert text.startswith("bad.png")
    assert "Traceback" not in page.content()
    assert "maskgit-page" not in text
    press(page, "Edit")
    said(page, "upload one first")


def test_what_is_mistaken_in_a_form_is_answered_with_a_sentence(visit, photo):
    page = visit()
    seed = page.get_by_label("Seed").locator("visible=true")
    seed.fill("<i>seven</i>")
    press(page, "Generate")
    said(page, "The seed must be a whole number, but is <i>seven</i>")
    seed.fill("0")
    choose_file(page, "Load settings from a PNG", photo)
    said(page, "meadow.png holds no settings")
    tab(page, "Edit")
    upload(page, photo)
    said(page, "meadow.png, ")
    press(page, "Edit")
    said(page, "Nothing is painted")


def test_a_closed_tab_stops_its_work(visit, pipe, monkeypatch):
    wait_until_idle()
    steps = endless(monkeypatch, pipe)
    page = visit()
    press(page, "Generate")
    said(page, "Step [2-9]")
    assert len(decoding()) == 1
    page.close()
    wait_until_idle()
    assert steps


def test_stop_stops_the_work(visit, pipe, monkeypatch):
    wait_until_idle()
    endless(monkeypatch, pipe)
    page = visit()
    press(page, "Generate")
    said(page, "Step [2-9]")
    page.get_by_role("button", name="Stop").locator("visible=true").click()
    said(page, "Stopped")
    wait_until_idle()


def test_two_people_do_not_see_each_others_pictures(visit, photo):
    ours, theirs = visit(), visit()
    for page, name in ((ours, "frog"), (theirs, "ship")):
        choose_class(page, name)
        press(page, "Generate")
    for page in (ours, theirs):
        said(page, "4 images in")
    links = [
        [link.get_attribute("href") for link in page.locator("a.save:visible").all()]
        for page in (ours, theirs)
    ]
    assert not set(links[0]) & set(links[1])
    assert "frog 0" not in theirs.locator(".pictures:visible").inner_text()
    assert "ship 0" not in ours.locator(".pictures:visible").inner_text()
    tab(ours, "Edit")
    upload(ours, photo)
    said(ours, "meadow.png")
    tab(theirs, "Edit")
    press(theirs, "Edit")
    said(theirs, "There is no photo yet")
    # Files are found by names that cannot be guessed; their folder is not listed.
    folder = theirs.url + links[0][0].rsplit("/", 2)[0]
    assert theirs.request.get(folder).status in (403, 404)


def test_everything_is_reached_by_the_keyboard(visit):
    page = visit()
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(NAME_OF_FOCUS))
        if reached[-1] == "Generate" and len(reached) > 5:
            break
    for name in ("Class", "Seed", "number input for Steps", "Policy"):
        assert name in reached
    assert reached[-1] == "Generate"
    page.keyboard.press("Enter")
    said(page, "4 images in")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_screens_wide_and_narrow(visit, photo, tmp_path, dark):
    folder = Path(os.environ.get("MASKGIT_SCREENSHOTS", tmp_path))
    page = visit(WIDE, dark)

    def look(name: str) -> None:
        for width, height in (NARROW, WIDE):
            page.set_viewport_size({"width": width, "height": height})
            # What follows the size of the window does so a moment later.
            page.wait_for_function(
                "width => innerWidth == width && document.documentElement.scrollWidth <= width", arg=width
            )
            path = folder / f"{name}-{width}-{'dark' if dark else 'light'}.png"
            page.screenshot(path=path, full_page=True)

    press(page, "Generate")
    said(page, "4 images in")
    look("generate")
    shown = page.locator(".pictures img:visible").first
    assert shown.bounding_box()["width"] > 300
    assert shown.evaluate("e => getComputedStyle(e).imageRendering") == "pixelated"
    colours = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(colours) < 64) == dark
    tab(page, "Edit")
    upload(page, photo)
    said(page, "meadow.png")
    look("paint")
    page.get_by_label("Replace a box").check()
    page.locator(".boxer img").wait_for()
    drag(page, ".boxer", (0.3, 0.2), (0.6, 0.8))
    press(page, "Edit")
    said(page, "1 image in")
    look("edit")
    tab(page, "Inside")
    press(page, "Look inside")
    said(page, "Decoded in")
    look("inside")
    tab(page, "Compare")
    press(page, "Compare")
    said(page, "B took")
    look("compare")
