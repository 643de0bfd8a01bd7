"""The proxy for a request, from the environment: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY.

Lower-case names are accepted and take precedence, as in other programs. In addition, requests to this machine itself never
use a proxy.
"""

import ipaddress
import socket
import urllib.request
from urllib.parse import urlsplit

from maskgit.errors import ConfigError

_SOCKS_PACKAGE = "socksio"


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine itself, in any notation; no name is resolved."""
    host = host.strip("[]").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    address = _address(host)
    if address is None:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    # Connecting to 0.0.0.0 or :: reaches this machine.
    return address.is_loopback or address.is_unspecified


def proxy_for(url: str) -> str | None:
    """Return the URL of the proxy for a request, or None for none.

    Args:
        url: the request's, with a scheme and a host.

    Raises:
        ConfigError: the environment names a proxy that cannot be parsed.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if (
        not proxy
        or urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2])
        or _in_network(host, proxies)
    ):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        readable = urlsplit(proxy).hostname and urlsplit(proxy).port != 0
    except ValueError:
        readable = False
    if not readable:
        # The value may contain a password.
        raise ConfigError(
            f"The proxy for {parts.scheme} URLs (HTTP_PROXY, HTTPS_PROXY or ALL_PROXY) cannot be parsed; write it like "
            "http://proxy.example:3128, or add the host to NO_PROXY."
        )
    return proxy


def missing_socks(error: ImportError) -> ConfigError | None:
    """Return what to do about an import that failed only because a SOCKS proxy is set; None for other imports."""
    if _SOCKS_PACKAGE not in str(error):
        return None
    return ConfigError(
        f"The environment names a SOCKS proxy, which needs the package {_SOCKS_PACKAGE}: install it with "
        "pip install 'httpx[socks]', or unset ALL_PROXY, HTTP_PROXY and HTTPS_PROXY (also in lower case)."
    )


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    try:
        # 127.1 and 0x7f000001 are addresses as well.
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except (OSError, UnicodeError, ValueError):
        return None


def _in_network(host: str, proxies: dict[str, str]) -> bool:
    """Return whether NO_PROXY names a network that contains the host, such as 10.0.0.0/8, or the host in brackets."""
    address = _address(host)
    for entry in proxies.get("no", "").replace(",", " ").split():
        try:
            if address is not None and address in ipaddress.ip_network(entry.strip("[]"), strict=False):
                return True
        except ValueError:
            continue
    return False
