"""Servers for tests: in a thread of this process, or in a process of their own."""

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import uvicorn

from maskgit import MaskGIT
from maskgit.apps.flags import Marking
from maskgit.apps.serving.app import create_app
from maskgit.apps.serving.server import bind
from maskgit.apps.serving.service import Limits, Service


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@contextlib.contextmanager
def in_thread(
    limits: Limits,
    keys: tuple[str, ...] = (),
    model: MaskGIT | None = None,
    marking: Marking | None = None,
) -> Iterator[tuple[httpx.Client, Service]]:
    """Give a client of a real server, with the bundled model if no other is given, and the service behind it."""
    service = Service(model or MaskGIT.from_pretrained(), "cifar10", limits, marking=marking)
    config = uvicorn.Config(create_app(service, keys), log_config=None, log_level="error", lifespan="on")
    server = uvicorn.Server(config)
    with bind("127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_for(lambda: service.ready)
            with httpx.Client(base_url=url, timeout=60) as client:
                yield client, service
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def in_process(*flags: str, port: int = 0, page: bool = False) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Give a `maskgit serve` and its URL; it is killed at the end if it still runs."""
    command = [sys.executable, "-m", "maskgit", "serve", "--port", str(port), *flags]
    command += [] if page else ["--no-page"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, line
        yield server, found.group()
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGKILL)
        server.communicate()
