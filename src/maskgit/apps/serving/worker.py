"""The thread that owns a model: it makes the images of all requests in shared batches.

Shapes: as in `maskgit.engine.batching`.
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from maskgit.apps.serving.errors import (
    ClientGoneError,
    DeadlineError,
    FailedError,
    ServiceError,
    UnavailableError,
)
from maskgit.engine.batch_sizes import equal_sizes, ran_out_of_memory
from maskgit.engine.batching import Batcher, Job, News
from maskgit.engine.graphs import fixed_sizes
from maskgit.engine.turns import Requester
from maskgit.foundation.forks import resets
from maskgit.pipeline import MaskGIT

T = TypeVar("T")
log = logging.getLogger(__name__)

# The past counts this much less with each step, when the speed is estimated.
_FADING = 0.99
# Steps that tell the speed.
_TELLING = 4
_NUMBERS = itertools.count()


class Ticket:
    """A request's right to be worked for: it ends at its deadline, or when it is cancelled."""

    def __init__(
        self,
        seconds: float,
        *,
        client: str = "",
        images: int = 1,
        steps: int = 1,
        pixels: int = 0,
        low: bool = False,
    ) -> None:
        """Issue a ticket.

        Args:
            seconds: to the deadline.
            client: who asks, by key or address.
            images, steps, pixels: images to make, decoding steps of all of them, and pixels held in memory.
            low: whether other requests go first.
        """
        self.seconds = seconds
        self.images, self.steps, self.pixels = images, steps, pixels
        self.made = 0
        # Seconds that the model's thread gave to its calls.
        self.called = 0.0
        # In the order of their issue.
        self.number = next(_NUMBERS)
        self.requester = Requester(client, self.number, low)
        self.deadline = time.monotonic() + seconds
        self._cancelled: ServiceError | None = None

    def cancel(self, fault: ServiceError | None = None) -> None:
        """End it, because of a fault if it is not that the client left."""
        self._cancelled = self._cancelled or fault or ClientGoneError("The request was cancelled.")

    @property
    def steps_left(self) -> int:
        """Steps that are still to be made; what takes none, or more than was expected, counts as one."""
        return max(1, self.steps - self.made)

    def left(self) -> float:
        """Return the seconds to the deadline, at least 0."""
        return max(0.0, self.deadline - time.monotonic())

    def late(self) -> DeadlineError:
        """Return the fault of a request that was not done in time."""
        return DeadlineError(
            f"The request was not finished within {self.seconds:g} seconds; ask for less, or allow more time."
        )

    def fault(self) -> ServiceError | None:
        """Return why it has ended, or None."""
        if not self.left():
            return self.late()
        return self._cancelled

    def check(self) -> None:
        """Raise the fault if it has ended."""
        fault = self.fault()
        if fault is not None:
            raise fault


@dataclass
class Stats:
    """What a worker has done.

    Attributes:
        images, steps, failures: jobs that are finished, steps of the batch, jobs that failed; a job is an image, or a
            window of a larger one.
        rows: images that are being decoded.
        waiting: images that have not begun.
        halvings: how often memory ran out.
        seconds_per_step: recent time of the thread for a step of one image.
    """

    images: int = 0
    steps: int = 0
    failures: int = 0
    rows: int = 0
    waiting: int = 0
    halvings: int = 0
    seconds_per_step: float = 0.1


@dataclass(eq=False)
class _Filling:
    """Jobs of one request, and where their news goes."""

    jobs: list[Job]
    ticket: Ticket
    news: "SimpleQueue[News | ServiceError]" = field(default_factory=SimpleQueue)


class _Call(NamedTuple):
    """A function to be run in the model's thread for a request."""

    function: Callable[[], Any]
    ticket: Ticket
    done: "Future[Any]"

    def answer(self) -> None:
        """Run it if its ticket is good, and hand its result or its error over."""
        fault = self.ticket.fault()
        if fault is not None:
            self.done.set_exception(fault)
            return
        started = time.perf_counter()
        try:
            result = self.function()
        # It belongs to the thread that called.
        except Exception as error:
            if ran_out_of_memory(error):
                error = FailedError("The server has too little memory for this request; ask for less.")
            self.done.set_exception(error)
            return
        self.ticket.called += time.perf_counter() - started
        self.done.set_result(result)


