"""The HTTP client against a real server: every method of both kinds, and the documents' programs."""

import asyncio
import inspect
import io
import json
import re
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clients import Both
from maskgit import MaskGIT, images
from maskgit.apps.client import calls as client_calls
from maskgit.apps.client.client import AsyncClient, Client, Making, Pictures, Preview, RequestError
from maskgit.apps.serving import handlers as making
from maskgit.apps.serving import schemas
from maskgit.apps.serving.service import Limits
from maskgit.errors import ConfigError, ImageError, MaskGITError
from servers import in_thread, wait_for

KEY = "not-to-be-shown-5f2a"
TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
SECTION = TEXT.partition("## Python client")[2].partition("\n## ")[0]
PROGRAMS = re.findall(r"```py\n(.*?)```", SECTION, re.DOTALL)

PHOTO = Image.fromarray((np.random.default_rng(0).random((40, 50, 3)) * 255).astype("uint8"))
PAINTED = Image.fromarray((np.arange(40 * 50).reshape(40, 50) % 50 < 20).astype("uint8") * 255)


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
    "settings", [{"seed": object()}, {"temperature": np.float32("nan")}, {"tables": {1, 2}}]
)
def test_what_is_no_json_value_is_not_sent(client, settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        client.generate("frog", **settings)
    with pytest.raises(ConfigError, match=next(iter(settings))):
        client.edit(PHOTO, [(3, 3, 10, 10)], "cat", **settings)


def test_a_text_that_looks_like_a_number_stays_one():
    form = client_calls.outpaint(PHOTO, label="3").request(1.0)
    assert form["data"]["class"] == '"3"'
    assert json.loads(client_calls.generate("3").request(1.0)["content"])["class"] == "3"


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


def test_the_client_does_not_load_torch():
    code = "import sys, maskgit.apps.client.client; print('torch' in sys.modules)"
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
    # How many previews there are depends on their share of the time.
    assert expected[number] - {f"ship-{i}.png" for i in range(1, 4)} <= names <= expected[number]
    assert ("unicorn" if number == 0 else "Preview") in capsys.readouterr().out
