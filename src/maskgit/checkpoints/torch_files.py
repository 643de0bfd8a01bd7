"""Checkpoints of other projects in torch's format: untrusted zip archives of pickles.

They are opened here and nowhere else, with `torch.load(weights_only=True)`, which runs no code; what comes out goes into
a safetensors folder like any other model.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgit.checkpoints.weights import WRAPPED, check_finite, check_is_no_pointer
from maskgit.errors import CheckpointError

# Under which keys training scripts keep the weights, what they sample with first.
_PLACES = ("ema", "model_ema", "model_state_dict", "state_dict", "model")


def read_torch_file(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a torch checkpoint by their names, without what compile, DDP and the like put before them.

    Args:
        path: a file written by `torch.save`, a state dict or a dict that holds one.

    Raises:
        CheckpointError: it cannot be read, asks for code to be run, or holds no tensors.
    """
    path = Path(path)
    try:
        check_is_no_pointer(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} asks for more than weights to be loaded, or is damaged; it was not run. Take the file from where "
            "its authors publish it."
        ) from error
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (EOFError, RuntimeError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a torch checkpoint: it is damaged, or a file of another kind."
        ) from error
    state = _weights(content)
    if not state:
        raise CheckpointError(
            f"{path} holds no weights: no tensors by name, nor any under {', '.join(_PLACES)}."
        )
    check_finite(state, path, "Take another checkpoint.")
    return state


def _weights(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    for place in _PLACES:
        if isinstance(content.get(place), Mapping):
            return _weights(content[place])
    return {
        ".".join(part for part in str(name).split(".") if part not in WRAPPED): value.detach()
        for name, value in content.items()
        if isinstance(value, Tensor)
    }


class Source:
    """A state dict that is taken apart name by name, so that what is missing or left over can be said."""

    def __init__(self, state: Mapping[str, Tensor], project: str) -> None:
        """Read from tensors by name; `project` names the format in errors."""
        self._left = dict(state)
        self.project = project

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape and leave it there."""
        if name not in self._left:
            raise CheckpointError(f"This is no checkpoint of {self.project}: {name} is missing.")
        return tuple(self._left[name].shape)

    def take(self, name: str) -> Tensor:
        """Return a tensor, float32 if it holds fractions, and leave it out from now on."""
        self.shape(name)
        tensor = self._left.pop(name)
        return tensor.float() if tensor.is_floating_point() else tensor

    def norm(self, name: str) -> dict[str, Tensor]:
        """Return the weight and bias of a norm or a layer with a bias."""
        return {part: self.take(f"{name}.{part}") for part in ("weight", "bias")}

    def count(self, pattern: str) -> int:
        """Return how many there are of what is numbered from 0: `pattern` holds {} where the number stands."""
        number = 0
        while any(name.startswith(pattern.format(number)) for name in self._left):
            number += 1
        return number

    def drop(self, *names: str) -> None:
        """Leave out what holds no weights."""
        for name in names:
            self._left.pop(name, None)

    def finish(self) -> None:
        """Raise a `CheckpointError` that names what was not taken."""
        if self._left:
            names = sorted(self._left)
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise CheckpointError(
                f"This is no checkpoint of {self.project}: {', '.join(names[:5])}{more} are not part of one."
            )
