"""The HTTP server in a thread: every route, what it accepts, what it refuses."""

import base64
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote, quote_from_bytes

import httpx
import numpy as np
import pytest
from PIL import Image

from maskgit import MaskGIT, images
from maskgit.apps.cli.flags import Marking
from maskgit.apps.serving import answering, app, outputs
from maskgit.apps.serving.service import Limits
from maskgit.apps.serving.worker import Ticket
from maskgit.images import provenance
from servers import in_thread, wait_for

LIMITS = Limits(
    queue_size=32,
    max_batch=4,
    max_images=4,
    max_pixels=100_000,
    max_body=200_000,
    body_seconds=1.0,
    timeout=60.0,
)


@pytest.fixture(scope="module")
def pipe():
    return MaskGIT.from_pretrained()


@pytest.fixture(scope="module")
def server():
    with in_thread(LIMITS) as made:
        yield made


@pytest.fixture(scope="module")
def client(server):
    return server[0]


def png(picture) -> bytes:
    return images.encode(picture)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


PHOTO = Image.fromarray((np.random.default_rng(0).random((40, 50, 3)) * 255).astype("uint8"))
PAINTED = Image.fromarray((np.arange(40 * 50).reshape(40, 50) % 50 < 20).astype("uint8") * 255)
GENERATE = {"class": "frog", "seed": 5, "steps": 3}


def decoded(answer, number=0):
    """Return a picture of an answer in JSON, and its settings."""
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["images"][number]["image"])
    return Image.open(io.BytesIO(data)).convert("RGB"), images.read_settings(data)


def same(first, second):
    """Check that pictures differ by a grey level at most."""
    difference = np.asarray(first).astype(int) - np.asarray(second).astype(int)
    assert np.abs(difference).max() <= 1


def test_generate_gives_the_pipelines_images_with_their_settings(client, pipe):
    body = GENERATE | {"num_images": 3, "first_index": 2, "return_tokens": True, "guidance_scale": 2.0}
    answer = client.post("/v1/generate", json=body)
    wanted = pipe.generate("frog", num_images=3, first_index=2, seed=5, steps=3, guidance_scale=2.0)
    listed = answer.json()["images"]
    assert [one["tokens"] for one in listed] == wanted.tokens.tolist()
    assert [(one["seed"], one["index"]) for one in listed] == [(5, 2), (5, 3), (5, 4)]
    for number, picture in enumerate(wanted.to_pil()):
        shown, settings = decoded(answer, number)
        same(shown, picture)
        assert settings["index"] == 2 + number
    assert settings | {"seed": 5, "class": "frog", "model": "cifar10", "command": "generate"} == settings
    assert (settings["steps"], settings["guidance_scale"]) == (3, 2.0)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("image/png", "PNG"),
        ("image/jpeg", "JPEG"),
        ("image/webp", "WEBP"),
        ("text/html, image/webp;q=0.9, */*;q=0.1", "WEBP"),
    ],
)
def test_one_image_where_one_is_accepted(client, pipe, accept, kind):
    answer = client.post("/v1/generate", json=GENERATE, headers={"accept": accept})
    picture = Image.open(io.BytesIO(answer.content))
    assert picture.format == kind
    assert answer.headers["content-type"] == f"image/{kind.lower()}"
    if kind == "PNG":
        same(picture, pipe.generate("frog", seed=5, steps=3).to_pil()[0])
        assert images.read_settings(answer.content)["seed"] == 5


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_pictures_inside_json_have_the_format_asked_for(client, form):
    answer = client.post("/v1/generate", json=GENERATE | {"format": form}).json()["images"][0]
    assert answer["media_type"] == f"image/{form}"
    assert Image.open(io.BytesIO(base64.b64decode(answer["image"]))).format == form.upper()


