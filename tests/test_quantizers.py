"""Quantizers against vector-quantize-pytorch where it has them, against closed forms where it has not."""

import math

import pytest
import torch
import torch.nn.functional as F
from vector_quantize_pytorch import FSQ, LFQ, SimVQ

from maskgit import MaskGIT, hub
from maskgit.config import ModelConfig, TokenizerConfig, TransformerConfig
from maskgit.convert import save_official
from maskgit.errors import ConfigError
from maskgit.networks import config as network_config
from maskgit.networks import quantizer as quantizers
from maskgit.networks.quantizer import QUANTIZERS, VectorQuantizer, make_quantizer, register_quantizer
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.transformer import Transformer
from maskgit.training.objectives.losses import entropy_loss, quantizer_loss

SHAPES = {
    "vq": {"embedding_dim": 6, "codebook_size": 30},
    "gumbel": {"embedding_dim": 6, "codebook_size": 30},
    "simvq": {"embedding_dim": 6, "codebook_size": 30},
    "ibq": {"embedding_dim": 6, "codebook_size": 30},
    "lfq": {"embedding_dim": 6, "codebook_size": 64},
    "bsq": {"embedding_dim": 6, "codebook_size": 64},
    "fsq": {"embedding_dim": 4, "codebook_size": 8 * 5 * 2 * 3, "levels": (8, 5, 2, 3)},
}


def config_of(name: str, **settings) -> TokenizerConfig:
    shape = {"filters": 32, "num_res_blocks": 1, "channel_multipliers": (1, 1), "quantizer": name}
    return TokenizerConfig(**(shape | SHAPES.get(name, {}) | settings))


def features_of(name: str) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(1)
    return (2 * torch.randn(2, SHAPES[name]["embedding_dim"], 4, 5, generator=numbers)).requires_grad_()


def gradients(output: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    return list(torch.autograd.grad((output * weights).sum(), inputs, retain_graph=True))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_tokens_are_the_nearest_codes_and_codes_come_back(name, monkeypatch):
    torch.manual_seed(0)
    quantizer, features = make_quantizer(config_of(name)), features_of(name)
    tokens = quantizer.tokens(features)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, quantizer.distances(features).argmin(-1))
    assert torch.equal(quantizer(features).tokens, tokens)
    every = torch.arange(quantizer.codebook_size)
    assert torch.equal(quantizer.embed(every[None, None])[0, :, 0].T, quantizer.codes)
    monkeypatch.setattr(quantizers, "MAX_DISTANCES", 3 * quantizer.codebook_size)  # Three vectors at a time.
    assert torch.equal(quantizer.tokens(features), tokens)


@pytest.mark.parametrize("name", ["lfq", "bsq"])
def test_bits_are_those_of_the_library(name):
    quantizer, features = make_quantizer(config_of(name)), features_of(name)
    theirs = LFQ(dim=6, codebook_size=64, spherical=name == "bsq", commitment_loss_weight=0.25).train()
    made, expected = quantizer(features), features_of(name)
    (output, tokens, loss), parts = theirs(expected, inv_temperature=1.0, return_loss_breakdown=True)
    # Its first dimension is the highest bit.
    reversed_bits = sum((tokens >> i & 1) << (5 - i) for i in range(6))
    assert torch.equal(made.tokens, reversed_bits)
    torch.testing.assert_close(made.features, output)
    torch.testing.assert_close(gradients(made.features, features), gradients(output, expected))
    # Its temperature divides 2 z·c, as ours divides the negative squared distance.
    found = quantizer_loss(made, quantizer.losses, entropy_weight=0.1, entropy_temperature=1.0)
    torch.testing.assert_close(found.commitment, 0.25 * parts.commitment)
    expected_entropy = 0.1 * (parts.per_sample_entropy - parts.batch_entropy)
    # It bounds probabilities by 1e-5 from below inside logarithms where we add as much.
    torch.testing.assert_close(found.entropy, expected_entropy, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(found.total, features), torch.autograd.grad(loss, expected), rtol=1e-3, atol=1e-5
    )


def test_levels_are_those_of_the_library():
    quantizer, features = make_quantizer(config_of("fsq")), features_of("fsq")
    made, expected = quantizer(features), features_of("fsq")
    output, tokens = FSQ([8, 5, 2, 3])(expected)
    assert torch.equal(made.tokens, tokens.long())
    torch.testing.assert_close(made.features, output)
    torch.testing.assert_close(gradients(made.features, features), gradients(output, expected))
    assert quantizer_loss(made, quantizer.losses).total == 0


