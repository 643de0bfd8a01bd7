"""The tokens of a data set as training reads them, and how they are written: shard by shard, by any number of processes.

    meta.json   plan.json   tokens-00000.npy …  uint16 (n, V, h, w)   labels.npy  int32 (N,)

Tokens of more than 65,536 codes are uint32.

Shapes: N images, S pixels a side, n images of a shard or batch, V views of each image, h × w the token grid.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from maskgit.data.augment import NUM_DRAWS, VIEWS
from maskgit.data.image_cache import (
    FORMAT,
    LABELS,
    MAX_META_BYTES,
    META,
    ImageCache,
    array_digest,
    checking,
    map_array,
    map_labels,
    read_meta,
    require,
)
from maskgit.errors import ConfigError, DataError, OutputError
from maskgit.foundation.checks import check_choice, check_count, check_seed
from maskgit.foundation.devices import upload
from maskgit.foundation.files import expand, output_error, read_json, replacing
from maskgit.foundation.notes import bar
from maskgit.networks.config import MAX_CODES, MAX_GRID
from maskgit.sampler.noise import uniform

PLAN = "plan.json"
# What determines the tokens: two caches that agree in these hold the same tokens.
PLAN_KEYS = (
    "format",
    "kind",
    "tokenizer_fingerprint",
    "images_fingerprint",
    "num_images",
    "num_codes",
    "grid_size",
    "image_size",
    "views",
    "num_views",
    "seed",
    "shard_size",
    "class_names",
)
# The stream of `noise.uniform` that the crops of a token cache are drawn from.
CROPS = 67


def token_type(num_codes: int) -> np.dtype:
    """Return the type that tokens are stored in: uint16 for up to 65,536 codes, uint32 above."""
    return np.dtype("<u2" if num_codes <= 2**16 else "<u4")


@dataclass(frozen=True, eq=False)
class TokenCache:
    """The tokens of a data set, of one or more crops of each image, opened for reading.

    Attributes:
        path: its folder.
        shards: uint16 or uint32 (n, V, h, w) each, memory-mapped; all but the last hold `shard_size` images.
        labels: int32 (N,), each in [0, len(class_names)), memory-mapped.
        class_names: a name for each class.
        fingerprint: sha256 of the tokens, the labels and everything they were made from.
        tokenizer_fingerprint: the fingerprint of the tokenizer that made the tokens.
        images_fingerprint: the fingerprint of the image cache.
        num_codes: every token is below this.
        image_size: pixels a side of the crops.
        views: name of the crops, in `augment.VIEWS`.
    """

    path: Path
    shards: tuple[np.ndarray, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    fingerprint: str
    tokenizer_fingerprint: str
    images_fingerprint: str
    num_codes: int
    image_size: int
    views: str

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open the cache in a folder without reading any token.

        Raises:
            DataError: there is none, it is incomplete, or its files are inconsistent.
        """
        path = expand(path)
        meta = read_meta(path, "token cache", "Run `maskgit tokenize` (again): it resumes where it stopped.")
        with checking(path, "token cache"):
            count, views, grid = meta["num_images"], meta["num_views"], meta["grid_size"]
            size, codes, names = meta["shard_size"], meta["num_codes"], tuple(meta["class_names"])
            require(1 <= grid <= MAX_GRID and 2 <= codes <= MAX_CODES, f"{codes} codes on a grid of {grid}")
            # The labels first: the size of their file confirms the number of images.
            labels = map_labels(path / LABELS, count, names)
            shards = tuple(
                map_array(path / shard_name(i), token_type(codes), (stop - start, views, grid, grid))
                for i, (start, stop) in enumerate(shard_bounds(count, size))
            )
            return cls(
                path,
                shards,
                labels,
                names,
                str(meta["fingerprint"]),
                str(meta["tokenizer_fingerprint"]),
                str(meta["images_fingerprint"]),
                codes,
                int(meta["image_size"]),
                str(meta["views"]),
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """How many classes there are, whether or not each has an image."""
        return len(self.class_names)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tokens."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def num_views(self) -> int:
        """Crops of each image, V."""
        return self.shards[0].shape[1]

    @property
    def grid_size(self) -> int:
        """Tokens a side, h and w."""
        return self.shards[0].shape[2]

    def take(self, indices: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Return the tokens of one view of each of some images.

        Args:
            indices: int (n,) in [0, N).
            views: int (n,) in [0, V).

        Returns:
            uint16 or uint32 (n, h, w).

        Raises:
            DataError: a token is not below `num_codes`.
        """
        tokens = np.empty((len(indices), self.grid_size, self.grid_size), self.shards[0].dtype)
        shards, places = np.divmod(indices, len(self.shards[0]))
        for shard in np.unique(shards):
            here = shards == shard
            tokens[here] = self.shards[shard][places[here], views[here]]
        if tokens.size and tokens.max() >= self.num_codes:
            raise DataError(
                f"The token cache {self.path} is damaged: it holds the token {tokens.max()}. Make it again."
            )
        return tokens

    def verify(self) -> None:
        """Read every token and compare with the fingerprint.

        Raises:
            DataError: the files have changed.
        """
        meta = read_meta(self.path, "token cache", "Make it again.")
        digests = [array_digest(shard) for shard in self.shards]
        if token_fingerprint(meta, digests, self.labels) != self.fingerprint:
            raise DataError(
                f"The token cache {self.path} is damaged: its content has changed. Make it again."
            )

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raise a `DataError` unless the tokens were made by the tokenizer that has the given fingerprint."""
        if self.tokenizer_fingerprint != fingerprint:
            raise DataError(
                f"The token cache {self.path} was made by another tokenizer "
                f"(fingerprint {self.tokenizer_fingerprint[:12]}, not {fingerprint[:12]}). "
                "Give that tokenizer, or make the tokens again with this one."
            )


class Encoder(Protocol):
    """The part of `tokenizer.Tokenizer` that is needed here."""

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
    """Write the tokens of all images into a folder, resuming where an earlier call stopped.

    Args:
        images: the images.
        tokenizer: turns them into tokens; on `device`, in evaluation mode.
        out: the folder to make or to complete.
        tokenizer_fingerprint: sha256 of the tokenizer's weights.
        num_codes: size of its codebook.
        views: which crops of each image, a name in `augment.VIEWS`.
        num_views: how many crops if `views` does not fix the number ("random"), else None.
        size: pixels per side of the crops, at most the cache's; None means the cache's.
        seed: of random crops, in [0, 2⁶⁴).
        batch_size: images encoded in one call.
        shard_size: images per file; an interrupted call loses the work of at most one file.
        device: where the tokenizer is.
        rank: which process this is; each writes every `world`-th shard.
        world: number of processes.
        progress: show a bar.

    Returns:
        The cache, opened; None if other processes have not written their shards yet.

    Raises:
        ConfigError: a setting is out of range, or does not match the images or the tokenizer.
        DataError: the folder holds other tokens.
        OutputError: it cannot be written; complete shards are kept.
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
        """Return the tokens, memory-mapped, if the file is complete."""
        try:
            tokens = np.load(self.file, mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, ValueError):
            return None
        same = tokens.dtype == token_type(self.num_codes) and tokens.shape == self.shape
        whole = same and tokens.max() < self.num_codes
        return tokens if whole else None


def _shards(out: Path, plan: dict[str, Any]) -> list[_Shard]:
    grid = (plan["num_views"], plan["grid_size"], plan["grid_size"])
    bounds = shard_bounds(plan["num_images"], plan["shard_size"])
    return [
        _Shard(out / shard_name(i), start, stop, (stop - start, *grid), plan["num_codes"])
        for i, (start, stop) in enumerate(bounds)
    ]


def _begin(out: Path, plan: dict[str, Any]) -> None:
    """Make the folder and store the plan in it, or check that it holds the same plan."""
    file = out / PLAN
    if file.is_file():
        remedy = f"Remove {out}, or choose another folder."
        former = read_json(file, DataError, limit=MAX_META_BYTES, remedy=remedy)
        changed = [key for key in plan if former.get(key) != plan[key]]
        if changed:
            raise DataError(
                f"{out} holds tokens made with a different {changed[0].replace('_', ' ')}. "
                "Remove it, or choose another folder."
            )
        return
    # Another process may just be writing the plan, under a hidden name.
    if out.exists() and (not out.is_dir() or any(not file.name.startswith(".") for file in out.iterdir())):
        raise OutputError(
            f"{out} already exists and is not a token cache. Remove it, or choose another folder."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out).free
    except OSError as error:
        raise output_error(out, error) from error
    grid = plan["num_views"] * plan["grid_size"] ** 2
    needed = token_type(plan["num_codes"]).itemsize * plan["num_images"] * grid
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
    """Return the tokens of a shard's images, uint16 or uint32 (n, V, h, w)."""
    tokens = np.empty(shard.shape, token_type(shard.num_codes))
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
                    f"instead of {shard.num_codes} codes on a grid of {shard.shape[2:]}."
                )
            tokens[first - shard.start : last - shard.start, view] = codes
    return tokens


def _finish(out: Path, plan: dict[str, Any], shards: list[_Shard], labels: np.ndarray) -> TokenCache | None:
    """Write the description once all shards are complete."""
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


def token_fingerprint(plan: dict[str, Any], digests: Sequence[str], labels: np.ndarray) -> str:
    """Return the fingerprint of tokens: `plan` is what they were made from, `digests` one for each shard."""
    described = {key: plan[key] for key in PLAN_KEYS}
    text = json.dumps([described, list(digests), array_digest(labels.astype("<i4"))], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def shard_name(number: int) -> str:
    """Return the file name of a shard of tokens."""
    return f"tokens-{number:05}.npy"


def shard_bounds(num_images: int, shard_size: int) -> list[tuple[int, int]]:
    """Return the first image of each shard and the one after its last."""
    return [(i, min(i + shard_size, num_images)) for i in range(0, num_images, shard_size)]
