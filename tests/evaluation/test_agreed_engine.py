"""All processes of an evaluation run the model in one way, whatever each of them would measure."""

import json
from dataclasses import replace

import pytest
import torch

from maskgit import engine
from maskgit.engine import Engine, build, host
from maskgit.engine.layers import ways
from maskgit.errors import ConfigError
from maskgit.evaluation.runs import running
from maskgit.evaluation.runs.running import agreed_engine
from small_evaluation import evaluation

CPU = {"device": "cpu"}


@pytest.fixture
def every_way(monkeypatch):
    """A CPU that can do all, of which nothing is run."""
    every = {torch.float32: ("torch", "mkl", "onednn", "int8"), torch.bfloat16: ("torch", "onednn")}
    for module in (engine, host, running):
        monkeypatch.setattr(module, "ways", every.get)


@pytest.fixture
def fastest(monkeypatch):
    """Say what a measurement finds the fastest."""

    def say(name):
        monkeypatch.setattr(host, "measured", lambda: {other: 1 + (other != name) for other in host.names()})

    return say


@pytest.mark.parametrize(
    ("mode", "first", "second"),
    [
        ("exact", "float32 mkl", "float32 onednn"),
        ("exact", "float32 torch", "float32 mkl"),
        ("fast", "bfloat16 onednn", "float32 mkl"),
        ("fast", "int8 int8", "bfloat16 torch"),
        ("int8", "float32 mkl", "float32 torch"),
    ],
)
def test_the_first_measurement_holds(tmp_path, every_way, fastest, mode, first, second):
    # Two threads and one are two machines to a measurement.
    fastest(first)
    chosen = agreed_engine(tmp_path, mode, **CPU)
    assert chosen == engine.choose(mode, **CPU)
    fastest(second)
    assert agreed_engine(tmp_path, mode, **CPU) == chosen
    assert json.loads((tmp_path / "work" / "engine.json").read_text()) == chosen.numbers()


def test_a_device_does_not_decide(tmp_path, every_way):
    stored = agreed_engine(tmp_path, "exact", device=torch.device("cuda", 0))
    assert agreed_engine(tmp_path, "exact", device=torch.device("cuda", 1)) == replace(
        stored, device="cuda:1"
    )


def test_other_settings_are_still_other_settings(tmp_path, every_way, fastest):
    fastest("bfloat16 onednn")
    agreed_engine(tmp_path, "fast", **CPU)
    # Whoever asks for float32 does not get bfloat16.
    assert agreed_engine(tmp_path, "exact", **CPU).dtype == "float32"


def test_what_this_machine_lacks_is_named(tmp_path, every_way, fastest, monkeypatch):
    fastest("float32 mkl")
    agreed_engine(tmp_path, "exact", **CPU)
    for module in (engine, host, running):
        monkeypatch.setattr(module, "ways", lambda dtype: ("torch",))
    with pytest.raises(
        ConfigError, match="begun with mkl products of float32, which this machine does not have"
    ):
        agreed_engine(tmp_path, "exact", **CPU)


@pytest.mark.parametrize("plan", ["[]", "{}", '{"engine": 3}', '{"engine": {"dtype": "float8"}}'])
def test_a_plan_without_an_engine_is_no_choice(tmp_path, every_way, fastest, plan):
    fastest("float32 mkl")
    (tmp_path / "work" / "samples").mkdir(parents=True)
    (tmp_path / "work" / "samples" / "plan.json").write_text(plan)
    assert agreed_engine(tmp_path, "exact", **CPU).linear == "mkl"


def test_an_evaluation_goes_on_where_another_way_is_faster(tiny, tmp_path, fastest):
    first, *others = [way for way in ways(torch.float32) if way != "int8"]
    fastest(f"float32 {first}")
    model = build(tiny, agreed_engine(tmp_path, "exact", **CPU))
    report = evaluation(model, num_images=8).run(tmp_path)
    made = json.loads(report.read_text())
    # Also where it was begun before the choice had a file of its own.
    for file in (tmp_path / "work" / "engine.json", None):
        for other in others:
            fastest(f"float32 {other}")
            model = build(tiny, agreed_engine(tmp_path, "exact", **CPU))
            assert model.engine.linear == first
            again = evaluation(model, num_images=8).run(tmp_path)
            assert json.loads(again.read_text())["metrics"] == made["metrics"]
        if file is not None:
            file.unlink()
    # Whoever forces another way is refused, by name.
    for other in others:
        with pytest.raises(ConfigError, match=f'engine.linear "{first}", not "{other}"'):
            evaluation(build(tiny, Engine(linear=other)), num_images=8).run(tmp_path)


def test_an_evaluation_begun_when_context_features_could_be_reused_goes_on(tiny, tmp_path):
    # Its plan says that they were not: "reuse": 1.
    model = build(tiny, Engine())
    evaluation(model, num_images=8, training=False).run(tmp_path)
    plan = json.loads((tmp_path / "work" / "samples" / "plan.json").read_text())
    assert plan["engine"] == {
        "dtype": "float32",
        "quantize": "",
        "linear": "torch",
        "compile": False,
        "graphs": False,
        "reuse": 1,
    }
    made = (tmp_path / "report.json").read_text()
    # As one that was begun then and killed: the choice had no file of its own.
    (tmp_path / "work" / "engine.json").unlink(missing_ok=True)
    (tmp_path / "report.json").unlink()
    assert agreed_engine(tmp_path, "exact", **CPU).linear == "torch"
    again = evaluation(model, num_images=8, training=False).run(tmp_path)
    assert json.loads(again.read_text())["metrics"] == json.loads(made)["metrics"]
