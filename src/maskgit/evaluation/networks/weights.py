"""Reading the published weights of frozen networks, safely and strictly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from maskgit.checkpoints.weights import check_finite, check_is_no_pointer
from maskgit.errors import CheckpointError
from maskgit.foundation.files import expand

# The largest weights file that is read: DINOv2's ViT-L/14, the biggest of those named here, has 1.2 GB.
MAX_WEIGHTS_BYTES = 2**31


def local_file(place: str | Path) -> Path:
    """Return the path of a weights file that is named by a path or an https URL, fetching it the first time.

    Raises:
        DownloadError: the URL cannot be reached, or its content has changed.
    """
    if not str(place).startswith(("https://", "http://")):
        return expand(place)
    # Imported here because networks read from local files need no network.
    from maskgit.foundation.download import fetch

    return fetch(str(place))


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file, without unpickling anything else.

    Args:
        path: a `.safetensors` file, or a PyTorch file that holds a flat dictionary of names and tensors; at
            most 2 GiB.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        CheckpointError: there is no such file, it is too large, or it holds anything else.
    """
    path = expand(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file: check the path.")
    if path.stat().st_size > MAX_WEIGHTS_BYTES:
        raise CheckpointError(f"{path} has more than {MAX_WEIGHTS_BYTES} bytes: is it the right file?")
    try:
        check_is_no_pointer(path)
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}. Check its permissions."
        ) from error
    # The unpickler of a damaged file raises whatever it trips over, from KeyError to AssertionError.
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a weights file of its kind, or is damaged: fetch it again."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} does not hold a flat dictionary of tensors: is it the right file?")
    return {str(name): value for name, value in state.items()}


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], path: Path, unused: tuple[str, ...] = ()
) -> None:
    """Copy weights into a module, each of its tensors once and none left over.

    Args:
        module: what receives them.
        state: tensors by name; BatchNorm's counters, which old files lack, are not asked for.
        path: the file they are from, for messages.
        unused: beginnings of names that belong to the file but not to the module.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape, or holds NaN or infinity.
    """
    counter = "num_batches_tracked"
    own = module.state_dict()
    given = {k: v for k, v in state.items() if not k.startswith(unused) and not k.endswith(counter)}
    for name, tensor in own.items():
        if name.endswith(counter):
            given[name] = tensor
        elif name not in given:
            raise CheckpointError(f"{path} lacks the tensor {name!r}: is it the right file?")
        elif given[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: {name!r} has the shape {tuple(given[name].shape)}, not {tuple(tensor.shape)}: "
                "is it the right file?"
            )
    for name in given:
        if name not in own:
            raise CheckpointError(
                f"{path} holds a tensor {name!r} that is not of this network: is it the right file?"
            )
    check_finite(given, path, "The file is broken; fetch it again.")
    module.load_state_dict(given)
