"""The pictures of docs/app.md: the page as Chromium draws it, with the bundled model.

    python docs/make_screenshots.py [--out docs/images] [--model cifar10] [NAME …]

Needs Debian's Chromium and the extras `app`, `demo` and `test`. Seed 0, not chosen; the photo is "coffee" of
scikit-image. Writes OUT/app-NAME.png with 128 colours at most, which keeps them small.
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
from playwright.sync_api import Browser, Page, sync_playwright
from skimage import data

WIDE, NARROW = (1280, 900), (390, 844)
PATIENCE = 300_000


@contextmanager
def running_page(model: str) -> Iterator[str]:
    """Start the page and give its address."""
    command = [sys.executable, "-m", "maskgit", "app", "--port", "0", "--model", model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None, "asked for"
        try:
            yield next(found[0] for line in running.stdout if (found := re.search(r"http://\S+", line)))
        finally:
            running.terminate()


def opened(browser: Browser, url: str, size: tuple[int, int], *, dark: bool = False) -> Page:
    """Open the page as somebody new; pictures that come with the model do not move."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce",
        device_scale_factor=2 if size == NARROW else 1,
    )
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    page.locator("body.ready").wait_for()
    page.wait_for_timeout(500)
    return page


def with_photo(page: Page, photo: Path, way: str) -> None:
    """Choose a photo to be edited in some way."""
    page.get_by_role("link", name="Edit").click()
    page.locator("#edit .drop input").set_input_files(photo)
    page.locator("#edit .status", has_text="pixels").wait_for()
    page.locator("#edit .ways label", has_text=way).click()


def drag(page: Page, places: list[tuple[float, float]]) -> None:
    """Move the pointer over the photo while it is down; places are shares of its sides."""
    seen = page.locator(".board").bounding_box()
    assert seen is not None, "on the screen"
    for number, (x, y) in enumerate(places):
        page.mouse.move(seen["x"] + x * seen["width"], seen["y"] + y * seen["height"], steps=8)
        if number == 0:
            page.mouse.down()
    page.mouse.up()


def create(browser: Browser, url: str, photo: Path) -> Page:
    """The first screen."""
    return opened(browser, url, WIDE)


def generated(browser: Browser, url: str, photo: Path) -> Page:
    """Pictures of one class, and the actions on one."""
    page = opened(browser, f"{url}/?class=horse&seed=0&count=9", WIDE, dark=True)
    page.locator("#status", has_text="pictures in").wait_for()
    page.locator(".tile").nth(4).hover()
    return page


def edit(browser: Browser, url: str, photo: Path) -> Page:
    """A photo with a painted mask."""
    page = opened(browser, url, WIDE)
    with_photo(page, photo, "Paint")
    drag(page, [(0.42, 0.45), (0.55, 0.4), (0.5, 0.55)])
    page.get_by_label("What should appear").fill("frog")
    return page


def result(browser: Browser, url: str, photo: Path) -> Page:
    """The result of an edit in a box."""
    page = opened(browser, url, WIDE, dark=True)
    with_photo(page, photo, "Box")
    drag(page, [(0.3, 0.2), (0.72, 0.75)])
    page.get_by_role("button", name="Apply").click()
    page.locator("#edit .status", has_text="Done in").wait_for()
    return page


def inside(browser: Browser, url: str, photo: Path) -> Page:
    """How a picture formed."""
    page = opened(browser, url, WIDE)
    page.locator(".tile").nth(6).hover()
    page.locator(".tile").nth(6).get_by_role("button", name="How it formed").click()
    page.get_by_role("button", name="Save animation").wait_for()
    return page


def compare(browser: Browser, url: str, photo: Path) -> Page:
    """The same picture in another order."""
    page = opened(browser, url, WIDE)
    page.locator(".tile").nth(6).hover()
    page.locator(".tile").nth(6).get_by_role("button", name="Compare").click()
    page.locator("dialog .help", has_text=re.compile(r"policy.* s$")).wait_for()
    return page


def phone(browser: Browser, url: str, photo: Path) -> Page:
    """The first screen on a phone."""
    return opened(browser, url, NARROW)


def phone_edit(browser: Browser, url: str, photo: Path) -> Page:
    """A box on a phone."""
    page = opened(browser, url, NARROW, dark=True)
    with_photo(page, photo, "Box")
    drag(page, [(0.3, 0.2), (0.72, 0.75)])
    return page


SHOTS = {
    "create": create,
    "generated": generated,
    "edit": edit,
    "result": result,
    "inside": inside,
    "compare": compare,
    "phone": phone,
    "phone-edit": phone_edit,
}


def main() -> None:
    """Write the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SHOTS)}; default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    parser.add_argument("--model", default="cifar10")
    given = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("Chromium is not installed: apt-get install chromium fonts-dejavu-core")
    with (
        tempfile.TemporaryDirectory() as folder,
        running_page(given.model) as url,
        sync_playwright() as playwright,
    ):
        photo = Path(folder) / "coffee.png"
        Image.fromarray(data.coffee()).save(photo)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name in given.names or SHOTS:
            page = SHOTS[name](browser, url, photo)
            page.wait_for_timeout(500)
            path = given.out / f"app-{name}.png"
            page.screenshot(path=path)
            page.context.close()
            Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.FLOYDSTEINBERG).save(path)
            print(path, flush=True)
        browser.close()


if __name__ == "__main__":
    main()
