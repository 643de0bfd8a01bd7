"""Two programs that are timed in turns, each in a process of its own, driven over pipes.

A request is one line of JSON, {"do": NAME, ...}; so is its answer, or {"error": TEXT}. Arrays travel as .npz
files. This module needs the standard library alone, for the official code's Python may have nothing of ours.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# What a checkout of the official code holds, and what is told of one that does not.
OFFICIAL = Path("maskgit", "inference.py")
NO_CHECKOUT = (
    f"{{}} holds no {OFFICIAL}: name a checkout, made by git clone https://github.com/google-research/maskgit"
)


class WorkerError(RuntimeError):
    """A worker could not do what it was asked, or has ended."""


class Worker:
    """The parent's end of a worker process."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        """Start a worker.

        Args:
            command: the program and its arguments.
            folder: the directory that it works in.
        """
        self._process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have the worker do something and return its answer.

        Raises:
            WorkerError: it failed, or its process has ended.
        """
        assert self._process.stdin is not None, "made with pipes"
        assert self._process.stdout is not None, "made with pipes"
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"The worker ended with exit code {self._process.wait()}.")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *raised: object) -> None:
        # The end of its input is what tells a worker to stop; one that is busy is not waited for.
        assert self._process.stdin is not None, "made with pipes"
        assert self._process.stdout is not None, "made with pipes"
        self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def serve(handlers: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer requests until the input ends; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = handlers[request.pop("do")](**request)
        # Whatever fails is for the parent to tell.
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def use_threads(count: int) -> None:
    """Keep this process and those that it starts to its first processors (0: use all)."""
    if count and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
