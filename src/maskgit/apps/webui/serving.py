"""Starting the page on its own."""

import socket
from contextlib import closing, suppress

import uvicorn
from fastapi import FastAPI

from maskgit.apps.cli.flags import Marking, Model
from maskgit.apps.serving.connections import Patient
from maskgit.apps.serving.network import place
from maskgit.apps.serving.options import Network
from maskgit.apps.webui.page import mount
from maskgit.errors import ConfigError
from maskgit.pipeline import MaskGIT

# Seconds that a browser's open connection can hold up the end.
PATIENCE = 2


def serve(model: Model, host: str, port: int, network: Network, marking: Marking) -> None:
    """Load a model and serve its page until interrupted; say meanwhile what is done.

    Args:
        model: which, and where it runs.
        host: the address to be reached at.
        port: 0 takes one that is free.
        network: what stands in front of the page.
        marking: what files say of where their pictures come from.

    Raises:
        ConfigError: the address cannot be used, or pictures cannot be signed as asked.
        MaskGITError: the model cannot be loaded.
    """
    marking.writing()
    # Taken first, so that nobody waits for a model whose page cannot be seen.
    with closing(listen(host, port)) as listening:
        print(f"loading the model {model.model}…", flush=True)
        pipe = model.load()
        print("building the page…", flush=True)
        app = application(pipe, model.model, network, marking)
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{listening.getsockname()[1]}  (Ctrl-C to stop)", flush=True)
        config = uvicorn.Config(
            app, http=Patient, log_level="warning", proxy_headers=False, timeout_graceful_shutdown=PATIENCE
        )
        # Ctrl-C is how a page is ended, nothing that went wrong.
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


def application(pipe: MaskGIT, name: str, network: Network, marking: Marking | None = None) -> FastAPI:
    """Return the page of a model and nothing else; the arguments are those of `mount`, and what stands in front."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    place(app, network)
    return mount(app, pipe, name, marking=marking)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that waits for browsers.

    Raises:
        ConfigError: the address is taken, forbidden, or not this computer's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        # Python adds the address in brackets.
        reason = str(error.strerror or error).partition(" (")[0]
        raise ConfigError(
            f"The page cannot listen on {host}, port {port}: {reason}. Choose another --port or --host."
        ) from error
