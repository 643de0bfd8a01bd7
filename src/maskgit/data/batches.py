"""What both training loops read: batches as pure functions of (seed, step), whatever the number of processes.

Samples are numbered 0, 1, 2, … over the whole run: step t reads the numbers from t · B to (t + 1) · B − 1. A
sample's number and the seed alone decide which image it is and how that image is cropped and flipped.

Shapes: B images of a step over all processes, b those of one process, S cached and s wanted pixels a side,
h × w the token grid.
"""

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from maskgit.data.augment import AUGMENTATIONS, NUM_DRAWS
from maskgit.data.image_cache import ImageCache
from maskgit.data.token_cache import TokenCache
from maskgit.errors import ConfigError, DataError
from maskgit.foundation.checks import check_choice, check_count, check_seed
from maskgit.sampler.noise import uniform

# The streams of `noise.uniform` that training data draws from.
AUGMENT, VIEW = 64, 65

T = TypeVar("T")


class ImageBatch(NamedTuple):
    """Images as both loops read them.

    Attributes:
        images: uint8 (b, 3, s, s), RGB, contiguous.
        labels: int64 (b,).
        sample_numbers: int64 (b,), to draw a sample's other random numbers from.
    """

    images: Tensor
    labels: Tensor
    sample_numbers: Tensor


class TokenBatch(NamedTuple):
    """Tokens as the second loop reads them.

    Attributes:
        tokens: int64 (b, h, w), each in [0, num_codes).
        labels: int64 (b,).
        sample_numbers: int64 (b,), to draw a sample's other random numbers from.
    """

    tokens: Tensor
    labels: Tensor
    sample_numbers: Tensor


class Shuffler:
    """The order in which samples visit a data set: each epoch a permutation drawn from (seed, epoch)."""

    def __init__(self, length: int, seed: int, shuffle: bool = True) -> None:
        """Describe the order.

        Args:
            length: images in the data set.
            seed: in [0, 2⁶⁴).
            shuffle: False visits them in their own order.

        Raises:
            ConfigError: the seed or the length is out of range.
        """
        seed = check_seed(seed)
        length = check_count("length", length, 1, 2**62)
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        # The last two epochs: a batch, or batches that are made ahead, may lie on both sides of a border.
        self._orders: dict[int, np.ndarray] = {}

    def order(self, epoch: int) -> np.ndarray:
        """Return the images in the order of an epoch, int64 (length,), each once."""
        known = self._orders.get(epoch)
        if known is not None:
            return known
        if self.shuffle:
            # The words of a bit generator stay the same in all versions of numpy; `permutation` may change.
            words = np.random.Philox(key=np.array([self.seed, epoch], np.uint64)).random_raw(self.length)
            order = np.argsort(words, kind="stable")
        else:
            order = np.arange(self.length)
        self._orders = {**dict(list(self._orders.items())[-1:]), epoch: order}
        return order

    def indices(self, sample_numbers: np.ndarray) -> np.ndarray:
        """Return which image each sample is: int64 (n,) → int64 (n,) in [0, length)."""
        epochs, places = np.divmod(sample_numbers, self.length)
        indices = np.empty_like(sample_numbers)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self.order(int(epoch))[places[here]]
        return indices


