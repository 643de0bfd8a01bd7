"""What the server refuses: bad values and pictures, bodies that are too large or too slow, missing keys."""

import asyncio
import base64
import contextlib
import io
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import ServerState

from maskgit import MaskGIT, images
from maskgit.apps.serving import schemas
from maskgit.apps.serving.app import create_app
from maskgit.apps.serving.connections import Patient
from maskgit.apps.serving.handlers import MAKERS
from maskgit.apps.serving.middleware import BodyGate, read_keys
from maskgit.apps.serving.server import configured
from maskgit.apps.serving.service import Limits, Service
from maskgit.errors import ConfigError
from servers import in_thread

LIMITS = Limits(max_batch=4, max_images=4, max_pixels=100_000, max_body=300_000, body_seconds=1.0)
KEYS = ("first-key-0123456789", "second-key-987654321")


@pytest.fixture(scope="module")
def client():
    with in_thread(LIMITS) as (made, _):
        yield made


def png(picture) -> bytes:
    return images.encode(picture)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


PHOTO = Image.fromarray((np.random.default_rng(0).random((40, 50, 3)) * 255).astype("uint8"))
GENERATE = {"class": "frog", "seed": 5, "steps": 3}


TOO_MANY_PIXELS = Image.new("1", (1000, 101))
ANIMATED = io.BytesIO()
PHOTO.save(ANIMATED, "GIF", save_all=True, append_images=[PHOTO.rotate(90)])
BOX = {"boxes": [[0, 0, 8, 8]], "class": "cat"}
BAD = {
    "no JSON": ("generate", {"content": b'{"class": '}, 422, "JSON"),
    "deep JSON": ("generate", {"content": b"[" * 50_000}, 422, "JSON"),
    "a list": ("generate", {"json": [1]}, 422, "object"),
    "another type": (
        "generate",
        {"content": b"x", "headers": {"content-type": "text/plain"}},
        415,
        "text/plain",
    ),
    "no class": ("generate", {"json": {}}, 422, "class"),
    "unknown class": ("generate", {"json": {"class": "unicorn"}}, 422, "Unknown class"),
    "class of another type": ("generate", {"json": {"class": True}}, 422, "class"),
    "class out of range": ("generate", {"json": {"class": 10**30}}, 422, "class"),
    "unknown field": ("generate", {"json": {"class": 1, "image_url": "http://x"}}, 422, "image_url"),
    "infinite": ("generate", {"content": b'{"class": 1, "temperature": Infinity}'}, 422, "temperature"),
    "negative seed": ("generate", {"json": {"class": 1, "seed": -1}}, 422, "seed"),
    "too large a seed": ("generate", {"json": {"class": 1, "seed": 2**64}}, 422, "seed"),
    "too many images": ("generate", {"json": {"class": 1, "num_images": 5}}, 422, "num_images"),
    "too many steps": ("generate", {"json": {"class": 1, "steps": 257}}, 422, "steps"),
    "unknown policy": ("generate", {"json": {"class": 1, "policy": "haltn"}}, 422, "halton"),
    "unknown option": ("generate", {"json": {"class": 1, "policy_options": {"x": 1}}}, 422, "x"),
    "wrong tables": ("generate", {"json": {"class": 1, "tables": {"mask_ratio": [2.0]}}}, 422, "mask_ratio"),
    "two images as one": (
        "generate",
        {"json": {"class": 1, "num_images": 2}, "headers": {"accept": "image/png"}},
        422,
        "one image",
    ),
    "no base64": ("edit", {"json": BOX | {"image": "../../etc/passwd"}}, 422, "base64"),
    "a path as a mask": (
        "inpaint",
        {"json": {"image": b64(png(PHOTO)), "mask": "/etc/passwd"}},
        422,
        "base64",
    ),
    "an address": ("edit", {"json": BOX | {"image": "https://example.org/a.png"}}, 422, "base64"),
    "no picture": ("edit", {"json": BOX | {"image": b64(b"hello")}}, 422, "not a picture"),
    "empty picture": ("edit", {"json": BOX | {"image": ""}}, 422, "empty"),
    "truncated": ("edit", {"json": BOX | {"image": b64(png(PHOTO)[:-900])}}, 422, "damaged or cut short"),
    "animated": ("edit", {"json": BOX | {"image": b64(ANIMATED.getvalue())}}, 422, "animated"),
    "a bomb": ("edit", {"json": BOX | {"image": b64(png(TOO_MANY_PIXELS))}}, 413, "101,000|1000 × 101"),
    "a bomb as a mask": (
        "inpaint",
        {"json": {"image": b64(png(PHOTO)), "mask": b64(png(TOO_MANY_PIXELS))}},
        413,
        "1000 × 101",
    ),
    "large results": ("outpaint", {"json": {"image": b64(png(PHOTO)), "left": 5000}}, 413, "results"),
    "large canvas": (
        "outpaint",
        {"json": {"image": b64(png(PHOTO)), "canvas": [10**9, 10**9]}},
        413,
        "results",
    ),
    "box outside": (
        "edit",
        {"json": {"image": b64(png(PHOTO)), "boxes": [[0, 0, 99, 9]], "class": 1}},
        422,
        "box",
    ),
    "no boxes": ("edit", {"json": {"image": b64(png(PHOTO)), "boxes": [], "class": 1}}, 422, "boxes"),
    "box of three": (
        "edit",
        {"json": {"image": b64(png(PHOTO)), "boxes": [[1, 2, 3]], "class": 1}},
        422,
        "boxes",
    ),
    "start beyond": (
        "edit",
        {"json": BOX | {"image": b64(png(PHOTO)), "steps": 3, "start_step": 3}},
        422,
        "start_step",
    ),
    "field twice": (
        "edit",
        {"files": [("image", png(PHOTO)), ("class", (None, "1")), ("class", (None, "2"))]},
        422,
        "twice",
    ),
    "file as a field": ("edit", {"data": {"image": "x"}, "files": {"boxes": b"[[0,0,8,8]]"}}, 422, "image"),
    "broken form": (
        "edit",
        {"content": b"--x\r\nbad", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        422,
        "",
    ),
    "no boundary": (
        "edit",
        {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
        422,
        "form",
    ),
    "tokens of another size": ("detokenize", {"json": {"tokens": [[1, 2], [3, 4]]}}, 422, "8 rows"),
    "tokens beyond": ("detokenize", {"json": {"tokens": [[512] * 8] * 8}}, 422, "512"),
    "18,000 boxes": (
        "edit",
        {"content": b'{"boxes": [' + b"[0,0,8,8]," * 18_000 + b"[0,0,8,8]]}"},
        422,
        "256 items",
    ),
    "many values": ("edit", {"content": b"[" + b"0," * 120_000 + b"0]"}, 422, "105,536 values"),
    "boxes that are texts": ("edit", {"content": b'{"boxes": [' + b'"",' * 60_000 + b'""]}'}, 422, "texts"),
    "wrong boxes": ("edit", {"content": b'{"boxes": [' + b"0," * 60_000 + b"0]}"}, 422, "boxes.0"),
    "more boxes than a mask": (
        "edit",
        {"json": BOX | {"image": "", "boxes": [[0, 0, 8, 8]] * 257}},
        422,
        "256",
    ),
    "unknown keys": ("edit", {"json": {f"k{number}": 1 for number in range(9000)}}, 422, "texts"),
    "a long class": ("generate", {"json": {"class": "x" * 150_000}}, 422, "200 characters"),
    "a long key": ("generate", {"json": {"x" * 150_000: 1}}, 422, "xxx"),
    "a long policy": ("generate", {"json": {"class": 1, "policy": "x" * 150_000}}, 422, "100 characters"),
    "a long option": (
        "generate",
        {"json": {"class": 1, "policy_options": {"a": "x" * 150_000}}},
        422,
        "policy",
    ),
    "many options": (
        "generate",
        {"json": {"class": 1, "policy_options": {f"k{i}": i for i in range(99)}}},
        422,
        "16",
    ),
    "a long number": ("generate", {"content": b'{"class": ' + b"9" * 150_000 + b"}"}, 422, ""),
    "a long table": (
        "generate",
        {"json": {"class": 1, "tables": {"mask_ratio": [0.5] * 10_001}}},
        422,
        "10000",
    ),
    "many rows": ("detokenize", {"json": {"tokens": [[1]] * 257}}, 422, "256"),
    "a long row": ("detokenize", {"json": {"tokens": [[1] * 257]}}, 422, "256"),
    "an endless timeout": ("generate", {"json": GENERATE | {"timeout": 1e300}}, 422, "86400"),
    "a far box": (
        "edit",
        {"json": BOX | {"image": b64(png(PHOTO)), "boxes": [[10**20, 0, 8, 8]]}},
        422,
        "boxes",
    ),
    "a form of boxes": (
        "edit",
        {"data": {"boxes": "[" + '"",' * 60_000 + '""]'}, "files": {"image": b""}},
        422,
        "texts",
    ),
    "zero timeout": ("generate", {"json": GENERATE | {"timeout": 0}}, 422, "timeout"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_told_in_a_sentence(client, name):
    command, request, status, words = BAD[name]
    headers = {"content-type": "application/json"} if "content" in request else {}
    request = request | {"headers": headers | request.get("headers", {})}
    answer = client.post(f"/v1/{command}", **request)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert any(word in error["message"] for word in words.split("|")), error
    assert error["message"].endswith((".", "?"))
    assert len(error["message"]) < 800
    assert "Traceback" not in error["message"]


@pytest.mark.parametrize("form", [False, True])
def test_health_is_answered_while_a_body_is_parsed(client, form, monkeypatch):
    parsing, go_on = threading.Event(), threading.Event()
    name = "model_validate" if form else "model_validate_json"
    validate = getattr(schemas.Edit, name)

    def waiting(*args):
        parsing.set()
        assert go_on.wait(120)
        return validate(*args)

    monkeypatch.setattr(schemas.Edit, name, waiting)
    request = {"data": {"boxes": "[]"}, "files": {"image": b"x"}} if form else {"json": {}}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/v1/edit", **request)
        assert parsing.wait(120)
        assert client.get("/healthz").status_code == 200
        go_on.set()
        assert answer.result().status_code == 422


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/models"])
def test_the_head_of_an_answer_can_be_asked_for(client, path):
    answer = client.head(path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == client.get(path).headers["content-length"]


def bounded(schema: dict) -> bool:
    """Return whether JSON of a schema has a largest size."""
    kinds = schema.get("anyOf") or [schema]
    if len(kinds) > 1:
        return all(bounded(kind) for kind in kinds)
    if (
        "enum" in schema
        or "const" in schema
        or "contentEncoding" in schema
        or schema["type"] in ("boolean", "null")
    ):
        return True
    if schema["type"] in ("integer", "number"):
        return {"minimum", "exclusiveMinimum"} & set(schema) and {"maximum", "exclusiveMaximum"} & set(schema)
    if schema["type"] == "string":
        return "maxLength" in schema
    if schema["type"] == "array":
        return "maxItems" in schema and bounded(schema["items"])
    values, keys = schema["additionalProperties"], schema["propertyNames"]
    return "maxProperties" in schema and bounded(values) and bounded({"type": "string"} | keys)


def test_everything_that_a_request_may_hold_has_a_bound():
    for schema in (*(maker.schema for maker in MAKERS.values()), schemas.Tokenize):
        described = schema.model_json_schema()
        assert described["additionalProperties"] is False
        for name, field in described["properties"].items():
            # The server's own limits bound a mask, a picture like any other.
            assert name == "mask" or bounded(field), (schema, name, field)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/generate", 405), ("GET", "/v1/../../etc/passwd", 404), ("POST", "/v1/%2e%2e/x", 404)],
)
def test_other_paths_and_methods(client, method, path, status):
    answer = client.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"type", "message"}


def raw(client: httpx.Client, head: str, parts, wait: float = 120.0) -> bytes:
    """Send bytes as they are, and return all that comes back until the server ends the connection."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=wait) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode())
        try:
            for part in parts:
                connection.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = b""
        while data := connection.recv(65536):
            answer += data
        return answer


HEAD = "POST /v1/edit HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"
MEGABYTE = b"x" * 2**20


def test_100_megabytes_with_a_length_are_refused(client):
    answer = raw(client, f"{HEAD}Content-Length: {100 * 2**20}\n\n", [MEGABYTE] * 100)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"300,000 bytes" in answer


def test_100_megabytes_without_a_length_are_refused(client):
    chunk = b"%x\r\n" % len(MEGABYTE) + MEGABYTE + b"\r\n"
    answer = raw(client, f"{HEAD}Transfer-Encoding: chunked\n\n", [chunk] * 100 + [b"0\r\n\r\n"])
    assert answer.startswith(b"HTTP/1.1 413")


def test_an_ordinary_client_sees_the_refusal_of_100_megabytes(client):
    for content in (MEGABYTE * 100, iter([MEGABYTE] * 100)):
        answer = client.post("/v1/edit", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert answer.json()["error"]["type"] == "too_large"


def test_a_slow_body_is_refused(client):
    answer = raw(client, f"{HEAD}Content-Length: 1000\n\n", [b"{"])
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"within 1 seconds" in answer


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(Patient, "head_seconds", 0.5)
    monkeypatch.setattr(Patient, "take_seconds", 0.5)


@pytest.mark.parametrize(
    "head", ["", "GET /healthz HT", "GET /healthz HTTP/1.1\nHost: localhost\nX: ", "GET / HTTP/1.1\n\nGET /"]
)
def test_a_connection_without_a_whole_request_is_closed(client, hasty, head):
    # It returns when the server has closed.
    raw(client, head, [])


def test_a_connection_that_is_kept_is_closed_when_no_further_request_comes(client, hasty):
    answer = raw(client, "GET /healthz HTTP/1.1\nHost: localhost\n\nGET /hea", [])
    assert answer.count(b"HTTP/1.1 200") == 1


def test_a_request_under_way_is_not_cut_off(client, hasty):
    """Its body comes when a connection without a request would long be closed."""
    late = threading.Event()

    def body():
        yield b'{"class": 1, '
        late.wait(0.8)
        yield b'"steps": 1}'

    headers = {"content-type": "application/json"}
    assert client.post("/v1/generate", content=body(), headers=headers).status_code == 200


def test_an_answer_that_nobody_takes_is_let_go():
    """The protocol is told that the transport is full, as asyncio does."""
    ended = []
    loop = asyncio.new_event_loop()

    async def run():
        protocol = Patient(configured(lambda scope: None), ServerState(), {})
        protocol.take_seconds = 0
        protocol.transport = type("Full", (), {"abort": lambda self: ended.append(True)})()
        protocol.flow = FlowControl(protocol.transport)
        protocol.flow.write_paused = True
        protocol.pause_writing()
        await asyncio.sleep(0)
        await asyncio.sleep(0.01)

    loop.run_until_complete(run())
    loop.close()
    assert ended


def test_connections_are_counted(client, monkeypatch):
    monkeypatch.setattr(Patient, "max_connections", 3)
    with contextlib.ExitStack() as stack:
        address = (client.base_url.host, client.base_url.port)
        held = [stack.enter_context(socket.create_connection(address, timeout=120)) for _ in range(4)]
        # The client's own connection may be one of them.
        assert held[-1].recv(65536).startswith(b"HTTP/1.1 503")
        assert held[-1].recv(65536) == b""


@pytest.mark.parametrize("length", ["-5", "abc", "1e3"])
def test_a_length_that_is_none_is_refused(client, length):
    assert b"400" in raw(client, f"{HEAD}Content-Length: {length}\n\n", []).split(b"\r\n")[0]


def test_too_many_bodies_at_once_are_refused():
    """Eight bodies of the largest size may arrive at once; a ninth finds no room."""
    sent, waiting = [], asyncio.Event()

    async def app(scope, receive, send):
        await waiting.wait()

    gate = BodyGate(app, 1000, 60)

    async def post():
        parts = [{"type": "http.request", "body": b"x" * 1000}]

        async def receive():
            return parts.pop() if parts else {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        await gate({"type": "http", "path": "/v1/edit", "headers": []}, receive, send)

    async def run():
        first = [asyncio.create_task(post()) for _ in range(8)]
        await asyncio.sleep(0)
        await post()
        waiting.set()
        await asyncio.gather(*first)
        await post()

    asyncio.run(run())
    assert [message["status"] for message in sent if "status" in message] == [429]
    assert (b"retry-after", b"1") in sent[0]["headers"]


def test_h11_refuses_as_httptools_does():
    """The parser that is there without further packages."""
    service = Service(MaskGIT.from_pretrained(), "cifar10", LIMITS)
    config = uvicorn.Config(
        create_app(service), http="h11", loop="asyncio", log_config=None, log_level="error"
    )

    async def run():
        server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            task = asyncio.create_task(server.serve([listener]))
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
                headers = {"content-type": "application/json"}
                answer = await client.post("/v1/edit", content=MEGABYTE * 100, headers=headers)
                server.should_exit = True
            await task
            return answer

    assert asyncio.run(run()).status_code == 413


@pytest.fixture(scope="module")
def guarded():
    with in_thread(LIMITS, KEYS) as (made, _):
        yield made


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        f"Bearer {KEYS[0]}x",
        f"Bearer {KEYS[0][:-1]}",
        f"Basic {KEYS[0]}",
        KEYS[0],
        f"Bearer {KEYS[0]} {KEYS[1]}",
    ],
)
@pytest.mark.parametrize(
    "path", ["/v1/generate", "/v1/models", "/metrics", "/docs", "/openapi.json", "/nothing"]
)
def test_without_a_key_nobody_comes_in(guarded, path, header):
    headers = {} if header is None else {"authorization": header}
    answer = guarded.get(path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["type"] == "unauthorized"


@pytest.mark.parametrize("key", KEYS)
def test_any_key_opens(guarded, key, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    headers = {"authorization": f"bearer {key}"}
    assert guarded.get("/v1/models", headers=headers).status_code == 200
    assert guarded.post("/v1/generate", json=GENERATE, headers=headers).status_code == 200
    assert key not in caplog.text + "".join(capfd.readouterr())


def test_health_needs_no_key(guarded):
    assert guarded.get("/healthz").status_code == guarded.get("/readyz").status_code == 200


def test_keys_are_read_from_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst\n\n  second  \n")
    assert read_keys(file) == ("first", "second")
    file.write_text("first\nsecond\n", encoding="utf-8-sig")
    assert read_keys(file) == ("first", "second")


@pytest.mark.parametrize(
    ("text", "words"), [("", "no keys"), ("# only\n", "no keys"), ("a b\n", "Key 1"), ("ü\n", "Key 1")]
)
def test_a_file_without_good_keys_is_refused(tmp_path, text, words):
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_keys(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "missing")
