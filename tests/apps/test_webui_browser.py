"""The page, as somebody uses it in a browser: Debian's Chromium, driven by Playwright; one server, one browser."""

import json
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from maskgit import MaskGIT, hub, images
from maskgit.apps.serving.service import Limits
from maskgit.apps.serving.worker import Ticket
from maskgit.apps.webui.page import add_page
from servers import in_thread, wait_for

# Milliseconds that a busy machine may take; nothing waits so long on an idle one.
PATIENCE = 120_000
expect.set_options(timeout=PATIENCE)
WIDE, MIDDLE, NARROW = (1280, 900), (768, 1024), (390, 844)
SAMPLES = Path(hub.__file__).parent / "assets" / "models" / "cifar10" / "samples"


@pytest.fixture(scope="module")
def server():
    """The bundled model with two steps, and its service."""
    whole = MaskGIT.from_pretrained()
    quick = replace(whole.config, sampler=replace(whole.config.sampler, steps=2))
    model = MaskGIT(quick, whole.tokenizer, whole.transformer)
    with in_thread(Limits(), model=model, samples=SAMPLES, page=add_page) as (client, service):
        yield f"{str(client.base_url).rstrip('/')}/", service


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
def visit(browser, server):
    """A function that opens the page as somebody new; at the end, nothing asked for was elsewhere or broke."""
    url, _ = server
    asked: list[str] = []
    broken: list[str] = []
    contexts = []

    def open_page(size=WIDE, dark=False, query="", still=True) -> Page:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce" if still else "no-preference",
            accept_downloads=True,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(url + query)
        page.locator("body.ready").wait_for()
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


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).locator("visible=true").first.click()


def said(page: Page, text: str) -> None:
    expect(page.locator(".status:visible").first).to_contain_text(re.compile(text))


def count(page: Page, number: int) -> None:
    page.locator("#count label", has_text=str(number)).click()


def act(page: Page, name: str, number: int = 0) -> None:
    """Use an action of a picture."""
    tile = page.locator(".tile").nth(number)
    tile.hover()
    tile.get_by_role("button", name=name, exact=True).click()


def saved(page: Page, folder: Path, press_it) -> Path:
    with page.expect_download() as download:
        press_it()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def edit(page: Page, photo: Path, way: str) -> None:
    """Choose a photo to be edited in some way."""
    page.get_by_role("link", name="Edit").click()
    page.locator("#edit .panel input[type=file]").first.set_input_files(photo)
    said(page, "pixels")
    page.locator(".ways label", has_text=way).click()


def drag(page: Page, *places: tuple[float, float]) -> None:
    """Move the pointer over the photo while it is down; places are shares of its sides."""
    seen = page.locator(".board").bounding_box()
    assert seen is not None
    points = [(seen["x"] + x * seen["width"], seen["y"] + y * seen["height"]) for x, y in places]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=6)
    page.mouse.up()


def box(page: Page) -> list[str]:
    return [page.get_by_label(name, exact=True).input_value() for name in ("Left", "Top", "Width", "Height")]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_the_first_screen_is_full_light_and_forms_once(visit):
    page = visit(still=False)
    tiles = page.locator(".tile canvas")
    expect(tiles).to_have_count(9)
    for tile in tiles.all():
        seen = tile.bounding_box()
        assert min(seen["width"], seen["height"]) >= 200
        assert seen["y"] + seen["height"] <= WIDE[1]
    first = "canvas => [...canvas.getContext('2d').getImageData(0, 0, 32, 32).data].join()"
    begun = tiles.last.evaluate(first)
    page.wait_for_function(
        "([begun, read]) => eval(read)(document.querySelectorAll('.tile canvas')[8]) !== begun".replace(
            "eval(read)", "(" + first + ")"
        ),
        arg=[begun, ""],
    )
    timing = "performance.getEntriesByType('resource').map(one => one.transferSize)"
    sizes = page.evaluate(timing)
    assert len(sizes) + 1 <= 30
    assert sum(sizes) <= 400_000
    assert page.locator("meta[property='og:title']").get_attribute("content").startswith("MaskGIT")
    assert page.locator("#classes button").count() == 10


def test_a_typed_class_counts_without_enter(visit):
    page = visit()
    count(page, 1)
    page.get_by_label("Class", exact=True).fill("frog")
    press(page, "Generate")
    said(page, "frog: 1 picture in")
    page.get_by_label("Class", exact=True).fill("ship")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Class", exact=True)).to_have_value("ship")
    press(page, "Generate")
    said(page, "ship: 1 picture in")
    page.get_by_label("Class", exact=True).fill("hrose")
    press(page, "Generate")
    said(page, "no class “hrose”. Did you mean")
    press(page, "horse")
    said(page, "horse: 1 picture in")


