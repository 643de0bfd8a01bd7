"""Pictures as the page shows them: HTML around them, and a shelf of files to download."""

import base64
import html
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import quote

from PIL import Image

from maskgit import images
from maskgit.images import provenance

# Photos are shown at most so large; what is downloaded is whole.
SHOWN_SIDE = 1024
# Small pictures are shown and painted on at about so many pixels, each of theirs a sharp square.
SMALL_SIDE = 512
# Above so many pixels a picture is sent as JPEG, which is smaller.
EXACT_PIXELS = 128 * 128
# Seconds that a picture can be downloaded.
KEPT = 24 * 3600


class Saved(NamedTuple):
    """A file on the shelf.

    Attributes:
        name: what it is called when it is downloaded.
        url: its address, relative to the page's.
    """

    name: str
    url: str


class Shelf:
    """A folder of finished pictures, each under a name that cannot be guessed, for a day."""

    def __init__(self, folder: Path) -> None:
        """Use a folder that the page serves files from."""
        self.folder = folder / "shelf"
        self.folder.mkdir(parents=True, exist_ok=True)

    def place(self, name: str) -> Path:
        """Return a path for a new file of a name, after clearing away what is a day old."""
        for old in self.folder.iterdir():
            # Somebody else's result may clear it away at the same time.
            with suppress(FileNotFoundError):
                if old.stat().st_mtime < time.time() - KEPT:
                    shutil.rmtree(old, ignore_errors=True)
        folder = self.folder / secrets.token_urlsafe(24)
        folder.mkdir()
        return folder / name

    def saved(self, path: Path) -> Saved:
        """Return what the page needs to link to a file that was written."""
        return Saved(path.name, f"gradio_api/file={quote(str(path))}")

    def save(
        self,
        picture: Image.Image,
        stem: str,
        settings: dict[str, Any],
        writing: Mapping[str, Any] = MappingProxyType({}),
    ) -> Saved:
        """Write a PNG with the settings that made it; for `writing` see `flags.Marking`.

        Raises:
            OutputError: it cannot be written.
        """
        path = self.place(f"{stem}.png")
        images.save_png(path, picture, settings=settings, **writing)
        return self.saved(path)


def enlarged(picture: Image.Image, side: int = SMALL_SIDE) -> Image.Image:
    """Return a picture at a size to look at: small ones in sharp squares, large ones scaled down."""
    scale = side // max(picture.size)
    if scale > 1:
        size = (picture.width * scale, picture.height * scale)
        return picture.resize(size, Image.Resampling.NEAREST)
    shown = picture.copy()
    shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    return shown


def data_uri(picture: Image.Image) -> str:
    """Return a picture inside an address; large ones are scaled down and lose a little."""
    shown = picture.copy()
    shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
    # Not a photo's own EXIF and XMP, which may be long.
    shown.info = {key: picture.info[key] for key in ("icc_profile", provenance.KEY) if key in picture.info}
    exact = shown.width * shown.height <= EXACT_PIXELS or shown.mode == "RGBA"
    form = "png" if exact else "jpeg"
    return f"data:image/{form};base64,{base64.b64encode(images.encode(shown, form)).decode()}"


def note(text: str) -> str:
    """Return what the page is doing, in the line above the pictures."""
    return f'<p class="status" role="status">{html.escape(text)}</p>'


def alert(text: str) -> str:
    """Return what went wrong, in that line."""
    return f'<p class="status failed" role="alert">{html.escape(text)}</p>'


def empty(text: str) -> str:
    """Return what stands where pictures will be."""
    return f'<div class="nothing">{html.escape(text)}</div>'


def link(saved: Saved, text: str) -> str:
    """Return a link that downloads a file."""
    label = html.escape(f"{text}: {saved.name}", quote=True)
    return (
        f'<a class="save" href="{saved.url}" download="{html.escape(saved.name, quote=True)}" '
        f'aria-label="{label}">{html.escape(text)}</a>'
    )


def image(picture: Image.Image, alt: str, *, classes: str = "", sharp: bool = True) -> str:
    """Return a picture; a small one is drawn in sharp squares, unless it is a drawing."""
    pixels = " pixels" if sharp and max(picture.size) <= SMALL_SIDE else ""
    return (
        f'<img class="{classes}{pixels}" src="{data_uri(picture)}" alt="{html.escape(alt, quote=True)}" '
        f'width="{picture.width}" height="{picture.height}">'
    )


def gallery(
    pictures: Sequence[Image.Image], alts: Sequence[str], files: Sequence[Saved] | None = None
) -> str:
    """Return pictures side by side, each with a link to its file if there is one."""
    figures = []
    for number, (picture, alt) in enumerate(zip(pictures, alts, strict=True)):
        saved = link(files[number], "Save PNG") if files else ""
        caption = f"<figcaption><span>{html.escape(alt)}</span>{saved}</figcaption>"
        figures.append(f"<figure>{image(picture, alt)}{caption}</figure>")
    return f'<div class="pictures {_columns(len(figures))}">{"".join(figures)}</div>'


def before_and_after(
    pairs: Sequence[tuple[Image.Image, Image.Image]], alts: Sequence[str], files: Sequence[Saved]
) -> str:
    """Return pairs of pictures of one size under each other, with a slider from the first to the second."""
    figures = []
    for (before, after), alt, saved in zip(pairs, alts, files, strict=True):
        slider = (
            '<input type="range" min="0" max="100" value="50" aria-label="How much of the original is shown" '
            "oninput=\"this.parentNode.style.setProperty('--at', this.value + '%')\">"
        )
        stage = (
            f'<div class="stage">{image(after, alt)}{image(before, "the original", classes="over")}'
            f'{slider}<i class="edge"></i><b class="left">before</b><b class="right">after</b></div>'
        )
        caption = f"<figcaption><span>{html.escape(alt)}</span>{link(saved, 'Save PNG')}</figcaption>"
        figures.append(f"<figure>{stage}{caption}</figure>")
    return f'<div class="pictures {_columns(len(figures))}">{"".join(figures)}</div>'


def film(frames: Sequence[Image.Image], alt: str) -> str:
    """Return frames of one size, with a slider that goes through them."""
    shown = "".join(
        image(frame, f"{alt}, after step {number}", classes="frame" + (" on" if last else ""), sharp=False)
        for number, (frame, last) in enumerate((frame, frame is frames[-1]) for frame in frames)
    )
    # The slider is the only thing that changes the frame; its value is the number of steps made.
    change = (
        "const f = this.parentNode.parentNode.querySelectorAll('.frame');"
        "f.forEach((e, i) => e.classList.toggle('on', i == this.value));"
        "this.nextElementSibling.textContent = 'step ' + this.value + ' of ' + (f.length - 1)"
    )
    last = len(frames) - 1
    return (
        f'<div class="film"><div class="frames">{shown}</div><div class="reel">'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="Step" oninput="{change}">'
        f"<output>step {last} of {last}</output></div></div>"
    )


def _columns(count: int) -> str:
    return "one" if count == 1 else "two" if count <= 4 else "many"
