"""Images made for an evaluation: functions of their index, whoever makes them and however often killed."""

import io
import json
import signal
import subprocess
import time

import numpy as np
import pytest
from PIL import Image

import small_evaluation
from forking import Python
from maskgit.errors import ConfigError, DataError
from maskgit.evaluation.runs.sampling import (
    RealImages,
    SampleConfig,
    Samples,
    gather,
    measured,
    shown_indices,
)
from maskgit.evaluation.scores.references import Reference
from maskgit.evaluation.scores.statistics import ImageStatistics
from maskgit.foundation.units import Units
from maskgit.images import to_uint8
from small_evaluation import evaluation, real_images, toy_net


def samples(tiny, config, **changes):
    settings = {"weights": {"a": "b"}, "sampler": tiny.sampler_config(steps=2)} | changes
    return Samples(tiny, toy_net(), config, **settings)


def numbers(out):
    report = json.loads((out / "report.json").read_text())
    return {key: value for key, value in report.items() if key != "run"}


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """The report of one process that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert evaluation(tiny).run(out) == out / "report.json"
    return numbers(out)


def started(out, *arguments):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return Python("-m", small_evaluation.__name__, out, *arguments, **streams)


def test_killed_and_started_again_gives_the_same_report(undisturbed, tmp_path):
    out = tmp_path / "out"
    second = out / "work/samples/unit-00001"
    process = started(out, 0, second)
    deadline = time.time() + 120
    while not second.is_dir() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = sorted((out / "work/samples").glob("unit-*/manifest.json"))
    assert 2 <= len(done) < 6
    before = [path.stat().st_mtime_ns for path in done]
    process = started(out)
    assert process.communicate()[0].strip() == str(out / "report.json")
    assert numbers(out) == undisturbed
    assert [path.stat().st_mtime_ns for path in done] == before


def test_three_processes_make_the_report_of_one(undisturbed, tmp_path):
    out = tmp_path / "out"
    processes = [started(out, 0.05) for _ in range(3)]
    printed = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], printed
    assert numbers(out) == undisturbed
    assert any(text.strip() == str(out / "report.json") for text, _ in printed)
    assert not list(out.rglob("*.lock"))
    assert not list(out.rglob(".unit-*"))


def test_a_unit_that_was_damaged_is_made_again(undisturbed, tiny, tmp_path):
    evaluation(tiny).run(tmp_path)
    arrays = tmp_path / "work/samples/unit-00002/arrays.npz"
    good = arrays.read_bytes()
    arrays.write_bytes(good[:-7] + b"damaged")
    (tmp_path / "work/reference/unit-00000/arrays.npz").unlink()
    evaluation(tiny).run(tmp_path)
    assert arrays.read_bytes() == good
    assert numbers(tmp_path) == undisturbed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 5}, "images.seed 0, not 5"),
        ({"weights": {"tokenizer": "c" * 64}}, "weights.tokenizer"),
        ({"sampler": {"steps": 3}}, "sampler.steps 2, not 3"),
        ({"num_images": 28}, "count 24, not 28"),
    ],
)
def test_units_of_other_settings_are_refused(tiny, tmp_path, changes, message):
    work = evaluation(tiny, training=False)
    Units(tmp_path / "work" / "samples", work._samples(work.images, {}, show=True))
    with pytest.raises(ConfigError, match=message):
        evaluation(tiny, training=False, **changes).run(tmp_path)


def test_an_image_depends_on_its_index_alone(tiny):
    whole = samples(tiny, SampleConfig(num_images=12, batch_size=12, seed=3))
    made = whole.pictures(0, 12)
    asked = [i % 10 for i in range(12)]
    expected = tiny.generate(asked, seed=3, steps=2, batch_size=12)
    assert (made == to_uint8(expected.images)).all()
    for index in (0, 7, 11):
        one = whole.pictures(index, index + 1)[0].astype(int)
        assert abs(one - made[index]).max() <= 1
    # Cut otherwise into units, with the same batches, bits are the same.
    halves = samples(tiny, SampleConfig(num_images=12, batch_size=3, unit_size=6, seed=3))
    thirds = samples(tiny, SampleConfig(num_images=12, batch_size=3, unit_size=3, seed=3))
    both = np.concatenate([halves.make(0, 6).arrays["pooled"], halves.make(6, 12).arrays["pooled"]])
    assert (both == np.concatenate([thirds.make(i, i + 3).arrays["pooled"] for i in range(0, 12, 3)])).all()
    assert np.allclose(both, measured(toy_net(), expected.images)["pooled"], atol=0.01)


def test_balanced_labels_come_in_turn_and_dataset_labels_as_in_the_data(tiny):
    indices = np.arange(40_000)
    balanced = samples(tiny, SampleConfig(num_images=40)).labels(indices)
    assert (np.bincount(balanced) == 4000).all()
    counts = np.array([8, 0, 1, 1, 2, 2, 2, 2, 2, 0])
    drawn = samples(tiny, SampleConfig(num_images=40, labels="dataset", seed=9), class_counts=counts).labels(
        indices
    )
    assert np.allclose(np.bincount(drawn, minlength=10) / 40_000, counts / 20, atol=0.01)
    part = samples(tiny, SampleConfig(num_images=40, labels="dataset", seed=9), class_counts=counts)
    assert (part.labels(indices[100:200]) == drawn[100:200]).all()
    other = samples(tiny, SampleConfig(num_images=40, labels="dataset", seed=8), class_counts=counts)
    assert (other.labels(indices) != drawn).any()
    with pytest.raises(ConfigError, match="give --training-data"):
        samples(tiny, SampleConfig(num_images=40, labels="dataset"))
    with pytest.raises(ConfigError, match="10 classes"):
        samples(tiny, SampleConfig(num_images=40, labels="dataset"), class_counts=np.ones(9, int))


def test_images_are_kept_where_asked(tiny):
    for kind in ("npz", "png"):
        work = samples(tiny, SampleConfig(num_images=6, batch_size=3, unit_size=4, keep_images=kind))
        files = work.make(0, 4).files
        expected = np.concatenate([work.pictures(0, 3), work.pictures(3, 4)])
        if kind == "npz":
            with np.load(io.BytesIO(files["images.npz"])) as archive:
                assert (archive["arr_0"] == expected).all()
                assert archive["arr_1"].tolist() == [0, 1, 2, 3]
        else:
            assert sorted(files) == [f"{i:08}.png" for i in range(4)]
            pictures = [np.asarray(Image.open(io.BytesIO(files[name]))) for name in sorted(files)]
            assert (np.stack(pictures) == expected).all()


def test_the_sheet_is_drawn_before_the_images():
    assert shown_indices(1000, 1).tolist() == shown_indices(1000, 1).tolist()
    assert shown_indices(1000, 1).tolist() != shown_indices(1000, 2).tolist()
    assert shown_indices(20, 1).tolist() == list(range(20))
    assert len(set(shown_indices(1000, 1))) == 64


def test_real_images_are_spread_evenly_and_torn_ones_left_out(tmp_path):
    data = real_images(10)
    data.bad = {4}
    work = RealImages(data, toy_net(), num_images=5, batch_size=2, unit_size=3)
    units = Units(tmp_path, work)
    units.run()
    found = gather(units)
    assert found.arrays["numbers"].tolist() == [0, 2, 6, 8]
    assert found.arrays["labels"].tolist() == [0, 2, 6, 8]
    assert found.skipped == ["image 4: it is torn"]
    assert np.allclose(
        found.arrays["pooled"], measured(toy_net(), data.read([0, 2, 6, 8]).floats)["pooled"], atol=1e-6
    )


def test_a_reference_that_cannot_be_compared_is_told_before_anything_is_made(tiny, tmp_path):
    small = real_images(side=16)
    reference = Reference("small", None, small, small.fingerprint)
    with pytest.raises(DataError, match="16 × 16 pixels and the samples of 32 × 32"):
        evaluation(tiny, reference=reference).run(tmp_path)
    statistics = ImageStatistics(None, None, "Inception, tf1", None)
    with pytest.raises(DataError, match="different feature nets"):
        evaluation(tiny, reference=Reference("x", statistics, None, "")).run(tmp_path)
    with pytest.raises(DataError, match="training data arrays has 16 × 16"):
        evaluation(tiny, training=small, **{}).run(tmp_path)
    torn = real_images()
    torn.bad = set(range(20))
    with pytest.raises(DataError, match="20 of the 40 images of arrays cannot be used"):
        evaluation(tiny, training=False, reference=Reference("x", None, torn, torn.fingerprint)).run(tmp_path)
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_images": 1},
        {"labels": "even"},
        {"seed": -1},
        {"batch_size": 0},
        {"keep_images": "jpeg"},
        {"unit_size": 0},
    ],
)
def test_wrong_settings_are_told(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong)).split("_")[0]):
        SampleConfig(**wrong)
