"""Running the application in this process, from its first socket to an orderly end."""

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn
from fastapi import FastAPI

from maskgit.apps.serving.app import create_app
from maskgit.apps.serving.connections import Patient
from maskgit.apps.serving.options import Network
from maskgit.apps.serving.service import Service
from maskgit.errors import ConfigError

# Seconds.
PATIENCE = 5
# Of a process that a third signal ends, with nothing put in order.
EXIT_KILLED = 1


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: an address or name of this machine.
        port: 0 is any that is free.

    Raises:
        ConfigError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"Cannot listen on {host}:{port} ({reason}); choose another --port or --host."
        ) from error


def configured(app: FastAPI) -> uvicorn.Config:
    """Return how uvicorn is to run the application."""
    return uvicorn.Config(
        app,
        http=Patient,
        # What proxies say is the application's to judge.
        proxy_headers=False,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="on",
        # Of connections that stay open when all is answered, as a browser's do.
        timeout_graceful_shutdown=PATIENCE,
    )


def run(
    service: Service,
    listener: socket.socket,
    keys: Sequence[str],
    announce: Callable[[str], None],
    page: Callable[[FastAPI], object] | None = None,
    network: Network | None = None,
    reload: Callable[[], None] | None = None,
) -> None:
    """Serve until a signal says to stop: then nothing new is accepted, and what was accepted is answered.

    At a second signal it is answered that the server stops. SIGHUP reloads, or stops as well.

    Args:
        service: not started yet.
        listener: see `bind`.
        keys, page, network: see `create_app`.
        announce: called with the URL once requests are taken.
        reload: what SIGHUP does; None is to stop.

    Raises:
        KeyboardInterrupt: a second signal came before all was answered.
        Exception: what the model failed at when it was warmed up.
    """
    config = configured(create_app(service, keys, page, network))
    server = _Server(config, service, announce, reload)
    # `nohup` has it ignored, and Windows has none.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, server.handle_hangup)
    server.run(sockets=[listener])
    if server.failure is not None:
        raise server.failure


class _Server(uvicorn.Server):
    """A uvicorn server that goes on answering while it drains: clients hear 503 and find no closed door."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        announce: Callable[[str], None],
        reload: Callable[[], None] | None,
    ) -> None:
        super().__init__(config)
        self.failure: BaseException | None = None
        self._reload = reload
        self._hung_up = False
        self._service = service
        self._announce = announce
        self._signals = 0
        self._warming: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets
        host, port = sockets[0].getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._warming = asyncio.create_task(self._wait_ready(url))

    async def _wait_ready(self, url: str) -> None:
        try:
            await asyncio.to_thread(self._service.wait_ready)
        # It is raised where the server was started.
        except Exception as error:
            self.failure = error
            self.should_exit = True
        else:
            self._announce(url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # A signal may come while this very thread holds the service's lock: it is only counted here.
        self._signals += 1
        if self._signals > 2:
            os._exit(EXIT_KILLED)

    def handle_hangup(self, sig: int, frame: FrameType | None) -> None:
        self._hung_up = True

    async def on_tick(self, counter: int) -> bool:
        if self._hung_up:
            self._hung_up = False
            if self._reload is None:
                self._signals = max(1, self._signals)
            else:
                self._reload()
        if self._signals:
            self._service.drain()
            self.should_exit = not self._service.num_accepted
        if self._signals > 1 and not self.should_exit:
            self._service.cancel_all()
            self.failure = KeyboardInterrupt()
            self.should_exit = True
        return await super().on_tick(counter)
