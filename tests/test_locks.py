"""One at a time: processes and threads, killed holders, other users' files, systems without `flock`."""

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from maskgit.errors import OutputError
from maskgit.foundation import locks
from maskgit.foundation.locks import locked

# Holds the lock that it is given and says so, until its standard input ends.
HOLDER = """
import sys
from pathlib import Path
from maskgit.foundation.locks import locked
with locked(Path(sys.argv[1]), lambda holder: print(f"waits for {holder}", flush=True)):
    print("holds", flush=True)
    sys.stdin.read()
"""


class GivenUpError(Exception):
    pass


def give_up(holder):
    raise GivenUpError(holder)


@contextmanager
def another_process(path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        yield holder
        holder.stdin.close()
        assert holder.wait() in (0, -signal.SIGKILL)


def test_the_second_process_waits_for_the_first_and_knows_its_name(tmp_path):
    path = tmp_path / "new" / "file.lock"
    with another_process(path) as first:
        assert first.stdout.readline() == "holds\n"
        with (
            pytest.raises(GivenUpError, match=f"process {first.pid} on {socket.gethostname()}"),
            locked(path, give_up),
        ):
            pass
        with another_process(path) as second:
            assert second.stdout.readline() == f"waits for process {first.pid} on {socket.gethostname()}\n"
            first.stdin.close()
            assert second.stdout.readline() == "holds\n"
            assert first.wait() == 0
            with pytest.raises(GivenUpError, match=f"process {second.pid}"), locked(path, give_up):
                pass
    assert list(path.parent.iterdir()) == []


def test_a_lock_whose_process_was_killed_is_free(tmp_path):
    path = tmp_path / "file.lock"
    with another_process(path) as first:
        assert first.stdout.readline() == "holds\n"
        first.kill()
        first.wait()
        assert path.exists()
        with locked(path, give_up):
            pass
    assert not path.exists()


def test_threads_take_turns(tmp_path):
    path, inside, most = tmp_path / "file.lock", [], []

    def work():
        for _ in range(50):
            with locked(path, lambda holder: None):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 200
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"process": "x", "host": 1}'])
def test_a_holder_that_cannot_be_named_is_another_process(content, tmp_path):
    path = tmp_path / "file.lock"
    with locked(path, give_up):
        path.write_bytes(content)
        with pytest.raises(GivenUpError, match="another process"), locked(path, give_up):
            pass


def test_without_flock_the_library_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    path, order = tmp_path / "file.lock", []
    entered = threading.Event()

    def second():
        with locked(path, lambda holder: (order.append(holder), entered.set())):
            order.append("second")

    with locked(path, give_up):
        thread = threading.Thread(target=second)
        thread.start()
        assert entered.wait(120)
        order.append("first")
    thread.join()
    assert order == ["another process", "first", "second"]


def test_a_file_system_without_locks_has_none(tmp_path, monkeypatch):
    def unsupported(handle, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with locked(tmp_path / "file.lock", give_up), locked(tmp_path / "file.lock", give_up):
        pass


def test_a_lock_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match="a file stands where a folder should be"),
        locked(tmp_path / "file" / "x.lock", give_up),
    ):
        pass
    # A link that somebody put there leads nowhere.
    (tmp_path / "x.lock").symlink_to(tmp_path / "target")
    with pytest.raises(OutputError), locked(tmp_path / "x.lock", give_up):
        pass
    assert not (tmp_path / "target").exists()


def test_a_lock_file_of_another_user_can_be_waited_for(tmp_path, monkeypatch):
    path = tmp_path / "file.lock"
    path.touch()
    whole = os.open

    def denied(name, flags, mode=0o777):
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return whole(name, flags, mode)

    monkeypatch.setattr(os, "open", denied)
    with locked(path, give_up), pytest.raises(GivenUpError), locked(path, give_up):
        pass
