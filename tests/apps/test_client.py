"""The HTTP client: every method against a real server, and its patience against one that follows a script."""

import asyncio
import base64
import contextlib
import inspect
import io
import json
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from maskgit import MaskGIT, images
from maskgit.apps import client_calls
from maskgit.apps.client import AsyncClient, Client, Making, Pictures, Preview, RequestError
from maskgit.apps.serving import making, schemas
from maskgit.apps.serving.service import Limits
from maskgit.errors import ConfigError, ImageError, MaskGITError
from servers import in_thread, wait_for

KEY = "not-to-be-shown-5f2a"
TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
SECTION = TEXT.partition("## Python client")[2].partition("\n## ")[0]
PROGRAMS = re.findall(r"```py\n(.*?)```", SECTION, re.DOTALL)

PHOTO = Image.fromarray((np.random.default_rng(0).random((40, 50, 3)) * 255).astype("uint8"))
PAINTED = Image.fromarray((np.arange(40 * 50).reshape(40, 50) % 50 < 20).astype("uint8") * 255)


class Both:
    """A client of either kind, whose methods are waited for here."""

    def __init__(self, kind, url, **options) -> None:
        self.kind = kind
        self.make = lambda: kind(url, **options)

    def __getattr__(self, name):
        if self.kind is Client:

            def ask(*args, **kwargs):
                with self.make() as client:
                    answer = getattr(client, name)(*args, **kwargs)
                    return list(answer) if name.startswith("stream_") else answer

            return ask

        async def ask_async(args, kwargs):
            async with self.make() as client:
                answer = getattr(client, name)(*args, **kwargs)
                return [event async for event in answer] if name.startswith("stream_") else await answer

        return lambda *args, **kwargs: asyncio.run(ask_async(args, kwargs))


@pytest.fixture(scope="module")
def pipe():
    return MaskGIT.from_pretrained()


@pytest.fixture(scope="module")
def url():
    with in_thread(Limits(queue_size=8, max_batch=4), keys=(KEY,)) as (plain, _):
        yield str(plain.base_url)


@pytest.fixture(params=[Client, AsyncClient])
def kind(request):
    return request.param


@pytest.fixture
def client(kind, url):
    return Both(kind, url, api_key=KEY)


def same(first: Image.Image, second: Image.Image) -> None:
    """Check that pictures differ by a grey level at most."""
    assert first.mode == second.mode
    difference = np.asarray(first).astype(int) - np.asarray(second).astype(int)
    assert np.abs(difference).max() <= 1


# The client's methods and the pipeline's take the same arguments.
WORK = {
    "generate": (("frog",), {}),
    "edit": ((PHOTO, [(3, 3, 10, 10)], 3), {"rule": "official", "feather": 1.5, "start_step": 1}),
    "inpaint": ((PHOTO, PAINTED), {"dilate": 1, "share": 0.1}),
    "outpaint": ((PHOTO,), {"canvas": (48, 40), "position": (2, 1), "label": "ship"}),
}
SETTINGS = {"seed": 2, "steps": 2}


@pytest.mark.parametrize("command", WORK)
def test_answers_are_the_pipelines(client, pipe, command):
    args, options = WORK[command]
    options = options | SETTINGS | {"num_images": 2, "first_index": 1}
    answer = getattr(client, command)(*args, **options, return_tokens=True)
    wanted = getattr(pipe, command)(*args, **options)
    for picture, image in zip(answer.pictures, wanted.to_pil(), strict=True):
        same(picture.image, image)
    assert [picture.tokens for picture in answer.pictures] == wanted.tokens.tolist()
    assert [(picture.seed, picture.index) for picture in answer.pictures] == [(2, 1), (2, 2)]
    assert answer.model == "cifar10"
    assert answer.settings["steps"] == images.read_settings(answer.pictures[0].data)["steps"] == 2
    if command == "inpaint":
        assert answer.class_guess.number == wanted.class_guess.label


@pytest.mark.parametrize("command", WORK)
def test_streams_end_with_the_answer(client, command):
    args, options = WORK[command]
    *previews, last = getattr(client, f"stream_{command}")(*args, **options, **SETTINGS)
    assert previews
    assert all(isinstance(event, Preview) and event.image.mode == "RGB" for event in previews)
    assert isinstance(last, Pictures)
    assert last.pictures[0].data == getattr(client, command)(*args, **options, **SETTINGS).pictures[0].data


