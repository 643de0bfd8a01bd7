"""Guidance by a weaker model, and sampling from the likeliest codes alone."""

import copy
import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from maskgit import MaskGIT
from maskgit.apps.cli import main
from maskgit.engine.batching import Batcher, Job
from maskgit.engine.graphs import GraphedSteps
from maskgit.errors import ConfigError
from maskgit.sampler import decode
from maskgit.sampler.config import SamplerConfig
from maskgit.sampler.guidance import WithGuide, truncated
from maskgit.sampler.noise import ImageNoise
from maskgit.sampler.policies import POLICIES

CODES, MASK = 3, 9


def table_model(seed):
    """A model of two tokens whose logits depend on what is known: int64 (B, 3) → float (B, 3, 3)."""
    table = torch.randn(CODES + 1, CODES + 1, 3, CODES, generator=torch.Generator().manual_seed(seed)) * 1.5

    def predict(sequence):
        first, second = sequence[:, 1:].clamp(max=CODES).unbind(1)
        return table[first, second]

    return predict


def test_guided_tokens_follow_the_guided_distribution():
    model, guide, scale, count = table_model(0), table_model(1), 2.5, 20_000
    config = SamplerConfig(
        steps=2, policy="random", mask_schedule="uniform", guidance_scale=scale, choice_temperature=0.0
    )
    sequence = torch.tensor([[5, MASK, MASK]]).expand(count, -1)
    noise = ImageNoise(0, torch.arange(count), 3, CODES)
    made = decode(WithGuide(model, guide), sequence, config, mask_token=MASK, noise=noise)[:, -1, 1:]

    def chances(known):
        read = torch.tensor([[5, *known]])
        weaker, own = guide(read)[0, 1:].double(), model(read)[0, 1:].double()
        return (weaker + scale * (own - weaker)).softmax(-1)

    expected = torch.zeros(CODES, CODES, dtype=torch.float64)
    for a, b in itertools.product(range(CODES), repeat=2):
        expected[a, b] += 0.5 * chances((MASK, MASK))[0, a] * chances((a, MASK))[1, b]
        expected[a, b] += 0.5 * chances((MASK, MASK))[1, b] * chances((MASK, b))[0, a]
    found = torch.bincount(made[:, 0] * CODES + made[:, 1], minlength=CODES**2)
    assert chisquare(found.numpy(), (expected.flatten() * count).numpy()).pvalue > 1e-3
    alone = decode(
        model, sequence, dataclasses.replace(config, guidance_scale=1.0), mask_token=MASK, noise=noise
    )
    other = torch.bincount(alone[:, -1, 1] * CODES + alone[:, -1, 2], minlength=CODES**2)
    assert chisquare(other.numpy(), (expected.flatten() * count).numpy()).pvalue < 1e-9


