"""Square images of one size as training reads them: a memory-mapped array with its labels and a description.

    meta.json   images.npy  uint8 (N, S, S, 3), RGB   labels.npy  int32 (N,)

Shapes: N images, S pixels a side, n images of a batch.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from maskgit.errors import DataError, OutputError
from maskgit.foundation.files import destination, expand, new_folder, read_json

FORMAT = 1
META, IMAGES, LABELS = "meta.json", "images.npy", "labels.npy"
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
        class_names: a name for each class; its number as text if the source has no names.
        fingerprint: sha256 over sizes, images, labels and names, as hexadecimal digits.
        source: what it was packed from.
        num_enlarged: images whose shorter side was less than S.
        num_skipped: images that could not be read.
        skipped: the first hundred of them, and why.
        left_out: a sentence for each reason why other files were not read.
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
        """Open the cache in a folder without reading any image.

        Raises:
            DataError: there is none, it is incomplete, or its files are inconsistent.
        """
        path = expand(path)
        meta = read_meta(path, "image cache", "Pack the images with `maskgit pack`.")
        with checking(path, "image cache"):
            count, size, names = meta["num_images"], meta["size"], tuple(meta["class_names"])
            require(isinstance(size, int) and 1 <= size <= MAX_SIDE, f"an image size of {size!r}")
            images = map_array(path / IMAGES, np.dtype("uint8"), (count, size, size, 3))
            labels = map_labels(path / LABELS, count, names)
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
                # Older caches do not have it.
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
        """What a user should know before training on it, one sentence each."""
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
            notes.append("There is only one image: a model can only memorize it.")
        if self.num_classes == 1:
            notes.append("There is only one class: labels will have no effect.")
        empty = self.num_classes - len(np.unique(self.labels))
        if empty:
            notes.append(f"{empty:,} of {self.num_classes:,} classes have no images.")
        return tuple(notes)

    def verify(self) -> None:
        """Read every image and compare with the fingerprint.

        Raises:
            DataError: the files have changed.
        """
        digest = image_digest(self.size)
        step = max(1, _CHUNK // self.images[0].nbytes)
        for start in range(0, len(self), step):
            digest.update(self.images[start : start + step].tobytes())
        if finish_image_digest(digest, self.labels, self.class_names) != self.fingerprint:
            raise DataError(
                f"The image cache {self.path} is damaged: its content has changed. Pack the images again."
            )


class ImageCacheWriter:
    """Writes an image cache image by image, in bounded memory; made by `new_image_cache`."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size
        self.count = 0
        self._digest = image_digest(size)
        # Appended rather than mapped: on a full disk that is an error, while a mapped file would kill the process.
        self._file = open(folder / IMAGES, "wb")  # noqa: SIM115, closed by `close`
        self._write_header()

    def _write_header(self) -> None:
        # NumPy leaves room in a header for the first axis to grow, so the header's length never changes.
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
        """Write the labels, int (N,), and the description; `facts` are the other attributes of `ImageCache`."""
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
    """Yield a writer; its cache appears at `out`, complete, once the block has ended without an error.

    Raises:
        OutputError: `out` exists, or cannot be written; nothing half-written is left behind.
    """
    out = destination(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} already exists. Remove it, or choose another folder.")
    with new_folder(out) as new, closing(ImageCacheWriter(new, size)) as writer:
        yield writer


def write_image_cache(
    out: str | Path, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> ImageCache:
    """Write a cache of images in memory.

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


def image_digest(size: int) -> Any:
    """Begin the fingerprint of images of one size."""
    return hashlib.sha256(f"maskgit image cache {FORMAT} {size}\n".encode())


def finish_image_digest(digest: Any, labels: np.ndarray, class_names: Sequence[str]) -> str:
    """Add labels and names to the digest of all images, and return the fingerprint."""
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


def read_meta(path: Path, kind: str, remedy: str) -> dict[str, Any]:
    """Return the description of the cache in a folder.

    Raises:
        DataError: there is none, or it has another kind or format.
    """
    file = path / META
    if not file.is_file():
        raise DataError(f"{path} is not a complete {kind}: it has no {META}. {remedy}")
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
def checking(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise DataError(f"The {kind} {path} is damaged: {META} lacks {error}. Make it again.") from error
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise DataError(f"The {kind} {path} is damaged: {error}. Make it again.") from error


def require(condition: bool, found: str) -> None:
    if not condition:
        raise ValueError(f"it has {found}")


def map_array(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    require(array.dtype == dtype and array.shape == shape, f"{array.dtype} {array.shape} in {file.name}")
    return array


def map_labels(file: Path, count: int, class_names: Sequence[str]) -> np.ndarray:
    labels = map_array(file, np.dtype("int32"), (count,))
    require(count > 0, "no images")
    require(all(isinstance(name, str) for name in class_names), "class names that are not text")
    low, high = int(labels.min()), int(labels.max())
    require(
        low >= 0 and high < len(class_names), f"labels from {low} to {high} for {len(class_names)} classes"
    )
    return labels
