"""Images and their tokens straight from their source, for data that no disk here can hold as a cache.

The stream is cut into lanes, each of which gives an equal share of every batch, so what a step reads depends
on (seed, lanes, step) and not on the number of processes. Limits, where a cache has none: images are shuffled
only within a buffer (and in the order of shards), those of a folder excepted; class names must be known
beforehand; resuming reads again, without decoding, at most two passes of the source; a change of the source is
noticed by the names and sizes of its files and a sample of their content, and on the hub by the commit.

Shapes: B images of a step over all processes, b those of one process, S pixels a side, h × w the token grid.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cached_property
from itertools import islice
from pathlib import Path
from threading import Event

import numpy as np
import torch

from maskgit.data.augment import AUGMENTATIONS, NUM_DRAWS
from maskgit.data.batches import (
    AUGMENT,
    ImageBatch,
    Shuffler,
    TokenBatch,
    ahead,
    image_batch,
    maybe_pinned,
    sample_numbers,
)
from maskgit.data.idx import SPLITS, find_idx
from maskgit.data.rows import AUTO, ClassNumbers, Row, decode_square
from maskgit.data.sources import open_source
from maskgit.errors import ConfigError, DataError, ImageError
from maskgit.foundation.checks import check_choice, check_count, check_range, check_seed
from maskgit.foundation.devices import upload
from maskgit.foundation.files import expand
from maskgit.networks.tokenizer import Tokenizer
from maskgit.sampler.noise import uniform

# Below this many images the share of bad ones says little.
_FEW = 1000
# Of so many files, at most, so many bytes at either end are part of the fingerprint.
_SAMPLED_FILES, _SAMPLED_BYTES = 1024, 4096
# Images that are encoded at once.
_ENCODED = 64


class StreamedImages:
    """The batches of a run that reads its images from their source; in use like `batches.ImageBatches`.

    Attributes:
        class_names: a name for each class.
        num_images: None, for the number is not known.
        size: pixels a side of the images given.
        left_out: a sentence for each reason why something that lies in the source is not read.
    """

    num_images: None = None

    def __init__(
        self,
        source: str | Path,
        *,
        seed: int,
        global_batch: int,
        size: int,
        rank: int = 0,
        world: int = 1,
        lanes: int = 1,
        split: str | None = None,
        config: str | None = None,
        revision: str | None = None,
        image_column: str = AUTO,
        label_column: str | None = AUTO,
        class_names: Sequence[str] | None = None,
        decoded_size: int | None = None,
        augment: str = "flip",
        shuffle_buffer: int = 1000,
        max_bad_share: float = 0.01,
        num_workers: int = 4,
    ) -> None:
        """Open the source; the first rows are read when iteration begins.

        Args:
            source, split, config, image_column, label_column, class_names: as in `ingest.pack_images`.
            revision: a commit, tag or branch of a data set on the hub.
            seed: of the order and of the augmentation, in [0, 2⁶⁴).
            global_batch: images of a step over all processes, a multiple of `lanes`.
            size: pixels a side wanted.
            rank: which process this is.
            world: number of processes.
            lanes: 1, and every process reads the whole source but decodes only its share; or a multiple of
                `world`, at most the source's number of shards, and each process reads its own shards.
            decoded_size: pixels a side of the square that is augmented; `size` when None.
            augment: a name in `augment.AUGMENTATIONS`.
            shuffle_buffer: images, not decoded, among which the next is drawn; 0 keeps the source's order. Those
                of a folder are files still closed, and the next is drawn among all of them.
            max_bad_share: largest share of images that may be unusable; the next in its lane replaces each.
            num_workers: threads that decode.

        Raises:
            ConfigError: a setting is out of range or does not fit the source.
            DataError: the source is missing or empty, or its classes are not known beforehand.
        """
        check_choice("augment", augment, AUGMENTATIONS)
        seed = check_seed(seed)
        shuffle_buffer = check_count("shuffle_buffer", shuffle_buffer, 0, 1_000_000)
        num_workers = check_count("num_workers", num_workers, 1, 256)
        sample_numbers(0, global_batch, rank, world)
        self.size = size
        self.decoded_size = size if decoded_size is None else decoded_size
        check_range("size", size, 1, self.decoded_size)
        source = expand(source) if str(source).startswith("~") else source
        if Path(source).is_dir() and any(find_idx(Path(source), name) for name in SPLITS):
            raise DataError(
                f"{source} holds IDX files, which are not streamed: pack them with `maskgit pack`."
            )
        self._source = open_source(source, split, config, image_column, label_column, revision)
        self.name, self.left_out = self._source.name, self._source.left_out
        _check_lanes(lanes, global_batch, world, self._source.num_shards)
        names = class_names or self._source.class_names
        if names is None:
            raise DataError(
                f"{self.name} does not say what its classes are called; give their names with class_names."
            )
        self.class_names = tuple(names)
        self._classes = ClassNumbers(self.class_names)
        self.seed, self.global_batch, self.rank, self.world = seed, global_batch, rank, world
        self.lanes, self.max_bad_share, self.num_workers = lanes, max_bad_share, num_workers
        # A folder is sorted by class, and a buffer smaller than a class would not mix them.
        whole = len(self._source.files) if shuffle_buffer and self._source.of_pictures else 0
        self.shuffle_buffer = max(shuffle_buffer, whole)
        self.num_bad = self.num_read = 0
        self._augment = AUGMENTATIONS[augment]

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of what `files_fingerprint` sees of the source and how it is cut, as hexadecimal digits."""
        described = [
            files_fingerprint(self._source.files),
            self._source.num_shards,
            self.lanes,
            self.decoded_size,
            list(self.class_names),
        ]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def __iter__(self) -> Iterator[ImageBatch]:
        return self.from_step(0)

    def from_step(self, step: int, *, pin: bool = False) -> Generator[ImageBatch, None, None]:
        """Give the batches of a step and on, for ever; closing the generator ends its threads.

        Args:
            step: the first.
            pin: whether they are to lie in pinned memory.

        Raises:
            DataError: the source breaks, is empty, or is bad in more than the allowed share.
        """
        # With one lane for several processes each takes its part of that lane's rows.
        own = range(1) if self.lanes == 1 else np.array_split(np.arange(self.lanes), self.world)[self.rank]
        start = step * self.global_batch // self.lanes
        closed = Event()
        lanes = [_Lane(self._lane_rows(int(lane), start, closed)) for lane in own]
        with ThreadPoolExecutor(self.num_workers) as pool:
            # One thread ahead: the lanes can only be read in order.
            make = maybe_pinned(lambda step: self._batch(step, lanes, pool), pin)
            yield from ahead(make, step, 1, closed)

    def _lane_rows(self, lane: int, start: int, closed: Event) -> Iterator[Row]:
        """Give the rows of a lane for ever, epoch after epoch, from the row numbered `start` on."""
        shards = range(lane, self._source.num_shards, self.lanes)
        shuffler = Shuffler(len(shards), self.seed, shuffle=self.shuffle_buffer > 0)
        epoch = position = 0
        while True:
            begin = position
            order = [shards[i] for i in shuffler.order(epoch)]
            words = np.random.Philox(key=np.array([self.seed, epoch], np.uint64), counter=[0, 0, 0, lane + 1])
            for row in _shuffled(self._shard_rows(order, closed), self.shuffle_buffer, words):
                if position >= start:
                    yield row
                position += 1
            length = position - begin
            if length == 0:
                raise DataError(f"{self.name} is empty, or a shard of it is: it has no images.")
            # Once an epoch's length is known, whole ones need not be read to be passed over.
            passed = max(0, start - position) // length
            position += passed * length
            epoch += 1 + passed

    def _shard_rows(self, shards: Sequence[int], closed: Event) -> Iterator[Row]:
        for shard in shards:
            for row in self._source.rows(shard):
                if closed.is_set():
                    # Nobody hears it, for who would have asked for the batch is gone.
                    raise DataError(f"{self.name} is no longer read.")
                yield row

    def _batch(self, step: int, lanes: list["_Lane"], pool: ThreadPoolExecutor) -> ImageBatch:
        share = self.global_batch // self.lanes
        places = range(share)
        if self.lanes == 1:
            part = self.global_batch // self.world
            places = range(self.rank * part, (self.rank + 1) * part)
        images, labels = [], []
        for lane in lanes:
            decoded = list(pool.map(self._decode, [lane.peek(place) for place in places]))
            for place, found in zip(places, decoded, strict=True):
                image, label = self._replace(lane, place, found)
                images.append(image)
                labels.append(label)
            lane.drop(share)
        numbers = sample_numbers(step, self.global_batch, self.rank, self.world)
        draws = uniform(self.seed, torch.from_numpy(numbers), 0, AUGMENT, NUM_DRAWS).numpy()
        return image_batch(self._augment(np.stack(images), draws, self.size), np.array(labels), numbers)

    def _decode(self, row: Row) -> tuple[np.ndarray, int] | str:
        """Return a row's pixels and class, or why there are none."""
        try:
            label = self._classes.of(row)
            assert isinstance(label, int)
            return decode_square(row.picture(), self.decoded_size)[0], label
        except (ImageError, OSError) as error:
            return row.complaint(error)

    def _replace(
        self, lane: "_Lane", place: int, found: tuple[np.ndarray, int] | str
    ) -> tuple[np.ndarray, int]:
        """Return what was found, or the next usable row of the lane, which keeps its own place too."""
        self.num_read += 1
        while isinstance(found, str):
            self.num_bad += 1
            if self.num_bad > self.max_bad_share * max(self.num_read, _FEW):
                raise DataError(
                    f"{self.num_bad:,} of the {self.num_read:,} images read from {self.name} cannot be used, "
                    f"more than the allowed share of {self.max_bad_share:g}; the last is {found}. "
                    "Mend or remove them, or allow a larger share."
                )
            place += 1
            found = self._decode(lane.peek(place))
        return found


