"""Numbers, their names and intervals, against closed forms and slower ways."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskgit.errors import DataError
from maskgit.evaluation.metrics import (
    Gaussian,
    Interval,
    LinearProbe,
    frechet_distance,
    precision_recall,
)
from maskgit.evaluation.metrics.intervals import wilson_interval
from maskgit.evaluation.scores.baselines import of_halves
from maskgit.evaluation.scores.classwise import ClassJudge, Labelled, best_and_worst, labelled
from maskgit.evaluation.scores.names import Baseline, Names, with_baselines
from maskgit.evaluation.scores.scores import (
    distances,
    distances_without,
    extrapolated_distance,
    manifolds,
    reconstruction_scores,
    split_distance,
    split_rows,
)
from maskgit.evaluation.scores.statistics import Collector, ImageStatistics, read_statistics, write_statistics
from small_evaluation import DIM, toy_net


def gaussian(features):
    return Gaussian(features.mean(0), np.cov(features, rowvar=False), len(features))


def reference(features, labels=None):
    return ImageStatistics(
        gaussian(features),
        None,
        toy_net().identity,
        (32, 32),
        features.astype(np.float32),
        None if labels is None else np.asarray(labels, np.int32),
    )


@given(st.integers(2, 60), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_the_distance_of_a_split_is_that_of_its_covariance(count, seed):
    rng = np.random.default_rng(seed)
    real = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12)) + 1
    split = rng.normal(size=(count, 12)) * rng.uniform(0.1, 3, 12)
    ours = gaussian(split)
    expected = frechet_distance(real.mean(0), np.cov(real, rowvar=False), ours.mean, ours.covariance)
    assert split_distance(split, gaussian(real)) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_scores_are_those_of_all_images_and_lie_within_their_intervals():
    rng = np.random.default_rng(0)
    real, made = rng.normal(size=(300, DIM)), rng.normal(0.4, 1, size=(200, DIM)).astype(np.float32)
    names = Names("toy", toy_net())
    scores, cautions = distances({"pooled": made}, reference(real), names, splits=8)
    by_name = {score.name: score for score in scores}
    assert list(by_name) == ["fd_toy", "kd_toy"]
    assert cautions == []
    expected = frechet_distance(
        real.mean(0), np.cov(real, rowvar=False), made.mean(0), np.cov(made.astype(float), rowvar=False)
    )
    assert by_name["fd_toy"].value == pytest.approx(expected)
    scores += manifolds(made, reference(real), names, device=toy_net().device)
    assert [score.name for score in scores[2:]] == [
        "precision_toy",
        "recall_toy",
        "density_toy",
        "coverage_toy",
    ]
    for score in scores:
        assert score.interval.low <= score.value <= score.interval.high
        assert score.interval.high > score.interval.low


def test_an_interval_is_as_wide_as_other_samples_differ():
    # Its spread over new samples is known by making them.
    rng = np.random.default_rng(1)
    real = reference(rng.normal(size=(500, DIM)))
    names, values, widths = Names("toy", toy_net()), [], []
    for _ in range(40):
        made = {"pooled": rng.normal(0.5, 1, size=(200, DIM))}
        scores = distances(made, real, names, splits=10)[0]
        scores += manifolds(made["pooled"], real, names, device=toy_net().device)
        values.append([score.value for score in scores])
        widths.append([score.interval.high - score.interval.low for score in scores])
    assert np.median(widths, 0) == pytest.approx(3.92 * np.std(values, 0), rel=0.45)


def test_images_that_count_twice_do_not_hide_from_recall():
    # Halves without replacement: were rows drawn with it, balls of repeated samples would have no size.
    rng = np.random.default_rng(0)
    real, made = rng.normal(size=(100, DIM)), rng.normal(size=(80, DIM))
    scores = manifolds(made, reference(real), Names("toy", toy_net()), device=toy_net().device)
    recall = scores[1]
    assert recall.interval.low < recall.value < recall.interval.high
    assert recall.value == precision_recall(real.astype(np.float32), made).recall


@pytest.mark.parametrize(("count", "groups"), [(40, 4), (400, 10)])
def test_the_distances_without_a_group_are_those_of_the_others(count, groups):
    rng = np.random.default_rng(0)
    real, made = gaussian(rng.normal(size=(300, 30))), rng.normal(0.3, 1.2, size=(count, 30))
    parts = np.array_split(rng.permutation(count), groups)
    found = distances_without(made, real, parts)
    for part, value in zip(parts, found, strict=True):
        left = gaussian(np.delete(made, part, 0))
        expected = frechet_distance(real.mean, real.covariance, left.mean, left.covariance)
        assert value == pytest.approx(expected, rel=1e-5)


def test_the_distance_of_infinitely_many_images_is_that_of_their_law():
    # Two normal laws whose distance is known, of so few images that it is twice too large.
    rng = np.random.default_rng(0)
    real = Gaussian(np.zeros(100), np.eye(100), None)
    made = rng.normal(0.1, 1.0, size=(2000, 100))
    statistics = gaussian(made)
    plain = frechet_distance(real.mean, real.covariance, statistics.mean, statistics.covariance)
    assert plain > 2
    assert extrapolated_distance(made, real) == pytest.approx(1.0, abs=0.15)
    scores, _ = distances({"pooled": made[:, :DIM]}, reference(made[::2, :DIM]), Names("toy", toy_net()))
    assert [score.name for score in scores] == ["fd_toy", "fd_infinity_toy", "kd_toy"]
    assert scores[1].interval is None


def test_parts_have_their_share_of_every_kind():
    strata = np.arange(100, dtype=np.int32) % 5
    for part in split_rows(100, 4, strata=strata):
        assert np.bincount(strata[part]).tolist() == [5] * 5
    parts = split_rows(100, 4, strata=strata)
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))


def test_few_images_have_no_interval():
    assert split_rows(31, 10) == []
    assert [len(part) for part in split_rows(35, 10)] == [18, 17]
    assert sorted(np.concatenate(split_rows(100, 3)).tolist()) == list(range(100))


def test_a_score_has_the_same_of_other_images_beside_it():
    names = Names("toy", toy_net())
    ours = [names.score("fd", 3.0, num_images=10), names.score("kd", 0.1, num_images=10)]
    real = [names.score("fd", 1.0, Interval(0.5, 1.5), num_images=9)]
    fd, kd = with_baselines(ours, {"real": real, "reconstructions": []})
    assert (fd.value, fd.baselines) == (3.0, {"real": Baseline(1.0, Interval(0.5, 1.5), 9)})
    assert kd == ours[1]


@pytest.mark.parametrize(
    ("features", "published", "kinds"),
    [
        (
            "inception",
            True,
            {"fd": "fid", "sfd": "sfid", "kd": "kid", "rfd": "rfid", "precision": "precision"},
        ),
        ("inception", False, {"fd": "fd_inception", "kd": "kd_inception", "recall": "recall_inception"}),
        ("inception-pytorch-fid", True, {"fd": "fid_pytorch-fid", "kd": "kid_pytorch-fid"}),
        ("effnet-lite0", True, {"fd": "fd_effnet-lite0", "kd": "kd_effnet-lite0", "rfd": "rfd_effnet-lite0"}),
        ("dinov2", None, {"fd": "fd_dinov2"}),
        ("clip", None, {"fd": "fd_clip", "cmmd": "cmmd"}),
    ],
)
def test_only_inceptions_scores_are_called_fid(features, published, kinds):
    net = toy_net()
    net.published = published
    names = Names(features, net)
    assert {kind: names.name(kind) for kind in kinds} == kinds
    assert names.name("psnr") == "psnr"
    assert ("FID" in names.title("fd")) == ("fid" in names.name("fd").split("_")[0])


def test_inception_has_an_inception_score_and_others_have_none():
    rng = np.random.default_rng(0)
    arrays = {"pooled": rng.normal(size=(64, DIM)), "logits": rng.normal(size=(64, 10))}
    net = toy_net()
    real = reference(rng.normal(size=(64, DIM)))
    names = [score.name for score in distances(arrays, real, Names("inception", net), splits=2)[0]]
    assert names == ["fid", "kid", "inception_score"]
    assert len(distances(arrays, real, Names("effnet-lite0", net), splits=2)[0]) == 2


def test_a_reference_of_another_net_is_refused():
    other = dataclasses.replace(reference(np.eye(DIM)), identity="Other net")
    with pytest.raises(DataError, match="different feature nets"):
        distances({"pooled": np.eye(DIM)}, other, Names("toy", toy_net()))


def collected(pieces, **settings):
    collector = Collector(toy_net(), total=100, resolution=(8, 8), **settings)
    for piece in pieces:
        collector.add_features(piece)
    return collector.finish()


def test_statistics_of_pieces_keep_features_of_all_parts(tmp_path):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(100, DIM)).astype(np.float32)
    labels = np.repeat(np.arange(10), 10).astype(np.int32)
    pieces = [{"pooled": features[i : i + 7], "labels": labels[i : i + 7]} for i in range(0, 100, 7)]
    found = collected([*pieces, {}], keep=20)
    assert np.allclose(found.pooled.covariance, np.cov(features.astype(float), rowvar=False))
    assert np.bincount(found.labels).tolist() == [2] * 10
    assert (found.features == features[::5]).all()
    write_statistics(tmp_path / "s.npz", found)
    assert (read_statistics(tmp_path / "s.npz").labels == found.labels).all()
    assert collected(pieces, keep=0).features is None
    unlabelled = [piece | {"labels": np.full(len(piece["labels"]), -1)} for piece in pieces]
    assert collected(unlabelled).labels is None
    with pytest.raises(DataError, match="at least 2"):
        collected([])


def test_classes_agree_where_samples_lie_among_theirs():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, DIM)) * 20
    classes = np.arange(90) % 3
    real = reference(centres[classes] + rng.normal(size=(90, DIM)), classes)
    asked = (np.arange(60) % 3).astype(np.int32)
    shown = np.where(np.arange(60) < 30, asked, 0)
    judge = ClassJudge(real)
    agreed = judge.agrees(centres[shown] + rng.normal(size=(60, DIM)), asked)
    assert (agreed == (shown == asked)).all()
    table = judge.table(agreed, asked)
    assert [entry.agreement for entry in table] == [1.0, 0.5, 0.5]
    assert [entry.real for entry in table] == [1.0] * 3
    assert all(entry.interval.low < entry.agreement <= entry.interval.high for entry in table)
    assert best_and_worst(table)[0].label == 0
    assert labelled(reference(centres)) is None


def test_the_ceiling_is_of_images_that_the_probe_has_not_seen():
    # Labels that mean nothing are learned by heart, and guessed on others.
    rng = np.random.default_rng(0)
    real = reference(rng.normal(size=(80, DIM)), np.arange(80) % 2)
    judge = ClassJudge(real)
    assert (judge.source, judge.num_fitted, len(judge.real)) == ("half of the reference", 40, 40)
    assert np.bincount(judge.real_labels).tolist() == [20, 20]
    training = Labelled(real.features + 5, real.labels)
    judge = ClassJudge(real, training)
    assert (judge.source, judge.num_fitted, len(judge.real)) == ("training images", 80, 80)
    assert judge.real.mean() < 0.75


def test_wilsons_interval():
    # Newcombe, Statistics in Medicine 1998, table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson_interval(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)


def test_reconstructions_are_scored_beside_their_originals():
    rng = np.random.default_rng(0)
    originals = rng.normal(size=(80, DIM))
    rebuilt = originals + rng.normal(0.1, 0.1, size=(80, DIM))
    arrays = {
        "pooled": rebuilt,
        "original_pooled": originals,
        "psnr": rng.normal(25, 1, 80),
        "codes": np.array([[5, 0, 0, 0], [0, 5, 0, 0]]),
    }
    scores, _ = reconstruction_scores(arrays, Names("inception", toy_net()), splits=4)
    found = {score.name: score.value for score in scores}
    a, b = gaussian(originals), gaussian(rebuilt)
    assert found == {
        "rfid": pytest.approx(frechet_distance(a.mean, a.covariance, b.mean, b.covariance)),
        "psnr": pytest.approx(arrays["psnr"].mean()),
        "codebook_usage": 0.5,
        "perplexity": pytest.approx(2),
    }


def test_halves_of_the_reference_are_scored_against_each_other():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 20).astype(np.int32)
    features = (rng.normal(size=(80, DIM)) + 2 * np.eye(4, DIM)[labels]).astype(np.float32)
    real, rebuilt = reference(features, labels), reference(features + 1, labels)
    names, asked = Names("toy", toy_net()), []

    def scoring(arrays, against):
        asked.append((arrays["pooled"], against))
        return distances(arrays, against, names, splits=2)[0][:1]

    found = of_halves(scoring, real, rebuilt, 24, names)
    place = {row.tobytes(): i for i, row in enumerate(features)}
    scored = [place[row.tobytes()] for row in asked[0][0]]
    against = [place[row.tobytes()] for row in asked[0][1].features]
    # As many as there are samples of one half, against the other, of which each class has its share.
    assert (len(scored), len(against), len(set(scored + against))) == (24, 40, 64)
    assert np.bincount(labels[against]).tolist() == [10] * 4
    for name, images in (("real", features), ("reconstructions", features + 1)):
        fd, agreement = found.baselines[name]
        expected = frechet_distance(
            images[scored].mean(0),
            np.cov(images[scored].T),
            features[against].mean(0),
            np.cov(features[against].T),
        )
        assert fd.value == pytest.approx(expected, rel=1e-5)
        # The probe has learned from every other image of each class, and judges those between.
        probe = LinearProbe(features[::2], labels[::2], 4)
        share = (probe.classes(images[1::2]) == labels[1::2]).mean()
        assert (agreement.value, agreement.num_images) == (share, 40)
    alone = of_halves(scoring, real, None, 24, names, judged=False)
    assert (list(alone.baselines), alone.judge) == (["real"], None)