def test_a_picture_is_saved_and_made_again(visit, server, tmp_path):
    page = visit()
    count(page, 4)
    page.locator("#classes").get_by_role("button", name="frog").click()
    said(page, "frog: 4 pictures in")
    small = saved(page, tmp_path, lambda: act(page, "Save 1×", 2))
    large = saved(page, tmp_path, lambda: act(page, "Save 4×", 2))
    settings = images.read_settings(small)
    assert small.name == f"frog-seed{settings['seed']}-2.png"
    assert large.name == f"frog-seed{settings['seed']}-2-4x.png"
    assert settings == images.read_settings(large)
    assert (settings["class"], settings["index"]) == ("frog", 2)
    assert (Image.open(small).size, Image.open(large).size) == ((32, 32), (128, 128))
    # The address is a link to the same pictures; a reload comes back to them.
    pictures = page.locator(".tile img").evaluate_all("all => all.map(one => one.src)")
    page.reload()
    said(page, "frog: 4 pictures in")
    assert page.locator(".tile img").evaluate_all("all => all.map(one => one.src)") == pictures
    # Whoever gets the file makes the same picture, on another page.
    other = visit()
    other.locator("#load").set_input_files(small)
    said(other, "frog: 1 picture in")
    again = saved(other, tmp_path / "again", lambda: act(other, "Save 1×"))
    assert (pixels(again) == pixels(small)).all()
    assert images.read_settings(again) == settings
    # The seed stays as it was loaded, and what somebody made is nobody else's.
    assert other.get_by_label("Seed", exact=True).first.input_value() == str(settings["seed"])
    assert other.locator("#runs button").count() == 1


def test_a_link_makes_the_same_picture_with_its_settings(visit, server, tmp_path):
    _, service = server
    page = visit(query="?class=horse&seed=18446744073709551615&count=1&steps=3&policy=halton")
    said(page, "horse: 1 picture in")
    path = saved(page, tmp_path, lambda: act(page, "Save 1×"))
    made = service.model.generate("horse", seed=2**64 - 1, steps=3, policy="halton")
    assert np.abs(pixels(path) - np.asarray(made.to_pil()[0]).astype(int)).max() <= 1
    assert images.read_settings(path)["seed"] == 2**64 - 1


def test_earlier_runs_are_kept_as_settings(visit):
    page = visit()
    count(page, 1)
    for name in ("cat", "deer"):
        page.locator("#classes").get_by_role("button", name=name).click()
        said(page, f"{name}: 1 picture in")
        if name == "cat":
            cat = page.locator(".tile img").get_attribute("src")
    page.goto(page.url.partition("?")[0])
    page.locator("#runs button", has_text="cat").click()
    said(page, "cat: 1 picture in")
    assert page.locator(".tile img").get_attribute("src") == cat


def test_stop_stops_at_once_and_so_does_a_closed_tab(visit, server):
    _, service = server
    page = visit()
    for end in (lambda: press(page, "Stop"), page.close):
        page.goto(page.url.partition("?")[0] + "?class=frog&count=9&steps=200")
        said(page, r"step \d+ of 200")
        end()
        wait_for(lambda: not service.num_accepted)
    assert service.ready


def test_a_place_in_line_is_told(visit, server):
    _, service = server
    go_on = threading.Event()
    held = threading.Thread(target=service._worker.call, args=(lambda: go_on.wait(120), Ticket(120)))
    held.start()
    first = service.submit(lambda model: model.generate("frog"))
    page = visit()
    count(page, 1)
    press(page, "Surprise me")
    said(page, "2nd in line")
    go_on.set()
    said(page, "1 picture in")
    first.future.result()
    held.join()


def test_a_server_that_is_gone_is_told(visit):
    page = visit()
    page.route("**/v1/*", lambda route: route.abort())
    press(page, "Surprise me")
    said(page, "cannot be reached")
    expect(page.get_by_role("button", name="Generate", exact=True)).to_be_visible()


def test_more_like_this_varies_a_picture(visit):
    page = visit(query="?class=truck&seed=1&count=1")
    said(page, "truck: 1 picture in")
    act(page, "More like this")
    said(page, "truck, varied: 9 pictures in")
    first = page.locator(".tile img").first.get_attribute("src")
    page.locator("#runs button", has_text="ship").or_(page.locator("#runs button", has_text="varied")).click()
    said(page, "truck, varied: 9 pictures in")
    assert page.locator(".tile img").first.get_attribute("src") == first


