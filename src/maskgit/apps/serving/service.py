"""A model as a service, without HTTP: a bounded queue, deadlines, cancellation, an orderly end.

service = Service(MaskGIT.from_pretrained(), "cifar10")
service.start()
service.wait_ready()
accepted = service.submit(lambda model: model.generate("frog", seed=1))
accepted.future.result().to_pil()[0].save("frog.png")
service.close()
"""

import math
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from maskgit.apps.cli.flags import Marking
from maskgit.apps.serving.errors import InvalidRequestError, OverloadedError, UnavailableError
from maskgit.apps.serving.options import Limits
from maskgit.apps.serving.request_model import SharedModel
from maskgit.apps.serving.worker import Stats, Ticket, Worker
from maskgit.foundation import __version__
from maskgit.foundation.forks import resets
from maskgit.pipeline import MaskGIT

T = TypeVar("T")
_MAX_RETRY_AFTER = 300


@dataclass(frozen=True)
class Accepted(Generic[T]):
    """A request that will be answered.

    Attributes:
        future: the answer.
        ticket: until when; cancel it when nobody waits any more.
    """

    future: "Future[T]"
    ticket: Ticket


class Service:
    """Answers requests with one model; every method may be called from any thread."""

    def __init__(
        self,
        model: MaskGIT,
        name: str,
        limits: Limits | None = None,
        *,
        recorded: dict[str, Any] | None = None,
        marking: Marking | None = None,
        samples: Path | None = None,
    ) -> None:
        """Describe the service; `start` starts it.

        Args:
            model: nobody else may use it from now on.
            name: what answers call it.
            limits: None is the defaults.
            recorded: what pictures' metadata says of the model beside its name and this package's version.
            marking: what files say of where their pictures come from; None is the defaults.
            samples: folder of images that come with the model, as `serving.samples` writes it; None is none.

        Raises:
            ConfigError: pictures cannot be signed as asked.
        """
        self.name = name
        # Seconds since 1970.
        # When a model was made is not recorded, and replicas must answer alike.
        self.created = 0
        self.recorded = {"maskgit": __version__, "model": name} | (recorded or {})
        self.samples = samples
        self.limits = limits or Limits()
        self.marking = marking or Marking()
        self.marking.writing()
        self._worker = Worker(model, max_batch=self.limits.max_batch)
        self._pool: ThreadPoolExecutor | None = None
        self._changed = threading.Condition()
        self._draining = False
        self._tickets: set[Ticket] = set()
        resets(self)

    def after_fork(self) -> None:
        """Forget what the parent's threads were about."""
        self._changed = threading.Condition()
        self._pool, self._tickets = None, set()

    @property
    def model(self) -> MaskGIT:
        """The model, to be asked about its config alone."""
        return self._worker.model

    @property
    def stats(self) -> Stats:
        """What has been done."""
        return self._worker.stats

    @property
    def num_accepted(self) -> int:
        """Images that are accepted and not answered yet."""
        with self._changed:
            return sum(ticket.images for ticket in self._tickets)

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._worker.ready.is_set() and self._worker.failure is None and not self._draining

    def place(self, ticket: Ticket) -> int:
        """Return a request's place among those that wait for their first step, from 1; 0 once it has begun."""
        with self._changed:
            waiting = [one for one in self._tickets if not one.made]
        waiting.sort(key=lambda one: one.number)
        return waiting.index(ticket) + 1 if ticket in waiting else 0

    def start(self) -> None:
        """Start the threads; the model is warmed up first.

        Raises:
            UnavailableError: they were started before this process was forked.
        """
        self._worker.start()
        # A request holds a thread while it waits for the batch, so that a place in the queue is a thread.
        self._pool = ThreadPoolExecutor(self.limits.queue_size, thread_name_prefix="maskgit-request")

    def wait_ready(self) -> None:
        """Wait until the model is warmed up.

        Raises:
            Exception: what went wrong instead.
        """
        self._worker.ready.wait()
        if self._worker.failure is not None:
            raise self._worker.failure

    def submit(
        self,
        work: Callable[[MaskGIT], T],
        *,
        images: int = 1,
        steps: int = 1,
        pixels: int = 0,
        timeout: float | None = None,
        client: str = "",
        low: bool = False,
    ) -> Accepted[T]:
        """Accept a request.

        Args:
            work: what it asks of the model, run in a thread of its own; the images that it makes share
                batches with those of other requests.
            images: how many it makes.
            steps: decoding steps of all its images together.
            pixels: of the images that it holds in memory.
            timeout: seconds, at most those of the limits.
            client: who asks, by key or address; clients share the batches fairly.
            low: whether all other requests go first.

        Returns:
            The answer to come; its exceptions are those of `work`, and `ServiceError`.

        Raises:
            InvalidRequestError: it asks for more than the whole queue.
            OverloadedError: the queue is full; its retry_after says when to try again.
            UnavailableError: the service is not ready yet, or is shutting down.
        """
        limits = self.limits
        most = min(limits.queue_size, limits.max_per_client or limits.queue_size)
        if images > most:
            raise InvalidRequestError(
                f"{images} images are more than the {most} that one client may have in the queue; ask for fewer at a time."
            )
        if steps > limits.queue_steps:
            raise InvalidRequestError(
                f"{images} images with {steps:,} decoding steps in total are more than the {limits.queue_steps:,} steps "
                "that the queue holds; ask for fewer images or steps."
            )
        seconds = min(timeout or limits.timeout, limits.timeout)
        ticket = Ticket(seconds, client=client, images=images, steps=steps, pixels=pixels, low=low)
        with self._changed:
            if not self.ready or self._pool is None:
                if isinstance(self._worker.failure, UnavailableError):
                    raise self._worker.failure
                state = "shutting down" if self._draining else "not ready yet"
                raise UnavailableError(f"The server is {state}; retry later.")
            why = self._why_full(ticket, self._tickets)
            if why is not None:
                raise OverloadedError(f"{why}; retry later.", self._retry_after(ticket))
            self._tickets.add(ticket)
            return Accepted(self._pool.submit(self._run, work, ticket), ticket)

    def _why_full(self, new: Ticket, accepted: Iterable[Ticket]) -> str | None:
        """Return why there is no place for a request beside those that are accepted, or None."""
        limits, accepted = self.limits, list(accepted)
        images, pixels = sum(t.images for t in accepted), sum(t.pixels for t in accepted)
        if images + new.images > limits.queue_size:
            return f"The queue is full: {images} of {limits.queue_size} images are taken, and this request needs {new.images}"
        steps = sum(t.steps_left for t in accepted)
        if steps + new.steps > limits.queue_steps:
            return (
                f"The queue is full: {steps:,} of {limits.queue_steps:,} decoding steps are taken, and this request needs "
                f"{new.steps:,}"
            )
        # A single large image is always taken.
        if pixels and pixels + new.pixels > 4 * limits.max_pixels:
            return (
                f"The queue is full: it holds images of {pixels:,} pixels, and with this request's would exceed "
                f"{4 * limits.max_pixels:,}"
            )
        own = sum(t.images for t in accepted if t.requester.client == new.requester.client)
        if limits.max_per_client is not None and own + new.images > limits.max_per_client:
            return f"You have {own} unfinished images in the queue, and the limit per client is {limits.max_per_client}"
        return None

    def _retry_after(self, new: Ticket) -> int:
        """Return in how many seconds there will be a place for a request, at the recent rate.

        Requests get equal shares, so that those with fewer steps left end first.
        """
        left = sorted(self._tickets, key=lambda ticket: ticket.steps_left)
        made = 0
        for number, ticket in enumerate(left, 1):
            made = sum(t.steps_left for t in left[:number]) + len(left[number:]) * ticket.steps_left
            if self._why_full(new, left[number:]) is None:
                break
        return max(1, min(_MAX_RETRY_AFTER, math.ceil(made * self.stats.seconds_per_step)))

    def drain(self) -> None:
        """Refuse new requests from now on."""
        with self._changed:
            self._draining = True

    def cancel_all(self) -> None:
        """Cancel what is accepted."""
        with self._changed:
            for ticket in self._tickets:
                ticket.cancel(UnavailableError("The server was told to stop at once; retry later."))

    def close(self, *, finish: bool = True) -> None:
        """End the service.

        Args:
            finish: whether to answer what was accepted; if not, it is cancelled.
        """
        self.drain()
        if not finish:
            self.cancel_all()
        if self._pool is not None:
            self._pool.shutdown()
        self._worker.close()

    def _run(self, work: Callable[[MaskGIT], T], ticket: Ticket) -> T:
        try:
            ticket.check()
            made = work(SharedModel(self._worker, ticket))
            self._worker.answered(ticket)
            return made
        finally:
            # What is left of its work is dropped.
            ticket.cancel()
            with self._changed:
                self._tickets.discard(ticket)
                self._changed.notify_all()
