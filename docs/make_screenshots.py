"""The pictures of docs/app.md: the page as Chromium draws it, with the bundled model.

    python docs/make_screenshots.py [--out docs/images]

Needs Debian's Chromium and the extras `app`, `demo` and `test`. Seed 0, not chosen; the photo is "coffee" of
scikit-image. Writes OUT/app-*.png with 96 colours at most, which keeps them small.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from skimage import data

WIDE, NARROW = (1280, 900), (390, 844)


@contextmanager
def running_page() -> Iterator[str]:
    """Start the page and give its address."""
    command = [sys.executable, "-m", "maskgit", "app", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None, "asked for"
        try:
            yield next(found[0] for line in running.stdout if (found := re.search(r"http://\S+", line)))
        finally:
            running.terminate()


def start(page: Page, tab: str, button: str, done: str, *, label: str) -> None:
    """Go to a tab, choose a class, press the button, and wait until the line above says that it is done."""
    page.get_by_role("tab", name=tab).click()
    choose_class(page, label)
    page.get_by_role("button", name=button, exact=True).click()
    page.locator(".status:visible", has_text=re.compile(done)).wait_for()


def choose_class(page: Page, name: str) -> None:
    """Search a class by its name."""
    field = page.get_by_label("Class").locator("visible=true").first
    field.fill(name)
    field.press("Enter")


def drag(page: Page, canvas: str, places: list[tuple[float, float]]) -> None:
    """Move the pointer over a canvas while it is down; places are shares of its sides."""
    page.locator(canvas).first.scroll_into_view_if_needed()
    seen = page.locator(canvas).first.bounding_box()
    assert seen is not None, "on the screen"
    for number, (x, y) in enumerate(places):
        page.mouse.move(seen["x"] + x * seen["width"], seen["y"] + y * seen["height"], steps=8)
        if number == 0:
            page.mouse.down()
    page.mouse.up()


def load_photo(page: Page, photo: Path, operation: str) -> None:
    """Upload a photo to be edited in some way."""
    page.get_by_role("tab", name="Edit").click()
    page.locator(".upload input[type=file]").set_input_files(photo)
    page.locator(".status:visible", has_text="pixels").wait_for()
    page.get_by_label(operation).check()
    page.wait_for_timeout(1000)


def main() -> None:
    """Write the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    out = parser.parse_args().out
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("Chromium is not installed: apt-get install chromium fonts-dejavu-core")
    with tempfile.TemporaryDirectory() as folder, running_page() as url, sync_playwright() as playwright:
        photo = Path(folder) / "coffee.png"
        Image.fromarray(data.coffee()).save(photo)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

        def opened(size: tuple[int, int], *, dark: bool) -> Page:
            context = browser.new_context(
                viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light"
            )
            page = context.new_page()
            page.goto(url)
            page.get_by_role("button", name="Generate", exact=True).wait_for()
            return page

        def shoot(page: Page, name: str) -> None:
            page.mouse.move(0, 0)
            page.wait_for_timeout(500)
            path = out / f"app-{name}.png"
            page.screenshot(path=path, full_page=True)
            Image.open(path).convert("RGB").quantize(96, dither=Image.Dither.FLOYDSTEINBERG).save(path)
            print(path)

        page = opened(WIDE, dark=False)
        start(page, "Generate", "Generate", "images in", label="horse")
        shoot(page, "generate")
        load_photo(page, photo, "Fill a painted area")
        drag(page, ".canvas canvas", [(0.42, 0.45), (0.55, 0.4), (0.5, 0.55)])
        start(page, "Edit", "Edit", "image in", label="frog")
        shoot(page, "edit")
        page = opened(WIDE, dark=True)
        start(page, "Inside", "Look inside", "Decoded in", label="horse")
        shoot(page, "inside")
        start(page, "Compare", "Compare", "B took", label="horse")
        shoot(page, "compare")
        page = opened(NARROW, dark=True)
        load_photo(page, photo, "Replace a box")
        drag(page, ".boxer", [(0.3, 0.3), (0.7, 0.8)])
        start(page, "Edit", "Edit", "image in", label="automobile")
        shoot(page, "phone")
        browser.close()


if __name__ == "__main__":
    main()
