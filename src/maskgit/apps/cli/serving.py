"""The commands that start a server: `maskgit serve` and `maskgit app`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from maskgit.apps.cli.flags import Marking, Model
from maskgit.apps.serving.options import Limits, Network
from maskgit.errors import ConfigError, install_extra
from maskgit.foundation.checks import check_count


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
        page: Serve the page of `maskgit app` at /. Not with API keys, which browsers do not send.
    """
    _serve(model, marking, limits, network, host, port, api_key_file, page, f"Serving {model.model} at {{}}")


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
    print(f"loading the model {model.model}…", flush=True)
    # Whoever runs the page alone may edit photos of any camera.
    limits = Limits(max_pixels=100_000_000, max_body=2**27)
    _serve(model, marking, limits, network, host, port, None, True, "{}  (Ctrl-C to stop)")


def _serve(
    model: Model,
    marking: Marking,
    limits: Limits,
    network: Network,
    host: str,
    port: int,
    api_key_file: Path | None,
    page: bool,
    announcement: str,
) -> None:
    """Serve a model until a signal says to stop."""
    import logging
    from functools import partial

    try:
        from maskgit.apps.serving.middleware import read_keys
        from maskgit.apps.serving.samples import FOLDER
        from maskgit.apps.serving.server import bind, run
        from maskgit.apps.serving.service import Service
        from maskgit.apps.webui.page import add_page
        from maskgit.checkpoints.folder import locate
    except ImportError as error:
        raise ConfigError(f"The server needs the package {error.name}: {install_extra('serve')}.") from error

    network.check()
    marking.writing()
    keys = list(read_keys(api_key_file)) if api_key_file else []
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Before the model is loaded, so that a taken port is reported at once.
    with bind(host, port) as listener:
        pipe = model.load()
        service = Service(
            pipe,
            model.model,
            limits,
            recorded=model.recorded("serve"),
            marking=marking,
            samples=locate(model.model) / FOLDER,
        )
        reload = partial(_reload, keys, api_key_file) if api_key_file else None
        announce = partial(_announce, announcement)
        run(service, listener, keys, announce, add_page if page and not keys else None, network, reload)


def _reload(keys: list[str], path: Path) -> None:
    """Replace the keys by those now in the file; an invalid file leaves them as they are."""
    from maskgit.apps.serving.middleware import read_keys

    try:
        keys[:] = read_keys(path)
    except ConfigError as error:
        print(f"Keeping the present keys: {error}", flush=True)
    else:
        print(f"Read {len(keys)} keys from {path}", flush=True)


def _announce(announcement: str, url: str) -> None:
    print(announcement.format(url), flush=True)