def test_a_transformed_codebook_is_that_of_the_library():
    torch.manual_seed(0)
    quantizer, features = make_quantizer(config_of("simvq")), features_of("simvq")
    theirs = SimVQ(dim=6, codebook_size=30, rotation_trick=False, channel_first=True)
    theirs.frozen_codebook.copy_(quantizer.fixed)
    theirs.code_transform.load_state_dict(quantizer.transform.state_dict())
    made, expected = quantizer(features), features_of("simvq")
    output, tokens, loss = theirs(expected)
    assert torch.equal(made.tokens, tokens)
    torch.testing.assert_close(made.features, output)
    found = quantizer_loss(made, quantizer.losses)
    torch.testing.assert_close(found.total, loss)
    torch.testing.assert_close(
        torch.autograd.grad(found.total, (features, quantizer.transform.weight)),
        torch.autograd.grad(loss, (expected, theirs.code_transform.weight)),
    )
    assert not quantizer.fixed.requires_grad


def test_index_backpropagation_has_the_gradients_of_the_softmax():
    torch.manual_seed(0)
    quantizer, features = make_quantizer(config_of("ibq")), features_of("ibq")
    made = quantizer(features)
    torch.testing.assert_close(made.features, quantizer.codebook[made.tokens].movedim(-1, 1))
    # What flows to the encoder is of the mixture; the codebook also has the rows of the hard choice.
    vectors, rows = features.movedim(1, -1), quantizer.codebook
    soft = (vectors @ rows.T).softmax(-1)
    hard = F.one_hot(made.tokens, 30).float()
    to_features, to_rows = gradients(made.features, features, rows)
    mixture = (soft @ rows.detach()).movedim(-1, 1)
    torch.testing.assert_close(gradients(mixture, features)[0], to_features)
    chosen = (hard @ rows + soft @ rows.detach()).movedim(-1, 1)
    torch.testing.assert_close(gradients(chosen, rows)[0], to_rows)
    found = quantizer_loss(made, quantizer.losses, entropy_weight=0.0)
    z, z_soft, z_hard = features, made.features, made.codes
    expected = (z_soft - z).square().mean() + (z_hard.detach() - z).square().mean()
    expected = expected + 0.25 * (z_hard - z.detach()).square().mean()
    torch.testing.assert_close(found.total, expected)
    inputs = (features, rows)
    torch.testing.assert_close(
        torch.autograd.grad(found.total, inputs, retain_graph=True), torch.autograd.grad(expected, inputs)
    )


def test_normalized_codes_are_pulled_to_normalized_features():
    torch.manual_seed(0)
    quantizer, features = make_quantizer(config_of("vq", normalize_codes=True)), features_of("vq")
    found = quantizer_loss(quantizer(features), entropy_weight=0.0)
    codes = quantizer.codes[quantizer.tokens(features)].movedim(-1, 1)
    torch.testing.assert_close(found.codebook, (F.normalize(features) - codes).square().mean())


def test_groups_of_bits_bound_the_entropy_of_all():
    quantizer, features = make_quantizer(config_of("bsq")), features_of("bsq")
    whole, groups = (quantizer(features, entropy_groups=count).distances for count in (1, 3))
    assert [d.shape[-1] for d in whole + groups] == [64, 4, 4, 4]

    def entropies(distances):  # Each vector's, and that of their mean choice.
        choices = [(-d.flatten(0, -2) / 0.1).softmax(-1) for d in distances]
        return (
            sum(-(p * p.log()).sum(-1).mean() for p in choices),
            sum(-(p.mean(0) * p.mean(0).log()).sum() for p in choices),
        )

    (one, mean_one), (parts, mean_parts) = entropies(whole), entropies(groups)
    torch.testing.assert_close(one, parts)
    assert mean_one < mean_parts
    found = quantizer_loss(
        quantizer(features, entropy_groups=3), ("entropy",), entropy_weight=1.0, entropy_temperature=0.1
    )
    expected = sum(entropy_loss(-d, temperature=0.1) for d in groups)
    torch.testing.assert_close(found.total, expected)
    assert quantizer(features, entropy_groups=0).distances == ()


