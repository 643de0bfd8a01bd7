"""The page as a server gives it; tests/apps/test_webui_browser.py uses it."""

import re
import signal
import subprocess
import sys
import urllib.request

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from maskgit.apps.cli.commands import main
from maskgit.apps.serving import samples
from maskgit.apps.serving.app import create_app
from maskgit.apps.serving.schemas import Samples
from maskgit.apps.serving.server import bind
from maskgit.apps.serving.service import Service
from maskgit.apps.webui.page import add_page, mount

PATIENCE = 120


@pytest.fixture(scope="module")
def client(tiny):
    return TestClient(create_app(Service(tiny, "tiny"), page=add_page), base_url="http://localhost")


def test_every_file_of_the_page_is_there_and_asks_nobody_else(client):
    index = client.get("/").text
    names = re.findall(r'(?:src|href)="(page/[^"]+)"', index)
    seen = set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        answer = client.get(f"/{name}")
        assert answer.status_code == 200
        assert not re.findall(r"https?://(?!www\.w3\.org/)", answer.text)
        names += [f"page/{other}" for other in re.findall(r'from "\./([^"]+)"', answer.text)]
    assert len(seen) >= 6
    assert client.get("/page/nothing.js").status_code == 404
    assert client.get("/page/index.html").status_code == 404


def test_the_page_forbids_other_scripts_and_is_asked_for_once(client):
    answer = client.get("/page/app.js")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    again = client.get("/page/app.js", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_a_path_cannot_break_out_of_the_page(tiny):
    app = create_app(Service(tiny, "tiny"), page=add_page)
    hostile = TestClient(app, base_url="http://localhost", root_path='/"><script>')
    assert "<script>" not in hostile.get("/").text.split("<title>")[0]


def test_a_server_of_ones_own_has_the_page_below_its_routes(tiny):
    app = FastAPI()

    @app.get("/own")
    def own() -> str:
        return "own"

    with TestClient(mount(app, tiny, "tiny", path="/pictures"), base_url="http://localhost") as client:
        assert client.get("/own").json() == "own"
        assert '<base href="/pictures/">' in client.get("/pictures/").text
        assert client.get("/pictures/v1/models").json()["models"][0]["name"] == "tiny"


def test_samples_are_written_and_listed(tiny, tmp_path):
    written = samples.write(tiny, tmp_path)
    assert len(written.forming) == samples.NUM_FORMING
    app = create_app(Service(tiny, "tiny", samples=tmp_path), page=add_page)
    client = TestClient(app, base_url="http://localhost")
    assert Samples.model_validate(client.get("/v1/samples").json()) == written
    assert client.get("/v1/samples/classes.webp").headers["content-type"] == "image/webp"
    assert client.get("/v1/samples/samples.json").status_code == 404
    (tmp_path / samples.ABOUT).write_text("{")
    assert client.get("/v1/samples").json()["columns"] is None


def test_a_model_without_samples_says_so(client):
    assert client.get("/v1/samples").json() == {"columns": None, "frames": 0, "forming": []}
    assert client.get("/v1/samples/forming.webp").status_code == 404


def test_the_port_that_is_taken_is_told_before_the_model_is_loaded(capsys):
    with bind("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert main(["app", "--port", port, "--model", "cifar10"]) != 0
    assert "choose another --port or --host" in capsys.readouterr().err


def test_the_command_says_where_it_is_and_ends_quietly():
    command = [sys.executable, "-m", "maskgit", "app", "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline().startswith("loading the model cifar10")
        found = re.match(r"(http://127\.0\.0\.1:\d+)  \(Ctrl-C", running.stdout.readline())
        assert found
        # A tab that is open keeps its connection.
        with urllib.request.urlopen(found[1], timeout=PATIENCE) as answer:
            assert b"MaskGIT" in answer.read()
            running.send_signal(signal.SIGINT)
            rest = running.stdout.read()
        running.wait(PATIENCE)
    assert "Traceback" not in rest
    assert len(rest) < 80