PHOTO_REQUESTS = {
    "edit": (
        {
            "boxes": [[3, 3, 10, 10]],
            "class": "cat",
            "seed": 2,
            "steps": 6,
            "rule": "official",
            "feather": 1.5,
        },
        lambda m: m.edit(PHOTO, [(3, 3, 10, 10)], "cat", seed=2, steps=6, rule="official", feather=1.5),
    ),
    "inpaint": (
        {"mask": PAINTED, "class": "dog", "seed": 3, "steps": 3, "dilate": 1},
        lambda m: m.inpaint(PHOTO, PAINTED, "dog", seed=3, steps=3, dilate=1),
    ),
    "outpaint": (
        {"left": 8, "bottom": 4, "class": 3, "steps": 2},
        lambda m: m.outpaint(PHOTO, left=8, bottom=4, label=3, steps=2),
    ),
    "reconstruct": ({}, lambda m: m.reconstruct(PHOTO)),
}


@pytest.mark.parametrize("command", PHOTO_REQUESTS)
def test_photos_as_json_and_as_a_form(client, pipe, command):
    fields, work = PHOTO_REQUESTS[command]
    wanted = work(pipe)
    pictures = {"image": PHOTO} | {key: value for key, value in fields.items() if key == "mask"}
    plain = {key: value for key, value in fields.items() if key not in pictures} | {"return_tokens": True}
    files = {key: (f"../../{key}.png", png(value), "image/png") for key, value in pictures.items()}
    form = client.post(
        f"/v1/{command}",
        data={key: value if isinstance(value, str) else json.dumps(value) for key, value in plain.items()},
        files=files,
    )
    as_json = client.post(
        f"/v1/{command}", json=plain | {key: b64(png(value)) for key, value in pictures.items()}
    )
    assert form.json() == as_json.json()
    assert form.json()["images"][0]["tokens"] == wanted.tokens[0].tolist()
    shown, settings = decoded(form)
    same(shown, wanted.to_pil()[0])
    assert settings["command"] == command
    assert "image" not in settings


def test_transparent_parts_and_a_guessed_class(client, pipe):
    cut_out = PHOTO.convert("RGBA")
    cut_out.putalpha(PAINTED.point(lambda value: 255 - value))
    wanted = pipe.inpaint(cut_out, "alpha", seed=1, steps=2)
    answer = client.post(
        "/v1/inpaint", data={"mask": "alpha", "seed": 1, "steps": 2}, files={"image": png(cut_out)}
    )
    guess = answer.json()["class_guess"]
    assert guess["number"] == wanted.class_guess.label
    shown, settings = decoded(answer)
    assert settings["class"] == guess["name"] == pipe.class_names[guess["number"]]
    same(shown, wanted.to_pil()[0].convert("RGB"))


def lines(data: bytes) -> str:
    return base64.encodebytes(data).decode()


SENT = {
    "in lines, as in mails": lines,
    "in lines of other systems": lambda data: lines(data).replace("\n", "\r\n"),
    "a data URL": lambda data: f"data:image/png;base64,{b64(data)}",
    "a data URL of no kind": lambda data: f"data:;base64,{b64(data)}",
    "a data URL in lines": lambda data: f"DATA:image/png;charset=utf-8;BASE64,\n{lines(data)}",
    "a quoted data URL": lambda data: f"data:image/png;base64,{quote(b64(data), safe='')}",
    "a data URL without base64": lambda data: f"data:image/png,{quote_from_bytes(data, safe='')}",
}


@pytest.mark.parametrize("form", SENT)
def test_pictures_as_text(client, form):
    wanted = client.post("/v1/tokenize", json={"image": b64(png(PHOTO))}).json()
    assert client.post("/v1/tokenize", json={"image": SENT[form](png(PHOTO))}).json() == wanted
    body = {"boxes": [[1, 1, 5, 5]], "class": 1, "steps": 1, "image": SENT[form](png(PHOTO))}
    assert client.post("/v1/edit", json=body).status_code == 200
    body = {"class": 1, "steps": 1, "image": b64(png(PHOTO)), "mask": SENT[form](png(PAINTED))}
    assert client.post("/v1/inpaint", json=body).status_code == 200


