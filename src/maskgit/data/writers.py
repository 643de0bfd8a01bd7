"""Writing the caches that training reads: whole or not at all, in bounded memory, and tokens shard by shard.

Shapes: N images, S pixels a side, n images of a shard or batch, V views of each image, h × w the token grid.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from maskgit.data.augment import NUM_DRAWS, VIEWS
from maskgit.data.caches import (
    FORMAT,
    IMAGES,
    LABELS,
    MAX_META_BYTES,
    META,
    PLAN,
    ImageCache,
    TokenCache,
    array_digest,
    finish_image_digest,
    image_digest,
    shard_bounds,
    shard_name,
    token_fingerprint,
)
from maskgit.errors import ConfigError, DataError, OutputError
from maskgit.foundation.bars import bar
from maskgit.foundation.checks import check_choice, check_count, check_seed
from maskgit.foundation.devices import upload
from maskgit.foundation.files import destination, expand, new_folder, output_error, read_json, replacing
from maskgit.networks.config import MAX_CODES, MAX_GRID
from maskgit.sampler.noise import uniform

# The stream of `noise.uniform` that the crops of a token cache are drawn from.
CROPS = 67


class ImageCacheWriter:
    """Writes an image cache image by image, in bounded memory; made by `new_image_cache`."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size
        self.count = 0
        self._digest = image_digest(size)
        # Appended rather than mapped: a full disk is then an error, where a mapped file kills the process.
        self._file = open(folder / IMAGES, "wb")  # noqa: SIM115, closed by `close`
        self._write_header()

    def _write_header(self) -> None:
        # numpy leaves room in a header for the first axis to grow, so its length never changes.
        shape = (self.count, self.size, self.size, 3)
        np.lib.format.write_array_header_1_0(
            self._file, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )

    def add(self, images: np.ndarray) -> None:
        """Append images, uint8 (n, S, S, 3)."""
        assert images.dtype == np.uint8
        assert images.shape[1:] == (self.size, self.size, 3)
        data = images.tobytes()
        self._digest.update(data)
        self._file.write(data)
        self.count += len(images)

    def finish(self, labels: np.ndarray, class_names: Sequence[str], **facts: Any) -> None:
        """Write labels, int (N,), and the description; `facts` are the other attributes of `ImageCache`."""
        labels = labels.astype("<i4")
        assert labels.shape == (self.count,)
        self._file.seek(0)
        self._write_header()
        self.close()
        np.save(self.folder / LABELS, labels)
        meta = {
            "format": FORMAT,
            "kind": "image cache",
            "num_images": self.count,
            "size": self.size,
            "fingerprint": finish_image_digest(self._digest, labels, class_names),
            **facts,
            "class_names": list(class_names),
        }
        (self.folder / META).write_text(json.dumps(meta, indent=1), "utf-8")

    def close(self) -> None:
        """Close the file of images."""
        self._file.close()


@contextmanager
def new_image_cache(out: str | Path, size: int) -> Iterator[ImageCacheWriter]:
    """Give a writer whose cache appears at `out`, whole, once the block has ended well.

    Raises:
        OutputError: something stands at `out`, or it cannot be written; nothing half-written is left behind.
    """
    out = destination(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} already exists. Remove it, or choose another folder.")
    with new_folder(out) as new, closing(ImageCacheWriter(new, size)) as writer:
        yield writer


