"""The server and the page behind nginx, under a path of its own; and what is believed of what proxies say."""

import asyncio
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright
from starlette.testclient import TestClient

from maskgit import images
from maskgit.apps.cli.commands import main
from maskgit.apps.client.client import Client, Pictures, Preview
from maskgit.apps.serving import outputs
from maskgit.apps.serving.app import create_app
from maskgit.apps.serving.network import Forwarded
from maskgit.apps.serving.options import Network
from maskgit.apps.serving.service import Limits, Service
from maskgit.apps.webui.page import add_page
from maskgit.errors import ConfigError
from servers import behind_nginx, in_thread, wait_for

EXAMPLE = (Path(__file__).parents[2] / "deploy" / "nginx.conf").read_text("utf-8")
PATIENCE = 120_000
BEHIND = Network(trusted_proxies=("127.0.0.1",))
# Another proxy, which leaves the prefix in the path and says nothing of it.
BARE = EXAMPLE.replace("proxy_pass http://127.0.0.1:8000/;", "proxy_pass http://127.0.0.1:8000;")
BARE = re.sub(r"proxy_set_header X-Forwarded-Prefix .*;", "", BARE)


@pytest.fixture(scope="module", params=["prefix told", "prefix known"])
def url(request):
    """The URL under /mg/."""
    network, example = {
        "prefix told": (BEHIND, EXAMPLE),
        "prefix known": (Network(root_path="/mg", trusted_proxies=BEHIND.trusted_proxies), BARE),
    }[request.param]

    with (
        in_thread(Limits(max_batch=4), network=network, page=add_page) as (client, _),
        behind_nginx(str(client.base_url).rstrip("/"), example) as outside,
    ):
        yield f"{outside}/mg"


def test_the_example_behind_which_it_runs_is_whole():
    assert "maskgit serve --trusted-proxies 127.0.0.1 --allowed-hosts images.example.org" in EXAMPLE
    assert "listen 80;" in EXAMPLE
    assert BARE != EXAMPLE


def test_the_client_asks_under_the_path(url):
    with Client(url) as client:
        assert client.health() == "ready"
        made = client.generate("frog", seed=1, steps=2)
        assert made.images[0].size == (32, 32)
        assert client.tokenize(made.images[0])
    assert httpx.post(f"{url}/v1/generate", json={}).status_code == 422
    assert httpx.get(f"{url}/nothing").status_code == 404


def test_a_stream_is_passed_on_while_it_is_made(url, monkeypatch):
    seen = threading.Event()
    pictures = outputs.pictures

    def waiting(*args, **options):
        # The answer is not made before the client has seen a preview.
        assert seen.wait(PATIENCE / 1000)
        return pictures(*args, **options)

    monkeypatch.setattr(outputs, "pictures", waiting)
    with Client(url) as client:
        events = client.stream_generate("ship", steps=4)
        assert isinstance(next(events), Preview)
        seen.set()
        assert isinstance(list(events)[-1], Pictures)


def test_the_documentation_is_under_the_path(url):
    page = httpx.get(f"{url}/docs")
    (link,) = re.findall(r'href="(.*?)"', page.text)
    document = httpx.get(httpx.URL(f"{url}/docs").join(link)).json()
    assert document["servers"] == [{"url": "/mg"}]
    assert "/v1/generate" in document["paths"]


def test_the_page_generates_and_edits_under_the_path(url, tmp_path):
    path = shutil.which("chromium")
    if path is None:
        pytest.fail(
            "This test drives Debian's Chromium; install it: apt-get install chromium fonts-dejavu-core"
        )
    Image.new("RGB", (96, 64), "olive").save(tmp_path / "meadow.png")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(accept_downloads=True)
        page.set_default_timeout(PATIENCE)
        asked, broken = [], []
        page.on("response", lambda answer: asked.append((answer.status, answer.url)))
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(f"{url}/")
        page.locator("label", has_text="1").first.click()
        page.get_by_role("button", name="frog", exact=True).click()
        page.locator("#status", has_text="1 picture in").wait_for()
        page.locator(".tile").hover()
        with page.expect_download() as download:
            page.get_by_role("button", name="Save 1×").click()
        download.value.save_as(tmp_path / "made.png")
        page.get_by_role("link", name="Edit").click()
        page.locator("#edit .drop input").set_input_files(tmp_path / "meadow.png")
        page.locator("#edit .status", has_text="meadow.png, 96 × 64 pixels").wait_for()
        page.locator("#edit .ways label", has_text="Remix").click()
        page.get_by_role("button", name="Apply").click()
        page.locator("#edit .status", has_text="Done in").wait_for()
        browser.close()
    assert images.read_settings(tmp_path / "made.png")["command"] == "generate"
    assert not broken
    elsewhere = [(status, at) for status, at in asked if not at.startswith((f"{url}/", "data:", "blob:"))]
    assert not elsewhere
    assert not [(status, at) for status, at in asked if status >= 400]