class StreamedTokens:
    """The tokens of streamed images, encoded as they come; in use like `batches.TokenBatches`.

    Attributes:
        class_names: a name for each class.
        left_out: as of the images.
        num_images: None, for the number is not known.
        fingerprint: the sha256 of the images' and the tokenizer's fingerprints, as hexadecimal digits.
    """

    num_images: None = None

    def __init__(self, images: StreamedImages, tokenizer: Tokenizer, tokenizer_fingerprint: str) -> None:
        """Describe the batches.

        Args:
            images: what is encoded.
            tokenizer: what encodes it, in evaluation mode, on whatever device it is on by then.
            tokenizer_fingerprint: sha256 of the tokenizer's weights.
        """
        self.class_names, self.left_out = images.class_names, images.left_out
        described = json.dumps([images.fingerprint, tokenizer_fingerprint])
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()
        self._images = images
        self._tokenizer = tokenizer

    def __iter__(self) -> Iterator[TokenBatch]:
        return self.from_step(0)

    def from_step(self, step: int, *, pin: bool = False) -> Generator[TokenBatch, None, None]:
        """Give the batches of a step and on, for ever; closing the generator ends its threads.

        The tokens are on the tokenizer's device, and are those that `maskgit tokenize` would write.

        Args:
            step: the first.
            pin: whether the images, labels and numbers are to lie in pinned memory.

        Raises:
            DataError: as `StreamedImages.from_step`.
        """
        with closing(self._images.from_step(step, pin=pin)) as batches:
            for batch in batches:
                tokens = [self._encode(images) for images in batch.images.split(_ENCODED)]
                yield TokenBatch(torch.cat(tokens), batch.labels, batch.sample_numbers)

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        """Return tokens: uint8 (b, 3, S, S) → int64 (b, h, w)."""
        device = self._tokenizer.device
        return self._tokenizer.encode(upload(images, device).float() / 255)


