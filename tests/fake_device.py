"""A device that computes on the CPU under another name, so that the rules of devices hold on a machine without one.

    fake_device.register("cuda")           # once in a process, for good
    model.to("gpu"); model.generate(...)   # real numbers, on torch.device("gpu", 0)
    with fake_device.counting() as waits:  # what made the host wait, and which line of the package it was
        ...

What it enforces: tensors of two devices do not meet (but for numbers on the CPU, where kernels take such), `numpy()`
raises, a device like MPS has no float64, and what is copied to the host without waiting is not there before somebody
waits. What it counts is what the host would wait for: numbers that are read, copies in either direction.

Registering concerns all of torch (`torch.accelerator` finds a device from then on), and cannot be undone. So tests that
use it run in processes of their own; see `test_on_device.py`.
"""

import collections
import contextlib
import dataclasses
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import backend_registration

NAME = "gpu"
KINDS = ("cuda", "mps")
PACKAGE = "/maskgit/"

# The kinds of events. Copies that are not among those that wait are free for the host.
READ = "read"
TO, FROM = "copy to device", "copy from device"
TO_FREE, FROM_FREE = "copy to device, without waiting", "copy from device, without waiting"


class Counts:
    """What happened while counting: events by kind, and by kind and line of the package."""

    def __init__(self) -> None:
        self.events: collections.Counter[str] = collections.Counter()
        self.lines: collections.Counter[str] = collections.Counter()

    def __getitem__(self, kind: str) -> int:
        return self.events[kind]

    @property
    def waits(self) -> int:
        """How often the host waited for the device, or for a copy."""
        return self.events[READ] + self.events[TO] + self.events[FROM]

    def __repr__(self) -> str:
        return "\n".join(f"{count:4} × {line}" for line, count in sorted(self.lines.items())) or "nothing"


@dataclasses.dataclass
class _State:
    kind: str = ""
    current: int = 0
    counts: list[Counts] = dataclasses.field(default_factory=list)
    # Copies that are under way: where to, and what will be there.
    landing: list[tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=list)
    pinned: dict[int, weakref.ref] = dataclasses.field(default_factory=dict)
    lock: Any = dataclasses.field(default_factory=threading.RLock)


_state = _State()
_libraries: list[torch.library.Library] = []


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Count what happens inside a `with` block, in whatever thread."""
    counts = Counts()
    _state.counts.append(counts)
    try:
        yield counts
    finally:
        _state.counts.remove(counts)


def _note(kind: str) -> None:
    if not _state.counts:
        return
    line, frame = "elsewhere", sys._getframe(1)
    while frame is not None:
        if PACKAGE in frame.f_code.co_filename:
            line = f"{frame.f_code.co_filename.split(PACKAGE)[-1]}:{frame.f_lineno}"
            break
        frame = frame.f_back  # type: ignore[assignment]
    for counts in _state.counts:
        counts.events[kind] += 1
        counts.lines[f"{kind}, {line}"] += 1


def _land() -> None:
    """Let copies that are under way arrive: somebody waits."""
    with _state.lock:
        landing, _state.landing = _state.landing, []
    for target, source in landing:
        target.copy_(source)


class OnDevice(torch.Tensor):
    """A tensor that says it lies on the device; `inner` is where its numbers are."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> "OnDevice":
        if _state.kind == "mps" and inner.dtype in (torch.float64, torch.complex128):
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner = inner
        return made

    def tolist(self) -> Any:
        _note(READ)
        _land()
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.inner!r}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if _is_composite(func):
            # Those of inference mode's tensors come whole, and would hide the copies that are in them.
            made = func.decompose(*args, **(kwargs or {}))
            if made is not NotImplemented:
                return made
        return _run(func, args, kwargs or {})


class Event:
    """`torch.cuda.Event` in what the package asks of it."""

    def record(self, stream: object = None) -> None: ...

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        _land()