def test_the_page_is_told_where_it_is(tiny):
    """What a browser asks for begins with the page's base."""
    network = Network("/mg", ("192.0.2.1",), ("images.example.org",))
    app = create_app(Service(tiny, "tiny"), page=add_page, network=network)
    headers = {"x-forwarded-host": "images.example.org", "x-forwarded-proto": "https"}
    for peer, root in (
        ("192.0.2.1", "https://images.example.org/mg/"),
        ("192.0.2.2", "http://localhost:1/mg/"),
    ):
        client = TestClient(app, base_url="http://localhost:1", client=(peer, 1))
        for path in ("/mg/", "/"):
            text = client.get(path, headers=headers).text
            assert '<base href="/mg/">' in text
            assert f'content="{root}v1/samples/forming.webp"' in text


def ask(client: httpx.Client, seen_from: str, key: str = "") -> httpx.Response:
    headers = {"x-forwarded-for": seen_from} | ({"authorization": f"Bearer {key}"} if key else {})
    body = {"class": 1, "steps": 2, "num_images": 2}
    return client.post("/v1/generate", json=body, headers=headers)


@pytest.fixture
def busy(monkeypatch):
    """An event; until it is set, no answer is made."""
    go_on = threading.Event()
    pictures = outputs.pictures

    def waiting(*args, **options):
        assert go_on.wait(PATIENCE / 1000)
        return pictures(*args, **options)

    monkeypatch.setattr(outputs, "pictures", waiting)
    yield go_on
    go_on.set()


LIMITS = Limits(max_batch=2, max_per_client=3)


@pytest.mark.parametrize(
    ("network", "others"),
    [
        # A trusted proxy says who somebody else is; of what a client writes before that, nothing is believed.
        (BEHIND, {"198.51.100.2": 200, "6.6.6.6, 192.0.2.7": 429, "2001:db8::1": 200}),
        # A forged address is nobody else.
        (Network(), {"198.51.100.2": 429, "6.6.6.6, 192.0.2.7": 429, "2001:db8::1": 429}),
    ],
)
def test_a_client_is_known_by_an_address_that_it_cannot_forge(network, others, busy):
    with in_thread(LIMITS, network=network) as (client, service), ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, client, "192.0.2.7")
        wait_for(lambda: service.num_accepted == 2)
        answers = {}
        for address, status in others.items():
            if status == 429:
                answers[address] = ask(client, address)
        assert all(answer.json()["error"]["type"] == "overloaded" for answer in answers.values())
        welcome = [pool.submit(ask, client, address) for address, status in others.items() if status == 200]
        wait_for(lambda: service.num_accepted == 2 + 2 * len(welcome))
        busy.set()
        assert {one.result().status_code for one in [first, *welcome]} == {200}
        wait_for(lambda: service.num_accepted == 0)
        assert ask(client, "192.0.2.7").status_code == 200


def test_an_ipv6_client_is_its_network(busy):
    with in_thread(LIMITS, network=BEHIND) as (client, service), ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, client, "2001:db8::1")
        wait_for(lambda: service.num_accepted == 2)
        assert ask(client, "2001:db8::2").status_code == 429
        busy.set()
        assert first.result().status_code == 200


def test_a_client_with_a_key_is_known_by_it(busy):
    with (
        in_thread(LIMITS, ("one", "two"), network=BEHIND) as (client, service),
        ThreadPoolExecutor(2) as pool,
    ):
        first = pool.submit(ask, client, "192.0.2.7", "one")
        wait_for(lambda: service.num_accepted == 2)
        refused = ask(client, "198.51.100.2", "one")
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert "2 unfinished images" in refused.json()["error"]["message"]
        second = pool.submit(ask, client, "192.0.2.7", "two")
        wait_for(lambda: service.num_accepted == 4)
        busy.set()
        assert (first.result().status_code, second.result().status_code) == (200, 200)


