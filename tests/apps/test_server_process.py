"""`maskgit serve` as a process: under load, when it is told to stop, when it is killed."""

import contextlib
import re
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from maskgit import MaskGIT, images
from maskgit.apps.cli.commands import main
from maskgit.apps.serving.server import bind
from maskgit.errors import ConfigError
from servers import in_process, wait_for

CLIENTS = 200


@contextlib.contextmanager
def client_of(url: str):
    """Give a client that may have many requests under way; one for each would take most of the time."""
    limits = httpx.Limits(max_connections=CLIENTS)
    with httpx.Client(base_url=url, timeout=120, limits=limits) as client:
        yield client


def ask(client: httpx.Client, seed: int, steps: int = 1) -> httpx.Response:
    body = {"class": "frog", "seed": seed, "steps": steps}
    return client.post("/v1/generate", json=body, headers={"accept": "image/png"})


def metric(client: httpx.Client, name: str) -> float:
    found = re.search(rf"^maskgit_{name} (.*)$", client.get("/metrics").text, re.MULTILINE)
    return float(found[1])


def test_200_clients_at_a_queue_of_32():
    with (
        in_process("--queue-size", "32") as (_, url),
        client_of(url) as client,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        answers = list(pool.map(lambda seed: ask(client, seed), range(CLIENTS)))
        counts = Counter(answer.status_code for answer in answers)
        assert set(counts) == {200, 429}
        assert counts.total() == CLIENTS
        for seed, answer in enumerate(answers):
            if answer.status_code == 200:
                # Everybody got their own image, and the server made no other.
                assert images.read_settings(answer.content)["seed"] == seed
            else:
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["type"] == "overloaded"
        assert metric(client, "images_total") == counts[200]
        wait_for(lambda: metric(client, "accepted_images") == 0)


def test_told_to_stop_it_finishes_what_it_accepted():
    with in_process() as (server, url), client_of(url) as client, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, client, seed, 48) for seed in range(8)]
        wait_for(lambda: metric(client, "accepted_images") == 8)
        server.send_signal(signal.SIGTERM)
        wait_for(lambda: client.get("/readyz").status_code == 503)
        refused = ask(client, 0)
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "unavailable")
        assert [answer.result().status_code for answer in answers] == [200] * 8
        assert server.wait(120) == 0
        assert server.stderr.read() == ""


def test_told_twice_it_says_so_to_all_that_it_accepted():
    with in_process() as (server, url), client_of(url) as client, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, client, seed, 256) for seed in range(8)]
        wait_for(lambda: metric(client, "accepted_images") == 8)
        server.send_signal(signal.SIGTERM)
        wait_for(lambda: client.get("/readyz").status_code == 503)
        server.send_signal(signal.SIGTERM)
        answers = [answer.result() for answer in answers]
        assert {answer.status_code for answer in answers} == {503}
        assert {answer.json()["error"]["type"] for answer in answers} == {"unavailable"}
        assert server.wait(120) == 130
        assert server.stderr.read() == "maskgit: interrupted.\n"


def test_hung_up_on_it_reads_its_keys_anew(tmp_path):
    file = tmp_path / "keys"
    file.write_text("old\n")

    def status(key: str) -> int:
        return client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

    with in_process("--api-key-file", str(file)) as (server, url), client_of(url) as client:
        assert (status("old"), status("new")) == (200, 401)
        file.write_text("new\nnewer\n")
        server.send_signal(signal.SIGHUP)
        assert server.stdout.readline() == f"Read 2 keys from {file}\n"
        assert (status("old"), status("new")) == (401, 200)
        file.write_text("")
        server.send_signal(signal.SIGHUP)
        assert "holds no keys" in server.stdout.readline()
        assert (status("old"), status("new"), status("newer"), status("other")) == (401, 200, 200, 401)


def test_hung_up_on_without_keys_it_finishes_what_it_accepted():
    with in_process() as (server, url), client_of(url) as client, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(ask, client, seed, 48) for seed in range(2)]
        wait_for(lambda: metric(client, "accepted_images") == 2)
        server.send_signal(signal.SIGHUP)
        assert [answer.result().status_code for answer in answers] == [200] * 2
        assert server.wait(120) == 0


def test_killed_under_load_it_starts_again_on_its_port():
    with in_process() as (server, url), client_of(url) as client, ThreadPoolExecutor(8) as pool:
        before = ask(client, 7, 2).content
        answers = [pool.submit(ask, client, seed, 200) for seed in range(8)]
        wait_for(lambda: metric(client, "batch_rows") == 8)
        server.send_signal(signal.SIGKILL)
        for answer in answers:
            with pytest.raises(httpx.TransportError):
                answer.result()
    with in_process(port=int(url.rpartition(":")[2])) as (_, again), client_of(again) as client:
        assert again == url
        assert ask(client, 7, 2).content == before
    wanted = MaskGIT.from_pretrained().generate("frog", seed=7, steps=2).to_pil()[0]
    made = images.read_image(before)
    assert max(abs(a - b) for a, b in zip(made.tobytes(), wanted.tobytes(), strict=True)) <= 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--queue-size", "0"], "queue_size"),
        (["--model", "nothing/there/at/all"], "nothing/there"),
        (["--api-key-file", "missing"], "missing"),
        (["--host", "no.such.host.invalid"], "--host"),
        (["--port", "99999"], "--port"),
    ],
)
def test_wrong_flags_end_in_a_sentence(flags, words, capsys):
    assert main(["serve", "--port", "0", *flags]) == 2
    assert words in capsys.readouterr().err


def test_a_port_in_use_is_refused():
    with bind("127.0.0.1", 0) as first, pytest.raises(ConfigError, match="choose another --port"):
        bind("127.0.0.1", first.getsockname()[1])


def test_the_page_is_at_the_root_beside_the_service():
    with in_process(page=True) as (server, url), client_of(url) as client:
        page = client.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert "MaskGIT" in page.text
        assert ask(client, 3).status_code == 200
        assert client.get("/healthz").json() == {"status": "alive"}
        server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0


def test_where_keys_are_asked_for_there_is_no_page(tmp_path):
    (tmp_path / "keys").write_text("secret\n")
    with (
        in_process("--api-key-file", str(tmp_path / "keys"), page=True) as (_, url),
        client_of(url) as client,
    ):
        assert client.get("/").status_code == 401
        assert client.get("/", headers={"authorization": "Bearer secret"}).status_code == 404
