"""What commands print, whoever reads it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskgit.apps.cli import commands as cli
from maskgit.diffusers import MaskGITPipeline
from maskgit.foundation.notes import bar

# The shell closes, breaks or fills a stream before Python starts.
MASKGIT = f"'{sys.executable}' -m maskgit"
# No file system says no to these; in a UTF-8 locale they are no text.
BYTES = os.fsdecode(b"caf\xe9")


def shell(command: str, tmp_path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("policies >&-", 0),
        ("generate --help >&-", 0),
        ("generate --class frog --steps 1 >&-", 0),
        ("info nonsense >&- 2>&- <&-", 2),
        ("policies | true", 0),
        ("generate --class frog --steps 1 2>&1 | true", 0),
        ("info nonsense 2>&1 | true", 2),
    ],
)
def test_whom_nobody_listens_to_does_its_work_all_the_same(command, code, tmp_path):
    done = shell(f"{MASKGIT} {command}", tmp_path)
    assert (done.returncode, done.stderr) == (code, b"")
    assert (tmp_path / "out" / "frog-0-00000.png").exists() == ("frog" in command)


def test_a_guess_that_cannot_be_printed_loses_no_picture(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.png")
    command = f"{MASKGIT} vary photo.png --strength 0.5 --steps 1 | true"
    assert shell(command, tmp_path, PYTHONUNBUFFERED="1").returncode == 0
    assert len(list((tmp_path / "out").glob("photo-*.png"))) == 1


def test_what_is_no_text_is_printed_to_nobody(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with cli.outlets():
        for stream in (sys.stdout, sys.stderr):
            print(BYTES, "×", file=stream)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full, which stands for a full disk")
@pytest.mark.parametrize("command", ["info", "tune --help", "--version"])
def test_a_full_disk_is_told(command, tmp_path):
    done = shell(f"{MASKGIT} {command} >/dev/full", tmp_path)
    assert done.returncode == 2
    assert done.stderr == b"maskgit: standard output cannot be written: No space left on device.\n"


def test_files_do_not_take_the_place_of_a_closed_stream(tmp_path):
    code = (
        "import os; from maskgit.apps.cli.streams import open_closed; open_closed(); print(os.open('x', 64))"
    )
    closed = shell(f"'{sys.executable}' -c \"{code}\" 2>&- <&-", tmp_path)
    assert int(closed.stdout) > 2
    # What a library prints is not in it, and a child has the streams too.
    code = (
        "import os, subprocess; from maskgit.apps.cli.streams import open_closed; open_closed();"
        "f = open('y', 'w'); os.write(2, b'remark'); subprocess.run(['sh', '-c', 'echo remark >&2']); f.close()"
    )
    assert shell(f"'{sys.executable}' -c \"{code}\" 2>&-", tmp_path).returncode == 0
    assert (tmp_path / "y").read_text() == ""


def printed(monkeypatch, encoding: str, *commands: str) -> tuple[list[int], bytes]:
    """Return the codes of commands and what they print to a terminal of that encoding."""
    raw, codes = io.BytesIO(), []
    for name in ("stdout", "stderr"):
        stream = io.TextIOWrapper(raw, encoding, "strict", write_through=True)
        monkeypatch.setattr(sys, name, stream)
    for command in commands:
        codes.append(cli.main(command.split()))
    return codes, raw.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "latin-1", "utf-8"])
def test_any_terminal_shows_what_is_printed(encoding, monkeypatch):
    commands = [*cli.app._subcommands, "policies --nonsense", "generate --class unicorn"]
    asked = [command if " " in command else f"{command} --help" for command in commands]
    codes, shown = printed(monkeypatch, encoding, "policies", "info", *asked)
    assert codes == [0] * len(commands) + [2, 2]
    text = shown.decode(encoding).replace("Fr\\xe9chet", "")
    assert "\\" not in text
    assert "Keep as many tokens as the entropy bound allows" in text


def test_signs_are_spelled_and_all_else_is_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii", "strict"))
    with cli.outlets():
        print("8 × 8 ≥ 3 – …", "é", "𝄞", BYTES)
    print("as before")
    sys.stdout.flush()
    assert sys.stdout.errors == "strict"
    assert raw.getvalue() == b"8 x 8 >= 3 - ... \\xe9 \\U0001d11e caf\xe9\nas before\n"


def test_every_command_takes_file_names_that_are_no_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(BYTES, name).mkdir(parents=True)
        for i in range(6):
            picture = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(picture).save(f"{BYTES}/{name}/{BYTES}{i}.png")
    photo, few = f"{BYTES}/a/{BYTES}1.png", "--steps 1"
    commands = [
        f"generate --class frog {few} --out {BYTES}-1",
        f"edit {photo} --box 0 0 9 9 --class frog {few} --out {BYTES}-2",
        f"outpaint {photo} --left 8 {few} --out {BYTES}-3",
        f"vary {photo} --strength 0.5 {few} --out {BYTES}-4",
        f"interpolate {photo} {photo} {few} --out {BYTES}-5",
        f"reconstruct {photo} --out {BYTES}-6",
        f"pack {BYTES} {BYTES}-packed --size 32",
        f"tokenize {BYTES}-packed {BYTES}-tokens --tokenizer cifar10",
        f"stats {BYTES} --out {BYTES}.npz",
        f"compare {BYTES} {BYTES} --json",
        f"evaluate cifar10 --reference {BYTES}.npz --num-images 12 {few} --out {BYTES}-7",
        f"evaluate cifar10 --reconstruction --reference {BYTES} --out {BYTES}-8",
    ]
    codes, shown = printed(monkeypatch, "utf-8", *commands)
    assert printed(monkeypatch, "utf-8", f"export cifar10 --out {BYTES}-9")[0] == [2]
    assert codes == [0] * len(commands), shown.decode("utf-8", "backslashreplace")[-2000:]
    # Paths can be copied: they are printed with their own bytes.
    for number in range(1, 7):
        assert b"caf\xe9-%d/sheet.png\n" % number in shown
    for number in (7, 8):
        report = json.loads(Path(f"{BYTES}-{number}/report.json").read_text("utf-8"))
        assert BYTES in json.dumps(report, ensure_ascii=False)


def test_work_goes_on_where_there_is_no_standard_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert list(bar(range(3), desc="work")) == [0, 1, 2]
    assert list(MaskGITPipeline.from_pretrained().progress_bar(range(3))) == [0, 1, 2]
