"""What the host gives a process: memory that is kept when freed, threads, and bfloat16."""

import ctypes
import math
import os
import sys
from pathlib import Path

import torch

from maskgit.engine.layers import ways

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 256 * 2**20
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


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
