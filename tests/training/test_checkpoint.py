"""Checkpoints: exact, whole or absent, whenever the process dies."""

import copy
import errno
import io
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from maskgit.checkpoints.weights import weights_fingerprint
from maskgit.errors import CheckpointError, MaskGITError, OutputError
from maskgit.training.run import checkpoint
from maskgit.training.run.checkpoint import MARKER, Checkpoints, ModelAndOptimizer
from runs import run_two


def trained(steps: int) -> ModelAndOptimizer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    return ModelAndOptimizer(model, optimizer)


def flat(state: dict, prefix: str = "") -> dict:
    if not isinstance(state, dict):
        return {prefix: state}
    return {k: v for key, item in state.items() for k, v in flat(item, f"{prefix}/{key}").items()}


def assert_same(a: dict, b: dict) -> None:
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, key


def small(step: int) -> dict:
    return {"weights": torch.full((4,), float(step)), "step": step}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_everything_comes_back_as_it_was(tmp_path, asynchronous):
    before = trained(3)
    checkpoints = Checkpoints(tmp_path, asynchronous=asynchronous)
    average = torch.randn(4, dtype=torch.float64)
    saved = {"net": before, "ema": {"a": average}, "place": {"step": 3, "names": ["x", "y"], "rate": 0.1}}
    expected = copy.deepcopy(before.state_dict())
    checkpoints.save(3, saved)
    before.optimizers[0].step()  # A save that is under way must not see what comes after it.
    average_then = average.clone()
    average.zero_()
    checkpoints.close()

    after, empty = trained(0), torch.zeros(4, dtype=torch.float64)
    state = {"net": after, "ema": {"a": empty}, "place": {"step": 0, "names": [], "rate": 0.0}}
    loaded = checkpoints.load(checkpoints.latest(), state)
    assert loaded["place"] == {"step": 3, "names": ["x", "y"], "rate": 0.1}
    assert torch.equal(empty, average_then)
    assert_same(after.state_dict(), expected)


def test_the_newest_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=1)
    for step, score in enumerate([0.1, 0.9, 0.2, None, 0.3, float("nan")], start=1):
        checkpoints.save(step, small(step), score)
    assert [entry.step for entry in checkpoints.committed()] == [2, 5, 6]
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [f"step-{n:08d}" for n in (2, 5, 6)]


def test_a_step_that_is_there_is_left_as_it_is(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, small(1))
    checkpoints.save(1, small(99))
    assert int(checkpoints.load(checkpoints.latest(), small(0))["weights"][0]) == 1


@pytest.mark.parametrize("harm", ["no marker", "half a marker", "a part is short", "a part is missing"])
def test_a_damaged_checkpoint_counts_for_nothing(tmp_path, harm):
    checkpoints = Checkpoints(tmp_path)
    good, bad = (checkpoints.save(step, small(step)) for step in (1, 2))
    part = next(path for path in bad.iterdir() if path.suffix == ".distcp")
    if harm == "no marker":
        (bad / MARKER).unlink()
    elif harm == "half a marker":
        text = (bad / MARKER).read_text()
        (bad / MARKER).write_text(text[: len(text) // 2])
    elif harm == "a part is short":
        part.write_bytes(part.read_bytes()[:-1])
    else:
        part.unlink()
    assert checkpoints.latest() == good
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.load(bad, small(0))
    checkpoints.save(2, small(2))
    assert checkpoints.latest() == bad


def test_no_checkpoint_is_none(tmp_path):
    assert Checkpoints(tmp_path / "nothing").latest() is None


@pytest.mark.parametrize("state", [{"weights": torch.zeros(5)}, {"other": torch.zeros(4)}])
def test_a_state_of_another_structure_is_an_error(tmp_path, state):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, small(1))
    with pytest.raises(CheckpointError, match="does not belong to this run"):
        checkpoints.load(checkpoints.latest(), state)


def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, small(1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="disk is full"):
            checkpoints.save(2, small(2))
    assert int(checkpoints.load(checkpoints.latest(), small(0))["step"]) == 1
    checkpoints.save(2, small(2))
    assert int(checkpoints.load(checkpoints.latest(), small(0))["step"]) == 2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_failed_leaves_nothing_and_training_goes_on(tmp_path, monkeypatch, asynchronous):
    checkpoints, said = Checkpoints(tmp_path, asynchronous=asynchronous), []
    checkpoints.report = said.append

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="disk is full"):
            # There is none yet that a run could go on from.
            checkpoints.save(1, small(1))
            checkpoints.wait()
    checkpoints.save(2, small(2))
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        checkpoints.save(3, small(3))
        checkpoints.close()
    assert len(said) == 1
    assert "step-00000003 cannot be written: the disk is full" in said[0]
    assert "starts again from step 2" in said[0]
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000002"]


