"""The search for sampler settings."""

import dataclasses

import pytest

from maskgit import MaskGIT
from maskgit.errors import ConfigError, DataError
from maskgit.evaluation.networks.features import load_feature_net
from maskgit.evaluation.runs.tuning import SearchSpace, feature_distance, tune
from maskgit.evaluation.scores.statistics import Collector


def test_the_search_finds_what_a_metric_wants(tiny):
    # Images of one temperature are the target: the nearest settings tried must win.
    guided = MaskGIT(dataclasses.replace(tiny.config, label_dropout=0.1), tiny.tokenizer, tiny.transformer)
    target = guided.generate([0, 1, 2, 3], seed=4, steps=2, temperature=0.2, choice_temperature=4.5).images
    space = SearchSpace((2,), ("confidence",), ("cosine",), (0.0, 3.0), (4.5, 4.5), (1.0, 1.0))
    seen = []
    found = tune(
        guided,
        lambda images, labels: float((images - target).square().mean()),
        space=space,
        trials=12,
        num_images=4,
        seed=4,
        report=lambda number, settings, score: seen.append((settings, score)),
    )
    assert seen == found.trials
    assert len(seen) == 12
    assert found.score == min(score for _, score in seen) < seen[0][1]
    assert abs(found.settings["temperature"] - 0.2) < 0.6
    again = tune(
        guided, lambda images, labels: float((images - target).square().mean()), space=space, trials=12,
        num_images=4, seed=4,
    )  # fmt: skip
    assert again == found


def test_a_model_that_cannot_be_guided_is_not(tiny):
    found = tune(
        tiny, lambda images, labels: float(images.mean()), space=SearchSpace(steps=(1, 2)), direction="maximize",
        trials=3, num_images=2,
    )  # fmt: skip
    assert all(settings.get("guidance_scale", 1) == 1 for settings, _ in found.trials)
    assert found.score == max(score for _, score in found.trials)


def test_the_distance_to_a_reference_is_small_for_its_own_images(tiny):
    net = load_feature_net("effnet-lite0", size=32)
    near = tiny.generate([0, 1, 2, 3] * 4, seed=1, steps=2).images
    far = (near * 0.3).clamp(0, 1)
    collector = Collector(net)
    collector.add(near)
    reference = collector.finish()
    frechet, kernel = (feature_distance(net, reference, distance) for distance in ("fd", "kd"))
    assert frechet(near, None) == pytest.approx(0, abs=1e-3)
    assert frechet(far, None) > 1
    assert kernel(near, None) < 0 < kernel(far, None)  # Unbiased, so below 0 of the very same images.
    with pytest.raises(DataError, match="keeps no features"):
        feature_distance(net, dataclasses.replace(reference, features=None))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": ()}, "steps lists nothing"),
        ({"policies": ("best",)}, "Unknown policy"),
        ({"mask_schedules": ("cosin",)}, "Unknown mask schedule"),
        ({"temperature": (1.0,)}, "must be a range"),
        ({"guidance_scale": (3.0, 1.0)}, "must be a range"),
    ],
)
def test_a_wrong_space_is_told(wrong, message):
    with pytest.raises(ConfigError, match=message):
        SearchSpace(**wrong)