def spread(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return images in an order of which every beginning has its share of every class.

    Args:
        labels: int (N,).
        seed: decides which images of a class come first, in [0, 2⁶⁴).

    Returns:
        int64 (N,), each image once.
    """
    order = Shuffler(len(labels), seed).order(0)
    _, classes, counts = np.unique(labels[order], return_inverse=True, return_counts=True)
    by_class = np.argsort(classes, kind="stable")
    place = np.empty(len(labels))
    # How far through its class an image lies, in (0, 1).
    starts = np.cumsum(counts) - counts
    place[by_class] = (np.arange(len(labels)) - starts[classes[by_class]] + 0.5) / counts[classes[by_class]]
    return order[np.lexsort((classes, place))]


def sample_numbers(step: int, global_batch: int, rank: int = 0, world: int = 1) -> np.ndarray:
    """Return the numbers of the samples that one process reads at a step.

    Args:
        step: counted from 0.
        global_batch: samples of a step over all processes, a multiple of `world`.
        rank: which process, in [0, world).
        world: number of processes.

    Returns:
        int64 (global_batch / world,); those of all ranks in turn are the numbers of a single process.

    Raises:
        ConfigError: the batch cannot be shared out evenly.
    """
    global_batch = check_count("global_batch", global_batch, 1, 2**30)
    rank = check_count("rank", rank, 0, world - 1)
    if global_batch % world:
        raise ConfigError(
            f"The batch size over all processes must be a multiple of their number, "
            f"but {global_batch} is not one of {world}."
        )
    share = global_batch // world
    start = step * global_batch + rank * share
    return np.arange(start, start + share, dtype=np.int64)


class _Batches(ABC, Generic[T]):
    """What the batches of both loops share; iterating gives those of step 0 and on, for ever."""

    def __init__(
        self,
        cache: ImageCache | TokenCache,
        seed: int,
        global_batch: int,
        rank: int,
        world: int,
        shuffle: bool,
        num_workers: int,
    ) -> None:
        num_workers = check_count("num_workers", num_workers, 0, 256)
        sample_numbers(0, global_batch, rank, world)
        self.global_batch, self.rank, self.world = global_batch, rank, world
        self.num_workers = num_workers
        self.shuffler = Shuffler(len(cache), seed, shuffle)
        self.fingerprint = cache.fingerprint
        self.class_names = cache.class_names
        self.num_images = len(cache)

    @abstractmethod
    def batch(self, step: int) -> T:
        """Return the batch of a step, whatever was read before."""

    def from_step(self, step: int, *, pin: bool = False) -> Generator[T, None, None]:
        """Give the batches of a step and on, for ever; closing the generator ends its threads.

        Args:
            step: the first.
            pin: whether they are to lie in pinned memory, from which a GPU copies while the host goes on.
        """
        return ahead(maybe_pinned(self.batch, pin), step, self.num_workers)

    def __iter__(self) -> Iterator[T]:
        return self.from_step(0)

    def _samples(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        numbers = sample_numbers(step, self.global_batch, self.rank, self.world)
        return numbers, self.shuffler.indices(numbers)

    def _draws(self, numbers: np.ndarray, stream: int, count: int) -> np.ndarray:
        return uniform(self.shuffler.seed, torch.from_numpy(numbers), 0, stream, count).numpy()


class ImageBatches(_Batches[ImageBatch]):
    """The batches of a run that trains on images; iterating gives those of step 0 and on, for ever."""

    def __init__(
        self,
        cache: ImageCache,
        *,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        size: int | None = None,
        augment: str = "flip",
        shuffle: bool = True,
        num_workers: int = 0,
    ) -> None:
        """Describe the batches.

        Args:
            cache: the images.
            seed: of the order and of the augmentation, in [0, 2⁶⁴).
            global_batch: images of a step over all processes.
            rank: which process this is.
            world: number of processes.
            size: pixels a side wanted, at most the cache's; the cache's when None.
            augment: a name in `augment.AUGMENTATIONS`.
            shuffle: False visits the images in their own order.
            num_workers: threads that make batches ahead; the batches are the same with any number.

        Raises:
            ConfigError: a setting is out of range or does not fit the cache.
        """
        check_choice("augment", augment, AUGMENTATIONS)
        self.size = cache.size if size is None else size
        if not 1 <= self.size <= cache.size:
            raise ConfigError(
                f"The image size is {self.size}, but the cached images have {cache.size} pixels a side: "
                f"choose at most {cache.size}, or pack the images again at {self.size} or more."
            )
        super().__init__(cache, seed, global_batch, rank, world, shuffle, num_workers)
        self.cache = cache
        self._augment = AUGMENTATIONS[augment]

    def batch(self, step: int) -> ImageBatch:
        """Return the batch of a step, whatever was read before."""
        numbers, indices = self._samples(step)
        images = self._augment(
            _take(self.cache.images, indices), self._draws(numbers, AUGMENT, NUM_DRAWS), self.size
        )
        return image_batch(images, self.cache.labels[indices], numbers)


class TokenBatches(_Batches[TokenBatch]):
    """The batches of a run that trains on tokens; iterating gives those of step 0 and on, for ever."""

    def __init__(
        self,
        cache: TokenCache,
        *,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        random_view: bool = True,
        shuffle: bool = True,
        num_workers: int = 0,
    ) -> None:
        """Describe the batches.

        Args:
            cache: the tokens.
            seed: of the order and of the choice of views, in [0, 2⁶⁴).
            global_batch: images of a step over all processes.
            rank: which process this is.
            world: number of processes.
            random_view: draw one of each image's views; False reads the first.
            shuffle: False visits the images in their own order.
            num_workers: threads that make batches ahead; the batches are the same with any number.

        Raises:
            ConfigError: a setting is out of range.
        """
        super().__init__(cache, seed, global_batch, rank, world, shuffle, num_workers)
        self.cache = cache
        self.random_view = random_view

    def batch(self, step: int) -> TokenBatch:
        """Return the batch of a step, whatever was read before."""
        numbers, indices = self._samples(step)
        views = np.zeros(len(numbers), np.int64)
        if self.random_view:
            draws = self._draws(numbers, VIEW, 1)[:, 0]
            # In float64: in float32 the product could round up to the number of views.
            views = (draws.astype(np.float64) * self.cache.num_views).astype(np.int64)
        return TokenBatch(
            torch.from_numpy(self.cache.take(indices, views).astype(np.int64)),
            torch.from_numpy(self.cache.labels[indices].astype(np.int64)),
            torch.from_numpy(numbers),
        )


def image_batch(images: np.ndarray, labels: np.ndarray, numbers: np.ndarray) -> ImageBatch:
    """Return a batch as tensors: images uint8 (b, s, s, 3), labels int (b,), sample numbers int64 (b,)."""
    return ImageBatch(
        torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))),
        torch.from_numpy(labels.astype(np.int64)),
        torch.from_numpy(numbers),
    )


def _take(array: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return rows of a memory-mapped array, read in the order in which they lie on the disk."""
    order = np.argsort(indices)
    rows = np.empty((len(indices), *array.shape[1:]), array.dtype)
    rows[order] = array[indices[order]]
    return rows


def maybe_pinned(make: Callable[[int], T], pin: bool) -> Callable[[int], T]:
    """Return what makes the same batches in pinned memory, if asked to: in the thread that makes them."""
    if not pin:
        return make

    def pinned(step: int) -> T:
        batch: Any = make(step)
        return type(batch)(*(tensor.pin_memory() for tensor in batch))

    return pinned


def ahead(
    make: Callable[[int], T], start: int, num_workers: int, closed: Event | None = None
) -> Generator[T, None, None]:
    """Give make(start), make(start + 1), … for ever, made ahead by threads if there are any.

    `closed` is set when no more is wanted, before the threads are waited for.

    Raises:
        DataError: this process was forked since the threads were started.
    """
    step, process = start, os.getpid()
    if num_workers == 0:
        while True:
            yield make(step)
            step += 1
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="batches")
    try:
        made: deque[Future[T]] = deque()
        while True:
            while len(made) <= num_workers:
                made.append(pool.submit(make, step))
                step += 1
            yield made.popleft().result()
            if os.getpid() != process:
                raise DataError(
                    "These batches were begun before this process was forked, and the threads that make them stayed "
                    "behind; begin them anew."
                )
    finally:
        if closed is not None:
            closed.set()
        pool.shutdown(cancel_futures=True)
