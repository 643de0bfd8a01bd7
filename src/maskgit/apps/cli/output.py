"""What the commands that make pictures share: the flags, the progress bar, the files."""

from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from maskgit.apps.cli.flags import Marking, about
from maskgit.apps.settings import SETTINGS
from maskgit.errors import OutputError
from maskgit.foundation.checks import check_count

if TYPE_CHECKING:
    from PIL import Image

    from maskgit.pipeline import MaskGIT
    from maskgit.results import Output

SHEET = "sheet.png"
EXPLAINED, FORMING = "explain.png", "forming.gif"
# Images that are explained: more would not fit a screen.
MAX_EXPLAINED = 8
# A sheet that can be looked at.
MAX_SHEET, MAX_COLUMNS = 400, 20


@dataclass(frozen=True)
class Making:
    """What to make, and where to write it."""

    num_images: Annotated[int, arg(aliases=["-n"])] = 1
    """Images per class."""
    seed: Annotated[int, about("seed")] = 0
    first_index: Annotated[int, about("first_index")] = 0
    batch_size: int = 16
    """Images decoded together; except in float32, may change their tokens."""
    out: Path = Path("out")
    """Folder for the images; created if needed."""
    overwrite: bool = False
    """Replace existing images."""
    marking: Marking = field(default_factory=Marking)

    def check(self) -> None:
        """Raise a `ConfigError` if a number is out of range, or pictures cannot be signed as asked."""
        self.marking.writing()
        check_count("num_images", self.num_images, 1, 1_000_000)
        for name in ("seed", "first_index"):
            check_count(name, getattr(self, name), SETTINGS[name].low, SETTINGS[name].high)
        check_count("batch_size", self.batch_size, 1, 65_536)

    def recorded(self, number: int) -> dict[str, int]:
        """Return what decides the `number`-th picture, besides the sampler's settings."""
        return {"seed": self.seed, "index": self.first_index + number}


class Progress:
    """A progress bar over decoding steps, on the terminal alone; used as a callback."""

    def __enter__(self) -> "Progress":
        from maskgit.foundation.notes import bar

        self.bar = bar(total=0, unit="step")
        return self

    reads_tokens = False

    def expect(self, num_calls: int) -> None:
        """Hear from what decodes how many steps more there are."""
        self.bar.total = (self.bar.total or 0) + num_calls
        self.bar.refresh()

    def __call__(self, *_: object) -> None:
        self.bar.update()

    def __exit__(self, *_: object) -> None:
        self.bar.close()


class Writer:
    """Writes PNGs on a thread of its own, while the next ones are made."""

    # Pictures that wait to be written, at most.
    WAITING = 64

    def __init__(self, overwrite: bool, writing: dict[str, Any]) -> None:
        """Write with arguments of `images.save_png`: whether to overwrite, and `Marking.writing`."""
        self.options = {"overwrite": overwrite} | writing

    def __enter__(self) -> "Writer":
        self.pool = ThreadPoolExecutor(1)
        self.waiting: deque[Future[None]] = deque()
        return self

    def save(self, path: Path, picture: "Image.Image", settings: dict[str, Any]) -> None:
        """See `images.save_png`; an error of an earlier picture may be raised here."""
        from maskgit import images

        if len(self.waiting) == self.WAITING:
            self.waiting.popleft().result()
        self.waiting.append(
            self.pool.submit(images.save_png, path, picture, settings=dict(settings), **self.options)
        )

    def __exit__(self, kind: object, *_: object) -> None:
        # What was made is written, even if the next ones are not to be.
        self.pool.shutdown()
        if kind is None:
            for written in self.waiting:
                written.result()


def slug(name: str) -> str:
    """Return a name as a part of a file's name."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.casefold()).split())[:60] or "image"


def numbered(making: Making, names: list[str]) -> list[str]:
    """Return a stem for each picture: what it shows, the seed and its index."""
    return [f"{slug(name)}-{making.seed}-{making.first_index + i:05}" for i, name in enumerate(names)]


def picture_paths(out: Path, overwrite: bool, stems: list[str], explain: bool = False) -> list[Path]:
    """Return a path for each picture, before any work is done for one that could not be written."""
    from maskgit.foundation.files import check_writable

    check_writable(out)
    seen = Counter[str]()
    paths = []
    for stem in stems:
        seen[stem] += 1
        paths.append(out / (f"{stem}.png" if seen[stem] == 1 else f"{stem}-{seen[stem]}.png"))
    others = [SHEET, *([EXPLAINED, FORMING] if explain else [])]
    for path in [*paths, *(out / name for name in others)]:
        if path.exists() and not overwrite:
            raise OutputError(f"{path} already exists; choose another --out, or add --overwrite.")
    return paths


def save_sheet(
    pictures: "list[Image.Image]", made: int, out: Path, writing: dict[str, Any], **layout: Any
) -> None:
    """Write the sheet and print its path; `made` counts the pictures that were written.

    Args:
        writing: see `Marking.writing`.
    """
    from maskgit import images

    images.save_png(out / SHEET, images.contact_sheet(pictures, **layout), **writing)
    print(out / SHEET if made <= len(pictures) else f"{out / SHEET} (the first {len(pictures)} of {made})")


def save_explained(pipe: "MaskGIT", made: "Output", making: Making) -> None:
    """Write how the first images were decoded, as a picture and as an animation, and print the paths."""
    from dataclasses import replace

    from maskgit import explain, images
    from maskgit.results import Trace

    trace = made.trace
    assert trace is not None, "asked for"
    # An animation enlarges small images to 192 pixels a side at most.
    shown = (trace.tokens.shape[1] + 1) * max(made.images.shape[-1], 192) ** 2
    count = max(1, min(MAX_EXPLAINED, images.MAX_PIXELS // shown))
    # The part of a photo that the model saw is what its tokens explain.
    first = replace(
        made,
        images=made.images[:count],
        tokens=made.tokens[:count],
        trace=Trace(trace.tokens[:count], trace.unknown[:count], trace.confidence[:count]),
        photos=None,
    )
    options: dict[str, Any] = {"overwrite": making.overwrite} | making.marking.writing()
    images.save_png(making.out / EXPLAINED, explain.explain(first), **options)
    explain.save_animation(making.out / FORMING, explain.animation(pipe, first), **options)
    print(making.out / EXPLAINED)
    print(making.out / FORMING)


def label_of(pipe: "MaskGIT", name: str) -> int | None:
    """Return the class that a name on the command line means; "none" is no class, and "name:none" a class."""
    number = pipe.label(None if name == "none" else name)
    return None if number < 0 else number
