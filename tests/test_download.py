"""Downloads from a server on this machine: resumed, checked, refused."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from maskgit.errors import DownloadError, OutputError
from maskgit.foundation import download, files

CONTENT = bytes(range(256)) * 4000


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `content`, with ranges; `cut` makes it stop in the middle."""

    content = CONTENT
    cut: int | None = None
    failing = False
    # What every request is answered with, if not None.
    code: int | None = None
    # Called before the content is sent.
    before = staticmethod(lambda: None)
    ranges: list[str | None] = []  # noqa: RUF012

    def do_GET(self):
        if self.failing:
            return self.send_error(503)
        if self.path == "/missing":
            return self.send_error(404)
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "http://example.com/x")
            return self.end_headers()
        asked = self.headers.get("Range")
        type(self).ranges.append(asked)
        if self.code is not None:
            return self.send_error(self.code)
        self.before()
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        body = self.content[start:]
        if start >= len(self.content):
            return self.send_error(416)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        self.send_header("Content-Length", str(2**40 if self.path == "/huge" else len(body)))
        self.end_headers()
        self.wfile.write(body[: self.cut])
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Handler.content, Handler.cut, Handler.ranges, Handler.code = CONTENT, None, [], None
    Handler.before = staticmethod(lambda: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_file_is_fetched_once_and_its_checksum_kept(server, tmp_path):
    path = download.fetch(f"{server}/model", folder=tmp_path)
    assert path.read_bytes() == CONTENT
    record = json.loads(Path(f"{path}.json").read_text())
    assert record == {"url": f"{server}/model", "sha256": download.sha256(path)}
    assert download.fetch(f"{server}/model", folder=tmp_path) == path
    assert len(Handler.ranges) == 1


def test_a_cut_off_download_goes_on_where_it_stopped(server, tmp_path):
    Handler.cut = 300_000
    with pytest.raises(DownloadError, match="was interrupted"):
        download.fetch(f"{server}/model", folder=tmp_path)
    assert [p.suffix for p in tmp_path.iterdir()] == [".part"]
    Handler.cut = None
    assert download.fetch(f"{server}/model", folder=tmp_path).read_bytes() == CONTENT
    assert Handler.ranges == [None, "bytes=300000-"]
    assert not list(tmp_path.glob("*.part"))


def test_a_complete_part_and_a_passing_failure_lose_nothing(server, tmp_path):
    path = download.fetch(f"{server}/model", folder=tmp_path)
    path.rename(f"{path}.part")
    Handler.failing = True
    with pytest.raises(DownloadError, match="responded with 503"):
        download.fetch(f"{server}/model", folder=tmp_path)
    assert Path(f"{path}.part").read_bytes() == CONTENT
    Handler.failing = False
    assert download.fetch(f"{server}/model", folder=tmp_path).read_bytes() == CONTENT


def test_changed_content_is_thrown_away(server, tmp_path):
    path = download.fetch(f"{server}/model", folder=tmp_path)
    path.unlink()
    Handler.content = CONTENT[::-1]
    with pytest.raises(DownloadError, match="not the file that was downloaded before"):
        download.fetch(f"{server}/model", folder=tmp_path)
    assert not path.exists()
    Handler.content = CONTENT
    download.fetch(f"{server}/model", folder=tmp_path)
    damaged = bytearray(CONTENT)
    damaged[5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DownloadError, match="not the file that was downloaded before"):
        download.fetch(f"{server}/model", folder=tmp_path)


@pytest.mark.parametrize(
    "url", ["http://example.com/x", "file:///etc/passwd", "ftp://example.com/x", "nonsense", ""]
)
def test_only_https_is_fetched(url, tmp_path):
    with pytest.raises(DownloadError, match="only https"):
        download.fetch(url, folder=tmp_path)


def test_failures_are_told_and_leave_no_file(server, tmp_path, monkeypatch):
    with pytest.raises(DownloadError, match="responded with 404"):
        download.fetch(f"{server}/missing", folder=tmp_path)
    with pytest.raises(DownloadError, match="only https"):
        download.fetch(f"{server}/away", folder=tmp_path)
    with pytest.raises(DownloadError, match="more than the limit"):
        download.fetch(f"{server}/huge", folder=tmp_path)
    with pytest.raises(DownloadError, match="cannot be reached"):
        download.fetch("http://127.0.0.1:1/x", folder=tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 1000, 0))
    with pytest.raises(DownloadError, match="where only 0 are free"):
        download.fetch(f"{server}/model", folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_cache_is_told(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        download.fetch(f"{server}/model", folder=tmp_path / "file" / "folder")


FETCH = """
import sys
from pathlib import Path
from maskgit.foundation import download, files
print(download.fetch(sys.argv[1], folder=Path(sys.argv[2])))
"""


def fetching(url, folder):
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, url, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [2, 3])
def test_processes_that_want_one_file_wait_for_one_download(number, server, tmp_path):
    asked, others_wait = threading.Event(), threading.Event()

    def hold():
        asked.set()
        assert others_wait.wait(120)

    Handler.before = staticmethod(hold)
    first = fetching(f"{server}/model", tmp_path)
    assert asked.wait(120)
    others = [fetching(f"{server}/model", tmp_path) for _ in range(number - 1)]
    said = [other.stderr.readline() for other in others]
    others_wait.set()
    for line in said:
        assert f"Waiting for the download of {server}/model, by process {first.pid}" in line
    for process in (first, *others):
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert Path(out.strip()).read_bytes() == CONTENT
    assert Handler.ranges == [None]
    assert {p.suffix for p in tmp_path.iterdir()} == {"", ".json"}
    assert download.fetch(f"{server}/model", folder=tmp_path).read_bytes() == CONTENT


def test_a_download_whose_process_was_killed_is_gone_on_with(server, tmp_path):
    asked, killed = threading.Event(), threading.Event()

    def hold():
        asked.set()
        assert killed.wait(120)

    Handler.before = staticmethod(hold)
    first = fetching(f"{server}/model", tmp_path)
    assert asked.wait(120)
    first.kill()
    first.communicate()
    killed.set()
    Handler.before = staticmethod(lambda: None)
    assert download.fetch(f"{server}/model", folder=tmp_path).read_bytes() == CONTENT


def test_a_server_that_always_answers_416_is_asked_twice(server, tmp_path):
    Handler.code = 416
    with pytest.raises(DownloadError, match="responded with 416"):
        download.fetch(f"{server}/model", folder=tmp_path)
    assert Handler.ranges == [None]
    name = download.cached(f"{server}/model", tmp_path)
    name.with_name(f"{name.name}.part").write_bytes(CONTENT[:10])
    with pytest.raises(DownloadError, match="responded with 416"):
        download.fetch(f"{server}/model", folder=tmp_path)
    assert Handler.ranges == [None, "bytes=10-", None]
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_read_where_nothing_can_be_written(server, tmp_path, monkeypatch):
    path = download.fetch(f"{server}/model", folder=tmp_path)

    def refuse(*_, **__):
        raise AssertionError("nothing is to be written")

    for name in ("mkdir", "replace", "open", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    assert download.fetch(f"{server}/model", folder=tmp_path) == path


def test_a_user_without_a_home_is_told_which_variable_to_set(tmp_path, monkeypatch):
    import pwd

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "MASKGIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(OutputError, match="MASKGIT_CACHE"):
        download.fetch("https://example.com/x")
    (tmp_path / "file").touch()
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OutputError, match=r"cannot be written.*MASKGIT_CACHE"):
        download.fetch("https://example.com/x")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MASKGIT_CACHE", "~/cache")
    assert files.cache_dir() == tmp_path / "cache"