def test_gumbel_has_no_loss():
    quantizer = make_quantizer(config_of("gumbel"))
    assert quantizer_loss(quantizer(features_of("gumbel")), quantizer.losses).total == 0


@pytest.mark.parametrize("name", QUANTIZERS)
def test_tokenizers_of_every_quantizer_are_saved_and_read(name, tmp_path):
    network = Tokenizer(config_of(name)).eval()
    tokens = network.encode(torch.rand(2, 3, 8, 12))
    hub.save_tokenizer(network, tmp_path / "tokenizer")
    again = hub.load_tokenizer(tmp_path / "tokenizer")
    assert again.config == network.config
    assert torch.equal(again.decode(tokens), network.decode(tokens))


@pytest.mark.parametrize("name", ["lfq", "bsq", "fsq"])
def test_a_quarter_of_a_million_codes_need_no_table(name):
    levels = {"levels": (8,) * 6, "embedding_dim": 6} if name == "fsq" else {"embedding_dim": 18}
    quantizer = make_quantizer(config_of(name, codebook_size=2**18, **levels))
    tokens = torch.tensor([[[0, 1, 2**18 - 1, 123_456]]])
    features = 1.5 * quantizer.embed(tokens)
    if name == "fsq":
        # The tanh's inverse: the features that are bounded to just these levels.
        inputs, shift = quantizer.embed(tokens) * 4, math.atanh(0.5 / 3.5035)
        features = torch.atanh((inputs + 0.5) / 3.5035) - shift
    assert torch.equal(quantizer.tokens(features), tokens)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        (
            "fsq",
            {"levels": (8, 5, 2)},
            r"a number for each dimension, 4 \(embedding_dim\), but are 8 × 5 × 2",
        ),
        ("fsq", {"levels": (8, 5, 2, 4)}, "levels 8 × 5 × 2 × 4 make 320 codes, but codebook_size is 240"),
        ("fsq", {"levels": (240, 1, 1, 1)}, "levels"),
        ("vq", {"levels": (6, 5)}, "levels are for quantizer fsq, but the quantizer is vq"),
        ("bsq", {"codebook_size": 100}, "embedding_dim 6 makes 64 codes, but codebook_size is 100"),
        ("simvq", {"normalize_codes": True}, "normalize_codes is for quantizers vq, gumbel and ibq"),
        ("vqq", {}, "Unknown quantizer"),
    ],
)
def test_codes_that_do_not_fit_are_sentences(name, settings, said):
    with pytest.raises(ConfigError, match=said):
        config_of(name, **settings)


def test_one_of_ones_own_is_registered(monkeypatch):
    monkeypatch.setattr(quantizers, "QUANTIZERS", dict(QUANTIZERS))
    monkeypatch.setattr(quantizers, "QUANTIZER_CHECKS", network_config.QUANTIZER_CHECKS)

    class Negated(VectorQuantizer):
        losses = ("commitment",)

        def inputs(self, features):
            return -features

    with pytest.raises(ConfigError, match="already"):
        register_quantizer("vq", Negated)
    try:
        register_quantizer("negated", Negated)
        network = Tokenizer(config_of("negated", embedding_dim=4, codebook_size=9))
        features = torch.randn(1, 4, 3, 3)
        assert torch.equal(
            network.quantizer.tokens(features),
            torch.cdist(-features.flatten(2).mT, network.quantizer.codes).argmin(-1).view(1, 3, 3),
        )
    finally:
        network_config.QUANTIZER_CHECKS.pop("negated")
    assert math.isfinite(float(quantizer_loss(network.quantizer(features), Negated.losses).total))


@pytest.mark.parametrize("name", ["simvq", "ibq", "bsq", "fsq"])
def test_googles_format_has_no_place_for_them(name, tmp_path):
    shape = config_of(name)
    backbone = TransformerConfig(
        shape.codebook_size, 2, 2, hidden_size=8, num_layers=1, num_heads=1, intermediate_size=8
    )
    model = MaskGIT(ModelConfig(shape, backbone, image_size=4), Tokenizer(shape), Transformer(backbone))
    with pytest.raises(ConfigError, match=f"no place for .*{'levels' if name == 'fsq' else name}"):
        save_official(model, tmp_path)