def test_the_log_names_whom_a_proxy_saw_and_nobody_elses_word(caplog):
    for network, named in ((BEHIND, "192.0.2.7"), (Network(), "127.0.0.1")):
        with in_thread(LIMITS, ("one",), network=network) as (client, _):
            caplog.clear()
            assert ask(client, "6.6.6.6, 192.0.2.7", "wrong").status_code == 401
            assert caplog.messages == [f"{named} sent no valid key."]


def seen(network: Network, scope: dict) -> dict:
    """Return a request as the application sees it."""
    caught = []

    async def app(scope, receive, send):
        caught.append(scope)

    scope = {"type": "http", "scheme": "http", "path": "/v1/models", "root_path": "", "headers": []} | scope
    scope["headers"] = [(name.encode(), value.encode("latin-1")) for name, value in scope["headers"]]
    asyncio.run(Forwarded(app, network)(scope, None, None))
    caught[0]["headers"] = [(name.decode(), value.decode("latin-1")) for name, value in caught[0]["headers"]]
    return caught[0]


FORGED = [
    ("host", "own:8000"),
    ("X-Forwarded-For", "6.6.6.6"),
    ("x-forwarded-proto", "https"),
    ("x-forwarded-host", "evil.example"),
    ("x-forwarded-prefix", "/evil"),
]


@pytest.mark.parametrize("network", [Network(), Network(trusted_proxies=("10.0.0.0/8", "::1"))])
def test_nobody_else_is_believed(network):
    got = seen(network, {"client": ("192.0.2.7", 1234), "headers": FORGED})
    assert got["client"] == ("192.0.2.7", 1234)
    assert (got["scheme"], got["root_path"], got["path"]) == ("http", "", "/v1/models")
    # Nothing behind may believe it either.
    assert got["headers"] == [("host", "own:8000")]


@pytest.mark.parametrize("peer", ["10.1.2.3", "::ffff:10.1.2.3", "::1"])
def test_a_trusted_proxy_is_believed(peer):
    network = Network(trusted_proxies=("10.0.0.0/8", "::1"))
    headers = [(name, value.replace("evil", "mg")) for name, value in FORGED]
    got = seen(network, {"client": (peer, 1), "headers": headers})
    assert got["client"] == ("6.6.6.6", 0)
    assert (got["scheme"], got["root_path"], got["path"]) == ("https", "/mg", "/mg/v1/models")
    assert got["headers"] == [("host", "mg.example")]
    assert seen(network, {"type": "websocket", "client": (peer, 1), "headers": headers})["scheme"] == "wss"


@pytest.mark.parametrize(
    ("told", "client"),
    [
        # A client writes the first ones itself; each proxy adds whom it saw.
        ("6.6.6.6, 192.0.2.7", "192.0.2.7"),
        ("6.6.6.6, 192.0.2.7, 10.9.9.9", "192.0.2.7"),
        ("10.1.1.1, 192.0.2.7", "192.0.2.7"),
        ("192.0.2.7:4321", "192.0.2.7"),
        ("[2001:db8::5]:4321", "2001:db8::5"),
        ("2001:db8::5", "2001:db8::5"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("6.6.6.6, unknown, 10.9.9.9", "10.9.9.9"),
        ("6.6.6.6, <script>", "10.0.0.1"),
        ("", "10.0.0.1"),
        ("10.2.2.2, 10.3.3.3", "10.2.2.2"),
    ],
)
def test_the_client_is_the_last_that_is_no_proxy_of_ours(told, client):
    network = Network(trusted_proxies=("10.0.0.0/8",))
    got = seen(network, {"client": ("10.0.0.1", 1), "headers": [("x-forwarded-for", told)]})
    assert got["client"][0] == client
    split = [("x-forwarded-for", part) for part in told.split(",")]
    assert seen(network, {"client": ("10.0.0.1", 1), "headers": split})["client"][0] == client


@pytest.mark.parametrize(
    "prefix", ["mg", "/", "//evil.example", "/a/../b?", "/m\rg", '/"><script>', "/a" * 20, "/é"]
)
def test_a_prefix_that_is_no_path_is_not_taken(prefix):
    got = seen(BEHIND, {"client": ("127.0.0.1", 1), "headers": [("x-forwarded-prefix", prefix)]})
    assert (got["root_path"], got["path"]) == ("", "/v1/models")


@pytest.mark.parametrize("host", ["a b", "x/y", "evil.example/@", "[::1", "", "a" * 300, "me@x", "x:y"])
def test_a_host_that_is_none_is_not_taken(host):
    headers = [("host", "own"), ("x-forwarded-host", host)]
    assert seen(BEHIND, {"client": ("127.0.0.1", 1), "headers": headers})["headers"] == [("host", "own")]


@pytest.mark.parametrize(
    ("path", "wanted"),
    [("/v1/models", "/mg/v1/models"), ("/mg/v1/models", "/mg/v1/models"), ("/mg", "/mg"), ("/mgx", "/mg/mgx"),
     ("/", "/mg/")],
)  # fmt: skip
def test_the_path_is_the_whole_one_whether_the_proxy_left_it_or_not(path, wanted):
    scope = {"client": ("192.0.2.7", 1), "path": path, "raw_path": path.encode()}
    # What was configured is nobody's word.
    got = seen(Network(root_path="/mg"), scope)
    assert (got["path"], got["raw_path"], got["root_path"]) == (wanted, wanted.encode(), "/mg")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"root_path": "mg"}, "/mg"),
        ({"root_path": "/mg/"}, "/mg"),
        ({"root_path": "/"}, "/mg"),
        ({"root_path": "/m g"}, "/mg"),
        ({"trusted_proxies": ("nginx",)}, "10.0.0.0/8"),
        ({"trusted_proxies": ("10.0.0.0/40",)}, "10.0.0.0/8"),
        ({"trusted_proxies": ("*",)}, "10.0.0.0/8"),
        ({"allowed_hosts": ("http://x",)}, "images.example.org"),
        ({"cors_origins": ("app.example.org",)}, "https://app.example.org"),
        ({"cors_origins": ("*",)}, "https://app.example.org"),
    ],
)
def test_wrong_flags_are_told_in_a_sentence(flags, words, capsys):
    with pytest.raises(ConfigError, match=words):
        Network(**flags).check()
    ((name, value),) = flags.items()
    given = value if isinstance(value, str) else value[0]
    for command in ("serve", "app"):
        assert main([command, "--port", "0", f"--{name.replace('_', '-')}", given]) == 2
        assert words in capsys.readouterr().err


