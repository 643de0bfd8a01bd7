"""docs/serving.md: its commands and programs are run against a server."""

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskgit import images
from maskgit.apps.serving import app
from maskgit.apps.serving.service import Limits
from servers import in_thread

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
URL = "http://127.0.0.1:8000"
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("curl")
]
PROGRAMS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def url():
    with in_thread(Limits(queue_size=8)) as (client, _):
        yield str(client.base_url).rstrip("/")


@pytest.fixture(autouse=True)
def _photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo = (np.random.default_rng(0).random((32, 40, 3)) * 255).astype("uint8")
    Image.fromarray(photo).save("photo.png")
    Image.fromarray(np.repeat(np.arange(40)[None] < 20, 32, 0).astype("uint8") * 255).save("mask.png")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, url):
    done = subprocess.run(
        [*shlex.split(command.replace(URL, url)), "--fail", "--silent", "--show-error"],
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for name in ("frog.png", "edited.webp"):
        if name in command:
            assert images.read_image(name).size[1] == 32
    if "stream" in command:
        assert done.stdout.count(b"event: preview") >= 1
    elif "answer.json" in command:
        assert '"images":[{' in Path("answer.json").read_text("utf-8")
    elif "-o" not in command:
        assert done.stdout.startswith(b"{")


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(program, url, capsys):
    exec(compile(program.replace(URL, url), "docs/serving.md", "exec"), {})
    assert len(list(Path().glob("frog-*.png"))) in (2, 4)


def test_every_route_is_described(tmp_path):
    for path in app.bare_app().openapi()["paths"]:
        assert f"`{path}`" in TEXT or f" {path}`" in TEXT, path
