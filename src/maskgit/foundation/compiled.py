"""Compiled functions that warn when they stop being compiled."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch

LIMIT = (
    "torch has compiled it for as many shapes, types and models as torch._dynamo.config.recompile_limit allows. "
    "Raise that, or use fewer batch sizes."
)


class Compiled:
    """A function or a network's forward, compiled by `torch.compile` as one graph.

    Dynamo recompiles a function for other shapes, dtypes and networks up to a limit, beyond which it silently runs the
    plain function. This class warns about that, and about functions that cannot be compiled.
    """

    def __init__(self, plain: Callable[..., Any], **options: Any) -> None:
        """Wrap a function; nothing is compiled before the first call.

        Args:
            plain: the function.
            **options: as for `torch.compile`.
        """
        self.plain = plain
        self.options = options
        self.stopped = False
        self._compiled: Callable[..., Any] = torch.compile(plain, fullgraph=True, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.stopped:
            return self.plain(*args, **kwargs)
        try:
            return self._compiled(*args, **kwargs)
        except Exception as error:
            # torch promises none of these names.
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            full = type(error).__name__ == "FailOnRecompileLimitHit"
            reason = LIMIT if full else " ".join(str(error).split())[:200]
        # If its arguments are wrong, this raises the error.
        made = self.plain(*args, **kwargs)
        self.stopped = True
        name = getattr(self.plain, "__qualname__", type(self.plain).__name__)
        warnings.warn(f"{name} runs uncompiled, slower, from now on: {reason}", stacklevel=2)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> "Compiled":
        return Compiled(copy.deepcopy(self.plain, memo), **self.options)


def is_compiled(network: torch.nn.Module) -> bool:
    """Return whether a network runs compiled."""
    return isinstance(network.forward, Compiled)