HOSTS = Network(
    trusted_proxies=("127.0.0.1",),
    allowed_hosts=("images.example.org", "*.below.example"),
    cors_origins=("https://app.example.org",),
)


@pytest.fixture(scope="module")
def exposed():
    with in_thread(Limits(max_batch=2), network=HOSTS) as (client, _):
        yield client


@pytest.mark.parametrize("told", ["host", "x-forwarded-host"])
@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("LOCALHOST:1", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("10.1.2.3:80", 200),
     ("images.example.org", 200), ("Images.Example.Org:443", 200), ("a.below.example", 200),
     ("evil.example", 403), ("below.example", 403), ("images.example.org.evil.example", 403),
     ("localhost.evil.example", 403), ("notlocalhost", 403)],
)  # fmt: skip
def test_the_server_answers_to_its_own_names(exposed, host, status, told):
    answer = exposed.get("/healthz", headers={told: host})
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["type"] == "foreign"
        assert "--allowed-hosts" in answer.json()["error"]["message"]
    assert exposed.get("/healthz/", headers={told: host}).status_code in (403, 404)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://localhost"}, 200),
        ({"origin": "https://app.example.org", "sec-fetch-site": "cross-site"}, 200),
        ({"origin": "https://x", "sec-fetch-site": "same-origin"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "http://localhost:9"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost", "sec-fetch-site": "cross-site"}, 403),
        ({"origin": "http://localhost", "sec-fetch-site": "same-site"}, 403),
    ],
)
@pytest.mark.parametrize("form", [False, True])
def test_other_sites_pages_are_refused(exposed, headers, status, form):
    request = (
        {"files": {"class": (None, "1"), "steps": (None, "1")}}
        if form
        else {"json": {"class": 1, "steps": 1}}
    )
    answer = exposed.post("/v1/generate", headers={"host": "localhost"} | headers, **request)
    assert answer.status_code == status
    named = "https://app.example.org" if headers.get("origin") == "https://app.example.org" else None
    assert answer.headers.get("access-control-allow-origin") == named


def test_without_a_flag_no_other_site_is_asked_in(exposed):
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    for origin, status in (("https://app.example.org", 200), ("https://evil.example", 400)):
        assert exposed.options("/v1/generate", headers={"origin": origin} | asked).status_code == status
    with in_thread(Limits(max_batch=2)) as (client, _):
        answer = client.get("/v1/models", headers={"origin": "https://app.example.org"})
        assert "access-control-allow-origin" not in answer.headers