@pytest.mark.parametrize(
    "text", ["data:image/png;base64,", "data:image/png;base64", "data:", "data:,%%", "a=b", ""]
)
def test_text_that_is_no_picture(client, text):
    answer = client.post("/v1/tokenize", json={"image": text})
    assert answer.status_code == 422, answer.text


def test_tokens_of_pictures_and_pictures_of_tokens(client, pipe):
    tokens = client.post("/v1/tokenize", files={"image": png(PHOTO)}).json()["tokens"]
    wanted = pipe.reconstruct(PHOTO)
    assert tokens == wanted.tokens[0].tolist()
    answer = client.post("/v1/detokenize", json={"tokens": tokens})
    same(decoded(answer)[0], wanted.to_pil()[0])


@pytest.fixture
def every_step(monkeypatch):
    """Show every step, whatever time that takes."""
    monkeypatch.setattr(app, "_PREVIEW_SHARE", float("inf"))


def events(answer):
    """Return the events of a stream as (name, data)."""
    parts = answer.text.strip().split("\n\n")
    return [(part.split("\n")[0][7:], json.loads(part.split("\n")[1][6:])) for part in parts]


@pytest.mark.parametrize("ask", [{"stream": True}, {"headers": {"accept": "text/event-stream"}}])
@pytest.mark.usefixtures("every_step")
def test_previews_are_streamed(client, pipe, ask):
    headers = ask.get("headers", {})
    body = GENERATE | {key: value for key, value in ask.items() if key != "headers"}
    answer = client.post("/v1/generate", json=body | {"num_images": 2}, headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *told, (name, result) = events(answer)
    assert name == "result"
    made = [(i, t) for i in range(2) for t in range(3)]
    previews = [(name, data) for name, data in told if name == "preview"]
    assert sorted((data["index"], data["step"]) for _, data in previews) == made
    assert sorted((data["index"], data["step"]) for name, data in told if name == "progress") == made
    assert result == client.post("/v1/generate", json=GENERATE | {"num_images": 2}).json()
    steps = []
    pipe.generate("frog", seed=5, steps=3, callback=lambda step, indices, tokens: steps.append(tokens))
    for number, tokens in enumerate(steps):
        data = next(data for _, data in previews if (data["index"], data["step"]) == (0, number))
        shown = Image.open(io.BytesIO(base64.b64decode(data["image"])))
        same(shown, images.to_pil(pipe.decode_tokens(tokens))[0])


@pytest.mark.usefixtures("every_step")
def test_edits_are_streamed_too(client):
    data = {"boxes": "[[3, 3, 10, 10]]", "class": "cat", "steps": 6, "stream": "true"}
    answer = client.post("/v1/edit", data=data, files={"image": png(PHOTO)})
    assert [data["step"] for name, data in events(answer) if name == "preview"] == [1, 2, 3, 4, 5]


def test_a_wrong_request_for_a_stream_is_an_error_of_its_own(client):
    answer = client.post("/v1/generate", json=GENERATE | {"class": "frg", "stream": True})
    assert answer.status_code == 422
    assert "frog" in answer.json()["error"]["message"]


def test_a_stream_begins_at_once_and_does_not_fall_silent(server, monkeypatch):
    client, service = server
    monkeypatch.setattr(answering, "_HEARTBEAT", 0.02)
    go_on = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(service._worker.call, lambda: go_on.wait(60), Ticket(60, client="another"))
        with client.stream("POST", "/v1/generate", json=GENERATE | {"stream": True}) as answer:
            # The model has not even begun.
            assert answer.status_code == 200
            assert answer.headers["x-accel-buffering"] == "no"
            lines = answer.iter_lines()
            beats = [next(lines) for _ in range(4)]
            assert [line for line in beats if line] == [": still working"] * 2
            go_on.set()
            rest = list(lines)
        held.result()
    assert "event: result" in rest


def test_what_goes_wrong_in_a_stream_is_an_event(client):
    body = GENERATE | {"stream": True, "steps": 256, "num_images": 4, "timeout": 0.2}
    name, data = events(client.post("/v1/generate", json=body))[-1]
    assert (name, data["error"]["type"]) == ("error", "deadline")


def test_previews_take_a_small_share_of_the_time():
    allowance = outputs.Allowance(0.05)
    made = 0
    for step in range(1000):
        if allowance.allows(step * 1.0):
            allowance.spend(0.3)
            made += 1
    assert 0.3 * made <= 0.05 * 1000 + 0.3
    assert 0.3 * made >= 0.04 * 1000
    assert outputs.Allowance(0.05).allows(0.0)


def test_a_low_priority_is_passed_on(server, monkeypatch):
    client, service = server
    seen = []
    add = service._worker.batcher.add
    monkeypatch.setattr(
        service._worker.batcher,
        "add",
        lambda job, requester: (seen.append(requester.low), add(job, requester)),
    )
    for priority in ("low", "normal"):
        assert client.post("/v1/generate", json=GENERATE | {"priority": priority}).status_code == 200
    assert seen == [True, False]


SETTINGS = {
    "steps": 5,
    "policy": "halton",
    "policy_options": {"policy": "moment", "policy_options": {"beta": 1.5}},
    "mask_schedule": "uniform",
    "temperature": 0.3,
    "temperature_schedule": "linear",
    "choice_temperature": 0.5,
    "choice_schedule": "constant",
    "guidance_scale": 1.5,
    "guidance_schedule": "linear",
    "tables": {"mask_ratio": [0.9, 0.8, 0.0]},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_changes_the_image_as_in_the_pipeline(client, pipe, setting):
    value = SETTINGS[setting]
    given = value if setting == "policy_options" else {setting: value}
    body = {"class": "frog", "seed": 5, "steps": 3, "return_tokens": True} | given
    tokens = client.post("/v1/generate", json=body).json()["images"][0]["tokens"]
    settings = {"steps": 3} | given
    assert tokens == pipe.generate("frog", seed=5, **settings).tokens[0].tolist()
    assert tokens != pipe.generate("frog", seed=5, steps=3).tokens[0].tolist()


def test_guidance_can_be_forced_where_it_must(client, pipe):
    # On a model with label dropout it says nothing; it must be taken and told all the same.
    answer = client.post("/v1/generate", json=GENERATE | {"force_guidance": True})
    assert answer.json()["settings"]["force_guidance"] is True


def test_models_classes_and_health(client, pipe):
    (card,) = client.get("/v1/models").json()["models"]
    assert (card["name"], card["image_size"], card["num_codes"]) == ("cifar10", 32, 512)
    assert card["sampler"] == pipe.config.sampler.to_dict()
    classes = client.get("/v1/classes").json()["classes"]
    assert [one["name"] for one in classes] == list(pipe.class_names)
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}


def test_metrics_count(client, server):
    client.get("/v1/nothing/here")
    client.post("/v1/generate", json=GENERATE)
    text = client.get("/metrics").text
    assert 'maskgit_requests_total{path="other",status="404"}' in text
    assert 'maskgit_requests_total{path="/v1/generate",status="200"}' in text
    assert "nothing/here" not in text
    count = next(line for line in text.splitlines() if line.startswith("maskgit_images_total"))
    assert float(count.split()[1]) == server[1].stats.images


@pytest.mark.parametrize("command", ["edit", "inpaint", "outpaint"])
def test_metrics_count_edits(client, server, command):
    stats = server[1].stats
    images, steps = stats.images, stats.steps
    data = {"class": "cat", "steps": 3} | {
        "edit": {"boxes": "[[3, 3, 10, 10]]"},
        "inpaint": {"mask": base64.b64encode(png(PAINTED)).decode()},
        "outpaint": {"left": 8},
    }[command]
    assert client.post(f"/v1/{command}", data=data, files={"image": png(PHOTO)}).status_code == 200
    text = client.get("/metrics").text
    count = next(line for line in text.splitlines() if line.startswith("maskgit_images_total"))
    assert float(count.split()[1]) > images
    assert stats.steps >= steps + 2


def test_the_page_loads_nothing_from_elsewhere(client):
    page = client.get("/docs").text
    assert "/v1/generate" in page
    assert "choice_temperature" in page
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page


def test_a_bad_request_beside_good_ones(client, pipe):
    answers = {}

    def ask(number, body):
        answers[number] = httpx.post(f"{client.base_url}/v1/generate", json=body, timeout=120)

    bodies = [GENERATE | {"seed": i, "return_tokens": True} for i in range(4)] + [{"class": "unicorn"}] * 2
    threads = [threading.Thread(target=ask, args=item) for item in enumerate(bodies)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[i].status_code for i in range(6)] == [200] * 4 + [422] * 2
    for i in range(4):
        wanted = pipe.generate("frog", seed=i, steps=3).tokens[0].tolist()
        assert answers[i].json()["images"][0]["tokens"] == wanted


def test_the_same_bytes_alone_and_under_load(client):
    body = GENERATE | {"steps": 5}
    headers = {"accept": "image/png"}
    alone = client.post("/v1/generate", json=body, headers=headers).content
    others = [
        threading.Thread(
            target=httpx.post,
            args=(f"{client.base_url}/v1/generate",),
            kwargs={"json": {"class": i, "seed": i, "steps": 2 + i, "num_images": 2}, "timeout": 60},
        )
        for i in range(5)
    ]
    for thread in others:
        thread.start()
    crowded = [client.post("/v1/generate", json=body, headers=headers).content for _ in range(3)]
    for thread in others:
        thread.join()
    assert crowded == [alone] * 3


def test_a_late_answer_is_a_504_and_its_work_is_dropped(client, server):
    made = server[1].stats.images
    answer = client.post("/v1/generate", json={"class": 1, "steps": 256, "num_images": 4, "timeout": 0.3})
    assert answer.status_code == 504
    assert answer.json()["error"]["type"] == "deadline"
    wait_for(lambda: server[1].num_accepted == 0)
    assert server[1].stats.images == made


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_not_worked_for(server, stream):
    client, service = server
    made = service.stats.images
    body = {"class": 1, "steps": 256, "num_images": 4, "stream": stream}
    with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=client.base_url, timeout=0.5) as leaver:
        if stream:
            with leaver.stream("POST", "/v1/generate", json=body) as answer:
                next(answer.iter_raw())
                raise httpx.ReadTimeout("enough seen")
        leaver.post("/v1/generate", json=body)
    wait_for(lambda: service.num_accepted == 0)
    wait_for(lambda: service.stats.rows == 0)
    assert service.stats.images == made


def test_a_request_leaves_nothing_behind(server):
    service = server[1]
    wait_for(lambda: service.num_accepted == 0)
    assert not service._tickets
    assert not service._worker._owners


@pytest.mark.parametrize("mark", [True, False])
def test_previews_say_what_they_are(tiny, mark):
    photo = {"image": b64(png(PHOTO))}
    asked = {
        "generate": ({}, provenance.GENERATED),
        "edit": (photo | {"boxes": [[8, 8, 8, 8]]}, provenance.EDITED),
        "outpaint": (photo | {"right": 16}, provenance.EDITED),
    }
    with in_thread(LIMITS, model=tiny, marking=Marking(mark=mark)) as (client, _):
        for command, (body, source) in asked.items():
            whole = body | {"class": 1, "steps": 2, "stream": True}
            shown = [
                base64.b64decode(data["image"])
                for name, data in events(client.post(f"/v1/{command}", json=whole))
                if name == "preview"
            ]
            assert shown
            assert all((source.encode() in data) == mark for data in shown)