class Stream:
    """`torch.cuda.Stream` likewise; there is no other order than that of the calls."""

    def synchronize(self) -> None:
        _land()

    def wait_stream(self, other: object) -> None: ...


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of a device beside its kernels, as the module `torch.gpu`."""

    Event, Stream = Event, Stream

    def device_count(self) -> int:
        return 2 if _state.kind == "cuda" else 1

    def current_device(self) -> int:
        return _state.current

    def set_device(self, device: Any) -> None:
        _state.current = torch.device(device).index or 0

    def current_stream(self, device: object = None) -> Stream:
        return Stream()

    def stream(self, stream: Stream) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def synchronize(self, device: object = None) -> None:
        _land()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None: ...


def is_registered() -> bool:
    """Return whether this process has the device."""
    return bool(_state.kind)


def register(kind: str) -> None:
    """Give torch the device `gpu`, like CUDA (two of them) or like MPS (one, without float64).

    Args:
        kind: one of `KINDS`.
    """
    assert kind in KINDS
    assert not _state.kind, "a process has one such device, of one kind"
    _state.kind = kind
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    # A tensor's `data` cannot be exchanged for another's: a module that moves gets new parameters.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
    fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    # `torch.tensor` calls these where neither fallbacks nor subclasses are looked at.
    aten.impl("_to_copy", _kernel("_to_copy"), "PrivateUse1")
    aten.impl("lift_fresh", lambda tensor: tensor, "PrivateUse1")
    aten.impl("_pin_memory", _pin_memory, "CPU")
    aten.impl("is_pinned", lambda tensor, device=None: _is_pinned(tensor), "CPU")
    for name in _RESIZING:
        aten.impl(name, _kernel(name), "PrivateUse1")
    for names, precision in ((_LOWER_PRECISION, None), (_FULL_PRECISION, torch.float32)):
        for name in names:
            aten.impl(name, _autocast(_overload(name), precision), "AutocastPrivateUse1")
    # They are withdrawn when they are forgotten.
    _libraries.extend((fallback, aten))


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _kernel(name: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: _run(_overload(name), args, kwargs)


# Torch makes an empty tensor for them and resizes it, which one of ours cannot be.
_RESIZING = ("arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m", "randperm")

# What autocast computes in its type, and what in float32, of the lists for CUDA.
_LOWER_PRECISION = (
    "conv2d", "conv_transpose2d.input", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm",
    "scaled_dot_product_attention",
)  # fmt: skip
_FULL_PRECISION = (
    "layer_norm", "group_norm", "softmax.int", "log_softmax.int", "exp", "log", "pow.Tensor_Scalar", "sum", "sum.dim_IntList",
    "cumsum", "softplus", "mse_loss", "l1_loss", "cross_entropy_loss", "nll_loss",
)  # fmt: skip


def _autocast(func: Any, precision: torch.dtype | None) -> Callable[..., Any]:
    """Return an operator that takes its floating-point tensors in a type, or in autocast's own."""
    outside = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(outside):
            dtype = precision or torch.get_autocast_dtype(NAME)

            def to(x: Any) -> Any:
                fits = isinstance(x, OnDevice) and x.is_floating_point() and x.dtype != torch.float64
                return x.to(dtype) if fits else x

            return func(*_mapped(to, args), **_mapped(to, kwargs))

    return cast


def _pin_memory(tensor: torch.Tensor, device: object = None) -> torch.Tensor:
    made = tensor.clone(memory_format=torch.preserve_format)
    storage = made.untyped_storage()
    with _state.lock:
        _state.pinned = {at: known for at, known in _state.pinned.items() if known() is not None}
        _state.pinned[storage.data_ptr()] = weakref.ref(storage)
    # The storage's Python object is to live as long as the tensor.
    made._pinned_storage = storage  # type: ignore[attr-defined]
    return made


