"""Compiled functions that say so when they are compiled no more."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch


class Compiled:
    """A function or a network's forward, compiled by `torch.compile` as one graph.

    Dynamo compiles a function anew for other shapes, types and networks, up to a limit, beyond which it would run the
    plain function without a word. Here a warning is given first.
    """

    def __init__(self, plain: Callable[..., Any], **options: Any) -> None:
        """Describe it; nothing is compiled before the first call.

        Args:
            plain: what is compiled.
            **options: as for `torch.compile`.
        """
        self.plain = plain
        self.options = options
        self.stopped = False
        self._compiled: Callable[..., Any] = torch.compile(plain, fullgraph=True, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.stopped:
            try:
                return self._compiled(*args, **kwargs)
            except Exception as error:
                # Its module is not one that torch promises.
                if type(error).__name__ != "FailOnRecompileLimitHit":
                    raise
            self.stopped = True
            name = getattr(self.plain, "__qualname__", type(self.plain).__name__)
            warnings.warn(
                f"{name} runs uncompiled, slower, from now on: torch has compiled it for as many shapes, types and "
                "models as torch._dynamo.config.recompile_limit allows. Raise that, or use fewer batch sizes.",
                stacklevel=2,
            )
        return self.plain(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Compiled":
        return Compiled(copy.deepcopy(self.plain, memo), **self.options)


def is_compiled(network: torch.nn.Module) -> bool:
    """Return whether a network runs compiled."""
    return isinstance(network.forward, Compiled)
