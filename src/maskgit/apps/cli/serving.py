"""The commands that start a server: `maskgit serve` and `maskgit app`."""

from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from maskgit.apps.cli.flags import Marking, Model
from maskgit.apps.serving.options import Limits, Network
from maskgit.errors import ConfigError, install_extra
from maskgit.foundation.checks import check_count
from maskgit.foundation.proxies import missing_socks


def serve(
    model: Model,
    marking: Marking,
    limits: Limits,
    network: Network,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: no keys)")] = None,
    page: bool = True,
) -> None:
    """Serve a model over HTTP; see docs/serving.md.

    Args:
        host: Address to listen on: 127.0.0.1 for this machine only, 0.0.0.0 for everyone who can reach it.
        port: Port to listen on; 0 picks a free one.
        api_key_file: File of API keys, one per line; clients must send one of them.
        page: Serve the page of `maskgit app` at /, if Gradio is installed. Not with API keys, which browsers do not send.
    """
    import logging
    from functools import partial
    from importlib.util import find_spec

    try:
        from maskgit.apps.serving.middleware import read_keys
        from maskgit.apps.serving.server import bind, run
        from maskgit.apps.serving.service import Service
    except ImportError as error:
        raise ConfigError(f"The server needs the package {error.name}: {install_extra('serve')}.") from error

    network.check()
    keys = list(read_keys(api_key_file)) if api_key_file else []
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Before the model is loaded, so that a missing package or a taken port is reported at once.
    mount = _page_mount() if page and not keys and find_spec("gradio") else None
    with bind(host, port) as listener:
        pipe = model.load()
        service = Service(pipe, model.model, limits, recorded=model.recorded("serve"), marking=marking)
        # The page decodes outside the batches of requests, with a model that shares the weights.
        mounted = mount and partial(mount, pipe=copy(pipe), name=model.model, marking=marking)
        announce = partial(_announce, model.model)
        reload = partial(_reload, keys, api_key_file) if api_key_file else None
        run(service, listener, keys, announce, mounted, network, reload)


def _page_mount() -> Callable[..., object]:
    """Return the function that mounts the page in a server."""
    try:
        from maskgit.apps.webui.page import mount
    except ImportError as error:
        failure = missing_socks(error)
        if failure is None:
            raise
        raise failure from error
    return mount


def _reload(keys: list[str], path: Path) -> None:
    """Replace the keys by those now in the file; an invalid file leaves them as they are."""
    from maskgit.apps.serving.middleware import read_keys

    try:
        keys[:] = read_keys(path)
    except ConfigError as error:
        print(f"Keeping the present keys: {error}", flush=True)
    else:
        print(f"Read {len(keys)} keys from {path}", flush=True)


def _announce(name: str, url: str) -> None:
    print(f"Serving {name} at {url}", flush=True)


def page(
    model: Model,
    marking: Marking,
    network: Network,
    port: Annotated[int, arg(metavar="INT")] = 7860,
    host: str = "127.0.0.1",
) -> None:
    """Serve a web page to generate, edit, inspect and compare images.

    Args:
        port: Port to listen on; 0 picks a free one.
        host: Address to listen on: 127.0.0.1 for this machine only, 0.0.0.0 for everyone who can reach it.
    """
    check_count("port", port, 0, 65_535)
    network.check()
    print("loading the libraries…", flush=True)
    try:
        from maskgit.apps.webui import serving
    except ImportError as error:
        raise missing_socks(error) or ConfigError(
            f"The page needs the package {error.name}: {install_extra('app')}."
        ) from error
    serving.serve(model, host, port, network, marking)
