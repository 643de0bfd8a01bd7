"""Downloads into a cache: resumed when interrupted, and verified against the checksum of the first download."""

import hashlib
import http.client
import json
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from contextlib import AbstractContextManager
from pathlib import Path

from maskgit.errors import ConfigError, DownloadError
from maskgit.foundation.files import cache_dir, naming_the_cache, output_error, read_json, write_bytes
from maskgit.foundation.locks import locked, waits_for
from maskgit.foundation.notes import bar
from maskgit.foundation.proxies import is_loopback, proxy_for

MAX_BYTES = 2**34
TIMEOUT_S = 30
_PIECE = 2**20


def fetch(url: str, *, folder: Path | None = None) -> Path:
    """Return the local copy of a URL, downloading it the first time.

    An interrupted download is resumed. The file's SHA-256 is recorded the first time and compared whenever the file
    is fetched or used again. While one process downloads, others that want the same file wait.

    Args:
        url: https, or http to this machine.
        folder: where files are kept; None means `downloads` in the cache.

    Returns:
        The file's path.

    Raises:
        DownloadError: the URL cannot be reached or is refused, or its content has changed.
        OutputError: the cache cannot be written, or the disk is full.
    """
    _check_url(url)
    if folder is None:
        folder = cache_dir() / "downloads"
        with naming_the_cache():
            return fetch(url, folder=folder)
    path = cached(url, folder)
    record = _record(path)
    # A complete file is only read, so that the cache may be read-only.
    if not (path.exists() and record.exists()):
        with _lock(path, f"the download of {url}"):
            if not path.exists():
                _download(url, path)
            if not record.exists():
                write_bytes(record, json.dumps({"url": url, "sha256": sha256(path)}).encode())
    digest, known = sha256(path), _recorded(record)
    if known != digest:
        with _lock(path, f"the download of {url}"):
            path.unlink(missing_ok=True)
        raise DownloadError(
            f"{url} is not the file that was downloaded before (SHA-256 {digest}, recorded {known}), and was deleted. "
            f"If the change is intended, delete {record} and try again."
        )
    return path


def read_text(url: str, limit: int) -> str:
    """Return the first `limit` bytes at a URL as text; nothing is kept.

    Raises:
        DownloadError: the URL cannot be reached or is refused.
    """
    _check_url(url)
    request = urllib.request.Request(url, headers={"User-Agent": "maskgit"})
    try:
        with urllib.request.build_opener(_Redirects, _Proxies).open(request, timeout=TIMEOUT_S) as answer:
            return answer.read(limit).decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        raise DownloadError(f"{url} responded with {error.code} {error.reason}; try again later.") from error
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"{url} cannot be reached ({getattr(error, 'reason', error)}).") from error


def cached(url: str, folder: Path) -> Path:
    """Return where `fetch` keeps a URL in a folder."""
    name = Path(urllib.parse.urlsplit(url).path).name[:80]
    return folder / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"


def forget(path: Path) -> None:
    """Delete a fetched file and its checksum, if `fetch` made them."""
    record = _record(path)
    if record.exists():
        with _lock(path, f"the download of {path.name}"):
            record.unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _lock(path: Path, what: str) -> AbstractContextManager[None]:
    return locked(path.with_name(f".{path.name}.lock"), waits_for(what))


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file.

    Raises:
        DownloadError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DownloadError(f"{path} cannot be read: {error.strerror}.") from error


def _recorded(record: Path) -> str:
    known = read_json(record, DownloadError, remedy="Delete it and try again.").get("sha256")
    if not isinstance(known, str):
        raise DownloadError(f"{record} holds no checksum. Delete it and try again.")
    return known


def _check_url(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    local = is_loopback(parts.hostname or "")
    if not (parts.scheme == "https" or (parts.scheme == "http" and local)):
        raise DownloadError(f"{url} is refused: only https URLs are allowed.")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects only to URLs that are allowed themselves."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        _check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Proxies(urllib.request.ProxyHandler):
    """Sends each request, including redirects, through the proxy for its URL, if there is one."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(("http", "https"), ""))

    def proxy_open(self, req, proxy, type):
        try:
            proxy = proxy_for(req.full_url)
        except ConfigError as error:
            raise DownloadError(str(error)) from error
        if proxy is None:
            return None
        if urllib.parse.urlsplit(proxy).scheme not in ("http", "https"):
            raise DownloadError(
                "Files are downloaded only through HTTP proxies, but the environment names another kind for "
                f"{req.type} URLs; set {req.type.upper()}_PROXY=http://HOST:PORT, or add the host to NO_PROXY."
            )
        return super().proxy_open(req, proxy, type)


def _download(url: str, path: Path) -> None:
    partial = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        start = partial.stat().st_size if partial.exists() else 0
        try:
            total = _transfer(url, partial, start)
        except _NoRestError:
            # Nothing is left to send, or the file has changed: start again, and let the checksum decide.
            partial.unlink(missing_ok=True)
            total = _transfer(url, partial, 0)
        if total is not None and partial.stat().st_size != total:
            raise DownloadError(f"{url} was interrupted; run the same command again to resume.")
        os.replace(partial, path)
    except urllib.error.HTTPError as error:
        raise DownloadError(f"{url} responded with {error.code} {error.reason}; try again later.") from error
    except DownloadError:
        raise
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise DownloadError(
            f"{url} cannot be reached ({reason}); run the same command again to resume."
        ) from error
    except OSError as error:
        raise output_error(path, error) from error


class _NoRestError(Exception):
    """The server does not send the rest of a partly downloaded file."""


def _transfer(url: str, partial: Path, start: int) -> int | None:
    """Append what is missing to `partial`; return the size of the whole file if the server gives it.

    Raises:
        _NoRestError: part of the file is there, and the server does not send the rest.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "maskgit"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    opener = urllib.request.build_opener(_Redirects, _Proxies)
    try:
        answer = opener.open(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:
            raise _NoRestError from error
        raise
    with answer:
        if answer.status != 206:  # the server sends the whole file regardless
            start = 0
        elif not (answer.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
            if start:
                raise _NoRestError
            raise DownloadError(f"{url} responded with only part of the file; try again later.")
        length = answer.headers.get("Content-Length") or ""
        total = start + int(length) if re.fullmatch("[0-9]{1,18}", length) else None
        free = shutil.disk_usage(partial.parent).free
        if total is not None and total > MAX_BYTES:
            raise DownloadError(f"{url} has {total} bytes, more than the limit of {MAX_BYTES}.")
        if total is not None and total - start > free:
            raise DownloadError(
                f"{url} needs {total - start} bytes in {partial.parent}, where only {free} are free."
            )
        with (
            partial.open("ab" if start else "wb") as file,
            bar(total=total, initial=start, unit="B", unit_scale=True, desc=partial.stem) as shown,
        ):
            while piece := answer.read(_PIECE):
                file.write(piece)
                shown.update(len(piece))
                if file.tell() > MAX_BYTES:
                    raise DownloadError(f"{url} sends more than the limit of {MAX_BYTES} bytes.")
    return total