def test_tokens_classes_models_and_health(client, pipe):
    tokens = client.tokenize(PHOTO)
    wanted = pipe.reconstruct(PHOTO)
    assert tokens == wanted.tokens[0].tolist()
    same(client.detokenize(np.array(tokens).tolist()).images[0], wanted.to_pil()[0])
    rebuilt = client.reconstruct(PHOTO, format="webp", return_tokens=True).pictures[0]
    assert (rebuilt.media_type, rebuilt.tokens) == ("image/webp", tokens)
    assert Image.open(io.BytesIO(rebuilt.data)).format == "WEBP"
    assert [one.name for one in client.classes()] == list(pipe.class_names)
    assert [card.name for card in client.models()] == ["cifar10"]
    assert client.health() == "ready"


def test_pictures_come_as_paths_bytes_and_pil(client, tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    data = (tmp_path / "photo.png").read_bytes()
    sources = [PHOTO, data, tmp_path / "photo.png", str(tmp_path / "photo.png")]
    tokens = [client.tokenize(source) for source in sources]
    assert tokens == [tokens[0]] * 4
    cut_out = PHOTO.convert("RGBA")
    cut_out.putalpha(PAINTED.point(lambda value: 255 - value))
    made = client.inpaint(cut_out, "alpha", "dog", steps=2)
    assert made.images[0].size == PHOTO.size


@pytest.mark.parametrize("source", ["missing.png", "no\0name", 3, None])
def test_what_is_no_picture_is_not_sent(client, source):
    with pytest.raises(ImageError):
        client.tokenize(source)


@pytest.mark.parametrize(
    "settings", [{"seed": np.int64(3)}, {"temperature": float("nan")}, {"tables": {1, 2}}]
)
def test_what_is_no_json_value_is_not_sent(client, settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        client.generate("frog", **settings)
    with pytest.raises(ConfigError, match=next(iter(settings))):
        client.edit(PHOTO, [(3, 3, 10, 10)], "cat", **settings)


def test_a_name_that_looks_like_a_number_stays_one(client):
    for ask in (lambda: client.generate("3"), lambda: client.outpaint(PHOTO, left=8, label="3")):
        with pytest.raises(RequestError, match="'3'"):
            ask()


def test_the_servers_sentence_is_the_errors(client, kind, url):
    with pytest.raises(RequestError, match=r"frog") as caught:
        client.generate("frg")
    assert (caught.value.status, caught.value.kind) == (422, "invalid_request")
    assert isinstance(caught.value, MaskGITError)
    with pytest.raises(RequestError, match="steps") as caught:
        client.stream_generate("frog", steps=0)
    with pytest.raises(RequestError, match="Authorization") as caught:
        Both(kind, url, api_key="wrong").classes()
    assert (caught.value.status, caught.value.kind) == (401, "unauthorized")


def test_every_field_of_every_request_can_be_said():
    names = dict.fromkeys(("class_", "label"), "class")
    asked = {command: maker.schema for command, maker in making.MAKERS.items()}
    for command, schema in (asked | {"tokenize": schemas.Tokenize}).items():
        parameters = set(inspect.signature(getattr(client_calls, command)).parameters)
        if "making" in parameters:
            parameters = parameters - {"making"} | set(Making.__annotations__)
        # A client says these of itself: how long it waits, and by which method it was asked.
        wanted = set(schema.model_fields) - {"timeout", "stream"}
        assert {names.get(name, name) for name in parameters} == {names.get(name, name) for name in wanted}


def test_both_kinds_have_the_same_methods():
    for name in (*WORK, *(f"stream_{command}" for command in WORK), "reconstruct", "health"):
        first, second = getattr(Client, name), getattr(AsyncClient, name)
        assert first.__name__ == second.__name__ == name
        assert inspect.signature(first) == inspect.signature(second)
        assert first.__doc__ == second.__doc__ is not None


def test_a_crowd_gets_all_its_images_from_a_queue_of_two():
    with in_thread(Limits(queue_size=2, max_batch=2)) as (plain, service):
        with Client(str(plain.base_url), retries=50) as client, ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda seed: client.generate("cat", seed=seed, steps=2), range(8)))
        assert [answer.pictures[0].seed for answer in made] == list(range(8))
        assert service.stats.images == 8


