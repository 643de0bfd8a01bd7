"""Python programs in processes of their own that start at once: forked from one that has imported torch and ours.

Importing them takes longer than most such programs run. Everything else is as with `subprocess`: environment,
streams, signals, the way out of the interpreter, and exit codes. Programs of which the imports are tested, or
what the environment changes in them, are started by `subprocess` itself.
"""

import ctypes
import functools
import gc
import json
import os
import signal
import socket
import subprocess
import sys
from types import CodeType
from typing import Any

# A process whose parent ends becomes a child of the nearest ancestor that has asked for such.
PR_SET_CHILD_SUBREAPER = 36
# One that forks others must have a single thread.
SINGLE = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
PRELOADED = (
    "maskgit.apps.cli.commands",
    "maskgit.pipeline",
    "maskgit.training.train_tokenizer",
    "maskgit.training.train_transformer",
    "torch.distributed.checkpoint",
)


class Python(subprocess.Popen):
    """`python -c CODE …` or `python -m MODULE …`, started at once; the options are those of `subprocess.Popen`."""

    def __init__(self, *arguments: object, **options: Any) -> None:
        super().__init__([sys.executable, *map(str, arguments)], **options)

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others) -> None:
        ends = others[3:9]
        if sys.platform != "linux":
            return super()._execute_child(
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others
            )
        theirs = [end if end != -1 else number for number, end in enumerate((ends[0], ends[3], ends[5]))]
        asked = [
            args[1:],
            os.fspath(cwd or os.getcwd()),
            dict(os.environ if env is None else env),
            others[14],
        ]
        self.pid = _ask(_server(), asked, theirs)
        self._child_created = True
        for end in {end for end in (ends[0], ends[3], ends[5]) if end != -1}:
            os.close(end)


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -c CODE …` or `python -m MODULE …` to its end, and return its exit code and what it wrote."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with Python(*arguments, **streams, **options) as process:
        try:
            out, error = process.communicate(timeout=600)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


@functools.cache
def _server() -> socket.socket:
    """Return a connection to the process that forks; it ends with this one."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ours, theirs = socket.socketpair()
    with theirs:
        subprocess.Popen(
            [sys.executable, "-c", f"import forking; exec(forking.serve({theirs.fileno()}))"],
            env=os.environ | SINGLE | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
    return ours


def _ask(server: socket.socket, asked: list[Any], streams: list[int]) -> int:
    data = json.dumps(asked).encode()
    socket.send_fds(server, [len(data).to_bytes(8, "big")], streams)
    server.sendall(data)
    return int.from_bytes(_receive(server, 8), "big")


def _receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def serve(number: int) -> CodeType:
    """Fork for whoever is at the other end of a socket, and in each child return the program that it is to run."""
    for name in PRELOADED:
        __import__(name)
    # What is frozen is not copied by a collection in a child.
    gc.freeze()
    connection = socket.socket(fileno=number)
    while True:
        length, streams, _, _ = socket.recv_fds(connection, 8, 3)
        if not length:
            os._exit(0)
        asked = json.loads(_receive(connection, int.from_bytes(length, "big")))
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            # The one between ends at once, so that whoever asks gets the other for a child of its own.
            grandchild = os.fork()
            if grandchild == 0:
                connection.close()
                for end in (reader, writer):
                    os.close(end)
                return _become(*asked, streams)
            os.write(writer, grandchild.to_bytes(8, "big"))
            os._exit(0)
        os.close(writer)
        os.waitpid(child, 0)
        with open(reader, "rb") as told:
            connection.sendall(told.read(8))
        for stream in streams:
            os.close(stream)


def _become(
    arguments: list[str], folder: str, environment: dict[str, str], new_session: bool, streams: list[int]
) -> CodeType:
    """Turn this process into one that was started with other arguments."""
    import torch

    if new_session:
        os.setsid()
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
    for stream in streams:
        os.close(stream)
    # Those of the parent know whether its own could seek.
    for place, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        how = {"buffering": 1, "errors": "backslashreplace"} if name == "stderr" else {}
        stream = open(place, mode, closefd=False, **how)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    option, program, *rest = arguments
    if option == "-m":
        sys.argv = [program, *rest]
        program = f"import runpy; runpy.run_module({program!r}, run_name='__main__', alter_sys=True)"
    else:
        sys.argv = [option, *rest]
    return compile(program, "<string>", "exec")
