"""Fetching files by URL into a cache: resumed when cut off, checked against what came the first time."""

import hashlib
import http.client
import json
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from maskgit.bars import bar
from maskgit.errors import DownloadError
from maskgit.files import output_error, write_bytes

MAX_BYTES = 2**34
TIMEOUT_S = 30
_PIECE = 2**20


def cache_dir() -> Path:
    """Return the cache: $MASKGIT_CACHE, or `maskgit` in the user's cache folder."""
    named = os.environ.get("MASKGIT_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maskgit"


def fetch(url: str, *, folder: Path | None = None) -> Path:
    """Return the local copy of a URL, downloading it the first time.

    A download that was cut off goes on where it stopped. The file's SHA-256 is recorded on first use and
    compared whenever the file is fetched or used again.

    Args:
        url: https, or http to this machine.
        folder: where files are kept; None is `downloads` in the cache.

    Returns:
        The file's path.

    Raises:
        DownloadError: the URL cannot be reached or is refused, or its content is not what it was before.
        OutputError: the cache cannot be written, or the disk is full.
    """
    _check_url(url)
    folder = folder or cache_dir() / "downloads"
    name = (
        f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{Path(urllib.parse.urlsplit(url).path).name[:80]}"
    )
    path, record = folder / name, folder / f"{name}.json"
    if not path.exists():
        _download(url, path)
    digest = sha256(path)
    known = _recorded(record)
    if known is None:
        write_bytes(record, json.dumps({"url": url, "sha256": digest}).encode())
    elif known != digest:
        path.unlink()
        raise DownloadError(
            f"{url} is not what was fetched before (SHA-256 {digest}, recorded {known}), so it was thrown away. "
            f"If the change is meant, delete {record} and try again."
        )
    return path


def forget(path: Path) -> None:
    """Delete a fetched file and its checksum, if `fetch` made them."""
    record = path.with_name(f"{path.name}.json")
    if record.exists():
        record.unlink()
        path.unlink(missing_ok=True)


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


def _recorded(record: Path) -> str | None:
    try:
        return str(json.loads(record.read_text("utf-8"))["sha256"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DownloadError(
            f"{record}, which holds a checksum, is damaged. Delete it and try again."
        ) from error


def _check_url(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    local = parts.hostname in ("127.0.0.1", "localhost", "::1")
    if not (parts.scheme == "https" or (parts.scheme == "http" and local)):
        raise DownloadError(f"{url} is refused: only https URLs are fetched.")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to URLs that could have been asked for."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        _check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, path: Path) -> None:
    partial = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        start = partial.stat().st_size if partial.exists() else 0
        total = _transfer(url, partial, start)
        if total is not None and partial.stat().st_size != total:
            raise DownloadError(f"{url} was cut off; run the same command again to go on.")
        os.replace(partial, path)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            # Nothing is left to send, or the file has become shorter: begin anew, and let the checksum decide.
            partial.unlink(missing_ok=True)
            return _download(url, path)
        raise DownloadError(f"{url} answered {error.code} {error.reason}; try again later.") from error
    except DownloadError:
        raise
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise DownloadError(
            f"{url} cannot be reached ({reason}); run the same command again to go on."
        ) from error
    except OSError as error:
        raise output_error(path, error) from error


def _transfer(url: str, partial: Path, start: int) -> int | None:
    """Append what is missing to `partial`; return the whole file's size if the server tells it."""
    request = urllib.request.Request(url, headers={"User-Agent": "maskgit"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    opener = urllib.request.build_opener(_Redirects)
    with opener.open(request, timeout=TIMEOUT_S) as answer:
        if answer.status != 206:  # the server sends it all, whatever was asked
            start = 0
        elif not (answer.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
            raise DownloadError(f"{url} answered with another part than was asked for; try again later.")
        length = answer.headers.get("Content-Length") or ""
        total = start + int(length) if re.fullmatch("[0-9]{1,18}", length) else None
        free = shutil.disk_usage(partial.parent).free
        if total is not None and total > MAX_BYTES:
            raise DownloadError(f"{url} has {total} bytes, more than the {MAX_BYTES} that are allowed.")
        if total is not None and total - start > free:
            raise DownloadError(
                f"{url} needs {total - start} bytes in {partial.parent}, where {free} are free."
            )
        with (
            partial.open("ab" if start else "wb") as file,
            bar(total=total, initial=start, unit="B", unit_scale=True, desc=partial.stem) as shown,
        ):
            while piece := answer.read(_PIECE):
                file.write(piece)
                shown.update(len(piece))
                if file.tell() > MAX_BYTES:
                    raise DownloadError(f"{url} sends more than the {MAX_BYTES} bytes that are allowed.")
    return total
