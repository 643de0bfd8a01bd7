"""Data sets on disk as training reads them: memory-mapped arrays with a JSON file beside them, numpy alone.

    image cache:  meta.json  images.npy  uint8 (N, S, S, 3), RGB      labels.npy  int32 (N,)
    token cache:  meta.json  plan.json  tokens-00000.npy …  uint16 (n, V, h, w)     labels.npy  int32 (N,)

Shapes: N images, S pixels a side, n images of one shard, V views of each image, h × w the token grid.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from maskgit.errors import DataError
from maskgit.foundation.files import expand, read_json
from maskgit.networks.config import MAX_CODES, MAX_GRID

FORMAT = 1
META, PLAN, IMAGES, LABELS = "meta.json", "plan.json", "images.npy", "labels.npy"
# What a token cache is made from: two caches that agree in these hold the same tokens.
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
MAX_SIDE = 8192
MAX_META_BYTES = 1 << 28
_CHUNK = 1 << 24


@dataclass(frozen=True, eq=False)
class ImageCache:
    """A data set of square images of one size, opened for reading.

    Attributes:
        path: its folder.
        images: uint8 (N, S, S, 3), RGB, memory-mapped.
        labels: int32 (N,), each in [0, len(class_names)), memory-mapped.
        class_names: a name for each class; its number as text where the source has none.
        fingerprint: sha256 over sizes, images, labels and names, as hexadecimal digits.
        source: what it was packed from, in words.
        num_enlarged: images whose shorter side was below S.
        num_skipped: images that could not be read.
        skipped: which ones and why, the first hundred.
        left_out: a sentence for each reason why something else that lay there was not read.
    """

    path: Path
    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    fingerprint: str
    source: str
    num_enlarged: int
    num_skipped: int
    skipped: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open the cache in a folder, reading no image yet.

        Raises:
            DataError: there is none, it is incomplete, or its files do not fit together.
        """
        path = expand(path)
        meta = read_meta(path, "image cache", "Pack the images with `maskgit pack`.")
        with _checking(path, "image cache"):
            count, size, names = meta["num_images"], meta["size"], tuple(meta["class_names"])
            _require(isinstance(size, int) and 1 <= size <= MAX_SIDE, f"an image size of {size!r}")
            images = _map(path / IMAGES, np.dtype("uint8"), (count, size, size, 3))
            labels = _map_labels(path / LABELS, count, names)
            return cls(
                path,
                images,
                labels,
                names,
                str(meta["fingerprint"]),
                str(meta["source"]),
                int(meta["num_enlarged"]),
                int(meta["num_skipped"]),
                tuple(str(line) for line in meta["skipped"]),
                # Caches of before do not say.
                tuple(str(line) for line in meta.get("left_out", ())),
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> int:
        """Pixels a side, S."""
        return self.images.shape[1]

    @property
    def num_classes(self) -> int:
        """How many classes there are, whether or not each has an image."""
        return len(self.class_names)

    @property
    def num_bytes(self) -> int:
        """Bytes of the images."""
        return self.images.nbytes

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know before training on it, a sentence each."""
        notes = []
        if self.num_skipped:
            notes.append(
                f"{self.num_skipped:,} of {len(self) + self.num_skipped:,} images could not be read."
            )
        if self.num_enlarged:
            notes.append(
                f"{self.num_enlarged:,} images were smaller than {self.size} pixels and were enlarged."
            )
        if len(self) == 1:
            notes.append("There is one image only: a model can do no more than memorize it.")
        if self.num_classes == 1:
            notes.append("There is one class only: labels will have no effect.")
        empty = self.num_classes - len(np.unique(self.labels))
        if empty:
            notes.append(f"{empty:,} of {self.num_classes:,} classes have no image.")
        return tuple(notes)

    def verify(self) -> None:
        """Read every image and compare with the fingerprint.

        Raises:
            DataError: the files are not what was packed.
        """
        digest = image_digest(self.size)
        step = max(1, _CHUNK // self.images[0].nbytes)
        for start in range(0, len(self), step):
            digest.update(self.images[start : start + step].tobytes())
        if finish_image_digest(digest, self.labels, self.class_names) != self.fingerprint:
            raise DataError(
                f"The image cache {self.path} is damaged: its content has changed. Pack the images again."
            )


@dataclass(frozen=True, eq=False)
class TokenCache:
    """The tokens of a data set, of one or more crops of each image, opened for reading.

    Attributes:
        path: its folder.
        shards: uint16 (n, V, h, w) each, memory-mapped; all but the last hold `shard_size` images.
        labels: int32 (N,), each in [0, len(class_names)), memory-mapped.
        class_names: a name for each class.
        fingerprint: sha256 over the tokens, the labels and all that they were made from.
        tokenizer_fingerprint: that of the tokenizer that made the tokens.
        images_fingerprint: that of the image cache that they were made from.
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
        """Open the cache in a folder, reading no token yet.

        Raises:
            DataError: there is none, it is incomplete, or its files do not fit together.
        """
        path = expand(path)
        meta = read_meta(path, "token cache", "Run `maskgit tokenize` (again): it goes on where it stopped.")
        with _checking(path, "token cache"):
            count, views, grid = meta["num_images"], meta["num_views"], meta["grid_size"]
            size, codes, names = meta["shard_size"], meta["num_codes"], tuple(meta["class_names"])
            _require(1 <= grid <= MAX_GRID and 2 <= codes <= MAX_CODES, f"{codes} codes on a grid of {grid}")
            # The labels first: their file's size vouches for the count that the shards are cut by.
            labels = _map_labels(path / LABELS, count, names)
            shards = tuple(
                _map(path / shard_name(i), np.dtype("uint16"), (stop - start, views, grid, grid))
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
        """Return the tokens of one view each of some images.

        Args:
            indices: int (n,) in [0, N).
            views: int (n,) in [0, V).

        Returns:
            uint16 (n, h, w).

        Raises:
            DataError: a token is not below `num_codes`.
        """
        tokens = np.empty((len(indices), self.grid_size, self.grid_size), np.uint16)
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
            DataError: the files are not what was written.
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


def image_digest(size: int) -> Any:
    """Begin the fingerprint of images of one size."""
    return hashlib.sha256(f"maskgit image cache {FORMAT} {size}\n".encode())


def finish_image_digest(digest: Any, labels: np.ndarray, class_names: Sequence[str]) -> str:
    """Add labels and names to a digest that has seen all images, and return the fingerprint."""
    digest.update(labels.astype("<i4").tobytes())
    digest.update(json.dumps(list(class_names)).encode())
    return digest.hexdigest()


def array_digest(array: np.ndarray) -> str:
    """Return the sha256 of an array's values, as hexadecimal digits."""
    digest = hashlib.sha256()
    step = max(1, _CHUNK // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        digest.update(array[start : start + step].tobytes())
    return digest.hexdigest()


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


def read_meta(path: Path, kind: str, remedy: str) -> dict[str, Any]:
    """Return the description of the cache in a folder.

    Raises:
        DataError: there is none, or it is not of this kind and format.
    """
    file = path / META
    if not file.is_file():
        raise DataError(f"{path} is not a finished {kind}: it has no {META}. {remedy}")
    meta = read_json(file, DataError, limit=MAX_META_BYTES, remedy=remedy)
    if (found := meta.get("kind")) != kind:
        raise DataError(
            f"{path} holds no {kind}, but {found if isinstance(found, str) else 'something else'}."
        )
    if meta.get("format") != FORMAT:
        raise DataError(
            f"{path} has the format {meta.get('format')!r}, but this version reads format {FORMAT}. {remedy}"
        )
    return meta


@contextmanager
def _checking(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise DataError(f"The {kind} {path} is damaged: {META} lacks {error}. Make it again.") from error
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise DataError(f"The {kind} {path} is damaged: {error}. Make it again.") from error


def _require(condition: bool, found: str) -> None:
    if not condition:
        raise ValueError(f"it has {found}")


def _map(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    _require(array.dtype == dtype and array.shape == shape, f"{array.dtype} {array.shape} in {file.name}")
    return array


def _map_labels(file: Path, count: int, class_names: Sequence[str]) -> np.ndarray:
    labels = _map(file, np.dtype("int32"), (count,))
    _require(count > 0, "no images")
    _require(all(isinstance(name, str) for name in class_names), "class names that are not text")
    low, high = int(labels.min()), int(labels.max())
    _require(
        low >= 0 and high < len(class_names), f"labels from {low} to {high} for {len(class_names)} classes"
    )
    return labels
