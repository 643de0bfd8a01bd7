"""Which way of computing linear layers is fastest on this CPU: measured once, then remembered.

The first measurement stays, so that all processes on a machine choose the same way.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from maskgit.engine.layers import PATHS, ways
from maskgit.errors import OutputError
from maskgit.foundation.files import cache_dir, write_bytes

# One image of the 256 model through the first layer of its MLP.
ROWS, INPUTS, OUTPUTS = 257, 768, 3072
ROUNDS = 5

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def names() -> list[str]:
    """Return the types and ways that there are to measure here, such as "float32 mkl" and "int8 int8"."""
    found = [f"{dtype} {way}" for dtype, kind in DTYPES.items() for way in ways(kind) if way != "int8"]
    return found + ["int8 int8"] * ("int8" in ways(torch.float32))


def measured(*, refresh: bool = False) -> dict[str, float]:
    """Return the seconds of each of `names`; "int8" is float32 in and out.

    They are read from the cache if this CPU was measured by this torch with as many threads, and else written.
    """
    try:
        path = place(torch.get_num_threads())
    except OutputError:
        # Without a cache it is measured in every process.
        return _measure()
    if not refresh:
        known = _read(path)
        if known is not None:
            return known
    return keep(path, _measure(), replace=refresh)


def place(threads: int) -> Path:
    """Return the cache file that holds this CPU's times with that number of threads."""
    name = torch.backends.cpu.get_cpu_capability()
    about: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    parts = [
        about.get("architecture", "cpu"),
        about.get("cpu_name", ""),
        name,
        f"{threads}threads",
        # oneDNN may be told to use less than the CPU has.
        f"{len(names())}ways",
    ]
    text = "-".join([*map(str, parts), torch.__version__])
    return (
        cache_dir() / "cpu" / ("".join(c if c.isalnum() or c in ".-" else "_" for c in text)[:120] + ".json")
    )


def _measure() -> dict[str, float]:
    rows = torch.randn(1, ROWS, INPUTS, generator=torch.Generator().manual_seed(0))
    calls: dict[str, Callable[[], Tensor]] = {}
    for name in names():
        dtype, _, way = name.partition(" ")
        # int8 layers take float32 and give it.
        kind = DTYPES.get(dtype, torch.float32)
        layer = nn.Linear(INPUTS, OUTPUTS, dtype=kind).requires_grad_(False)
        calls[name] = _call(PATHS[way][1](layer), rows.to(kind))
    return dict(zip(calls, time_in_turns(list(calls.values())), strict=True))


def _call(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: module(x)


@torch.no_grad()
def time_in_turns(calls: Sequence[Callable[[], object]], rounds: int = ROUNDS) -> list[float]:
    """Return the least seconds of each call; they take turns, so that other load meets all of them."""
    best = [float("inf")] * len(calls)
    for number in range(rounds + 1):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            # The first round packs and warms up.
            if number:
                best[i] = min(best[i], time.perf_counter() - start)
    return best


def _read(path: Path) -> dict[str, float] | None:
    try:
        times = json.loads(path.read_text("utf-8"))
        if not all(isinstance(seconds, float) and seconds > 0 for seconds in times.values()):
            return None
        return times if times.keys() == set(names()) else None
    except (OSError, ValueError, AttributeError):
        return None


def keep(path: Path, times: dict[str, float], *, replace: bool) -> dict[str, float]:
    """Write the measured times and return those in the cache, which another process may have written first."""
    try:
        broken = path.exists() and _read(path) is None
        write_bytes(path, json.dumps(times).encode(), overwrite=replace or broken)
    # It is there by now, or cannot be written.
    except (OSError, OutputError):
        pass
    return _read(path) or times
