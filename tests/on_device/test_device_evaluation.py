"""Evaluations on a device: the CPU's scores, and how often a batch makes the host wait."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from fake_device import FROM, READ, TO, TO_FREE, counting
from maskgit.apps.cli import commands as cli
from maskgit.evaluation.metrics.manifolds import density_coverage, precision_recall
from maskgit.evaluation.networks import inception, vit
from maskgit.evaluation.networks.features import load_feature_net
from maskgit.evaluation.networks.lpips import LPIPS
from maskgit.evaluation.runs.sampling import Reconstructions, SampleConfig, Samples, measured
from maskgit.foundation.devices import own_device, widest_float
from small_evaluation import evaluation, real_images, toy_net


def test_samples_score_as_on_the_cpu(tiny, on_device, tmp_path):
    evaluation(tiny).run(tmp_path / "here")
    evaluation(on_device, net=toy_net("gpu")).run(tmp_path / "there")
    here, there = (json.loads((tmp_path / place / "report.json").read_text()) for place in ("here", "there"))
    assert here["metrics"].keys() == there["metrics"].keys()
    # Decoded in other numbers at a time, a pixel in a thousand is rounded to the next grey level.
    for name, value in here["metrics"].items():
        assert there["metrics"][name] == pytest.approx(value, rel=1e-2), name
    assert "gpu" in there["run"]["device"]


def test_a_batch_of_samples_waits_for_what_is_measured_of_it(on_device):
    config = SampleConfig(num_images=8, batch_size=4, unit_size=4)
    sampler = on_device.sampler_config(steps=2)
    samples = Samples(on_device, toy_net("gpu"), config, weights={}, sampler=sampler)
    samples.make(0, 4)
    with counting() as counts:
        samples.make(4, 8)
    # Tokens there and pixels back without waiting; the rounded pixels there; two kinds of features back.
    assert counts[READ] == counts[TO] == 0, counts
    assert counts[TO_FREE] == 2
    assert counts[FROM] == 2


def test_reconstructions_are_compared_as_on_the_cpu(tiny, on_device):
    torch.manual_seed(0)
    lpips = LPIPS("alex").requires_grad_(False).eval()
    made = []
    for model, net, network in (
        (tiny, toy_net(), lpips),
        (on_device, toy_net("gpu"), LPIPS("alex").requires_grad_(False).eval()),
    ):
        network.load_state_dict(lpips.state_dict())
        work = Reconstructions(
            model.tokenizer,
            real_images(8),
            net,
            weights={},
            lpips=network.to(net.device),
            lpips_name="alex",
            batch_size=4,
        )
        made.append(work.make(0, 8).arrays)
    here, there = made
    assert here.keys() == there.keys()
    for name, value in here.items():
        np.testing.assert_allclose(there[name], value, rtol=1e-3, atol=2e-3, err_msg=name)


def test_feature_nets_give_the_cpus_features():
    images = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    here, there = (load_feature_net("effnet-lite0", device, size=32) for device in ("cpu", "gpu"))
    one, other = (measured(net, images) for net in (here, there))
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    with counting() as counts:
        there(images)
    assert counts.events == {TO_FREE: 1}


@pytest.mark.parametrize(
    "prepare", [*inception.PREPARATIONS.values(), partial(vit.prepare, config=vit.DINOV2)]
)
def test_images_are_prepared_as_on_the_cpu(prepare):
    images = torch.rand(2, 3, 30, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(prepare(images.to("gpu")).cpu(), prepare(images))


def test_manifolds_are_those_of_the_cpu(kind):
    random = np.random.default_rng(0)
    real, generated = random.normal(size=(30, 4)), random.normal(size=(25, 4))
    if kind == "mps":
        assert widest_float(torch.device("gpu:0")) == torch.float32
        return
    for score in (precision_recall, density_coverage):
        assert score(real, generated, k=3, device="gpu") == pytest.approx(score(real, generated, k=3))


def test_the_commands_score_on_the_device(tiny, tmp_path, capsys, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    for i, image in enumerate(pixels):
        (tmp_path / "real" / f"class{i % 10}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "real" / f"class{i % 10}" / f"{i}.png")
    tiny.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    small = ["--feature-size", "32", "--device", "gpu", "--splits", "2"]
    assert cli.main(["stats", "real", "--out", "real.npz", *small[:4]]) == 0
    command = ["evaluate", "model", "--reference", "real.npz", "--num-images", "12", "--steps", "2", *small]
    assert cli.main([*command, "--out", "made"]) == 0
    command = ["evaluate", "model", "--reconstruction", "--reference", "real", "--num-images", "12", *small]
    assert cli.main([*command, "--out", "rebuilt"]) == 0
    for place in ("made", "rebuilt"):
        report = json.loads((tmp_path / place / "report.json").read_text())
        assert report["metrics"]
        assert "gpu" in report["run"]["device"]
    capsys.readouterr()
    assert cli.main(["compare", "real.npz", "real", "--json", *small]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["fd_effnet-lite0"] == pytest.approx(0, abs=1e-3)


def test_a_device_of_another_kind_is_taken_as_it_is():
    assert own_device("gpu") == torch.device("gpu")
