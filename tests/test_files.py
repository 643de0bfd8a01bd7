"""Files are written whole or not at all."""

import errno
import os
import stat

import pytest

from maskgit.errors import OutputError
from maskgit.files import output_error, replacing, write_bytes


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


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
