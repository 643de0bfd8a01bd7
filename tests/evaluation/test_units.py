"""Work that processes share: locked, committed whole, found damaged, made again."""

import json
import os
import threading

import numpy as np
import pytest

from maskgit.errors import ConfigError, DataError, OutputError
from maskgit.foundation.locks import give_up, locked
from maskgit.foundation.units import Made, Units


class Squares:
    """The squares of ten numbers, three a unit."""

    def __init__(self, power=2):
        self.plan = {"power": power, "sub": {"a": 1}}
        self.count, self.unit_size = 10, 3
        self.power, self.asked = power, []

    def make(self, first, stop):
        self.asked.append((first, stop))
        return Made({"x": np.arange(first, stop) ** self.power}, {"first": first}, {"text": b"hello"})


def values(units):
    return np.concatenate([units.read(i).arrays["x"] for i in range(len(units))]).tolist()


def test_units_cover_the_work_and_are_not_made_twice(tmp_path):
    work = Squares()
    seen = []
    units = Units(tmp_path, work)
    units.run(lambda done, total: seen.append((done, total)))
    assert values(units) == [i**2 for i in range(10)]
    assert work.asked == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert seen[0] == (0, 4)
    assert seen[-1] == (4, 4)
    assert units.read(1).notes == {"first": 3}
    assert (tmp_path / "unit-00000" / "text").read_bytes() == b"hello"
    assert (tmp_path / "unit-00000").stat().st_mode & 0o777 == 0o777 & ~_umask()
    Units(tmp_path, Squares()).run()
    assert len(work.asked) == 4
    assert units.seconds() >= 0


def test_each_unit_is_looked_for_a_few_times_however_many_there_are(tmp_path, monkeypatch):
    looks = []
    done = Units.done
    monkeypatch.setattr(Units, "done", lambda self, number: looks.append(number) or done(self, number))
    work = Squares()
    work.count, work.unit_size = 60, 1
    seen = []
    Units(tmp_path, work).run(lambda done, total: seen.append((done, total)))
    assert seen == [(i, 60) for i in range(61)] + [(60, 60)]
    assert len(looks) <= 4 * 60


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    class Stops(Squares):
        def make(self, first, stop):
            if first == 6:
                raise KeyboardInterrupt
            return super().make(first, stop)

    with pytest.raises(KeyboardInterrupt):
        Units(tmp_path, Stops()).run()
    assert not list(tmp_path.glob("*.lock"))
    work = Squares()
    units = Units(tmp_path, work)
    units.run()
    assert work.asked == [(6, 9), (9, 10)]
    assert values(units) == [i**2 for i in range(10)]


@pytest.mark.parametrize("damage", ["flip", "cut", "no arrays", "no manifest", "other plan", "other file"])
def test_damage_is_found_and_mended(tmp_path, damage):
    units = Units(tmp_path, Squares())
    units.run()
    unit = tmp_path / "unit-00001"
    arrays, manifest = unit / "arrays.npz", unit / "manifest.json"
    if damage == "flip":
        data = bytearray(arrays.read_bytes())
        data[len(data) // 2] ^= 1
        arrays.write_bytes(bytes(data))
    elif damage == "cut":
        arrays.write_bytes(arrays.read_bytes()[:50])
    elif damage == "no arrays":
        arrays.unlink()
    elif damage == "no manifest":
        manifest.write_text("{")
    elif damage == "other plan":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"plan": "0" * 64}))
    else:
        (unit / "text").write_bytes(b"hallo")
    if damage != "other file":
        with pytest.raises(DataError, match="run the same command again"):
            units.read(1)
    assert units.mend() == 1
    assert values(units) == [i**2 for i in range(10)]
    assert units.mend() == 0
    assert (unit / "text").read_bytes() == b"hello"


def test_a_unit_without_its_manifest_is_made_again(tmp_path):
    units = Units(tmp_path, Squares())
    units.run()
    (tmp_path / "unit-00002" / "manifest.json").unlink()
    units.run()
    assert values(units) == [i**2 for i in range(10)]


def test_another_plan_is_refused_and_told(tmp_path):
    Units(tmp_path, Squares())
    with pytest.raises(ConfigError, match=r"other settings \(power 2, not 3\).*choose another folder"):
        Units(tmp_path, Squares(3))
    (tmp_path / "plan.json").write_text("[")
    with pytest.raises(ConfigError, match=r"is not JSON\. Remove"):
        Units(tmp_path, Squares())


def test_work_done_twice_does_no_harm(tmp_path):
    class Raced(Squares):
        """Another process takes over its lock and finishes each unit first."""

        def make(self, first, stop):
            other = Units(tmp_path, Squares())
            other._commit(first // 3, Squares().make(first, stop), 0.0)
            return super().make(first, stop)

    units = Units(tmp_path, Raced())
    units.run()
    assert values(units) == [i**2 for i in range(10)]
    assert units.mend() == 0


@pytest.mark.parametrize("finished", [True, False])
def test_a_unit_that_another_process_makes_is_waited_for(tmp_path, finished):
    work = Squares()
    units = Units(tmp_path, work)
    held, waits = threading.Event(), threading.Event()

    def other():
        """Hold a unit until the rest is done, and then finish it or be killed."""
        with locked(tmp_path / "unit-00002.lock", give_up):
            held.set()
            assert waits.wait(60)
            if finished:
                units._commit(2, Squares().make(6, 9), 0.0)

    thread = threading.Thread(target=other)
    thread.start()
    assert held.wait(60)
    seen = []
    units.run(lambda done, total: (seen.append(done), waits.set() if done == 3 else None))
    thread.join()
    assert work.asked == [(0, 3), (3, 6), (9, 10)] + [(6, 9)] * (not finished)
    assert seen == sorted(seen)
    assert values(units) == [i**2 for i in range(10)]


def test_each_process_begins_with_its_own_share(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    work = Squares()
    Units(tmp_path, work).run()
    assert work.asked == [(3, 6), (9, 10), (0, 3), (6, 9)]


def test_what_killed_processes_left_is_removed(tmp_path):
    units = Units(tmp_path, Squares())
    units.run()
    (tmp_path / ".unit-00001.abc").mkdir()
    (tmp_path / "unit-00002.lock").write_text("{}")
    units.tidy()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "plan.json",
        *(f"unit-0000{i}" for i in range(4)),
    ]


def test_a_file_in_the_way_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a file stands where a folder should be"):
        Units(tmp_path / "file" / "work", Squares())