def _is_pinned(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() in _state.pinned


# Kernels that copy a number from the CPU to the device, where others take it as an argument.
_COPY_NUMBERS = ("aten::where", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
# Kernels that take no number from the CPU at all.
_TAKE_NO_NUMBERS = ("aten::cat", "aten::stack", "aten::gather", "aten::scatter", "aten::index_copy")
# Those whose indices may lie on the CPU.
_INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
# Those that a GPU's own code reads a number for: how large the result is, or whether the input is valid.
_READING = (
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::bincount", "aten::equal", "aten::repeat_interleave", "aten::histc",
)  # fmt: skip


@functools.cache
def _is_composite(func: Any) -> bool:
    """Return whether an operator is made of others."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _leaves(x: Any) -> list[Any]:
    """Return what is in lists, tuples and dicts, of which arguments and results of operators are made."""
    if isinstance(x, dict):
        x = list(x.values())
    return [leaf for part in x for leaf in _leaves(part)] if isinstance(x, (list, tuple)) else [x]


def _mapped(change: Callable[[Any], Any], x: Any) -> Any:
    """Return the same with every leaf changed. Torch's own `tree_map` takes longer than most operators."""
    if isinstance(x, dict):
        return {key: _mapped(change, part) for key, part in x.items()}
    return type(x)([_mapped(change, part) for part in x]) if isinstance(x, (list, tuple)) else change(x)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, OnDevice) else x


def _placed(device: Any) -> torch.device:
    device = torch.device(device)
    if device.type != NAME:
        return device
    index = _state.current if device.index is None else device.index
    if index >= torch.get_device_module(NAME).device_count():
        raise RuntimeError(f"There is no device {NAME}:{index}: invalid device ordinal.")
    return torch.device(NAME, index)


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Do what an operator does, if a device would."""
    name = func._schema.name
    tensors = [x for x in _leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if name == "aten::_local_scalar_dense":
        _note(READ)
        _land()
        return func(tensors[0].inner)
    if name == "aten::_to_copy":
        return _to_copy(func, tensors[0], kwargs)
    if name in ("aten::copy_", "aten::_copy_from"):
        target, source = tensors[:2] if name == "aten::copy_" else tensors[1::-1]
        free = bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        return _copy(target, source, free=free)
    here = [x for x in tensors if isinstance(x, OnDevice)]
    _check_company(name, tensors, here)
    if name in _READING or (
        name in _INDEXED and any(x.dtype in (torch.bool, torch.uint8) for x in tensors[1:])
    ):
        _note(READ)
    device = _placed(kwargs["device"]) if kwargs.get("device") is not None else None

    def plain(x: Any) -> Any:
        return torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else _inner(x)

    args, kwargs = _mapped(plain, args), _mapped(plain, kwargs)
    if device is not None:
        kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
    made = func(*args, **kwargs)
    assert all(x.shape == x.inner.shape for x in here), (
        f"{name} resized a tensor, which is not supported here"
    )
    where = here[0].device if device is None and here else device
    if where is None or where.type != NAME:
        return made
    same = {id(x.inner): x for x in here}

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return same[id(x)] if id(x) in same else OnDevice(x, where)

    return _mapped(wrapped, made)


def _check_company(name: str, tensors: list[torch.Tensor], here: list[OnDevice]) -> None:
    """Raise if tensors of several devices meet, and note the copies that a kernel makes itself."""
    if not here:
        return
    elsewhere = [x for x in tensors if x.device != here[0].device]
    for other in elsewhere:
        is_number = other.dim() == 0 and other.device.type == "cpu" and name not in _TAKE_NO_NUMBERS
        is_index = other.device.type == "cpu" and name in _INDEXED and not other.is_floating_point()
        if not is_number and not is_index:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{here[0].device} and {other.device}! ({name})"
            )
        if is_index or name in _COPY_NUMBERS:
            _note(TO)


def _to_copy(func: Any, source: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    rest = {
        key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "non_blocking")
    }
    target = source.device if kwargs.get("device") is None else _placed(kwargs["device"])
    made = func(_inner(source), **rest)
    if target == source.device:
        return OnDevice(made, target) if target.type == NAME else made
    if target.type == NAME:
        _note_copy(source, free=bool(kwargs.get("non_blocking")))
        return OnDevice(made, target)
    if not kwargs.get("non_blocking"):
        _note(FROM)
        _land()
        return made
    return _launch(torch.full_like(made, 77), made)


def _copy(target: torch.Tensor, source: torch.Tensor, *, free: bool) -> torch.Tensor:
    if target.device == source.device or target.device.type == NAME:
        if target.device != source.device:
            _note_copy(source, free=free)
        _inner(target).copy_(_inner(source))
        return target
    if free:
        return _launch(target, _inner(source).clone())
    _note(FROM)
    _land()
    return target.copy_(_inner(source))


def _note_copy(source: torch.Tensor, *, free: bool) -> None:
    """Note a copy to the device, which waits unless it comes from pinned memory or another device."""
    _note(TO_FREE if source.device.type == NAME or (free and _is_pinned(source)) else TO)


def _launch(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Begin a copy to the host that is there once somebody waits."""
    _note(FROM_FREE)
    with _state.lock:
        _state.landing.append((target, source.clone()))
    return target
