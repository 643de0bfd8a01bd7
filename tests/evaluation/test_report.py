"""The report: one JSON file for programs, one page for people that needs nothing else."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskgit.errors import ConfigError
from maskgit.evaluation.metrics import Interval, frechet_distance
from maskgit.evaluation.report.charts import Mark, line_chart, number
from maskgit.evaluation.report.charts import _ticks as ticks
from maskgit.evaluation.report.report import plain
from maskgit.evaluation.runs.evaluate import EvaluationConfig
from maskgit.evaluation.runs.reconstruction import ReconstructionEvaluation
from maskgit.evaluation.runs.sampling import measured
from maskgit.evaluation.scores.references import Reference
from small_evaluation import evaluation, real_images, toy_net

CURVE = {"steps": (1, 2), "policy": ("confidence", "halton")}
VOID = {"meta", "img", "link", "br"}


class Page(HTMLParser):
    """Checks that elements nest, and collects what is shown."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.sources, self.ids = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.sources += [values[name] for name in ("src", "href") if name in values]
        if tag == "img":
            assert "alt" in values
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A whole evaluation of the tiny model: its folder, and what it was made with."""
    out = tmp_path_factory.mktemp("report")
    work = evaluation(tiny, num_images=40, name='<script>alert("x")</script>', curve=CURVE)
    work.run(out)
    return out, work


def test_the_json_holds_what_was_measured(finished):
    out, work = finished
    report = json.loads((out / "report.json").read_text())
    assert list(report["metrics"]) == [
        f"{kind}_toy"
        for kind in (
            "fd",
            "sfd",
            "kd",
            "precision",
            "recall",
            "density",
            "coverage",
            "class_agreement",
            "authenticity",
            "copies",
        )
    ]
    made = work._samples(work.images, {}, show=False)
    features = np.concatenate([measured(toy_net(), t)["pooled"] for t in _floats(made)])
    real = measured(toy_net(), real_images().read(range(40)).floats)["pooled"]
    moments = [(x.mean(0), np.cov(x.astype(float), rowvar=False)) for x in (real, features)]
    assert report["metrics"]["fd_toy"] == pytest.approx(frechet_distance(*moments[0], *moments[1]), rel=1e-4)
    assert report["intervals"].keys() == report["metrics"].keys()
    for name, (low, high) in report["intervals"].items():
        assert low <= report["metrics"][name] <= high
    assert [entry["class"] for entry in report["classes"]] == list(range(10))
    assert report["settings"]["sampler"]["steps"] == 2
    assert report["settings"]["images"]["num_images"] == 40
    assert report["model"]["weights"] == {"tokenizer": "a" * 64, "transformer": "b" * 64}
    assert report["evaluator"]["identity"] == toy_net().identity
    assert report["reference"]["num_images"] == 40
    beside = report["baselines"]["fd_toy"]
    assert list(beside) == ["real", "reconstructions"]
    # All thirty that are measured, since more samples were asked for.
    training = measured(toy_net(), real_images(seed=1).read([i * 40 // 30 for i in range(30)]).floats)[
        "pooled"
    ]
    theirs = training.mean(0), np.cov(training.astype(float), rowvar=False)
    expected = frechet_distance(*moments[0], *theirs)
    assert beside["real"]["value"] == pytest.approx(expected, rel=1e-4)
    assert beside["real"]["num_images"] == 30
    assert beside["reconstructions"]["value"] != beside["real"]["value"]
    assert list(report["baselines"]["class_agreement_toy"]) == ["real"]
    assert report["versions"].keys() >= {"maskgit", "torch", "numpy"}
    assert report["memorisation"]["num_training"] == 30
    assert [len(row["training_images"]) for row in report["memorisation"]["random"]] == [5] * 8
    nearest = [row["suspicion"] for row in report["memorisation"]["nearest"]]
    assert nearest == sorted(nearest)
    assert [point["settings"] for point in report["curves"]] == [
        {"steps": steps, "policy": policy} for steps in (1, 2) for policy in CURVE["policy"]
    ]
    assert all(point["num_images"] == 8 for point in report["curves"])


def _floats(work):
    import torch

    for start in range(0, 40, 4):
        yield torch.from_numpy(work.pictures(start, start + 4)).movedim(-1, 1).float() / 255


def test_the_page_shows_baselines_losses_and_costs(finished):
    out, _ = finished
    report = json.loads((out / "report.json").read_text())
    page = Page((out / "report.html").read_text("utf-8"))
    assert "losses" in page.ids
    real, rebuilt = (report["baselines"]["fd_toy"][name]["value"] for name in ("real", "reconstructions"))
    made = report["metrics"]["fd_toy"]
    for value in (real, rebuilt, made, rebuilt - real, made - rebuilt, report["cost"]["flops"] / 1e9):
        assert number(value) in page.texts
    assert "N = 40 · toy" in page.texts
    assert "N = 40 · toy · k = 3" in page.texts


def test_the_page_is_whole_and_asks_nothing_of_the_network(finished):
    out, _ = finished
    text = (out / "report.html").read_text("utf-8")
    page = Page(text)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "http:" not in text
    assert "https:" not in text
    assert not re.search(r"url\(|@import|<script", text)
    assert text.count("<img") == 40 + 32 + 10 + (8 + 24) * 6
    assert {"images", "classes", "copies", "curves", "settings", "fd_toy"} <= set(page.ids)
    shown = " ".join(page.texts)
    assert '<script>alert("x")</script>' in shown  # as text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(svg)


def test_other_seeds_give_the_scores_of_evaluations_of_their_own(tiny, tmp_path):
    config = EvaluationConfig(splits=2, num_training=30, num_examples=1, seeds=2)
    evaluation(tiny, config=config, seed=4, command="maskgit evaluate <model>").run(tmp_path / "both")
    evaluation(tiny, seed=5, training=False).run(tmp_path / "second")
    report = json.loads((tmp_path / "both" / "report.json").read_text())
    second = json.loads((tmp_path / "second" / "report.json").read_text())
    found = report["repeats"]["metrics"]["fd_toy"]
    assert report["repeats"]["seeds"] == [4, 5]
    assert found["values"] == [report["metrics"]["fd_toy"], second["metrics"]["fd_toy"]]
    assert found["mean"] == pytest.approx(np.mean(found["values"]))
    assert found["deviation"] == pytest.approx(np.std(found["values"], ddof=1))
    page = (tmp_path / "both" / "report.html").read_text()
    assert 'id="repeats"' in page
    assert "maskgit evaluate &lt;model&gt;" in page
    Page(page)


def test_other_nets_score_the_same_images_as_in_an_evaluation_of_their_own(tiny, tmp_path):
    config = EvaluationConfig(splits=2, curve_images=8, num_examples=1, seeds=2)
    other = toy_net(seed=1)
    settings = {"config": config, "curve": {"steps": (1,)}, "training": None, "num_images": 8}
    reports = []
    for name, nets in {
        "beside": {"also": {"clip": other}},
        "alone": {"net": other, "features": "clip"},
    }.items():
        evaluation(tiny, **nets, **settings).run(tmp_path / name)
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
    beside, alone = reports
    names = ["fd_clip", "sfd_clip", "cmmd", "kd_clip"]
    assert [name for name in beside["metrics"] if name not in alone["metrics"]][:3] == [
        "fd_toy",
        "sfd_toy",
        "kd_toy",
    ]
    assert list(beside["metrics"])[-4:] == names
    for part in ("metrics", "intervals", "baselines"):
        assert [beside[part].get(name) for name in names] == [alone[part].get(name) for name in names]
    assert set(beside["baselines"]["cmmd"]) == {"real", "reconstructions"}
    assert all(beside["repeats"]["metrics"][name] == alone["repeats"]["metrics"][name] for name in names)
    for ours, theirs in zip(beside["curves"], alone["curves"], strict=True):
        assert all(ours["metrics"][name] == theirs["metrics"][name] for name in names)
    assert beside["evaluator"]["also"]["clip"]["identity"] == other.identity
    assert "features of <b>Toy</b>, <b>Toy</b>" in (tmp_path / "beside" / "report.html").read_text()
    # Begun without it, the folder has no features by it.
    with pytest.raises(ConfigError, match="also"):
        evaluation(tiny, also={}, **settings).run(tmp_path / "beside")


def test_every_curve_is_drawn(finished):
    text = (finished[0] / "report.html").read_text("utf-8")
    charts = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(charts) == 4
    assert all(chart.count("<polyline") == 2 and chart.count("<circle") == 4 for chart in charts)


def test_a_report_of_reconstructions(tiny, tmp_path):
    pictures = real_images(20)
    pictures.bad, pictures.max_bad_share = {3}, 0.1
    work = ReconstructionEvaluation(
        tiny.tokenizer, "tiny", {"tokenizer": "a" * 64}, toy_net(), "toy", pictures,
        EvaluationConfig(splits=2), batch_size=4, unit_size=8,
    )  # fmt: skip
    work.run(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["metrics"]) == ["rfd_toy", "psnr", "ssim", "codebook_usage", "perplexity"]
    assert report["num_images"] == 19
    assert report["skipped"] == {"count": 1, "first": ["image 3: it is torn"]}
    images = pictures.read(range(20)).floats
    rebuilt = tiny.tokenizer.decode(tiny.tokenizer.encode(images)).clamp(0, 1)
    error = (images - rebuilt).square().mean((1, 2, 3))
    assert report["metrics"]["psnr"] == pytest.approx(float((-10 * error.log10()).mean()), abs=0.02)
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert len(page.sources) == 2 * 19
    assert "Before and after" in page.texts
    with pytest.raises(ConfigError, match="multiples of 4 pixels"):
        ReconstructionEvaluation(
            tiny.tokenizer, "tiny", {}, toy_net(), "toy",
            real_images(20, side=20).__class__(np.zeros((4, 18, 18, 3), np.uint8)), EvaluationConfig(),
        ).run(tmp_path / "other")  # fmt: skip


def test_a_reference_of_other_classes_is_told(tiny, tmp_path):
    pictures = real_images()
    pictures.labels = pictures.labels % 3
    reference = Reference("three classes", None, pictures, pictures.fingerprint)
    evaluation(tiny, reference=reference, training=False).run(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert "3 classes, but the model has 10" in report["cautions"][-1]
    assert report["no_classes"] == report["cautions"][-1]
    assert report["classes"] == []
    assert "class_agreement_toy" not in report["metrics"]


@given(st.floats(-1e12, 1e12), st.floats(0, 1e12))
def test_an_axis_encloses_its_values(low, span):
    made = ticks(low, low + span)
    tolerance = 1e-6 * max(abs(low), span, 1)
    assert made[0] <= low + tolerance
    assert made[-1] >= low + span - tolerance
    assert 2 <= len(made) <= 8
    assert made == sorted(set(made))


def test_a_chart_takes_words_single_points_and_missing_intervals():
    drawn = line_chart({"<a>": [Mark("x & y", 1.0, None), Mark("z", 2.0, Interval(1, 3))]}, "policy", "a < b")
    ElementTree.fromstring(drawn)
    ElementTree.fromstring(line_chart({"": [Mark(4, 0.0, None)]}, "steps", ""))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (225.123, "225.1"),
        (0.77312, "0.7731"),
        (123456.7, "123,457"),
        (0.0, "0"),
        (-1.5, "−1.5"),
        (1.234e-5, "1.23e−05"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_what_json_cannot_hold_becomes_null():
    assert plain(Interval(1.0, float("inf"))) == [1.0, None]
    assert plain(float("nan")) is None
    assert plain(3) == 3
