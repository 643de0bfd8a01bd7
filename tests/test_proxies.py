"""Proxies in the environment: loopback never goes through one, and what cannot be used is told in a sentence."""

import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from clients import Both, scripted
from maskgit.apps.client.client import AsyncClient, Client, RequestError
from maskgit.errors import ConfigError, DownloadError
from maskgit.foundation import download
from maskgit.foundation.proxies import is_loopback, proxy_for

KEY = "not-for-proxies-93b1"
CLASSES = (200, {"content-type": "application/json"}, b'{"classes":[]}')
# Nobody listens there.
NOWHERE = "http://127.0.0.1:9"
SOCKS = ("socks5://127.0.0.1:9", "socks5h://127.0.0.1:9")
SPELLINGS = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY", "https_proxy")


@pytest.fixture(params=[Client, AsyncClient])
def kind(request):
    return request.param


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST", "localhost.", "mg.localhost", "127.0.0.1", "127.255.0.3", "127.1", "0x7f000001",
     "2130706433", "::1", "[::1]", "0:0:0:0:0:0:0:1", "::ffff:127.0.0.1", "0.0.0.0", "::"],
)  # fmt: skip
def test_this_machine_is_known_however_it_is_written(host):
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "localhost.example.org",
        "notlocalhost",
        "128.0.0.1",
        "10.0.0.1",
        "fe80::1",
        "127.0.0.1.nip.io",
        "ünder",
    ],
)
def test_other_hosts_are_not_this_machine(host):
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "0.0.0.0", "[::ffff:127.0.0.1]"])
def test_the_client_asks_this_machine_itself(kind, host, monkeypatch):
    with scripted(CLASSES) as (url, asked), scripted((502, {}, b"")) as (proxy, overheard):
        for variable in SPELLINGS:
            monkeypatch.setenv(variable, proxy)
        there = url.replace("127.0.0.1", host)
        assert Both(kind, there, api_key=KEY, retries=0).classes() == []
    assert asked[0][1]["authorization"] == f"Bearer {KEY}"
    assert not overheard


@pytest.mark.parametrize("no_proxy", ["", "example.org, ,::1,[::1],10.0.0.0/8,[fd00::]/8,*.example.org:80,]"])
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "all_proxy"])
def test_the_client_asks_others_through_the_proxy(kind, variable, no_proxy, monkeypatch):
    with scripted(CLASSES) as (proxy, asked):
        monkeypatch.setenv(variable, proxy.removeprefix("http://"))
        monkeypatch.setenv("NO_PROXY", no_proxy)
        assert Both(kind, "http://maskgit.invalid:8000", retries=0).classes() == []
    assert asked[0][1]["host"] == "maskgit.invalid:8000"


@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_what_no_proxy_names_goes_past_the_proxy(kind, name, monkeypatch):
    with scripted(CLASSES) as (proxy, asked):
        monkeypatch.setenv("HTTP_PROXY", proxy)
        monkeypatch.setenv(name, "other, .invalid")
        with pytest.raises(RequestError, match="cannot be reached"):
            Both(kind, "http://maskgit.invalid:8000", retries=0).classes()
    assert not asked


@pytest.mark.parametrize(
    ("url", "no_proxy"),
    [
        ("http://10.1.2.3:8000", "192.168.0.0/16,10.0.0.0/8"),
        ("http://10.1.2.3:8000", "10.1.2.3"),
        ("http://maskgit.invalid:8000", "maskgit.invalid"),
        ("http://maskgit.invalid:8000", "maskgit.invalid:8000"),
        ("http://maskgit.invalid:8000", "*"),
        ("http://[fd00::5]:8000", "fd00::/8"),
        ("http://[fd00::5]:8000", "[fd00::5]"),
    ],
)
def test_no_proxy_names_hosts_and_networks(url, no_proxy, monkeypatch):
    monkeypatch.setenv("http_proxy", NOWHERE)
    assert proxy_for(url) == NOWHERE
    monkeypatch.setenv("no_proxy", no_proxy)
    assert proxy_for(url) is None


@pytest.mark.parametrize(("variable", "proxy"), [("ALL_PROXY", SOCKS[0]), ("http_proxy", SOCKS[1])])
def test_a_proxy_that_needs_a_package_is_a_sentence(kind, proxy, variable, monkeypatch):
    monkeypatch.setenv(variable, proxy)
    # As where it is not installed.
    monkeypatch.setitem(sys.modules, "socksio", None)
    with pytest.raises(ConfigError, match=r"needs the package socksio.*httpx\[socks\].*ALL_PROXY"):
        kind("http://maskgit.invalid:8000")
    with scripted(CLASSES) as (url, _):
        assert Both(kind, url).classes() == []


@pytest.mark.parametrize(
    "proxy", ["http://", "http://me:hidden@[", "ftp://me:hidden@proxy:21", "http://me:hidden@proxy:x"]
)
def test_a_proxy_that_is_none_is_a_sentence_without_its_password(kind, proxy, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(ConfigError, match="proxy") as caught:
        kind("http://maskgit.invalid:8000")
    assert "hidden" not in "".join(traceback.format_exception(caught.value))
    with scripted(CLASSES) as (url, _):
        assert Both(kind, url).classes() == []


def test_downloads_from_this_machine_pass_the_proxy_by(tmp_path, monkeypatch):
    with scripted((200, {}, b"file")) as (url, _), scripted((502, {}, b"")) as (proxy, overheard):
        for variable in SPELLINGS:
            monkeypatch.setenv(variable, proxy)
        for host in ("127.0.0.1", "localhost", "127.1"):
            there = url.replace("127.0.0.1", host)
            assert download.fetch(f"{there}/model", folder=tmp_path).read_bytes() == b"file"
    assert not overheard


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "ALL_PROXY", "all_proxy"])
def test_downloads_from_elsewhere_go_through_the_proxy(variable, tmp_path, monkeypatch):
    with scripted((502, {}, b"")) as (proxy, _):
        monkeypatch.setenv(variable, proxy)
        # The script knows no CONNECT, and says so.
        with pytest.raises(DownloadError, match=r"Tunnel connection failed: 501"):
            download.fetch("https://models.invalid/model", folder=tmp_path)


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "ALL_PROXY", "all_proxy"])
def test_downloads_name_a_proxy_that_they_cannot_use(variable, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, SOCKS[0])
    with pytest.raises(DownloadError, match=r"only through HTTP proxies.*HTTPS_PROXY"):
        download.fetch("https://models.invalid/model", folder=tmp_path)


@pytest.mark.parametrize("command", ["app", "serve"])
def test_a_server_needs_no_proxy(command, tmp_path):
    (tmp_path / "socksio.py").write_text("raise ImportError('not there')")
    environment = {"ALL_PROXY": SOCKS[0], "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    server = subprocess.Popen(
        [sys.executable, "-m", "maskgit", command, "--port", "0"],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert any("http://" in line for line in server.stdout)
    finally:
        server.kill()
        server.communicate()


def test_the_containers_health_check_asks_this_machine_itself():
    text = (Path(__file__).parents[1] / "Dockerfile").read_text("utf-8")
    program = text.partition('CMD ["python", "-c", "')[2].partition('"]')[0]
    with scripted((200, {}, b"")) as (url, asked), scripted((502, {}, b"")) as (proxy, overheard):
        program = program.replace("http://127.0.0.1:8000", url)
        env = os.environ | {"HTTP_PROXY": proxy, "http_proxy": proxy}
        subprocess.run([sys.executable, "-c", program], env=env, check=True)
    assert asked
    assert not overheard