def test_what_is_painted_is_replaced_and_can_be_painted_again(visit, photo, tmp_path):
    page = visit()
    edit(page, photo, "Paint")
    press(page, "Apply")
    said(page, "Nothing is painted")
    drag(page, (0.45, 0.5), (0.55, 0.5))
    said(page, "meadow.png, 96 × 64")
    # A look at another way changes nothing: neither the mask, nor the class, which is guessed.
    read = (
        "canvas => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"
        ".filter((_, i) => i % 4 === 3).map(alpha => alpha > 127).join()"
    )
    mask = page.locator(".mask").evaluate(read)
    page.locator(".ways label", has_text="Box").click()
    page.locator(".ways label", has_text="Paint").click()
    assert page.locator(".mask").evaluate(read) == mask
    expect(page.get_by_label("What should appear")).to_have_value("")
    press(page, "Apply")
    said(page, "Guessed class: ")
    # Fully the result; the photo lies under the slider.
    assert page.get_by_label("Show the photo before").input_value() == "0"
    assert page.locator(".before").evaluate("one => one.style.clipPath").startswith("inset(0px 100%")
    made = saved(page, tmp_path, lambda: press(page, "Save"))
    settings = images.read_settings(made)
    assert re.fullmatch(r"meadow-painted-[a-z]+-seed\d+\.png", made.name)
    assert settings["command"] == "inpaint"
    before, after = pixels(photo), pixels(made)
    assert before.shape == after.shape
    assert (before[:, :16] == after[:, :16]).all()
    assert (before[28:36, 44:52] != after[28:36, 44:52]).any()
    # Loaded elsewhere, while another way is showing: the class, the mask and the picture come back.
    other = visit()
    edit(other, photo, "Extend")
    other.locator("#edit input[accept='image/png']").set_input_files(made)
    said(other, "Settings loaded from")
    expect(other.get_by_label("What should appear")).to_have_value(settings["class"])
    assert other.locator(".mask").evaluate(read) == mask
    press(other, "Apply")
    said(other, "Done in")
    again = saved(other, tmp_path / "again", lambda: press(other, "Save"))
    assert (pixels(again) == after).all()
    # A new photo takes the result away.
    other.locator("#edit .panel input[type=file]").first.set_input_files(photo)
    expect(other.locator(".outcome")).to_be_hidden()


def test_a_box_is_drawn_moved_resized_and_typed(visit, photo, tmp_path):
    page = visit()
    edit(page, photo, "Box")
    press(page, "Apply")
    said(page, "There is no box yet")
    drag(page, (0.5, 0.5))
    assert box(page) == [""] * 4
    drag(page, (0.25, 0.25), (0.5, 0.75))
    assert [abs(int(a) - b) <= 1 for a, b in zip(box(page), (24, 16, 24, 32), strict=True)] == [True] * 4
    left, top, width, height = map(int, box(page))
    drag(page, (0.375, 0.5), (0.475, 0.5))
    assert 8 <= int(box(page)[0]) - left <= 11
    assert box(page)[1:] == [str(top), str(width), str(height)]
    corner = page.locator(".box .se").bounding_box()
    page.mouse.move(corner["x"] + 8, corner["y"] + 8)
    page.mouse.down()
    page.mouse.move(corner["x"] + 88, corner["y"] + 8, steps=4)
    page.mouse.up()
    assert int(box(page)[2]) > width
    for name, value in (("Left", 40), ("Top", 20), ("Width", 16), ("Height", 16)):
        page.get_by_label(name, exact=True).fill(str(value))
        page.keyboard.press("Tab")
    page.get_by_label("What should appear").fill("frog")
    press(page, "Apply")
    said(page, "Done in")
    made = saved(page, tmp_path, lambda: press(page, "Save"))
    settings = images.read_settings(made)
    assert (settings["command"], settings["boxes"], settings["class"]) == ("edit", [[40, 20, 16, 16]], "frog")
    assert (pixels(photo)[:, :10] == pixels(made)[:, :10]).all()
    press(page, "How it formed")
    page.get_by_role("button", name="Save animation").wait_for()


def test_a_photo_is_extended_and_remixed(visit, photo, tmp_path):
    page = visit()
    edit(page, photo, "Extend")
    press(page, "Apply")
    said(page, "Done in")
    wide = saved(page, tmp_path, lambda: press(page, "Save"))
    # As docs/app.md says: scaled to the model's size, with 16 pixels on each side.
    assert Image.open(wide).size == (48 + 32, 32)
    page.locator(".ways label", has_text="Remix").click()
    press(page, "Apply")
    said(page, "Done in")
    assert Image.open(saved(page, tmp_path, lambda: press(page, "Save"))).size == (32, 32)


