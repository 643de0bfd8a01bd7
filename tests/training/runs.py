"""What tests of both loops share: processes of their own, and what a run left behind."""

import contextlib
import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from forking import Python
from maskgit.training.run.checkpoint import Checkpoints


def start(script: str, *arguments: str, **environment: object) -> subprocess.Popen[str]:
    """Start a Python script; its standard error can be read."""
    settings = {key: str(value) for key, value in environment.items()}
    return Python(
        "-c",
        script,
        *arguments,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | settings,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_two(script: str, *arguments: str, joins: int = 1, code: int = 0) -> list[str]:
    """Run a script in two processes that find each other, and return what each wrote to standard error.

    Args:
        script: the program.
        arguments: its own.
        joins: how often the processes join. Each time needs a port of its own, of which MASTER_PORTS lists so
            many: at the same one, a process that is early would join the group that the other is still leaving.
        code: what both must exit with.
    """
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(joins)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in probes]
    group = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0]}
    group["MASTER_PORTS"] = " ".join(map(str, ports))
    workers = [start(script, *arguments, RANK=rank, **group) for rank in range(2)]
    try:
        said = [worker.communicate(timeout=600)[1] for worker in workers]
    except subprocess.TimeoutExpired:
        for worker in workers:
            worker.kill()
        said = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [code, code], "\n".join(said)
    return said


def logged(out: str | Path) -> list[dict[str, Any]]:
    """Return what a run logged, a dict for each line."""
    return [json.loads(line) for line in (Path(out) / "scalars.jsonl").read_text().splitlines()]


def checkpointed(out: str | Path) -> dict[str, Tensor]:
    """Return all tensors of a run's last checkpoint by name."""
    reader = dcp.FileSystemReader(Checkpoints(out).latest())
    entries = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if hasattr(entry, "size")
    }
    dcp.load(state, storage_reader=reader)
    return state