def write_image_cache(
    out: str | Path, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> ImageCache:
    """Write a cache of images that are in memory already.

    Args:
        out: the folder to make.
        images: uint8 (N, S, S, 3), RGB.
        labels: int (N,), each in [0, len(class_names)).
        class_names: a name for each class.

    Returns:
        The cache, opened.

    Raises:
        OutputError: the folder exists or cannot be written.
    """
    with new_image_cache(out, images.shape[1]) as writer:
        writer.add(images)
        writer.finish(labels, class_names, source="memory", num_enlarged=0, num_skipped=0, skipped=[])
    return ImageCache.open(out)


class Encoder(Protocol):
    """The part of a tokenizer that is needed here; see `tokenizer.Tokenizer`."""

    @property
    def patch_size(self) -> int:
        """Pixels a token covers, in each direction."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Return tokens: float (B, 3, H, W) in [0, 1] → int64 (B, h, w)."""
        ...


def write_token_cache(
    images: ImageCache,
    tokenizer: Encoder,
    out: str | Path,
    *,
    tokenizer_fingerprint: str,
    num_codes: int,
    views: str = "centre+flip",
    num_views: int | None = None,
    size: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    shard_size: int = 16_384,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
) -> TokenCache | None:
    """Write the tokens of all images into a folder, going on where a former call stopped.

    Args:
        images: the images.
        tokenizer: turns them into tokens; on `device`, in evaluation mode.
        out: the folder to make or to complete.
        tokenizer_fingerprint: sha256 of the tokenizer's weights.
        num_codes: size of its codebook.
        views: the crops of each image, a name in `augment.VIEWS`.
        num_views: how many crops where `views` leaves it open ("random"), else None.
        size: pixels a side of the crops, at most the cache's; the cache's when None.
        seed: of random crops, in [0, 2⁶⁴).
        batch_size: images encoded at once.
        shard_size: images in a file; a call that is stopped loses at most one file's work.
        device: where the tokenizer is.
        rank: which process this is; each does every `world`-th shard.
        world: number of processes.
        progress: show a bar.

    Returns:
        The cache, opened; None if other processes have not written their shards yet.

    Raises:
        ConfigError: a setting is out of range or does not fit the images or the tokenizer.
        DataError: the folder holds other tokens.
        OutputError: it cannot be written; the shards that are complete are kept.
    """
    batch_size = check_count("batch_size", batch_size, 1, 65_536)
    shard_size = check_count("shard_size", shard_size, 1, 2**30)
    seed = check_seed(seed)
    num_codes = check_count("num_codes", num_codes, 2, MAX_CODES)
    rank = check_count("rank", rank, 0, world - 1)
    check_choice("views", views, VIEWS)
    size = images.size if size is None else size
    patch = tokenizer.patch_size
    if size % patch or not 1 <= size // patch <= MAX_GRID:
        raise ConfigError(
            f"The image size must be a multiple of {patch}, the tokenizer's patch, but is {size}."
        )
    plan = {
        "format": FORMAT,
        "kind": "token cache",
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "images_fingerprint": images.fingerprint,
        "num_images": len(images),
        "num_codes": num_codes,
        "grid_size": size // patch,
        "image_size": size,
        "views": views,
        "num_views": VIEWS[views].check(num_views, images.size, size),
        "seed": seed,
        "shard_size": shard_size,
        "class_names": list(images.class_names),
    }
    out = expand(out)
    _begin(out, plan)
    shards = _shards(out, plan)
    with bar(shards[rank::world], desc="tokenizing", unit=" shards", shown=progress) as shown:
        for shard in shown:
            if shard.load() is None:
                with replacing(shard.file) as temporary, temporary.open("wb") as stream:
                    np.save(stream, _encode_shard(images, tokenizer, plan, shard, batch_size, device))
    return _finish(out, plan, shards, images.labels)


@dataclass(frozen=True)
class _Shard:
    file: Path
    start: int
    stop: int
    shape: tuple[int, ...]
    num_codes: int

    def load(self) -> np.ndarray | None:
        """Return the tokens, memory-mapped, if they are there and whole."""
        try:
            tokens = np.load(self.file, mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, ValueError):
            return None
        whole = tokens.dtype == np.uint16 and tokens.shape == self.shape and tokens.max() < self.num_codes
        return tokens if whole else None


def _shards(out: Path, plan: dict[str, Any]) -> list[_Shard]:
    grid = (plan["num_views"], plan["grid_size"], plan["grid_size"])
    bounds = shard_bounds(plan["num_images"], plan["shard_size"])
    return [
        _Shard(out / shard_name(i), start, stop, (stop - start, *grid), plan["num_codes"])
        for i, (start, stop) in enumerate(bounds)
    ]


def _begin(out: Path, plan: dict[str, Any]) -> None:
    """Make the folder and say in it what it will hold, or check that what it holds is that."""
    file = out / PLAN
    if file.is_file():
        remedy = f"Remove {out}, or choose another folder."
        former = read_json(file, DataError, limit=MAX_META_BYTES, remedy=remedy)
        changed = [key for key in plan if former.get(key) != plan[key]]
        if changed:
            raise DataError(
                f"{out} holds tokens that were made with another {changed[0].replace('_', ' ')}. "
                "Remove it, or choose another folder."
            )
        return
    # Another process may be writing the plan this moment, under a hidden name.
    if out.exists() and (not out.is_dir() or any(not file.name.startswith(".") for file in out.iterdir())):
        raise OutputError(f"{out} already exists and is no token cache. Remove it, or choose another folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out).free
    except OSError as error:
        raise output_error(out, error) from error
    needed = 2 * plan["num_images"] * plan["num_views"] * plan["grid_size"] ** 2
    if needed > free:
        raise OutputError(
            f"{out} needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there. "
            "Free some space, choose another folder, or take fewer views."
        )
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(plan, indent=1), "utf-8")


def _encode_shard(
    images: ImageCache,
    tokenizer: Encoder,
    plan: dict[str, Any],
    shard: _Shard,
    batch_size: int,
    device: str | torch.device,
) -> np.ndarray:
    """Return the tokens of a shard's images, uint16 (n, V, h, w)."""
    tokens = np.empty(shard.shape, np.uint16)
    make = VIEWS[plan["views"]].make
    for first in range(shard.start, shard.stop, batch_size):
        last = min(first + batch_size, shard.stop)
        numbers = torch.arange(first, last)
        for view in range(plan["num_views"]):
            draws = uniform(plan["seed"], numbers, view, CROPS, NUM_DRAWS).numpy()
            crops = make(images.images[first:last], draws, plan["image_size"], view)
            pixels = torch.from_numpy(np.ascontiguousarray(crops.transpose(0, 3, 1, 2)))
            pixels = upload(pixels, torch.device(device))
            codes = tokenizer.encode(pixels.float() / 255).cpu().numpy()
            if (
                codes.shape != (last - first, *shard.shape[2:])
                or codes.min() < 0
                or codes.max() >= shard.num_codes
            ):
                raise ConfigError(
                    f"The tokenizer gives tokens {codes.min()} to {codes.max()} of shape {codes.shape[1:]}, "
                    f"but {shard.num_codes} codes on a grid of {shard.shape[2:]} were announced."
                )
            tokens[first - shard.start : last - shard.start, view] = codes
    return tokens


def _finish(out: Path, plan: dict[str, Any], shards: list[_Shard], labels: np.ndarray) -> TokenCache | None:
    """Describe the cache once all shards are there."""
    if not (out / META).is_file():
        digests = []
        for shard in shards:
            tokens = shard.load()
            if tokens is None:
                return None
            digests.append(array_digest(tokens))
        with replacing(out / LABELS) as temporary, temporary.open("wb") as stream:
            np.save(stream, np.asarray(labels, "<i4"))
        meta = {
            **plan,
            "shards": digests,
            "fingerprint": token_fingerprint(plan, digests, np.asarray(labels)),
        }
        with replacing(out / META) as temporary:
            temporary.write_text(json.dumps(meta, indent=1), "utf-8")
    return TokenCache.open(out)
