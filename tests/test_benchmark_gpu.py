"""The measurement for machines with a GPU: its sections run, end, and keep what they found, without one."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STAND_INS = """
import os, subprocess, sys
from pathlib import Path

sys.path.insert(0, {benchmarks!r})
from sections import Record

name, out = sys.argv[1], Path(sys.argv[2])
record = Record(out / (name + ".json"))
record.add("before", 0.5, "s", expected=(0.5, 0.6), source="arithmetic")
if name == "crash":
    raise ValueError("it broke here")
if name == "kill":
    os.abort()
if name == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (out / "child").write_text(str(child.pid))
    child.wait()
record.add("after", 0.1, expected=(0.5, 0.6))
"""


@pytest.fixture(autouse=True)
def _modules(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def results(tmp_path):
    """Run stand-in sections by their names and limits; return what is written."""
    import sections

    script = tmp_path / "section.py"
    script.write_text(STAND_INS.format(benchmarks=str(BENCHMARKS)))

    def run(limits, budget=600.0):
        found = [
            sections.Section(name, limit, lambda *_: None, f"About {name}.") for name, limit in limits.items()
        ]
        out = tmp_path / "out"
        well = sections.run_sections(
            found,
            lambda section: [sys.executable, str(script), section.name, str(out)],
            out,
            budget=budget,
            title="Stand-ins",
        )
        return well, json.loads((out / "results.json").read_text()), (out / "results.md").read_text()

    return run


def test_a_section_that_fails_hides_no_other_and_keeps_what_it_found(results, tmp_path):
    # The one that hangs is cut short as soon as it can have begun.
    well, found, page = results({"crash": 60, "kill": 60, "hang": 20, "fine": 60})
    assert not well
    assert [len(found[name]["rows"]) for name in ("crash", "kill", "hang", "fine")] == [1, 1, 1, 2]
    assert found["crash"]["end"] == "failed with exit code 1"
    assert "it broke here" in found["crash"]["printed"]
    assert found["kill"]["end"] == "failed with exit code -6"
    assert found["hang"]["end"] == "cut short after 20 s"
    assert found["fine"]["end"] == "done"
    assert "it broke here" in page
    # And what it had started has ended, too.
    child = Path("/proc") / (tmp_path / "out" / "child").read_text()
    assert not child.exists() or "\nState:\tZ" in (child / "status").read_text()


def test_expected_figures_stand_beside_measured_ones(results):
    well, found, page = results({"fine": 60})
    assert well
    before, after = found["fine"]["rows"]
    assert (before["low"], after["low"]) == (False, True)
    assert "| before | 0.5 s | 0.5 to 0.6 | arithmetic |" in page
    assert "| after | 0.1 **under 70%: to be explained** | 0.5 to 0.6 |  |" in page


def test_what_the_time_does_not_reach_is_named(results):
    well, found, page = results({"fine": 60, "other": 60}, budget=0)
    assert not well
    assert {section["end"] for section in found.values()} == {"not run: the time was over"}
    assert "About other. (not run: the time was over)" in page


def test_a_slow_section_takes_no_time_from_those_after_it(tmp_path, monkeypatch):
    import sections

    now, given = [0.0], {}

    def run(command, printed, seconds):
        given[command[0]] = seconds
        now[0] += seconds if command[0] != "quick" else 1
        return {"end": "done"}

    monkeypatch.setattr(sections.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sections, "_run", run)
    named = [sections.Section(name, 60, lambda *_: None, "") for name in ("slow", "quick", "next", "last")]
    sections.run_sections(named, lambda one: [one.name], tmp_path, budget=120, title="")
    # What a quick one leaves is for the others, each of which has its own limit.
    assert given == {"slow": 30, "quick": 30, "next": 44.5, "last": 44.5}
    assert sections.run_sections(named[:1], lambda one: [one.name], tmp_path, budget=120, title="")
    assert given["slow"] == 60


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    command = [sys.executable, BENCHMARKS / "gpu.py"]
    listed = subprocess.run([*command, "--list"], check=True, capture_output=True, text=True).stdout
    names = [line.split()[0] for line in listed.splitlines()]
    assert names[0] == "environment"
    assert {"tokens", "policies", "training", "roofline-256", "roofline-512", "synchronization"} < set(names)
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr.startswith("benchmarks/gpu.py needs a CUDA GPU, and this torch finds none")
    assert "Traceback" not in refused.stderr


def test_expectations_follow_from_operations(monkeypatch):
    import flops
    import gpu
    import models

    monkeypatch.setattr(gpu, "name_of", lambda device: "NVIDIA H200")
    assert gpu.expected_images("256", "cuda") == (365, 430)
    low, high = gpu.expected_images("512", "cuda")
    large, small = (flops.generate(models.SIZES[s](), n) for s, n in (("512", 12), ("256", 8)))
    assert low * large == pytest.approx(365 * small)
    assert high * large == pytest.approx(430 * small)
    # What is expected is far from what products alone would allow.
    assert 430 * small < 0.5 * gpu.PEAKS["H200"][0]
    monkeypatch.setattr(gpu, "name_of", lambda device: "NVIDIA A100")
    assert gpu.expected_images("256", "cuda") is None


def test_every_section_runs_in_small_on_a_cpu(tmp_path, monkeypatch):
    import gpu
    from sections import Record

    monkeypatch.setattr(gpu, "ODD_BATCHES", (1, 3))
    monkeypatch.setattr(gpu, "POLICIES", ("confidence", "stable"))
    options = argparse.Namespace(
        device="cpu", size="tiny", out=tmp_path, batch=2, batches=[1, 3], rounds=1, only=[], section=None
    )
    for section in gpu.SECTIONS:
        if section.name in ("roofline-512", "training"):
            continue
        record = Record(tmp_path / f"{section.name}.json")
        section.run(options, record)
        rows = json.loads(record.path.read_text())["rows"]
        assert rows or section.name == "memory", section.name
        if section.name == "tokens":
            assert [row["measured"] for row in rows if row.get("expected")] == [1.0, 1.0, 1.0]
        if section.name == "synchronization":
            assert all(row["measured"] == 1 for row in rows if row.get("expected"))


def test_the_training_section_trains(tmp_path):
    pytest.importorskip("datasets")
    import gpu
    from sections import Record

    record = Record(tmp_path / "training.json")
    gpu.training(argparse.Namespace(device="cpu", out=tmp_path), record)
    assert {row["what"]: row["measured"] for row in record.rows} == {
        "pack: ended well": 1,
        "tokenizer to step 10: ended well": 1,
        "tokenizer to step 20: ended well": 1,
        "tokenize: ended well": 1,
        "transformer to step 10: ended well": 1,
        "transformer to step 20: ended well": 1,
        "FSDP2 of one process: ended well": 1,
    }
