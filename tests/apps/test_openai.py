"""OpenAI's image API, asked by OpenAI's own client."""

import base64
import io

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from maskgit import MaskGIT, images
from maskgit.apps.serving.openai_api import find_class
from maskgit.apps.serving.service import Limits
from maskgit.errors import ConfigError
from servers import in_thread, wait_for

KEY = "the-key-of-this-test"
PHOTO = Image.fromarray((np.random.default_rng(0).random((40, 50, 3)) * 255).astype("uint8"))
PAINTED = np.arange(40 * 50).reshape(40, 50) % 50 < 20


def png(picture) -> bytes:
    return images.encode(picture)


def transparent(picture, where):
    cut_out = picture.convert("RGBA")
    cut_out.putalpha(Image.fromarray(np.where(where, 0, 255).astype("uint8")))
    return cut_out


def picture(shown):
    return Image.open(io.BytesIO(base64.b64decode(shown.b64_json)))


def same(first, second):
    assert np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max() <= 1


@pytest.fixture(scope="module")
def pipe():
    return MaskGIT.from_pretrained()


@pytest.fixture(scope="module")
def server():
    with in_thread(Limits(queue_size=8, max_batch=4, max_images=4), keys=(KEY,)) as made:
        yield made


@pytest.fixture(scope="module")
def client(server):
    url = f"{server[0].base_url}/v1"
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as made:
        yield made


@pytest.mark.parametrize("prompt", ["frog", "a frog", "A photo of a Frog.", "cifar10/frog", "6", "name:frog"])
def test_a_prompt_names_a_class(pipe, prompt):
    assert find_class(pipe, "cifar10", prompt) == 6


def test_a_prompt_that_names_none_gets_a_suggestion(client):
    with pytest.raises(ConfigError, match="frog"):
        find_class(MaskGIT.from_pretrained(), "cifar10", "a frgo")
    with pytest.raises(openai.BadRequestError, match="Did you mean 6: frog") as caught:
        client.images.generate(prompt="a frgo")
    assert caught.value.type == "invalid_request_error"
    assert caught.value.code == "invalid_request"
    assert caught.value.param is None


def test_images_are_the_pipelines(client, pipe):
    answer = client.images.generate(
        model="cifar10",
        prompt="a frog",
        n=2,
        size="32x32",
        quality="high",
        user="somebody",
        response_format="b64_json",
        extra_body={"seed": 5, "steps": 3, "guidance_scale": 2.0},
    )
    wanted = pipe.generate("frog", num_images=2, seed=5, steps=3, guidance_scale=2.0).to_pil()
    assert answer.size == "32x32"
    for shown, image in zip(answer.data, wanted, strict=True):
        same(picture(shown), image)
    settings = images.read_settings(base64.b64decode(answer.data[1].b64_json))
    assert settings | {"seed": 5, "index": 1, "class": "frog", "steps": 3} == settings


def test_the_format_is_what_is_asked_for(client):
    answer = client.images.generate(prompt="cat", output_format="webp", extra_body={"steps": 2})
    assert (picture(answer.data[0]).format, answer.output_format) == ("WEBP", "webp")


def test_what_is_transparent_is_edited(client, pipe):
    wanted = pipe.inpaint(PHOTO, PAINTED, "cat", steps=3, seed=2).to_pil()[0]
    mask = png(transparent(Image.new("RGB", PHOTO.size), PAINTED))
    options = {"prompt": "a cat", "n": 1, "extra_body": {"steps": 3, "seed": 2}}
    answer = client.images.edit(image=png(PHOTO), mask=mask, **options)
    same(picture(answer.data[0]), wanted)
    # Without a mask, what is transparent in the image itself.
    answer = client.images.edit(image=[png(transparent(PHOTO, PAINTED))], **options)
    wanted = pipe.inpaint(transparent(PHOTO, PAINTED), "alpha", "cat", steps=3, seed=2).to_pil()[0]
    same(picture(answer.data[0]), wanted)
    with pytest.raises(openai.BadRequestError, match="transparent"):
        client.images.edit(image=png(PHOTO), mask=png(PHOTO), **options)


def test_partial_images_are_streamed(client, pipe):
    events = list(
        client.images.generate(
            prompt="ship", stream=True, partial_images=2, extra_body={"steps": 6, "seed": 1}
        )
    )
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:-1]] == [0, 1]
    tokens = {}
    made = pipe.generate(
        "ship", seed=1, steps=6, callback=lambda step, _, grid: tokens.setdefault(step, grid)
    )
    same(picture(events[0]), images.to_pil(pipe.decode_tokens(tokens[1]))[0])
    same(picture(events[1]), images.to_pil(pipe.decode_tokens(tokens[3]))[0])
    same(picture(events[2]), made.to_pil()[0])
    mask = png(transparent(Image.new("RGB", PHOTO.size), PAINTED))
    edited = client.images.edit(
        image=png(PHOTO), mask=mask, prompt="cat", stream=True, partial_images=1, extra_body={"steps": 4}
    )
    assert [event.type for event in edited] == ["image_edit.partial_image", "image_edit.completed"]


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["cifar10"]
    assert client.models.retrieve("cifar10").object == "model"
    with pytest.raises(openai.NotFoundError, match="no model 'dall-e-3'"):
        client.models.retrieve("dall-e-3")


WRONG = {
    "model": ({"model": "dall-e-3"}, "no model 'dall-e-3'; this server has 'cifar10'"),
    "size": ({"size": "1024x1024"}, "32x32"),
    "url": ({"response_format": "url"}, "b64_json"),
    "unknown field": ({"extra_body": {"sed": 1}}, "sed"),
    "setting": ({"extra_body": {"steps": 0}}, "steps"),
    "too many": ({"n": 5}, "at most 4"),
    "streams of several": ({"n": 2, "stream": True}, "one image"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_have_the_form_of_openais(client, wrong):
    fields, words = WRONG[wrong]
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        client.images.generate(**{"prompt": "frog"} | fields)
    assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_a_full_queue_and_a_wrong_key_are_what_the_client_knows(client, server):
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").images.generate(prompt="frog")
    http, service = server
    held = [service.submit(lambda m: m.generate("frog", steps=256, num_images=4), images=4) for _ in range(2)]
    with pytest.raises(openai.RateLimitError) as caught:
        client.images.generate(prompt="frog")
    assert caught.value.type == "rate_limit_error"
    assert int(caught.value.response.headers["retry-after"]) >= 1
    for accepted in held:
        accepted.ticket.cancel()
    wait_for(lambda: service.num_accepted == 0)
    assert (
        httpx.get(f"{http.base_url}/v1/images/none", headers={"authorization": f"Bearer {KEY}"}).status_code
        == 404
    )
