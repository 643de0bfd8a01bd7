"""The command that starts the page."""

from typing import Annotated

from tyro.conf import arg

from maskgit.apps.cli.flags import Marking, Model
from maskgit.apps.serving.options import Network


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
    from maskgit.errors import ConfigError, install_extra
    from maskgit.foundation.checks import check_count
    from maskgit.foundation.proxies import missing_socks

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
