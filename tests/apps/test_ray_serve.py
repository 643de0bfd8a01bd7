"""The service on a local Ray: what the single process answers, on every replica; and what it refuses."""

import re
import socket
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve

from maskgit.apps import ray_serve
from maskgit.apps.client.client import Client, Preview
from maskgit.errors import ConfigError
from servers import in_process, wait_for

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
SECTION = TEXT.partition("## Ray Serve")[2].partition("\n## ")[0]
(PROGRAM,) = re.findall(r"```py\n(.*?)```", SECTION, re.DOTALL)
PHOTO = Path(__file__).parents[2] / "docs" / "images" / "edit-vary.png"


@pytest.fixture(scope="module")
def url():
    """The URL of the document's program on a Ray of two processors."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 * 2**20,
            _temp_dir=folder,
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            exec(compile(PROGRAM, "docs/serving.md", "exec"), {})
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url, timeout=120) as client:
        yield client


def test_the_same_bytes_as_the_single_process(client, monkeypatch):
    bodies = [
        {"class": "frog", "seed": 5, "steps": 4},
        {"class": 3, "seed": 2**63, "steps": 3, "guidance_scale": 1.5, "policy": "halton", "num_images": 3},
        {"class": "ship", "steps": 2, "format": "webp", "return_tokens": True},
    ]
    # A replica computes in as many threads as it has processors.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with in_process("--queue-size", "4") as (_, single), httpx.Client(base_url=single, timeout=120) as other:
        for body in bodies:
            answers = [one.post("/v1/generate", json=body) for one in (client, other)]
            assert answers[0].status_code == 200
            assert answers[0].content == answers[1].content
        for accept in ("image/png", "text/event-stream"):
            headers = {"accept": accept}
            answers = [one.post("/v1/generate", json=bodies[0], headers=headers) for one in (client, other)]
            assert answers[0].headers["content-type"].startswith(accept)
            # How many previews come depends on what they may cost; the last event is the result.
            last = [answer.content.strip().split(b"\n\n")[-1] for answer in answers]
            assert last[0] == last[1] if "stream" in accept else answers[0].content == answers[1].content
        data = {"boxes": "[[300, 40, 90, 90]]", "class": "cat", "steps": "3"}
        edits = [
            one.post("/v1/edit", data=data, files={"image": PHOTO.read_bytes()}) for one in (client, other)
        ]
        assert edits[0].status_code == 200
        assert edits[0].content == edits[1].content
        for path in ("/v1/classes", "/v1/models", "/v1/nothing", "/openapi.json", "/readyz"):
            assert client.get(path).content == other.get(path).content


def test_previews_come_while_it_works(url):
    with Client(url) as client:
        times = [
            (time.monotonic(), isinstance(event, Preview))
            for event in client.stream_generate("cat", steps=32)
        ]
    # How many come depends on what they may cost.
    assert [is_preview for _, is_preview in times[:-1]] == [True] * (len(times) - 1)
    assert len(times) > 1
    # They would come with the result if somebody on the way kept them until the end.
    assert times[-1][0] - times[0][0] > 0.02


def test_overload_is_refused_and_passes(url, client):
    def ask(seed: int) -> httpx.Response:
        return client.post("/v1/generate", json={"class": "dog", "seed": seed, "steps": 12})

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(ask, range(40)))
    counts = Counter(answer.status_code for answer in answers)
    assert set(counts) == {200, 429}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)
    assert client.get("/readyz").status_code == 200
    with Client(url, retries=50) as patient, ThreadPoolExecutor(12) as pool:
        made = list(pool.map(lambda seed: patient.generate("dog", seed=seed, steps=2), range(12)))
    assert [answer.pictures[0].seed for answer in made] == list(range(12))


def accepted(client: httpx.Client) -> float:
    return float(re.search(r"^maskgit_accepted_images (.*)$", client.get("/metrics").text, re.MULTILINE)[1])


def test_a_client_that_leaves_is_not_worked_for(client):
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/generate", json={"class": 1, "steps": 256, "num_images": 4}, timeout=0.3)
    wait_for(lambda: accepted(client) == 0)


def test_rays_command_line_makes_the_options():
    parameters = ray_serve.build.__annotations__
    assert parameters["options"] is ray_serve.Options
    options = ray_serve.Options.model_validate(
        {"num_replicas": "2", "num_gpus": "0.5", "api_key_file": "keys"}
    )
    assert (options.num_replicas, options.num_gpus, options.api_key_file) == (2, 0.5, Path("keys"))
    with pytest.raises(ValueError, match="num_replica\n"):
        ray_serve.Options.model_validate({"num_replica": 2})


def test_what_ray_is_told():
    options = ray_serve.Options(num_replicas=2, max_replicas=5, num_gpus=1, queue_size=9, max_batch=4)
    deployment = ray_serve.build(options)._bound_deployment
    assert deployment.name == "maskgit"
    assert deployment.ray_actor_options == {"num_cpus": 1.0, "num_gpus": 1.0}
    assert (deployment.max_ongoing_requests, deployment.max_queued_requests) == (9, 64)
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 8)


def test_wrong_options_are_refused_before_anything_is_deployed():
    with pytest.raises(ConfigError, match="queue_size"):
        ray_serve.build(ray_serve.Options(queue_size=0))
    with pytest.raises(ConfigError, match="max_replicas must be at least num_replicas, 3"):
        ray_serve.build(ray_serve.Options(num_replicas=3, max_replicas=2))