def test_a_stream_that_is_left_ends_the_work():
    with in_thread(Limits(max_batch=2)) as (plain, service):
        url, made = str(plain.base_url), service.stats.images

        async def leave() -> None:
            async with AsyncClient(url) as client:
                events = client.stream_generate("cat", steps=256)
                assert isinstance(await anext(events), Preview)
                await events.aclose()

        with Client(url) as client:
            events = client.stream_generate("cat", steps=256)
            assert isinstance(next(events), Preview)
            events.close()
        asyncio.run(leave())
        wait_for(lambda: service.num_accepted == 0)
        assert made == service.stats.images


class Script(BaseHTTPRequestHandler):
    """Answers one request after the other as its server's list says, and notes what was asked."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append((time.monotonic(), self.headers, b""))
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.append((time.monotonic(), self.headers, body))
        self._answer()

    def _answer(self) -> None:
        step = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
        if step is None:
            self.close_connection = True
            return
        status, headers, body = step
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@contextlib.contextmanager
def scripted(*steps) -> Iterator[tuple[str, list]]:
    """Give the URL of a server that answers (status, headers, body), or hangs up at None; the last one for good."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Script)
    server.daemon_threads = True
    server.script, server.asked = list(steps), []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def fault(status: int, kind: str, **headers: str):
    body = json.dumps({"error": {"type": kind, "message": f"A sentence of {kind}."}}).encode()
    return status, headers, body


GOOD = (200, {}, b'{"classes": [{"number": 0, "name": "frog"}]}')
FULL = fault(429, "overloaded", **{"Retry-After": "1"})


def test_it_comes_again_when_it_is_told_to(kind):
    soon = formatdate(time.time() + 2, usegmt=True)
    stopping = fault(503, "unavailable", **{"Retry-After": soon})
    with scripted(FULL, stopping, GOOD) as (url, asked):
        assert Both(kind, url).classes()[0].name == "frog"
        times = [when for when, _, _ in asked]
    assert len(times) == 3
    assert times[1] - times[0] >= 1


@pytest.mark.parametrize("status", [400, 401, 404, 408, 413, 422, 500, 502, 504])
def test_other_errors_are_not_tried_again(status, kind):
    with scripted(fault(status, "some_kind", **{"Retry-After": "0"}), GOOD) as (url, asked):
        with pytest.raises(RequestError, match="A sentence of some_kind") as caught:
            Both(kind, url).classes()
        assert (caught.value.status, caught.value.kind, len(asked)) == (status, "some_kind", 1)


def test_lost_connections_are_tried_again(kind, monkeypatch):
    monkeypatch.setattr("maskgit.apps.client._FIRST_PAUSE", 0.01)
    with scripted(None, None, GOOD) as (url, asked):
        assert Both(kind, url).classes()
        assert len(asked) == 3
    with pytest.raises(RequestError, match="cannot be reached") as caught:
        Both(kind, url, retries=2).classes()
    assert caught.value.kind == "unreachable"
    assert isinstance(caught.value.__cause__, httpx.TransportError)


def test_its_patience_ends(kind):
    again = fault(429, "overloaded", **{"Retry-After": "0"})
    with scripted(again) as (url, asked):
        with pytest.raises(RequestError) as caught:
            Both(kind, url, retries=3).classes()
        assert (caught.value.status, len(asked)) == (429, 4)
    with scripted(fault(429, "overloaded", **{"Retry-After": "7200"})) as (url, asked):
        with pytest.raises(RequestError) as caught:
            Both(kind, url).generate("frog")
        assert (caught.value.retry_after, len(asked)) == (7200, 1)
    with scripted(fault(503, "unavailable"), GOOD) as (url, asked), pytest.raises(RequestError):
        Both(kind, url, retries=0).classes()
    not_ready = (503, {}, b'{"status": "not ready"}')
    with scripted(not_ready) as (url, asked):
        assert Both(kind, url).health() == "not ready"
        assert len(asked) == 1


def test_a_stream_that_breaks_is_not_begun_anew(kind):
    preview = {"step": 0, "index": 0, "image": base64.b64encode(images.png_bytes(PHOTO)).decode()}
    part = f"event: preview\ndata: {json.dumps(preview)}\n\nevent: something-new\ndata: {{}}\n\n".encode()
    failed = (
        b'event: error\ndata: {"error": {"type": "deadline", "message": "The request was not done."}}\n\n'
    )
    with scripted(FULL, (200, {}, part)) as (url, asked):
        with pytest.raises(RequestError, match="before its result"):
            Both(kind, url).stream_generate("frog")
        assert len(asked) == 2
        assert json.loads(asked[1][2]) == {"class": "frog", "timeout": 120.0, "stream": True}
    with scripted((200, {}, part + failed)) as (url, asked):
        with pytest.raises(RequestError, match="was not done") as caught:
            Both(kind, url).stream_generate("frog")
        assert (caught.value.kind, len(asked)) == ("deadline", 1)


