"""Files are written whole or not at all."""

import errno
import os

import pytest

import forking
from maskgit.errors import OutputError
from maskgit.foundation.files import expand_argument, output_error, replacing, write_bytes


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), ValueError("ours"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(failure, tmp_path):
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")
    with (
        pytest.raises(OutputError if isinstance(failure, OSError) else type(failure)),
        replacing(path) as temporary,
    ):
        temporary.write_bytes(b"half")
        raise failure
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_errors_say_what_to_do(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="a file stands where a folder should be"):
        write_bytes(tmp_path / "file" / "x", b"")
    with pytest.raises(OutputError, match="a file stands where a folder should be"):
        write_bytes(tmp_path / "file" / "x" / "y", b"")
    assert "disk is full" in str(output_error("x", OSError(errno.ENOSPC, "No space left on device")))
    assert "Read-only" in str(output_error("x", OSError(errno.EROFS, "Read-only file system")))


def test_a_file_that_appears_meanwhile_is_not_replaced_unasked(tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    for link in (os.link, refuse_links):
        monkeypatch.setattr(os, "link", link)
        with (
            pytest.raises(OutputError, match="exists already"),
            replacing(path, overwrite=False) as temporary,
        ):
            temporary.write_bytes(b"ours")
            path.write_bytes(b"theirs")
        assert path.read_bytes() == b"theirs"
        path.unlink()
        write_bytes(path, b"ours", overwrite=False)
        assert path.read_bytes() == b"ours"
        assert list(tmp_path.iterdir()) == [path]
        path.unlink()


def refuse_links(*_):
    raise PermissionError(errno.EPERM, "Operation not permitted")


def test_links_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "file.bin"
    link.symlink_to("real/file.bin")
    for content in (b"made", b"renewed"):
        write_bytes(link, content)
        assert link.is_symlink()
        assert (tmp_path / "real" / "file.bin").read_bytes() == content
    assert len(list((tmp_path / "real").iterdir())) == 1


def test_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_bytes("~/new/file", b"x")
    assert (tmp_path / "new" / "file").read_bytes() == b"x"
    for given, meant in {
        "--out=~/frogs": f"--out={tmp_path}/frogs",
        "~/a=~/b": f"{tmp_path}/a=~/b",
        "~": f"{tmp_path}",
        "--out=~": f"--out={tmp_path}",
        "--class=~x": "--class=~x",
        "a~/b": "a~/b",
        "--set": "--set",
        "data=~/x": "data=~/x",
    }.items():
        assert expand_argument(given) == meant


MODES = """
import os, stat, sys, threading
from pathlib import Path
import numpy as np
from maskgit import hub
from maskgit.foundation.files import write_bytes
from maskgit.data.image_cache import write_image_cache

# The umask belongs to the process: whoever sets it, if only for a moment, sets it for all threads.
def refuse(mask):
    raise AssertionError("the umask is not to be changed")

os.umask(0o027)
os.umask = refuse
out = Path(sys.argv[1])
write_bytes(out / "file", b"x")
write_image_cache(out / "cache", np.zeros((1, 4, 4, 3), np.uint8), np.zeros(1, np.int64), ("a",))
hub.from_pretrained().save_pretrained(out / "model")
for path in sorted(out.rglob("*")):
    print(oct(stat.S_IMODE(path.stat().st_mode)), "folder" if path.is_dir() else "file", path.name)
"""


def test_permissions_are_those_of_any_new_file_without_touching_the_umask(tmp_path):
    done = forking.run("-c", MODES, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 8
    for line in lines:
        assert line.startswith("0o750 folder" if " folder " in line else "0o640 file"), line
