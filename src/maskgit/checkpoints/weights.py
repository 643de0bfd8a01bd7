"""The tensors of a network for saving and loading: under their own names, complete and finite."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from maskgit.errors import CheckpointError, ConfigError
from maskgit.foundation.devices import shapes_only

Module = TypeVar("Module", bound=nn.Module)

# The name of the child in wrappers of a network: torch.compile, DataParallel and DDP, FSDP, activation checkpointing.
WRAPPED = frozenset(("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the network inside DataParallel or similar wrappers, which hide its methods.

    The result of `torch.compile` forwards everything to the network and is returned as it is.
    """
    inner, passes_on = module, True
    while True:
        name = next((name for name, _ in inner.named_children() if name in WRAPPED), None)
        if name is None:
            return module if passes_on else inner
        passes_on = passes_on and name == "_orig_mod"
        inner = inner.get_submodule(name)


def own_state(kind: Callable[[Any], nn.Module], config: Any, module: nn.Module) -> dict[str, Tensor]:
    """Return a network's tensors by the names in a new network of its config, whatever wraps it or its parts.

    Raises:
        ConfigError: its tensors differ from those of such a network, so that they could not be loaded again.
    """
    with shapes_only():
        expected = shapes(kind(config).state_dict())
    state = {
        ".".join(part for part in name.split(".") if part not in WRAPPED): tensor.detach()
        for name, tensor in module.state_dict().items()
    }
    problems = differences(expected, shapes(state))
    if problems:
        raise ConfigError(
            f"The {kind.__name__.lower()} no longer matches its config: {listed(problems)}. Save the network that it was "
            "made from."
        )
    return state


def loaded(kind: Callable[[Any], Module], config: Any, state: Mapping[str, Tensor]) -> Module:
    """Return the network of a config with the given weights, without drawing random ones first.

    Raises:
        CheckpointError: a tensor is missing, unknown or misshapen.
    """
    with torch.device("meta"):
        module = kind(config)
    counts = {  # BatchNorm's, which Flax does not have
        name: torch.zeros_like(buffer, device="cpu")
        for name, buffer in module.named_buffers()
        if name.endswith("num_batches_tracked")
    }
    problems = differences(shapes(module.state_dict()), shapes({**counts, **state}))
    if problems:
        raise CheckpointError(f"The weights are not those of their config: {listed(problems)}.")
    module.load_state_dict({**counts, **state}, strict=True, assign=True)
    return module.eval()


def plain_network(kind: Callable[[Any], Module], config: Any, module: nn.Module) -> Module:
    """Return a network without wrappers: itself, or a new one that shares its tensors.

    Raises:
        ConfigError: it is wrapped, and its tensors do not match its config.
    """
    if not any(WRAPPED.intersection(name.split(".")) for name, _ in module.named_modules()):
        return cast(Module, module)
    state = own_state(kind, config, module)
    with shapes_only():
        fresh = kind(config)
    fresh.load_state_dict(state, strict=True, assign=True)
    return fresh.train(module.training)


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return a description of each tensor that is missing, unknown or misshapen, sorted by name."""
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is unknown" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has the shape {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return sorted(problems)


def listed(problems: list[str]) -> str:
    """Return the first five problems in one line."""
    return "; ".join(problems[:5]) + (f", and {len(problems) - 5} more" if len(problems) > 5 else "")


def check_finite(state: Mapping[str, Tensor], place: object, advice: str) -> None:
    """Refuse weights that contain NaN or infinity.

    Args:
        state: tensors by name.
        place: where they are from, for the message.
        advice: what to do, a sentence.

    Raises:
        CheckpointError: one is broken; the first is named.
    """
    tensors = {
        name: tensor for name, tensor in state.items() if tensor.is_floating_point() and tensor.numel()
    }
    if not tensors:
        return
    # A sum runs at memory speed, and on a GPU all sums are waited for at once. Only tensors whose sum is not finite,
    # which may be mere overflow, are checked element by element.
    sums = torch.stack([tensor.detach().sum(dtype=torch.float32) for tensor in tensors.values()])
    for name in _names(tensors, sums.isfinite().logical_not().tolist()):
        if not bool(tensors[name].isfinite().all()):
            kind = "NaN" if bool(tensors[name].isnan().any()) else "infinity"
            raise CheckpointError(f"{place}: {name} holds {kind}. {advice}")


def _names(tensors: Mapping[str, Tensor], chosen: Iterable[bool]) -> list[str]:
    return [name for name, is_chosen in zip(tensors, chosen, strict=True) if is_chosen]


def check_is_no_pointer(path: Path) -> None:
    """Refuse a Git LFS pointer, left where a file was not downloaded.

    Raises:
        CheckpointError: it is a pointer.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights themselves. Run `git lfs pull` in its folder, or "
            "download the file again."
        )


def weights_fingerprint(module: nn.Module) -> str:
    """Return the sha256 of a network's weights with their names, types and shapes, as hexadecimal digits.

    A token cache holds that of the tokenizer that made it, in float32.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Give a safetensors file for reading.

    Raises:
        CheckpointError: it is none, or cannot be read; also if that shows inside the block.
    """
    with blaming_file(path):
        check_is_no_pointer(path)
        # Read on the CPU, because safetensors supports only some devices.
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file


@contextmanager
def blaming_file(path: Path) -> Iterator[None]:
    """Turn errors of reading inside the block into a `CheckpointError` that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}.") from error


def write(path: Path, state: dict[str, Tensor]) -> None:
    """Write tensors on the CPU as a safetensors file.

    Raises:
        OSError: it cannot be written.
    """
    # safetensors would make it readable by its owner alone; a file that is there keeps its mode.
    path.touch()
    mode = path.stat().st_mode & 0o777
    try:
        save_file(state, path, metadata={"format": "pt"})
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(str(error)) from error
    path.chmod(mode)