def files_fingerprint(files: Sequence[str]) -> str:
    """Return what can be told of files without reading all of them, the same wherever their folder lies.

    Args:
        files: paths in the order in which they are read, or addresses on the hub, which name a commit.

    Returns:
        The sha256 of the files' names and sizes and of the first and last bytes of at most 1024 of them, evenly
        spread, as hexadecimal digits; of files on the hub, of their addresses.

    Raises:
        DataError: a file cannot be read.
    """
    here = [file for file in files if "://" not in file]
    home = os.path.commonpath(here) if here else ""
    sampled = {files[i] for i in np.linspace(0, len(files) - 1, min(len(files), _SAMPLED_FILES), dtype=int)}
    digest = hashlib.sha256()
    for file in files:
        described: list[str | int] = [file]
        if "://" not in file:
            try:
                described = [os.path.relpath(file, home), os.path.getsize(file)]
                described += _ends(file) if file in sampled else []
            except OSError as error:
                raise DataError(f"{file} cannot be read: {error.strerror or error}.") from error
        digest.update(json.dumps(described).encode() + b"\n")
    return digest.hexdigest()


def _ends(file: str) -> list[str]:
    """Return the first and the last bytes of a file as hexadecimal digits."""
    with open(file, "rb") as opened:
        first = opened.read(_SAMPLED_BYTES)
        opened.seek(max(0, os.path.getsize(file) - _SAMPLED_BYTES))
        return [first.hex(), opened.read(_SAMPLED_BYTES).hex()]


def _shuffled(rows: Iterator[Row], size: int, words: np.random.Philox) -> Iterator[Row]:
    """Give all rows, each drawn from among the `size` that wait; 0 keeps their order."""
    waiting: list[Row] = []
    for row in rows:
        if len(waiting) < size:
            waiting.append(row)
            continue
        if size:
            place = int(words.random_raw()) % size
            waiting[place], row = row, waiting[place]
        yield row
    while waiting:
        place = int(words.random_raw()) % len(waiting)
        waiting[place], waiting[-1] = waiting[-1], waiting[place]
        yield waiting.pop()


class _Lane:
    """Rows that can be looked at before they are taken."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self._rows = rows
        self._waiting: deque[Row] = deque()

    def peek(self, place: int) -> Row:
        """Return a row, counted from the next."""
        self._waiting.extend(islice(self._rows, max(0, place + 1 - len(self._waiting))))
        return self._waiting[place]

    def drop(self, count: int) -> None:
        """Pass over the next rows."""
        self.peek(count - 1)
        for _ in range(count):
            self._waiting.popleft()


def _check_lanes(lanes: int, global_batch: int, world: int, num_shards: int) -> None:
    lanes = check_count("lanes", lanes, 1, 65_536)
    if lanes > 1 and (lanes % world or global_batch % lanes or lanes > num_shards):
        raise ConfigError(
            f"lanes must be 1, or a multiple of the {world} processes dividing the batch of {global_batch} "
            f"and is at most the source's {num_shards} shards, but is {lanes}."
        )
