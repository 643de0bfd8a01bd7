"""Predictions of masked tokens alone against those of all."""

from dataclasses import dataclass

import pytest
import torch

from maskgit import MaskGIT
from maskgit.config import ModelConfig
from maskgit.engine import masked as module
from maskgit.engine.masked import LARGEST_SHARE, MaskedPredictor
from maskgit.networks.config import TokenizerConfig, TransformerConfig
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.transformer import Transformer
from maskgit.sampler.policies import POLICIES
from maskgit.sampler.policies.confidence import Confidence
from ties import assert_same_tokens


@pytest.fixture(scope="module")
def bundled():
    return MaskGIT.from_pretrained()


@pytest.fixture
def predictor(bundled):
    return MaskedPredictor(
        bundled.transformer,
        bundled.transformer,
        codes=bundled.vocabulary.num_codes,
        mask_token=bundled.vocabulary.mask,
        remember=True,
    )


class Counted:
    """Counts the rows of a batch that go through a transformer."""

    def __init__(self, transformer) -> None:
        self.rows = 0
        transformer.head.register_forward_pre_hook(self.count)

    def count(self, module, args) -> None:
        self.rows += len(args[0])

    def take(self) -> int:
        rows, self.rows = self.rows, 0
        return rows


@pytest.mark.parametrize("num_known", [(0, 0, 0), (10, 0, 3), (40, 50, 30), (63, 20, 64), (64, 64, 64)])
def test_masked_tokens_are_predicted_as_ever(bundled, predictor, num_known):
    vocabulary = bundled.vocabulary
    sequence = vocabulary.sequence(torch.tensor([6, 8, -1]))
    generator = torch.Generator().manual_seed(0)
    for row, known in enumerate(num_known):
        places = torch.randperm(vocabulary.num_tokens, generator=generator)[:known] + 1
        sequence[row, places] = torch.randint(vocabulary.num_codes, (known,), generator=generator)
    expected, made = bundled.predict_logits(sequence), predictor(sequence)
    masked = sequence == vocabulary.mask
    masked[:, 0] = False
    assert torch.allclose(made[masked], expected[masked], atol=1e-5)
    assert made.shape == expected.shape
    most = max(1, vocabulary.num_tokens - min(num_known))
    if most <= LARGEST_SHARE * sequence.shape[1]:
        # Rows with fewer masked tokens have some known ones computed, too.
        assert made.any(-1).sum(1).tolist() == [most] * len(sequence)


def test_a_class_is_evaluated_once_at_the_first_step(bundled, float32):
    model = bundled.optimize(**float32)
    expected = bundled.predict_logits(bundled.vocabulary.sequence(torch.tensor([6, 8, 6, 6])))
    # One network on some ways, two on others.
    counters = [Counted(network) for network in {model.transformer, model.local_transformer}]
    predict = model.masked_predictor
    for labels, rows in (([6], 1), ([6, 8, 6, 6], 1), ([8, 8, 6, 8], 0), ([1, 2, 3, 4], 4)):
        made = predict(bundled.vocabulary.sequence(torch.tensor(labels)))
        assert sum(counted.take() for counted in counters) == rows
        for row, label in enumerate(labels):
            if label in (6, 8):
                assert torch.allclose(made[row], expected[[6, 8].index(label)], atol=1e-5)
    # What is returned is not what is kept.
    made.zero_()
    assert predict(bundled.vocabulary.sequence(torch.tensor([4]))).abs().max() > 0


def test_what_is_remembered_is_bounded(bundled, predictor, monkeypatch):
    one = 4 * (bundled.vocabulary.num_tokens + 1) * bundled.vocabulary.num_codes
    monkeypatch.setattr(module, "KEPT_BYTES", 3 * one)
    for label in (0, 1, 2, 1, 3, 4):
        predictor(bundled.vocabulary.sequence(torch.tensor([label])))
    offset = int(bundled.vocabulary.sequence(torch.tensor([0]))[0, 0])
    assert [number - offset for number in predictor._first] == [1, 3, 4]


def test_nothing_is_remembered_in_bfloat16(bundled, bfloat16):
    # There an image would depend on the batches before it.
    predict = bundled.optimize(**bfloat16).masked_predictor
    predict(bundled.vocabulary.sequence(torch.tensor([6, 6, 8])))
    assert not predict._first


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_makes_the_same_images(bundled, policy, float32):
    arguments = {"seed": 5, "steps": 5, "policy": policy, "guidance_scale": 2.0}
    expected = bundled.generate(["frog", "ship", None], **arguments)
    model = bundled.optimize(**float32)
    for batch_size in (3, 2):
        made = model.generate(["frog", "ship", None], batch_size=batch_size, **arguments)
        assert_same_tokens(made.tokens, expected.tokens)


def test_a_trace_tells_of_known_tokens_too(bundled, float32):
    expected = bundled.generate("frog", seed=3, steps=6, return_steps=True)
    made = bundled.optimize(**float32).generate("frog", seed=3, steps=6, return_steps=True)
    assert torch.allclose(made.trace.confidence, expected.trace.confidence, atol=1e-4)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_few_layers(num_layers, float32):
    torch.manual_seed(0)
    config = ModelConfig(
        tokenizer=TokenizerConfig(filters=32, channel_multipliers=(1, 1), embedding_dim=16, codebook_size=30),
        transformer=TransformerConfig(
            num_codes=30, num_classes=3, grid_size=4, hidden_size=32, num_layers=num_layers, num_heads=4,
            intermediate_size=64,
        ),
        image_size=8,
    )  # fmt: skip
    model = MaskGIT(config, Tokenizer(config.tokenizer).eval(), Transformer(config.transformer).eval())
    expected = model.generate([0, 1, 2, 2], seed=1)
    assert_same_tokens(model.optimize(**float32).generate([0, 1, 2, 2], seed=1).tokens, expected.tokens)


@pytest.mark.parametrize("reads", [False, True])
def test_a_policy_that_reads_known_tokens_gets_their_logits(bundled, reads, monkeypatch, float32):
    seen = []

    @dataclass(frozen=True)
    class Reader(Confidence):
        reads_known = reads

        def choose(self, step, memory):
            known = ~step.unknown_BS
            known[:, 0] = False
            seen.append((step.logits_BSK[known] == 0).all(-1).float().mean())
            return super().choose(step, memory)

    monkeypatch.setitem(POLICIES, "reader", Reader)
    bundled.optimize(**float32).generate("frog", seed=1, steps=8, policy="reader")
    assert seen[-1] == (0 if reads else 1)


@pytest.mark.parametrize("policy", ["halton", "random"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_an_order_known_in_advance_spares_what_is_masked_again(bundled, policy, guidance_scale):
    """The image is the one of a call whose callback reads the tokens of every step."""
    settings = {"seed": 3, "steps": 6, "policy": policy, "guidance_scale": guidance_scale}
    fast, read = bundled.optimize("exact"), []
    scored: list[int] = []
    fast.local_transformer.head.register_forward_pre_hook(
        lambda module, args: scored.append(args[0].shape[1])
    )
    spared = fast.generate([2, 7], **settings)
    assert len(scored) == 6
    assert max(scored) < 32  # Of 64 positions.
    told = fast.generate([2, 7], callback=lambda *step: read.append(step[2]), **settings)
    assert torch.equal(spared.tokens, told.tokens)
    assert torch.equal(spared.tokens, bundled.generate([2, 7], **settings).tokens)
    assert all(bool((tokens < 512).all()) for tokens in read)