def test_what_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    monkeypatch.setattr(checkpoint.dcp, "save", lambda *_, **__: pytest.fail("begun"))
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path))
    state = {"weights": torch.zeros(2**20), "nested": {"moments": torch.zeros(2**19, dtype=torch.float64)}}
    with pytest.raises(
        OutputError, match=r"disk is full.*needs 8\.0 MiB, and 0\.0 MiB are free on the disk at"
    ) as raised:
        Checkpoints(tmp_path / "run").save(1, state)
    assert str(tmp_path) in str(raised.value).split("disk at")[1]


def test_a_failed_asynchronous_save_is_told(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, asynchronous=True)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        checkpoints.save(1, small(1))
        with pytest.raises(MaskGITError, match="disk is full"):
            checkpoints.wait()
    checkpoints.close()


def test_a_failed_asynchronous_commit_is_told_and_loses_nothing(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, asynchronous=True)
    checkpoints.save(1, small(1))
    checkpoints.wait()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync_folder", full)
        checkpoints.save(2, small(2))
        with pytest.raises(OutputError, match=r"step-00000002.*disk is full"):
            checkpoints.wait()
    checkpoints.close()
    assert checkpoints.load(checkpoints.latest(), small(0))["step"] == 1


FULL_DISK = """
import datetime, errno, os, sys
import torch
import torch.distributed as dist
from maskgit.errors import OutputError
from maskgit.training.run import checkpoint

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
rank = dist.get_rank()


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def small(step):
    return {"weights": torch.full((4,), float(step)), "step": step}


for asynchronous in (False, True):
    for failing, module, name in ((1, os, "fsync"), (0, os, "fsync"), (0, checkpoint, "_sync_folder")):
        checkpoints = checkpoint.Checkpoints(
            f"{sys.argv[1]}/{asynchronous}-{failing}-{name}", asynchronous=asynchronous
        )
        checkpoints.save(1, small(1))
        checkpoints.wait()
        write = getattr(module, name)
        if rank == failing:
            setattr(module, name, full)
        try:
            checkpoints.save(2, small(2))
            checkpoints.wait()
        except OutputError as error:
            print("TOLD", error, file=sys.stderr)
        setattr(module, name, write)
        dist.barrier()
        assert checkpoints.load(checkpoints.latest(), small(0))["step"] == 1
        checkpoints.save(3, small(3))
        checkpoints.close()
        dist.barrier()
        assert checkpoints.load(checkpoints.latest(), small(0))["step"] == 3
dist.destroy_process_group()
"""


def test_a_disk_that_is_full_for_one_process_is_a_sentence_in_all(tmp_path):
    for said in run_two(FULL_DISK, str(tmp_path)):
        told = [line for line in said.splitlines() if line.startswith("TOLD")]
        assert len(told) == 6
        assert all("step-00000002" in line and "disk is full" in line for line in told)


WRITES = (
    (os, "replace"),
    (os, "rename"),
    (os, "fsync"),
    (os, "mkdir"),
    (os, "unlink"),
    (os, "rmdir"),
    (io, "open"),
)


def save_and_die(folder, step: int, call: int) -> bool:
    """Save in a process that ends without a word before its `call`-th write; return whether it ended well."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    count = 0

    def dying(function):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count == call:
                os._exit(9)
            return function(*args, **kwargs)

        return wrapped

    for module, name in WRITES:
        setattr(module, name, dying(getattr(module, name)))
    try:
        Checkpoints(folder, keep_last=1).save(step, small(step))
    except BaseException:
        os._exit(8)
    os._exit(0)


def test_killed_at_every_write_of_a_checkpoint_in_turn_leaves_one_that_loads(tmp_path):
    steps = []
    ended = False
    while not ended:
        folder = tmp_path / str(len(steps))
        checkpoints = Checkpoints(folder, keep_last=1)
        checkpoints.save(1, small(1))
        ended = save_and_die(folder, 2, call=len(steps) + 1)
        loaded = checkpoints.load(checkpoints.latest(), small(0))
        assert loaded["weights"].tolist() == [float(loaded["step"])] * 4
        steps.append(loaded["step"])
        # What a killed save left behind is swept away by the next.
        checkpoints.save(3, small(3))
        assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000003"]
    # The old one up to some write, the new one from there.
    assert steps == sorted(steps)
    assert len(steps) > 10
    assert {1, 2} == set(steps)


def test_a_marker_tells_what_it_commits(tmp_path):
    path = Checkpoints(tmp_path).save(7, small(7), score=0.5)
    marker = json.loads((path / MARKER).read_text())
    assert marker["step"] == 7
    assert marker["score"] == 0.5
    assert marker["files"] == {p.name: p.stat().st_size for p in path.iterdir() if p.name != MARKER}


def test_a_fingerprint_tells_weights_apart():
    one, other = nn.Linear(2, 3), nn.Linear(2, 3)
    other.load_state_dict(one.state_dict())
    assert weights_fingerprint(one) == weights_fingerprint(other)
    with torch.no_grad():
        other.bias[1] = torch.nextafter(other.bias[1], torch.tensor(9.0))
    assert weights_fingerprint(one) != weights_fingerprint(other)
