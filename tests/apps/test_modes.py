"""Which mode a command runs in if nothing is said, and that it is said."""

import pytest
import torch

from maskgit import MaskGIT, hub
from maskgit.apps.cli import evaluation_flags, flags
from maskgit.apps.cli import tuning as tuning_commands
from maskgit.apps.cli.flags import Model, Speed
from maskgit.errors import ConfigError
from maskgit.evaluation.networks import features
from maskgit.evaluation.scores import statistics
from maskgit.foundation import devices


@pytest.fixture
def machine(monkeypatch):
    """Say which device `auto` finds, and keep what `optimize` is asked for; nothing is moved."""
    asked = []

    def say(kind):
        for name in ("choose_device", "own_device"):
            monkeypatch.setattr(devices, name, lambda name="auto": torch.device(kind))
        monkeypatch.setattr(hub, "from_pretrained", lambda name, **options: MaskGIT.__new__(MaskGIT))
        monkeypatch.setattr(MaskGIT, "optimize", lambda self, mode, **choices: asked.append(mode) or self)
        return asked

    return say


@pytest.mark.parametrize(
    ("kind", "said", "mode"),
    [
        ("cuda", {}, "fast"),
        ("cuda", {"speed": Speed(exact=True)}, "exact"),
        ("cuda", {"speed": Speed(fast=True)}, "fast"),
        ("cuda", {"dtype": "float32"}, "exact"),
        ("cuda", {"dtype": "bfloat16"}, "fast"),
        ("cpu", {}, "exact"),
        ("cpu", {"speed": Speed(fast=True)}, "fast"),
        ("cpu", {"dtype": "bfloat16"}, "exact"),
        ("mps", {}, "exact"),
    ],
)
def test_a_gpu_is_fast_unless_told_otherwise(machine, capsys, kind, said, mode):
    asked = machine(kind)
    model = Model(**said)
    model.load()
    assert asked == [mode]
    told = capsys.readouterr().err
    assert ("--exact" in told) == (kind == "cuda" and mode == "fast" and not said.get("speed", Speed()).fast)
    # And a picture's metadata says the same.
    assert model.recorded("generate")["mode"] == mode


def test_two_modes_are_refused():
    with pytest.raises(ConfigError, match="--exact and --fast"):
        Model(speed=Speed(exact=True, fast=True)).mode()


def test_scores_are_exact_everywhere():
    assert evaluation_flags.WorkFlags().speed.mode == "exact"


def test_tuning_is_exact_everywhere(monkeypatch, tmp_path):
    class ToldError(Exception):
        pass

    def load(self):
        raise ToldError(self.mode())

    monkeypatch.setattr(flags.Model, "load", load)
    monkeypatch.setattr(features, "load_feature_net", lambda *_, **__: None)
    monkeypatch.setattr(statistics, "read_statistics", lambda *_: None)
    with pytest.raises(ToldError, match="exact"):
        tuning_commands.tune("cifar10", tmp_path / "x.npz", out=tmp_path)
