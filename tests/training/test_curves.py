"""Curves of what runs logged, and runs beside each other."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskgit.apps.cli import commands as cli
from maskgit.training.run.curves import (
    LEFT,
    RIGHT,
    WIDTH,
    Chart,
    Curve,
    Logged,
    draw_charts,
    run_charts,
    ticks,
)


def pixels(path: Path, colour: str) -> np.ndarray:
    """Return the places of a colour in a picture, int (n, 2): rows and columns."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.argwhere((np.asarray(Image.open(path)) == wanted).all(-1))


def write_run(folder: Path, losses: list[float], hours: bool = True, **settings: object) -> Path:
    folder.mkdir()
    config = {"out": str(folder), "steps": 100, "batch_size": 36, "model": {"width": 8}} | settings
    (folder / "run.json").write_text(json.dumps({"config": config, "data": {}}))
    lines = []
    for i, loss in enumerate(losses, 1):
        line = {"step": 10 * i, "loss": loss, "learning_rate": 1e-3, "images_per_second": 0.1}
        lines.append(line | ({"mean_loss": loss + 0.5, "hours": 2.0 * i} if hours else {}))
        lines.append({"step": 10 * i, "test_loss": 10 - loss})
    (folder / "scalars.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_curve_lies_where_its_values_are(tmp_path):
    x = np.arange(0.0, 101)
    rising = Curve("rising", x, x / 50, colour=0)
    flat = Curve("flat", x, np.full(101, 1.0), colour=1)
    draw_charts([Chart("two curves", "steps", (rising, flat))], tmp_path / "c.png")
    found = [pixels(tmp_path / "c.png", colour) for colour in ("#0072B2", "#D55E00")]
    # Below the legend, whose squares have the same colours.
    rows, columns = (found[0][found[0][:, 0] > 45]).T
    slope, _ = np.polyfit(columns, rows, 1)
    right = WIDTH - RIGHT
    assert columns.min() == pytest.approx(LEFT, abs=2)
    assert columns.max() == pytest.approx(right, abs=2)
    assert slope * (right - LEFT) == pytest.approx(rows.min() - rows.max(), abs=4)
    level = found[1][found[1][:, 0] > 45][:, 0]
    assert np.ptp(level) <= 1
    assert level.mean() == pytest.approx((rows.min() + rows.max()) / 2, abs=2)


def test_a_run_without_anything_logged_draws_nothing(tmp_path):
    draw_charts(run_charts(Logged([])), tmp_path / "c.png")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_number_is_not_drawn():
    steps, values = Logged([{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}]).series("loss")
    assert (steps.tolist(), values.tolist()) == ([1.0], [2.0])


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.31, 5.5), (-3e-5, 1e-4), (7.0, 7.0), (0.0, 0.0)])
def test_ticks_are_round_and_enclose_their_range(low, high):
    found = ticks(low, high)
    assert found[0] <= low + 1e-12
    assert found[-1] >= high - 1e-12
    assert 3 <= len(found) <= 7
    assert all(len(f"{abs(tick):.10g}".strip("0.").replace(".", "").split("e")[0]) <= 3 for tick in found)


def test_hours_of_runs_that_did_not_log_them_follow_from_their_speed(tmp_path):
    runs = [write_run(tmp_path / name, [5, 4], hours=name == "new") for name in ("new", "old")]
    for folder in runs:
        lines = [json.loads(line) for line in (folder / "scalars.jsonl").read_text().splitlines()]
        # 36 images a step at a tenth of an image a second are an hour in ten steps.
        expected = [2, 4] if folder.name == "new" else [1, 2]
        assert Logged(lines, 36).hours(np.array([10, 20])).tolist() == pytest.approx(expected)


def test_runs_are_compared_in_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "small", [5.0, 4.0, 4.5], learning_rate=0.001)
    write_run(tmp_path / "large", [5.0, 3.0], learning_rate=0.002, model={"width": 16})
    assert cli.main(["train", "show", "small", "large"]) == 0
    head, small, large, _, settings, rate, width, _ = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "run"
    assert "PSNR" not in head
    cells = [cell.strip() for cell in small.split("  ") if cell.strip()]
    assert cells == [
        "small",
        "30/100",
        "5.0000",
        "5.5000",
        "5.0000 at 10",
        "0.001",
        "0.1",
        "6.00",
        "14 h 00 min",
    ]
    assert large.split()[:4] == ["large", "20/100", "3.5000", "7.0000"]
    assert settings.split() == ["setting", "small", "large"]
    assert rate.split() == ["learning_rate", "0.001", "0.002"]
    assert width.split() == ["model.width", "8", "16"]
    # Training and test losses, over steps and over hours.
    assert Image.open("runs.png").size == (2 * 560, 2 * 340)
    for colour in ("#0072B2", "#D55E00"):
        rows, columns = pixels(Path("runs.png"), colour).T
        assert {(r // 340, c // 560) for r, c in zip(rows, columns, strict=True)} == {
            (0, 0), (0, 1), (1, 0), (1, 1)
        }  # fmt: skip


def test_runs_at_work_are_followed_until_ctrl_c(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "run", [5.0])
    waits = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            raise KeyboardInterrupt
        with (folder / "scalars.jsonl").open("a") as file:
            # The run writes on, and is in the middle of a line.
            file.write(
                json.dumps({"step": 20, "mean_loss": 1.25, "images_per_second": 1, "hours": 3}) + '\n{"st'
            )

    monkeypatch.setattr(time, "sleep", wait)
    code = cli.main(["train", "show", str(folder), "--follow", "--out", str(tmp_path / "runs.png")])
    assert code == 130
    told = capsys.readouterr().out
    assert "10/100" in told
    assert "20/100  1.2500" in told


@pytest.mark.parametrize(("runs", "message"), [([], "at least one run"), (["gone"], "holds no run")])
def test_folders_without_runs_are_told(runs, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "show", *runs]) == 2
    assert message in capsys.readouterr().err
