"""Learning rates, clipping and averaged weights against closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from maskgit.errors import CheckpointError, ConfigError
from maskgit.networks.config import TransformerConfig
from maskgit.networks.transformer import Transformer
from maskgit.training.optim import (
    EMA,
    clip_gradients,
    learning_rate,
    make_adam,
    parameter_groups,
    set_learning_rate,
    transformer_optimizers,
    warm_decay,
)


def test_warm_up_then_constant():
    rates = [learning_rate(step, peak=2.0, warmup_steps=4, total_steps=10) for step in range(10)]
    assert rates == [0.5, 1.0, 1.5, 2.0, *[2.0] * 6]


def test_cosine_falls_to_nothing():
    settings = {"peak": 3.0, "schedule": "cosine", "warmup_steps": 2, "total_steps": 10}
    assert learning_rate(2, **settings) == 3.0
    assert learning_rate(6, **settings) == pytest.approx(1.5)
    assert learning_rate(10, **settings) == pytest.approx(0)
    assert learning_rate(99, **settings) == pytest.approx(0)


@given(st.integers(0, 100), st.integers(0, 60), st.sampled_from(["constant", "cosine"]))
def test_rate_stays_between_nothing_and_the_peak(step, warmup, schedule):
    rate = learning_rate(step, peak=1.0, schedule=schedule, warmup_steps=warmup, total_steps=100)
    assert 0 <= rate <= 1


def test_unknown_schedule():
    with pytest.raises(ConfigError, match="cosine"):
        learning_rate(0, peak=1.0, schedule="cosin")


def test_weight_decay_is_on_matrices_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(4), nn.Embedding(5, 4))
    decayed, others = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in others["params"]} == {1}
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_muon_moves_the_matrices_of_the_layers_alone():
    torch.manual_seed(0)
    config = TransformerConfig(
        16, 3, 4, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, block="modern", dropout=0.0
    )
    network = Transformer(config)
    adamw, muon = transformer_optimizers(network, "muon", weight_decay=0.0, betas=(0.9, 0.96))
    set_learning_rate([adamw, muon], 0.01)
    matrices = {id(p) for n, p in network.named_parameters() if n.startswith("layers.") and p.ndim == 2}
    assert {id(p) for group in muon.param_groups for p in group["params"]} == matrices
    others = [p for group in adamw.param_groups for p in group["params"]]
    assert {id(p) for p in others} == {id(p) for p in network.parameters()} - matrices
    weight = network.layers[0].attention.out.weight
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    muon.step()
    # All directions move alike, and in the mean as far as AdamW's 0.2 of the learning rate (arXiv 2502.16982, eq. 4).
    moves = torch.linalg.svdvals((before - weight).detach())
    assert moves.max() / moves.min() < 3
    assert (before - weight).detach().square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.3)
    assert len(transformer_optimizers(network, "adamw", weight_decay=0.0, betas=(0.9, 0.96))) == 1


def test_clipping():
    weight = nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), 3.0)
    assert clip_gradients([weight], math.inf).item() == pytest.approx(6)
    assert weight.grad.norm().item() == pytest.approx(6)
    assert clip_gradients([weight], 1.5).item() == pytest.approx(6)
    assert weight.grad.norm().item() == pytest.approx(1.5, rel=1e-5)


def test_adam_with_made_state_moves_as_torch_does():
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    ours, theirs = make_adam([weights[0]], (0.0, 0.99)), torch.optim.Adam([weights[1]], 0.1, (0.0, 0.99))
    ours.param_groups[0]["lr"] = 0.1
    for step in range(3):
        for weight, optimizer in zip(weights, (ours, theirs), strict=True):
            weight.grad = torch.tensor([1.0, -2.0, 0.5]) * (step + 1)
            optimizer.step()
    assert torch.equal(*weights)


def test_ema_is_the_average_of_its_definition():
    model = nn.BatchNorm1d(2)
    ema = EMA(model, 0.9)
    expected = model.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            model.weight += step + 1
            model.running_mean += 1
        ema.update(model)
        expected = 0.9 * expected + 0.1 * model.weight.detach()
    torch.testing.assert_close(ema.average["weight"], expected)
    assert torch.equal(ema.average["running_mean"], model.running_mean)


def test_ema_lends_itself_and_gives_back():
    model = nn.Linear(2, 2)
    ema, own = EMA(model, 0.5), model.weight.detach().clone()
    ema.average["weight"].fill_(7)
    with ema.applied(model):
        assert (model.weight == 7).all()
    assert torch.equal(model.weight, own)


def test_ema_state_goes_round_and_refuses_others():
    model = nn.Linear(2, 2)
    first, second = EMA(model, 0.5), EMA(model, 0.5)
    first.average["weight"].fill_(3)
    second.load_state_dict(first.state_dict())
    assert (second.average["weight"] == 3).all()
    with pytest.raises(CheckpointError, match="not those of this network"):
        second.load_state_dict(EMA(nn.Linear(3, 2), 0.5).state_dict())


def test_warm_up_stable_decay():
    rates = [
        learning_rate(step, peak=1.0, schedule="wsd", warmup_steps=2, total_steps=10) for step in range(11)
    ]
    assert rates == [0.5, *[1.0] * 8, 0.5, 0.0]
    settings = {"peak": 1.0, "schedule": "wsd", "total_steps": 10, "decay_steps": 4}
    assert [learning_rate(step, **settings) for step in range(5, 10)] == [1.0, 1.0, 0.75, 0.5, 0.25]


def test_a_final_decay_starts_where_the_schedule_stands():
    cosine = {"peak": 1.0, "schedule": "cosine"}
    whole = [learning_rate(step, total_steps=100, **cosine) for step in range(40)]
    ended = [
        learning_rate(step, total_steps=40, schedule_steps=100, decay_steps=10, **cosine)
        for step in range(40)
    ]
    assert ended[:31] == whole[:31]
    assert ended[35] == pytest.approx(whole[35] / 2)


def test_an_average_forgets_its_first_weights():
    """Without a warm-up, 0.999 ** 60 = 94 % of a short run's average would be its initial weights."""
    assert [warm_decay(0.5, step) for step in (0, 1, 7, 8, 9)] == [0.1, 2 / 11, 8 / 17, 0.5, 0.5]
    weight = nn.Linear(1, 1)
    with torch.no_grad():
        weight.weight.fill_(1.0)
        ema = EMA(weight, 0.999)
        weight.weight.fill_(0.0)
    for step in range(60):
        ema.update(weight, step)
    # The product of (1 + n) / (10 + n) telescopes: 60! 9! / 69!.
    expected = math.factorial(60) * math.factorial(9) / math.factorial(69)
    assert float(ema.average["weight"]) == pytest.approx(expected, rel=1e-3)