def test_odd_files_are_taken_or_answered_with_one_sentence(visit, tmp_path):
    page = visit()
    page.get_by_role("link", name="Edit").click()
    chosen = page.locator("#edit .panel input[type=file]").first
    (tmp_path / "notes.png").write_text("no picture")
    chosen.set_input_files(tmp_path / "notes.png")
    expect(page.locator(".status.wrong")).to_have_count(1)
    turned = Image.new("RGB", (40, 20), "teal")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    chosen.set_input_files(tmp_path / "turned.jpg")
    said(page, "turned.jpg, 20 × 40 pixels")
    Image.new("CMYK", (30, 30)).save(tmp_path / "print.tiff")
    chosen.set_input_files(tmp_path / "print.tiff")
    said(page, "print.tiff, 30 × 30 pixels")
    page.locator("#edit input[accept='image/png']").set_input_files(tmp_path / "turned.jpg")
    said(page, "holds no settings")


def test_a_reload_comes_back_to_the_edit(visit, photo):
    page = visit()
    edit(page, photo, "Box")
    drag(page, (0.25, 0.25), (0.5, 0.75))
    drawn = box(page)
    page.wait_for_timeout(1000)
    page.reload()
    said(page, "meadow.png, 96 × 64")
    expect(page.get_by_label("Width", exact=True)).to_have_value(drawn[2])
    expect(page.locator(".box")).to_be_visible()
    assert box(page) == drawn


def test_a_picture_is_looked_into_and_compared(visit, tmp_path):
    page = visit()
    act(page, "How it formed", 6)
    page.get_by_role("button", name="Save animation").wait_for()
    cells = page.locator("dialog .map").first.locator("span")
    assert cells.count() == 64
    cells.first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("dialog .help")).to_contain_text("Row 1, column 2: code")
    sheet = saved(page, tmp_path, lambda: press(page, "Save explanation"))
    assert sheet.name == "horse-seed0-2-explained.png"
    page.get_by_label("Step", exact=True).fill("0")
    press(page, "Close")
    act(page, "Compare", 6)
    expect(page.locator("dialog figure .help").nth(1)).to_contain_text("policy halton")
    expect(page.locator("dialog figure .help").nth(1)).to_contain_text(" s")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [NARROW, MIDDLE, WIDE], ids=["390", "768", "1280"])
def test_nothing_stands_in_anybodys_way(visit, photo, size, dark):
    page = visit(size, dark)
    expect(page.locator(".tile canvas")).to_have_count(9)

    def check() -> None:
        found = Axe().run(page).response["violations"]
        assert not found, json.dumps([(one["id"], [n["html"] for n in one["nodes"]][:3]) for one in found])
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    page.locator("details").first.evaluate("one => { one.open = true; }")
    check()
    edit(page, photo, "Box")
    drag(page, (0.25, 0.25), (0.5, 0.75))
    check()


def test_on_a_phone_pictures_come_first_and_the_bar_is_in_reach(visit, photo):
    page = visit(NARROW)
    expect(page.locator(".tile canvas")).to_have_count(9)
    assert page.locator("#gallery").bounding_box()["y"] < page.locator("#classes").bounding_box()["y"]
    press(page, "Settings")
    count(page, 1)
    press(page, "Settings")
    page.locator("#classes").get_by_role("button", name="dog").click()
    said(page, "dog: 1 picture in")
    expect(page.locator("#picked")).to_have_text("dog")
    bar = page.get_by_role("button", name="Generate", exact=True).bounding_box()
    assert bar["y"] + bar["height"] <= NARROW[1]
    edit(page, photo, "Box")
    drag(page, (0.25, 0.25), (0.75, 0.75))
    apply = page.get_by_role("button", name="Apply").bounding_box()
    assert apply["y"] + apply["height"] <= NARROW[1]
    press(page, "Apply")
    said(page, "Done in")
    expect(page.locator(".board")).to_be_hidden()
    # Holding the result shows the photo.
    page.locator(".pair").hover()
    page.mouse.down()
    assert page.locator(".before").evaluate("one => one.style.clipPath") in (
        "inset(0px)",
        "inset(0px 0% 0px 0px)",
    )
    page.mouse.up()
    assert page.locator(".before").evaluate("one => one.style.clipPath").startswith("inset(0px 100%")
