"""Servers for tests: in a thread of this process, or in a process of their own."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from forking import Python
from maskgit import MaskGIT
from maskgit.apps.cli.flags import Marking
from maskgit.apps.serving.app import create_app
from maskgit.apps.serving.server import bind, configured
from maskgit.apps.serving.service import Limits, Service


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
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
    samples: Path | None = None,
    **options: Any,
) -> Iterator[tuple[httpx.Client, Service]]:
    """Give a client of a real server, with the bundled model if no other is given, and the service behind it.

    The options are those of `create_app`.
    """
    service = Service(model or MaskGIT.from_pretrained(), "cifar10", limits, marking=marking, samples=samples)
    server = uvicorn.Server(configured(create_app(service, keys, **options)))
    with bind("127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_for(lambda: service.ready)
            with httpx.Client(base_url=url, timeout=120) as client:
                yield client, service
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def in_process(*flags: str, port: int = 0, page: bool = False) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Give a `maskgit serve` and its URL; it is killed at the end if it still runs."""
    command = ["-m", "maskgit", "serve", "--port", port, *flags, *([] if page else ["--no-page"])]
    server = Python(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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


# Debian's number for nobody.
NOBODY = 65534
NGINX = """
daemon off; worker_processes 1; pid nginx.pid; error_log stderr warn;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    {server}
}}
"""


@contextlib.contextmanager
def behind_nginx(upstream: str, example: str) -> Iterator[str]:
    """Give the URL of an nginx that runs an example's server in front of one at 127.0.0.1, as nobody of importance.

    Args:
        upstream: the URL of the server behind it; in the example, http://127.0.0.1:8000.
        example: what is to be included in nginx's http block, listening on 80.
    """
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.fail("This test runs Debian's nginx; install it: apt-get install nginx-light")
    root = os.getuid() == 0
    with tempfile.TemporaryDirectory(prefix="nginx-", dir="/tmp") as name, socket.socket() as listener:
        # A socket that it inherits is open before it starts, and no one else's.
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        address = "{}:{}".format(*listener.getsockname())
        server = example.replace("listen 80;", f"listen {address};").replace("127.0.0.1:8000", upstream[7:])
        Path(name, "nginx.conf").write_text(NGINX.format(server=server), "utf-8")
        if root:
            os.chown(name, NOBODY, NOBODY)
        process = subprocess.Popen(
            [program, "-p", name, "-c", f"{name}/nginx.conf", "-e", "stderr"],
            pass_fds=[listener.fileno()],
            env=os.environ | {"NGINX": f"{listener.fileno()};"},
            **({"user": NOBODY, "group": NOBODY, "extra_groups": []} if root else {}),
        )
        try:
            yield f"http://{address}"
            assert process.poll() is None
        finally:
            process.terminate()
            process.wait()
