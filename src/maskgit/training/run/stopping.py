"""What ends a run before its last step: a signal, a number that is none, divergence, or a test that gets no better."""

import math
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from maskgit.errors import MaskGITError
from maskgit.foundation.devices import copies_aside
from maskgit.training.distributed import Distributed

# Steps after which the host asks whether all of them were finite, where asking makes it wait.
FINITE_EVERY = 50
# Steps in a row beyond the limit of a loss from which on it counts as diverged.
DIVERGED_STEPS = 20
ADVICE = (
    "The last checkpoint is of before: go on from it with a lower learning rate, by the same command with "
    "`--change --set learning_rate=…`, or look at the data."
)
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later


class TrainingError(MaskGITError, RuntimeError):
    """A run cannot go on, for example because its loss is not a number."""


class StopSignal:
    """SIGTERM or SIGINT as a request to stop after the step, agreed over all processes.

    A second SIGINT stops at once.
    """

    def __init__(self, distributed: Distributed) -> None:
        self.requested = False
        self._distributed = distributed
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Python allows handlers in the main thread alone.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            # None stands for one that was not set from Python, and cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def agreed(self) -> bool:
        """Return whether any process was asked to stop; all must call it."""
        return self._distributed.any(self.requested)


class Watch:
    """What a run is judged by while it goes on: whether its loss has diverged, and whether tests get better.

    Its counts are part of the run's state, so that a resumed run stops where an uninterrupted one would.
    """

    def __init__(
        self,
        quantity: str,
        limit: float,
        beyond: str,
        *,
        max_diverged_steps: int | None,
        patience: int | None,
    ) -> None:
        """Begin to count.

        Args:
            quantity: the name of the loss that is judged.
            limit: the loss beyond which a model is worse than one that has learned nothing.
            beyond: what that means, in words, such as "guessing is 6.93".
            max_diverged_steps: steps in a row beyond the limit after which the run stops; None never.
            patience: tests in a row without a better score after which the run ends; None never.
        """
        self._quantity, self._limit, self._beyond = quantity, limit, beyond
        self._max_diverged_steps, self._patience = max_diverged_steps, patience
        self._diverged_steps, self._worse_tests = 0, 0
        self._best = -math.inf
        self._loss = math.nan

    @property
    def diverged(self) -> bool:
        """Whether the loss has been beyond its limit for so long that it is no outlier."""
        return self._diverged_steps >= DIVERGED_STEPS

    @property
    def exhausted(self) -> bool:
        """Whether the run's patience is at its end."""
        return self._patience is not None and self._worse_tests >= self._patience

    def count(self, quantities: Mapping[str, float]) -> None:
        """Count a step's loss."""
        self._loss = quantities[self._quantity]
        self._diverged_steps = self._diverged_steps + 1 if self._loss > self._limit else 0

    def count_test(self, score: float) -> None:
        """Count a test; a higher score is better."""
        better = score > self._best
        self._best = max(score, self._best)
        self._worse_tests = 0 if better else self._worse_tests + 1

    def check(self, done: int, *, last: bool, warn: Callable[[str, int, str], None]) -> None:
        """Say that the loss has diverged, and stop the run if that has lasted.

        Args:
            done: steps done.
            last: whether the run ends here, which a diverged one does with an error instead of a model.
            warn: says a sentence once by name, at a step.

        Raises:
            TrainingError: the loss has diverged for too long.
        """
        if not self.diverged:
            return
        told = f"{self._quantity} is {self._loss:.4g}, where {self._beyond}, for {self._diverged_steps} steps"
        too_long = self._max_diverged_steps is not None and self._diverged_steps >= self._max_diverged_steps
        if too_long or (last and self._max_diverged_steps is not None):
            raise TrainingError(f"Stopped after step {done}, for the loss has diverged: {told}. {ADVICE}")
        warn(
            "diverged",
            done,
            f"the loss has diverged: {told}. No checkpoint is written until it has come back.",
        )

    def state_dict(self) -> dict[str, float]:
        """Return the counts."""
        return {
            "diverged_steps": self._diverged_steps,
            "worse_tests": self._worse_tests,
            "best": self._best,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on with counts that `state_dict` returned."""
        self._diverged_steps, self._worse_tests = int(state["diverged_steps"]), int(state["worse_tests"])
        self._best = state["best"]


class UpdateGate:
    """Stops a run before a number that is none can spoil its weights.

    On a CPU each step is looked at before its update. Elsewhere looking would make the host wait, so the optimizers are
    told on the device to leave their weights and averages as they are, at such a step and at all after it, and the
    host looks every `FINITE_EVERY` steps and whenever `read` is called, which is before anything is kept or shown.
    """

    def __init__(
        self,
        device: torch.device,
        *optimizers: torch.optim.Optimizer,
        every: int | None = None,
        watch: Watch | None = None,
    ) -> None:
        """Watch some optimizers, which off the CPU must be fused.

        Args:
            device: where the quantities will be.
            optimizers: what is not to be spoilt.
            every: steps between two looks; None is 1 on a CPU (and on MPS, whose optimizers cannot be told), and
                `FINITE_EVERY` elsewhere.
            watch: counts the losses that are read.
        """
        self._watch = watch
        self._every = every or (FINITE_EVERY if copies_aside(device) else 1)
        self._unread: list[tuple[int, tuple[str, ...], Tensor]] = []
        self._closed: Tensor | None = None
        if self._every > 1:
            self._closed = torch.zeros((), device=device)
            for optimizer in optimizers:
                # As GradScaler tells them: 1 passes over a step.
                optimizer.grad_scale = None  # type: ignore[attr-defined]
                optimizer.found_inf = self._closed  # type: ignore[attr-defined]

    def check(self, step: int, quantities: Mapping[str, Tensor]) -> None:
        """Look at a step's scalars, before its update, or let the device do so.

        Args:
            step: the step at hand.
            quantities: scalars by name. Give means over all processes, so that all stop.

        Raises:
            TrainingError: one is NaN or infinite, at this step or at one since the last look.
        """
        values = torch.stack([value.detach().float() for value in quantities.values()])
        if self._closed is not None:
            torch.maximum(self._closed, (~values.isfinite()).any().float(), out=self._closed)
        self._unread.append((step, tuple(quantities), values))
        if len(self._unread) == self._every:
            self.read()

    def read(self) -> None:
        """Look at all steps since the last look.

        Raises:
            TrainingError: a quantity was NaN or infinite.
        """
        unread, self._unread = self._unread, []
        numbers = torch.cat([values for _, _, values in unread]).tolist() if unread else []
        for step, names, values in unread:
            own, numbers = numbers[: len(values)], numbers[len(values) :]
            bad = [
                f"{name} is {value}"
                for name, value in zip(names, own, strict=True)
                if not math.isfinite(value)
            ]
            if bad:
                raise TrainingError(f"Stopped at step {step} before its update: {', '.join(bad)}. {ADVICE}")
            if self._watch is not None:
                self._watch.count(dict(zip(names, own, strict=True)))
