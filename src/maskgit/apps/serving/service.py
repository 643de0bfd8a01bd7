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
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from maskgit.apps.cli.flags import Marking
from maskgit.apps.serving.errors import InvalidRequestError, OverloadedError, UnavailableError
from maskgit.apps.serving.request_model import SharedModel
from maskgit.apps.serving.worker import Stats, Ticket, Worker
from maskgit.foundation.checks import Config, check_count, check_range
from maskgit.foundation.forks import resets
from maskgit.foundation.version import __version__
from maskgit.pipeline import MaskGIT

T = TypeVar("T")
MAX_QUEUE = 4096
MAX_SECONDS = 86_400
_MAX_RETRY_AFTER = 300


@dataclass(frozen=True)
class Limits(Config):
    """How much is taken at once, and how much a request may ask for.

    Attributes:
        queue_size: images that are accepted and not answered yet; a request counts as its images.
        max_batch: images made together.
        max_images: images of one request.
        max_per_client: images that one client has accepted and not answered yet; None is the whole queue.
        max_steps: steps of one image.
        max_pixels: pixels of a picture that is sent, and of all pictures in one answer.
        max_body: bytes of a request.
        body_seconds: in which a request's body must have arrived.
        timeout: seconds in which a request must be answered, unless it asks for less.
    """

    queue_size: int = 64
    max_batch: int = 16
    max_images: int = 16
    max_per_client: int | None = None
    max_steps: int = 256
    max_pixels: int = 25_000_000
    max_body: int = 32 * 2**20
    body_seconds: float = 30.0
    timeout: float = 120.0

    def validate(self) -> None:
        check_count("queue_size", self.queue_size, 1, MAX_QUEUE)
        check_count("max_batch", self.max_batch, 1, MAX_QUEUE)
        check_count("max_images", self.max_images, 1, MAX_QUEUE)
        if self.max_per_client is not None:
            check_count("max_per_client", self.max_per_client, 1, MAX_QUEUE)
        check_count("max_steps", self.max_steps, 1, 10_000)
        check_count("max_pixels", self.max_pixels, 1, 10**9)
        check_count("max_body", self.max_body, 1, 2**32)
        check_range("body_seconds", self.body_seconds, 0.01, MAX_SECONDS)
        check_range("timeout", self.timeout, 0.01, MAX_SECONDS)


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
    ) -> None:
        """Describe the service; `start` starts it.

        Args:
            model: nobody else may use it from now on.
            name: what answers call it.
            limits: None is the defaults.
            recorded: what pictures' metadata says of the model beside its name and this package's version.
            marking: what files say of where their pictures come from; None is the defaults.

        Raises:
            ConfigError: pictures cannot be signed as asked.
        """
        self.name = name
        self.recorded = {"maskgit": __version__, "model": name} | (recorded or {})
        self.limits = limits or Limits()
        self.marking = marking or Marking()
        self.marking.writing()
        self._worker = Worker(model, max_batch=self.limits.max_batch)
        self._pool: ThreadPoolExecutor | None = None
        self._changed = threading.Condition()
        self._draining = False
        self._images, self._pixels = 0, 0
        self._tickets: set[Ticket] = set()
        self._clients: Counter[str] = Counter()
        resets(self)

    def after_fork(self) -> None:
        """Forget what the parent's threads were about."""
        self._changed = threading.Condition()
        self._pool, self._tickets = None, set()
        self._images, self._pixels = 0, 0
        self._clients = Counter()

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
        return self._images

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._worker.ready.is_set() and self._worker.failure is None and not self._draining

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
        pixels: int = 0,
        timeout: float | None = None,
        client: str = "",
    ) -> Accepted[T]:
        """Accept a request.

        Args:
            work: what it asks of the model, run in a thread of its own; the images that it makes share
                batches with those of other requests.
            images: how many it makes.
            pixels: of the pictures that it holds in memory.
            timeout: seconds, at most those of the limits.
            client: who asks, by key or address.

        Returns:
            The answer to come; its exceptions are those of `work`, and `ServiceError`.

        Raises:
            InvalidRequestError: it asks for more than the whole queue.
            OverloadedError: there is no place; its retry_after says when to come again.
            UnavailableError: the service is not ready yet, or about to stop.
        """
        limits = self.limits
        most = min(limits.queue_size, limits.max_per_client or limits.queue_size)
        if images > most:
            raise InvalidRequestError(
                f"{images} images are more than the {most} that may be asked for; ask for fewer at a time."
            )
        ticket = Ticket(min(timeout or limits.timeout, limits.timeout))
        with self._changed:
            if not self.ready or self._pool is None:
                if isinstance(self._worker.failure, UnavailableError):
                    raise self._worker.failure
                state = "stopping" if self._draining else "not ready yet"
                raise UnavailableError(f"The server is {state}; send the request to another one, or later.")
            if self._images + images > limits.queue_size:
                raise OverloadedError(
                    f"{self._images} of the queue's {limits.queue_size} places are taken, and {images} more would be needed; "
                    "come again later.",
                    self.retry_after(),
                )
            # A single large picture is always taken.
            if self._pixels and self._pixels + pixels > 4 * limits.max_pixels:
                raise OverloadedError(
                    f"Pictures of {self._pixels:,} pixels are worked on, and with these there would be more than the "
                    f"{4 * limits.max_pixels:,} that are held at once; come again later.",
                    self.retry_after(),
                )
            if self._clients[client] + images > most:
                raise OverloadedError(
                    f"You have asked for {self._clients[client]} images that are not made yet, and {most} are the "
                    "limit; wait for them.",
                    self.retry_after(),
                )
            self._clients[client] += images
            self._images, self._pixels = self._images + images, self._pixels + pixels
            self._tickets.add(ticket)
            return Accepted(self._pool.submit(self._run, work, ticket, images, pixels, client), ticket)

    def retry_after(self) -> int:
        """Return in how many seconds what is accepted will be done, by the speed of late; at least 1."""
        seconds = self._images * self.stats.seconds_per_image
        return max(1, min(_MAX_RETRY_AFTER, math.ceil(seconds)))

    def drain(self) -> None:
        """Refuse new requests from now on."""
        with self._changed:
            self._draining = True

    def wait_idle(self, seconds: float | None = None) -> bool:
        """Wait until nothing is accepted that is not answered; return whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._images, seconds)

    def cancel_all(self) -> None:
        """Cancel what is accepted."""
        with self._changed:
            for ticket in self._tickets:
                ticket.cancel(
                    UnavailableError("The server was told to stop at once; send the request to another one.")
                )

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

    def _run(self, work: Callable[[MaskGIT], T], ticket: Ticket, images: int, pixels: int, client: str) -> T:
        try:
            ticket.check()
            made = work(SharedModel(self._worker, ticket))
            self._worker.answered(images)
            return made
        finally:
            # What is left of its work is dropped.
            ticket.cancel()
            with self._changed:
                self._tickets.discard(ticket)
                self._images, self._pixels = self._images - images, self._pixels - pixels
                # Those who have nothing are forgotten.
                self._clients -= Counter({client: images})
                self._changed.notify_all()