def test_a_late_answer_is_an_error_of_its_own(kind, monkeypatch):
    monkeypatch.setattr("maskgit.apps.client._GRACE_SECONDS", 0.0)
    hang = threading.Event()
    monkeypatch.setattr(Script, "_answer", lambda self: hang.wait(30))
    with scripted(GOOD) as (url, asked):
        with pytest.raises(RequestError, match=r"within 0.2 seconds") as caught:
            Both(kind, url, timeout=0.2).classes()
        assert (caught.value.kind, len(asked)) == ("timeout", 1)
        hang.set()


@pytest.mark.parametrize(
    "answer",
    [
        (200, {}, b"<html>Welcome</html>"),
        (200, {}, b'{"model": "x", "settings": {}, "images": [{"image": "!", "media_type": "image/png"}]}'),
        (
            200,
            {},
            b'{"model": "x", "settings": {}, "images": [{"image": "aGk=", "media_type": "image/png"}]}',
        ),
        (200, {"Content-Encoding": "gzip"}, b"no gzip"),
        (302, {"Location": "http://127.0.0.1:1/"}, b""),
        (404, {}, b"<html>nothing here</html>"),
    ],
)
def test_answers_of_something_else(kind, answer):
    with scripted(answer) as (url, asked):
        with pytest.raises(RequestError) as caught:
            Both(kind, url).generate("frog")
        assert (caught.value.kind, len(asked)) == ("not_understood", 1)


def test_a_proxys_refusal_is_understood(kind):
    dropped = (429, {"Retry-After": "0"}, b"Request dropped due to backpressure.")
    with scripted(dropped) as (url, _), pytest.raises(RequestError, match="backpressure") as caught:
        Both(kind, url, retries=1).generate("frog")
    assert caught.value.kind == "overloaded"


def test_the_key_is_sent_and_never_shown(kind, monkeypatch):
    with scripted(GOOD, fault(401, "unauthorized")) as (url, asked):
        for number, options in enumerate(({"api_key": KEY}, {})):
            monkeypatch.setenv("MASKGIT_API_KEY", f" {KEY}\n" if number else "another")
            client = Both(kind, url, **options)
            said = [repr(client.make()), str(vars(client.make()))]
            try:
                client.classes()
            except RequestError as error:
                said += [repr(error), "".join(traceback.format_exception(error))]
            assert not [text for text in said if KEY in text]
        assert [headers["authorization"] for _, headers, _ in asked] == [f"Bearer {KEY}"] * 2
    with scripted(None) as (url, _), pytest.raises(RequestError) as caught:
        Both(kind, url, api_key=KEY, retries=0).classes()
    assert KEY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("key", [f"{KEY}\r\nx: y", f"{KEY} and more", f"{KEY}é"])
def test_a_key_that_cannot_be_sent_is_not_repeated(kind, key):
    with pytest.raises(ConfigError) as caught:
        kind("http://127.0.0.1:8000", api_key=key)
    assert KEY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "localhost:8000", "ftp://x", "http://", "http://me:secret@x", "http://x:y", 3]
)
def test_a_url_that_is_none(kind, url):
    with pytest.raises(ConfigError, match="like http://") as caught:
        kind(url)
    assert "secret" not in str(caught.value)


def test_a_server_below_a_path(kind):
    with scripted(GOOD) as (url, _):
        client = kind(f"{url}/maskgit/")
        assert str(client._http.build_request("GET", "/v1/classes").url) == f"{url}/maskgit/v1/classes"


def test_the_client_does_not_load_torch():
    code = "import sys, maskgit.apps.client; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("number", range(2))
def test_the_documents_programs(number, url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASKGIT_API_KEY", KEY)
    PHOTO.save("photo.png")
    program = PROGRAMS[number].replace("http://127.0.0.1:8000", url)
    exec(compile(program, "docs/serving.md", "exec"), {"__name__": "__main__"})
    names = {path.name for path in tmp_path.glob("*.png")} - {"photo.png"}
    expected = [{"frog-0.png", "frog-1.png", "ship.png", *(f"ship-{i}.png" for i in range(4))}, {"horse.png"}]
    assert names == expected[number]
    assert ("unicorn" if number == 0 else "Preview") in capsys.readouterr().out