@pytest.fixture(scope="module")
def weak(tiny):
    """A weaker model than the golden one: its matrices are noisy."""
    transformer = copy.deepcopy(tiny.transformer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter += parameter.std().nan_to_num() * torch.randn(parameter.shape, generator=generator)
    return MaskGIT(tiny.config, tiny.tokenizer, transformer)


SETTINGS = {"num_images": 2, "steps": 3, "seed": 1, "guidance_scale": 2.5}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_guide_equal_to_the_model_changes_nothing_and_scale_1_is_the_model(tiny, weak, policy):
    plain = SETTINGS | {"policy": policy, "guidance_scale": 1.0}
    expected = tiny.generate(1, **plain).tokens
    alike = tiny.guided_by(copy.deepcopy(tiny)).generate(1, **plain | {"guidance_scale": 2.5})
    assert torch.equal(alike.tokens, expected)
    assert torch.equal(tiny.guided_by(weak).generate(1, **plain).tokens, expected)


def test_a_guide_reaches_all_that_decodes(tiny, weak):
    guided = tiny.guided_by(weak)
    expected = guided.generate(1, **SETTINGS).tokens
    assert not torch.equal(expected, tiny.generate(1, **SETTINGS | {"guidance_scale": 1.0}).tokens)
    assert torch.equal(guided.optimize("exact").generate(1, **SETTINGS).tokens, expected)
    graphed = copy.copy(guided)
    graphed.decode_step = GraphedSteps(capture=False, compile_noise=False)
    assert torch.equal(graphed.generate(1, **SETTINGS).tokens, expected)
    assert torch.equal(made_in_batches(guided, [{}, {}])[0], expected[0])
    photo = np.zeros((guided.config.image_size,) * 2 + (3,), np.uint8)
    mask = torch.ones(guided.config.image_size, guided.config.image_size, dtype=torch.bool)
    filled = [
        model.inpaint(photo, mask, label=1, **SETTINGS | {"num_images": 1}).tokens
        for model in (guided, tiny.guided_by(copy.deepcopy(tiny)))
    ]
    assert not torch.equal(*filled)
    assert guided.guided_by(None).guide is None


def made_in_batches(model, changes):
    """The tokens of images with settings of their own, made in one batch."""
    batcher = Batcher(model, max_batch=4)
    options = {name: value for name, value in SETTINGS.items() if name not in ("num_images", "seed")}
    jobs = []
    for index, change in enumerate(changes):
        sequence = model.vocabulary.sequence(torch.tensor([1]))[0]
        config = model.sampler_config(**options | change)
        jobs.append(Job(sequence, config, SETTINGS["seed"], index, pixels=False))
        batcher.add(jobs[-1])
    tokens = {}
    while len(batcher):
        tokens |= {news.job: news.tokens for news in batcher.step() if news.last}
    return [tokens[job] for job in jobs]


def test_guides_that_do_not_fit_are_refused(tiny, weak):
    with pytest.raises(ConfigError, match="must predict the same tokens of the same classes"):
        tiny.guided_by(MaskGIT.from_pretrained())
    with pytest.raises(ConfigError, match="Join a model and its guide first"):
        tiny.optimize("exact").guided_by(weak)
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        next(iter(other.tokenizer.quantizer.parameters())).add_(1)
    with pytest.raises(ConfigError, match="codes are of another tokenizer"):
        tiny.guided_by(other)
    with pytest.raises(ConfigError, match="a weaker model as its guide"):
        tiny.generate(1, guidance_scale=2.0)


def test_the_likeliest_codes_are_those_that_transformers_keeps():
    logits = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) * 2
    for k, p, heat in itertools.product((1, 5, 30), (0.05, 0.5, 0.9, 1.0), (0.5, 1.0, 1.7)):
        expected = TopKLogitsWarper(k)(None, logits / heat)
        if p < 1:
            alone = TopPLogitsWarper(p)(None, logits / heat)
            expected = torch.where(alone.isinf(), alone, expected)
        ones = torch.ones(40, 1)
        found = truncated(logits[:, None], ones * heat, ones * k, ones * p)[:, 0]
        assert torch.equal(found.isinf(), expected.isinf()), (k, p, heat)
        assert torch.equal(found[~found.isinf()], logits[~found.isinf()])


@pytest.mark.parametrize("policy", POLICIES)
def test_the_likeliest_code_alone_is_temperature_0(tiny, policy):
    settings = SETTINGS | {"policy": policy, "guidance_scale": 1.0}
    expected = tiny.generate(1, **settings, temperature=0.0).tokens
    for only in ({"top_k": 1}, {"top_p": 0.0}):
        assert torch.equal(tiny.generate(1, **settings, **only).tokens, expected)
    assert not torch.equal(tiny.generate(1, **settings, top_k=3).tokens, tiny.generate(1, **settings).tokens)
    everything = {"top_k": tiny.vocabulary.num_codes, "top_p": 1.0}
    assert torch.equal(tiny.generate(1, **settings, **everything).tokens, tiny.generate(1, **settings).tokens)


def test_images_of_a_batch_have_likeliest_codes_of_their_own(tiny, weak):
    guided = tiny.guided_by(weak)
    changes = [{"top_k": 2}, {"top_p": 0.3}, {}, {"top_k": 40, "top_p": 0.9}]
    made = made_in_batches(guided, changes)
    for index, change in enumerate(changes):
        alone = guided.generate(1, **SETTINGS | {"num_images": 1} | change, first_index=index).tokens
        assert torch.equal(made[index], alone[0]), change


def test_settings_that_came_later_are_stored_where_they_are_made():
    assert {"top_k", "top_p"}.isdisjoint(SamplerConfig().to_dict())
    assert SamplerConfig(top_k=5).to_dict()["top_k"] == 5
    assert SamplerConfig.from_dict(SamplerConfig(top_p=0.9).to_dict()).top_p == 0.9


def test_the_command_line_takes_a_guide_and_the_likeliest_codes(tiny, weak, tiny_folder, tmp_path, capsys):
    folder = weak.save_pretrained(tmp_path / "weak")
    flags = ["--model", str(tiny_folder), "--guide", str(folder), "--guidance-scale", "2.5", "--steps", "3"]
    flags += ["--top-k", "9", "--top-p", "0.8", "--seed", "1", "--exact"]
    assert main(["generate", "--class", "1", *flags, "--out", str(tmp_path / "out")]) == 0
    (path,) = [p for p in (tmp_path / "out").glob("*.png") if p.name != "sheet.png"]
    with Image.open(path) as image:
        recorded = json.loads(image.text["maskgit"])
    assert (recorded["guide"], recorded["top_k"], recorded["top_p"]) == (str(folder), 9, 0.8)
    assert main(["generate", "--class", "1", "--model", str(tiny_folder), "--guide", "cifar10"]) == 2
    assert "must predict the same tokens of the same classes" in capsys.readouterr().err
