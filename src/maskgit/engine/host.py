"""What this machine gives a process: memory, threads, bfloat16, and the fastest way to compute linear layers.

That way is measured once, then remembered, so that all processes on a machine choose the same one.
"""

import ctypes
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from maskgit.engine.layers import PATHS, ways
from maskgit.errors import OutputError
from maskgit.foundation.files import cache_dir, write_bytes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 256 * 2**20
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
# One image of the 256 model through the first layer of its MLP.
ROWS, INPUTS, OUTPUTS = 257, 768, 3072
ROUNDS = 5

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def keep_freed_memory() -> bool:
    """Ask glibc to keep large blocks that are freed, and return whether it does.

    glibc asks the system for every block above 32 MiB and gives it back at once, so that each activation of
    a 256×256 image is paged in anew, which takes as long as a sixth of the decoder's arithmetic. Blocks of up
    to 256 MiB are kept instead; the process then stays as large as it was at its largest.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)) and bool(mallopt(M_TRIM_THRESHOLD, 2 * KEPT_BYTES))


def limit_threads() -> int:
    """Let torch use no more threads than a container's quota of processor time, and return their number.

    torch counts the processors that it may run on, but not the quota, and threads that wait for one another's
    share of it are slower than few. $OMP_NUM_THREADS, where it is set, stays.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        quota = cpu_quota()
        if quota is not None:
            torch.set_num_threads(max(1, min(torch.get_num_threads(), math.floor(quota))))
    return torch.get_num_threads()


def cpu_quota() -> float | None:
    """Return how many processors' time the control group (version 2) grants, or None for no limit."""
    try:
        quota, period = CPU_QUOTA.read_text("ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def has_bfloat16_units() -> bool:
    """Return whether this CPU multiplies bfloat16 by instructions of its own, and oneDNN may use them.

    Without them bfloat16 is slower than float32. Where torch does not say what the CPU has, the answer is no.
    """
    said: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    if "avx512_bf16" not in said:
        # Not promised by torch.
        ask = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        said = {"avx512_bf16": ask is not None and ask()}
    return bool(said["avx512_bf16"]) and "onednn" in ways(torch.bfloat16)


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
