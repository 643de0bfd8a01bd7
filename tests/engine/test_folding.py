"""The rewritten transformer against the plain one."""

import copy

import pytest
import torch
import torch.nn.functional as F

from maskgit.engine import fold_biases, replace_gelus
from maskgit.engine.layers import PIECE, PiecewiseGelu
from maskgit.networks.config import TransformerConfig
from maskgit.networks.transformer import Transformer


@pytest.fixture
def transformer():
    """A network in which every bias matters."""
    torch.manual_seed(0)
    made = Transformer(
        TransformerConfig(
            num_codes=32, num_classes=4, grid_size=4, hidden_size=48, num_layers=3, num_heads=4,
            intermediate_size=96,
        )
    )  # fmt: skip
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
        elif "norm" not in name:
            parameter.data.mul_(8)
    return made.eval().requires_grad_(False)


def test_folded_biases_compute_the_same(transformer):
    sequence = torch.randint(transformer.config.vocab_size, (3, 17))
    # Double precision says how much of a difference is rounding.
    exact = copy.deepcopy(transformer).double()(sequence)
    before = {name: parameter.clone() for name, parameter in transformer.named_parameters()}
    weights = dict(transformer.named_parameters())
    folded = copy.deepcopy(transformer)
    fold_biases(folded)
    replace_gelus(folded)
    error, rounding = (folded(sequence) - exact).abs().max(), (transformer(sequence) - exact).abs().max()
    assert error < 4 * rounding
    assert rounding < 1e-4 * exact.std()
    assert all(torch.equal(weights[name], value) for name, value in before.items())


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 5, 7), (1, 257, 3072), (3, PIECE // 8 + 1, 8), (0, 4, 8)])
@pytest.mark.parametrize("biased", [False, True])
def test_gelu_in_pieces_is_gelu(shape, biased):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4
    bias = torch.linspace(-1, 1, shape[-1]) if biased else None
    expected = F.gelu((x if bias is None else x + bias).double(), approximate="tanh")
    made = PiecewiseGelu(bias)(x)
    assert made is x
    assert torch.allclose(made.double(), expected, atol=3e-6, rtol=1e-6)


def test_gelu_in_pieces_far_from_zero():
    x = torch.tensor([[-1e30, -1e5, -20.0, 0.0, 20.0, 1e5, 1e30, torch.inf]])
    expected = F.gelu(x, approximate="tanh")
    assert torch.equal(PiecewiseGelu()(x), expected)
    assert PiecewiseGelu()(torch.full((1, 1), torch.nan)).isnan()


def test_inference_mode_leaves_nothing_behind(tiny, form):
    # What is made there must not be changed in place outside.
    model = tiny.optimize(**form)
    with torch.inference_mode():
        made = model.generate([0, 1], seed=1, steps=3)
    again = model.generate([0, 1], seed=1, steps=3)
    assert torch.equal(made.tokens, again.tokens)
    assert torch.equal(made.images, again.images)
