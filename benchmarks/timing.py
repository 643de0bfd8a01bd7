"""What the benchmarks share: timing in turns, a record of the machine, and their JSON."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from maskgit.foundation import files

CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")


def clock(work: Callable[[], Any], device: torch.device | str = "cpu") -> Callable[[], float]:
    """Return a function that does the work once and returns its wall time in seconds.

    Args:
        work: what is to be timed.
        device: where it runs; a GPU is waited for before and after.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None

    def timed() -> float:
        wait()
        start = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - start

    return timed


def in_turns(
    works: Mapping[str, Callable[[], float]], rounds: int, *, warmups: int = 1
) -> dict[str, list[float]]:
    """Time several works in turns (A B C, A B C, …), so that what slows the machine down slows all of them.

    Args:
        works: by name, each does its work once and returns its seconds.
        rounds: times that each is timed, at least 1.
        warmups: times that each is done first, unrecorded.

    Returns:
        The seconds of each round, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(warmups + rounds):
        for name, work in works.items():
            seconds = work()
            if turn >= warmups:
                times[name].append(seconds)
    return times


def spread(times: list[float]) -> dict[str, Any]:
    """Return the median, the least and the greatest of some seconds, and their number."""
    return {
        "seconds": statistics.median(times),
        "least_s": min(times),
        "greatest_s": max(times),
        "rounds": len(times),
    }


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return what a number depends on beside the code: the machine, its load, threads and versions."""
    record: dict[str, Any] = {
        "processor": _processor("model name") or platform.processor() or platform.machine(),
        "features": [name for name in CPU_FEATURES if name in _processor("flags").split()],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(device),
    }
    if torch.device(device).type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(device)
        record["cuda"] = torch.version.cuda
    return record


def _processor(key: str) -> str:
    """Return a value that Linux tells of the first processor, or nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition("\t")[0] == key), "")


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a benchmark's record whole or not at all."""
    files.write_bytes(path, json.dumps(record, indent=2).encode() + b"\n")
