"""For tests of the HTTP client: both kinds behind one face, and a server that follows a script."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from maskgit.apps.client.client import Client


class Both:
    """A client of either kind, whose methods are waited for here."""

    def __init__(self, kind, url, **options) -> None:
        self.kind = kind
        self.make = lambda: kind(url, **options)

    def __getattr__(self, name):
        if self.kind is Client:

            def ask(*args, **kwargs):
                with self.make() as client:
                    answer = getattr(client, name)(*args, **kwargs)
                    return list(answer) if name.startswith("stream_") else answer

            return ask

        async def ask_async(args, kwargs):
            async with self.make() as client:
                answer = getattr(client, name)(*args, **kwargs)
                return [event async for event in answer] if name.startswith("stream_") else await answer

        return lambda *args, **kwargs: asyncio.run(ask_async(args, kwargs))


class Script(BaseHTTPRequestHandler):
    """Answers one request after the other as its server's list says, and notes what was asked."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append((time.monotonic(), self.headers, b""))
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.append((time.monotonic(), self.headers, body))
        self._answer()

    def _answer(self) -> None:
        step = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
        if step is None:
            self.close_connection = True
            return
        status, headers, body = step
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@contextlib.contextmanager
def scripted(*steps) -> Iterator[tuple[str, list]]:
    """Give the URL of a server that answers (status, headers, body) or, at None, hangs up, the last step
    for good; and the list of what it was asked: (time, headers, body).
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Script)
    server.daemon_threads = True
    server.script, server.asked = list(steps), []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
