"""What an image costs, and the samples in one file."""

import json

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maskgit.data.picture_sets import open_pictures
from maskgit.evaluation.runs.cost import network_flops, passes_by_step
from maskgit.evaluation.runs.evaluate import EvaluationConfig
from small_evaluation import evaluation

# Fewer images than the toy net has dimensions, of which a reader is to hear.
SMALL = EvaluationConfig(splits=2, num_training=30, curve_images=4, num_examples=1)


def test_operations_are_those_of_the_networks_at_work(tiny):
    sequence = tiny.vocabulary.sequence(torch.tensor([3]))
    counts = []
    for work in (
        lambda: tiny.predict_logits(sequence),
        lambda: tiny.tokenizer.decode(tiny.vocabulary.grid(torch.zeros_like(sequence))),
    ):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            work()
        counts.append(counter.get_total_flops())
    assert network_flops(tiny) == tuple(counts)


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"steps": 3}, [1, 1, 1]),
        ({"steps": 2, "policy": "self_critic", "policy_options": {"folds": 3}}, [4, 1]),
    ],
)
def test_forward_passes_are_counted_by_step(tiny, settings, passes):
    assert passes_by_step(tiny, tiny.sampler_config(**settings, guidance_scale=1.0)) == passes


def test_the_report_says_what_an_image_costs_and_samples_are_one_file(tiny, tmp_path):
    made = evaluation(tiny, num_images=10, keep_images="npz", curve={"steps": (1, 3)}, config=SMALL)
    report = json.loads(made.run(tmp_path).read_text())
    forward, decode = network_flops(tiny)
    assert report["cost"] == {"forward_passes": 2, "flops": 2 * forward + decode}
    assert [point["cost"]["forward_passes"] for point in report["curves"]] == [1, 3]
    assert report["run"]["seconds_per_image"] > 0
    assert any(text.startswith("Runs with other settings: ") for text in report["cautions"])
    work = made.works()["samples"]
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as archive:
        pictures = np.concatenate([work.pictures(i, min(i + 4, 10)) for i in (0, 4, 8)])
        assert np.array_equal(archive["arr_0"], pictures)
        assert archive["arr_1"].tolist() == [*range(10)]
        seconds = report["run"]["seconds_per_image"]
        assert json.loads(str(archive["about"]))["cost"] == report["cost"] | {"seconds": seconds}
    assert open_pictures(tmp_path / "samples.npz").read([7]).labels.tolist() == [7]