class Worker:
    """Runs one model in one thread; `fill` and `call` may be used from any other."""

    def __init__(self, model: MaskGIT, *, max_batch: int) -> None:
        """Describe the worker; `start` starts it.

        Args:
            model: nobody else may use it from now on.
            max_batch: images in the batch.
        """
        self.model = model
        self.stats = Stats()
        self.batcher = Batcher(model, max_batch=max_batch)
        self.ready = threading.Event()
        self.failure: Exception | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._calls: deque[_Call] = deque()
        self._fillings: deque[_Filling] = deque()
        self._owners: dict[Job, _Filling] = {}
        self._busy, self._made = 0.0, 0.0
        self._thread = threading.Thread(target=self._run, name="maskgit-model", daemon=True)
        resets(self)

    def start(self) -> None:
        """Start the thread, which warms the model up first.

        Raises:
            UnavailableError: it was started before this process was forked.
        """
        if isinstance(self.failure, UnavailableError):
            raise self.failure
        self._thread.start()

    def after_fork(self) -> None:
        """Say to all who come that the thread stayed behind, if it was started."""
        self._changed = threading.Condition()
        if self._thread.ident is not None:
            self.ready = threading.Event()
            self.ready.set()
            self.failure = UnavailableError(
                "The service was started before this process was forked, and its thread stayed behind; start it in "
                "each process (with gunicorn, without --preload)."
            )

    def close(self) -> None:
        """Finish what there is to do and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def call(self, function: Callable[[], T], ticket: Ticket) -> T:
        """Run a function in the model's thread between two steps, and return what it returns.

        Raises:
            ServiceError: the ticket ended before.
        """
        done: Future[T] = Future()
        with self._changed:
            self._check_open()
            self._calls.append(_Call(function, ticket, done))
            self._changed.notify()
        return done.result()

    def run(self, network: Callable[[Tensor], Tensor], tensor: Tensor, ticket: Ticket) -> Tensor:
        """Return what a network of the model makes of a tensor, from the CPU to the CPU; see `call`."""
        device = self.model.device
        return self.call(lambda: network(tensor.to(device)).cpu(), ticket)

    def fill(self, jobs: list[Job], ticket: Ticket, told: Callable[[News], None] | None = None) -> list[News]:
        """Have jobs done, and return their results in their order.

        Args:
            jobs: at least one.
            ticket: if it ends, the jobs are dropped at the next step.
            told: called in this thread with all news.

        Raises:
            ServiceError: the ticket ended, or a job failed.
        """
        filling = _Filling(jobs, ticket)
        with self._changed:
            self._check_open()
            self._fillings.append(filling)
            self._changed.notify()
        results: dict[Job, News] = {}
        while len(results) < len(jobs):
            news = filling.news.get()
            if isinstance(news, ServiceError):
                raise news
            if news.error is not None:
                raise FailedError(
                    "The model failed on this request; the server's log says why."
                ) from news.error
            if told is not None:
                told(news)
            if news.last:
                results[news.job] = news
        return [results[job] for job in jobs]

    def answered(self, ticket: Ticket) -> None:
        """Hear whose answer is ready, to estimate the speed: a request without steps counts as one."""
        if not ticket.made:
            self._count(1)

    def _count(self, steps: int) -> None:
        with self._changed:
            self._made += steps
            # Few steps say little.
            if self._made >= _TELLING:
                self.stats.seconds_per_step = self._busy / self._made

    def _check_open(self) -> None:
        if isinstance(self.failure, UnavailableError):
            raise self.failure
        if self._closing or self.failure is not None:
            raise UnavailableError("The server is shutting down; retry later.")

    def _run(self) -> None:
        try:
            self._warm_up()
        # Whoever waits for readiness is told.
        except Exception as error:
            if ran_out_of_memory(error):
                error = FailedError(
                    f"Out of memory with batches of {self.batcher.max_batch}; choose a smaller --max-batch."
                )
            self.failure = error
            self.ready.set()
            return
        self.ready.set()
        while self._wait():
            try:
                self._turn()
            # The batcher has its own answer to whatever fails in the networks: this is a mistake of ours.
            except Exception:
                log.exception("A step failed; its requests are abandoned.")
                self._give_up(FailedError("The server failed on this request; its log says why."))

    def _wait(self) -> bool:
        """Wait for work; return whether there is any, False at the end."""
        with self._changed:
            while not (self._calls or self._fillings or self._owners or self._closing):
                self._changed.wait()
            return bool(self._calls or self._fillings or self._owners)

    def _warm_up(self) -> None:
        """Run everything once, so that the first request does not pay for it, and find out what is broken."""
        model, engine = self.model, self.model.engine
        counts: tuple[int, ...] = (1,)
        if engine is not None and (engine.compile or engine.graphs):
            # In few rows a GPU rounds otherwise than in many, but one image is not to pay for the whole batch. Each
            # size is compiled or captured for itself.
            counts = self.batcher.sizes = fixed_sizes(self.batcher.max_batch)
        else:
            self.batcher.sizes = equal_sizes(model, self.batcher.max_batch)
        label = -1 if model.config.label_dropout else 0
        sequence = model.vocabulary.sequence(torch.tensor([label]))[0]
        own = model.config.sampler
        # The largest first: what is too large is known at once, and the others fit into its memory.
        for count in reversed(counts):
            for config in (own, replace(own, guidance_scale=1.0)):
                started = time.perf_counter()
                for index in range(count):
                    self.batcher.add(Job(sequence, config, index=index))
                steps = self._finish_warm_up()
                # The first round pays for what is compiled, and what follows for one image alone.
                if count == counts[-1]:
                    self.stats.seconds_per_step = (time.perf_counter() - started) / max(1, steps)
        model.encode_pixels(torch.zeros(1, 3, model.config.image_size, model.config.image_size))

    def _finish_warm_up(self) -> int:
        """Return how many steps of images were made."""
        steps = 0
        while len(self.batcher):
            brought = self.batcher.step()
            steps += len(self.batcher.stepped)
            for news in brought:
                if news.error is not None:
                    raise news.error
                if news.pixels is not None and not news.pixels.isfinite().all():
                    raise FailedError(
                        "The model computes NaN: its weights are damaged, or the precision does not suit it."
                    )
        return steps

    def _turn(self) -> None:
        """Run what was called for, and make a step."""
        started = time.perf_counter()
        with self._changed:
            calls = self._take_calls()
            fillings, self._fillings = self._fillings, deque()
        for call in calls:
            call.answer()
        self._count_halvings()
        for filling in fillings:
            for job in filling.jobs:
                self._owners[job] = filling
                self.batcher.add(job, filling.ticket.requester)
        for filling in set(self._owners.values()):
            fault = filling.ticket.fault()
            if fault is not None:
                self._drop(filling, fault)
        if len(self.batcher):
            self._step()
        with self._changed:
            self._busy = _FADING * self._busy + time.perf_counter() - started
            self._made *= _FADING
        self.stats.rows, self.stats.waiting = self.batcher.num_rows, self.batcher.num_waiting

    def _take_calls(self) -> list[_Call]:
        """Take a call of each client: those of one wait for one another, not for those of all."""
        taken: dict[Hashable, _Call] = {}
        for call in self._calls:
            taken.setdefault(call.ticket.requester.client, call)
        self._calls = deque(call for call in self._calls if taken[call.ticket.requester.client] is not call)
        return list(taken.values())

    def _step(self) -> None:
        all_news = self.batcher.step()
        stats = self.stats
        for job in self.batcher.stepped:
            self._owners[job].ticket.made += 1
        self._count(len(self.batcher.stepped))
        finished = sum(news.last and news.error is None for news in all_news)
        stats.images, stats.steps = stats.images + finished, stats.steps + 1
        self._count_halvings()
        # Told last: whoever has an image finds it counted.
        for news in all_news:
            owner = self._owners[news.job]
            if news.last:
                del self._owners[news.job]
            if news.error is not None:
                stats.failures += 1
                log.error("An image failed.", exc_info=news.error)
            owner.news.put(news)

    def _count_halvings(self) -> None:
        if self.batcher.halvings > self.stats.halvings:
            self.stats.halvings = self.batcher.halvings
            log.warning(
                "Out of memory: from now on, batches have at most %d rows, and %d images are decoded at once.",
                self.batcher.sizes[-1],
                self.batcher.decode_size,
            )

    def _drop(self, filling: _Filling, fault: ServiceError) -> None:
        for job in filling.jobs:
            if self._owners.pop(job, None) is not None:
                self.batcher.drop(job)
        filling.news.put(fault)

    def _give_up(self, fault: ServiceError) -> None:
        for filling in set(self._owners.values()):
            self._drop(filling, fault)
