"""Where a run is shown."""

import sys
import types
from pathlib import Path

import pytest
import torch

from maskgit.errors import ConfigError
from maskgit.training.run.progress import make_tracker


def test_tensorboard_holds_what_was_added(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = make_tracker("tensorboard", tmp_path)
    tracker.add_scalar("loss", 2.5, 3)
    tracker.add_image("samples", torch.zeros(3, 4, 4, dtype=torch.uint8), 3)
    tracker.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 2.5)]
    assert events.Tags()["images"] == ["samples"]


def test_weights_and_biases_goes_on_with_the_same_run(tmp_path, monkeypatch):
    seen = []

    class Run:
        def log(self, values, step):
            seen.append((step, values))

        def alert(self, title, text):
            seen.append((title, text))

        def finish(self):
            seen.append("finished")

    ids = []
    fake = types.SimpleNamespace(
        init=lambda **options: ids.append(options["id"]) or Run(), Image=lambda array: array.shape
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        tracker = make_tracker("wandb", Path(tmp_path))
        tracker.add_scalar("loss", 1.0, 5)
        tracker.add_image("samples", torch.zeros(3, 4, 6, dtype=torch.uint8), 5)
        tracker.add_text("warnings", "odd", 5)
        tracker.close()
    assert seen[:4] == [
        (5, {"loss": 1.0}),
        (5, {"samples": (4, 6, 3)}),
        ("warnings", "step 5: odd"),
        "finished",
    ]
    assert ids[0] == ids[1]


def test_what_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        make_tracker("wandb", tmp_path)
    with pytest.raises(ConfigError, match="Choose from: tensorboard, wandb, none"):
        make_tracker("comet", tmp_path)
    assert make_tracker("none", tmp_path) is None
