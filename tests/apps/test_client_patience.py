"""The HTTP client when something goes wrong: what it tries again, what it says, what it never shows."""

import base64
import json
import threading
import time
import traceback
from email.utils import formatdate

import httpx
import numpy as np
import pytest
from PIL import Image

from clients import Both, Script, scripted
from maskgit import images
from maskgit.apps.client.client import AsyncClient, Client, RequestError

KEY = "not-to-be-shown-5f2a"
PHOTO = Image.fromarray((np.random.default_rng(0).random((40, 50, 3)) * 255).astype("uint8"))


@pytest.fixture(params=[Client, AsyncClient])
def kind(request):
    return request.param


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
    monkeypatch.setattr("maskgit.apps.client.client._FIRST_PAUSE", 0.01)
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
    preview = {"step": 0, "index": 0, "image": base64.b64encode(images.encode(PHOTO)).decode()}
    part = f"event: preview\ndata: {json.dumps(preview)}\n\nevent: something-new\ndata: {{}}\n\n".encode()
    failed = (
        b'event: error\ndata: {"error": {"type": "deadline", "message": "The request was not done."}}\n\n'
    )
    with scripted(FULL, (200, {}, part)) as (url, asked):
        with pytest.raises(RequestError, match="before the result"):
            Both(kind, url).stream_generate("frog")
        assert len(asked) == 2
        assert json.loads(asked[1][2]) == {"class": "frog", "timeout": 120.0, "stream": True}
    with scripted((200, {}, part + failed)) as (url, asked):
        with pytest.raises(RequestError, match="was not done") as caught:
            Both(kind, url).stream_generate("frog")
        assert (caught.value.kind, len(asked)) == ("deadline", 1)


def test_a_late_answer_is_an_error_of_its_own(kind, monkeypatch):
    monkeypatch.setattr("maskgit.apps.client.client._GRACE_SECONDS", 0.0)
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


def test_a_server_below_a_path(kind):
    with scripted(GOOD) as (url, _):
        client = kind(f"{url}/maskgit/")
        assert str(client._http.build_request("GET", "/v1/classes").url) == f"{url}/maskgit/v1/classes"
