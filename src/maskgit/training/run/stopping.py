"""What ends a run before its last step: a signal, or a number that is none."""

import math
import signal
import threading
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from maskgit.errors import MaskGITError
from maskgit.foundation.devices import copies_aside
from maskgit.training.distributed import Distributed

# Steps after which the host asks whether all of them were finite, where asking makes it wait.
FINITE_EVERY = 50
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


class UpdateGate:
    """Stops a run before a number that is none can spoil its weights.

    On a CPU each step is looked at before its update. Elsewhere looking would make the host wait, so the optimizers are
    told on the device to leave their weights and averages as they are, at such a step and at all after it, and the
    host looks every `FINITE_EVERY` steps and whenever `read` is called, which is before anything is kept or shown.
    """

    def __init__(
        self, device: torch.device, *optimizers: torch.optim.Optimizer, every: int | None = None
    ) -> None:
        """Watch some optimizers, which off the CPU must be fused.

        Args:
            device: where the quantities will be.
            optimizers: what is not to be spoilt.
            every: steps between two looks; None is 1 on a CPU (and on MPS, whose optimizers cannot be told), and
                `FINITE_EVERY` elsewhere.
        """
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
                raise TrainingError(
                    f"Stopped at step {step} before its update: {', '.join(bad)}. The last checkpoint is whole; "
                    "lower the learning rate or look at the data, and start the same command again."
                )
