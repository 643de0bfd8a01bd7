"""The command that starts the page."""

from typing import Annotated

from tyro.conf import arg

from maskgit.apps.cli.flags import Marking, Model, Network


def page(
    model: Model,
    marking: Marking,
    network: Network,
    port: Annotated[int, arg(metavar="INT")] = 7860,
    host: str = "127.0.0.1",
) -> None:
    """Open a page in the browser: generate, edit, look inside and compare.

    Args:
        port: Where the page is; 0 takes one that is free.
        host: Who may see it: 127.0.0.1 is this computer alone, 0.0.0.0 everybody who can reach it.
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
