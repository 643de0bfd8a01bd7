"""Losses, discriminator and R1 against the records of the official code, and against closed forms."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from golden_weights import arrays
from maskgit.errors import ConfigError
from maskgit.networks.config import TokenizerConfig
from maskgit.networks.quantizer import VectorQuantizer
from maskgit.training.objectives import discriminator
from maskgit.training.objectives.discriminator import (
    DISCRIMINATORS,
    Discriminator,
    PatchDiscriminator,
    blur_downsample,
    num_filters,
)
from maskgit.training.objectives.losses import (
    LeCam,
    adaptive_weight,
    discriminator_loss,
    entropy_loss,
    generator_loss,
    l1_loss,
    l2_loss,
    quantizer_loss,
    r1_penalty,
    sequence_losses,
)

GOLDEN = Path(__file__).parent.parent / "golden"
TIGHT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def official() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "official_losses.npz") as file:
        return dict(file)


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))


@pytest.mark.parametrize("kind", ["softmax", "argmax"])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_entropy_loss_is_official(official, kind, temperature):
    found = entropy_loss(tensor(official["entropy_affinity"]), kind, temperature)
    torch.testing.assert_close(found, tensor(official[f"entropy_{kind}_{temperature}"]), **TIGHT)


def test_entropy_loss_of_known_choices():
    even = torch.eye(8) * 100
    assert entropy_loss(even, temperature=1.0).item() == pytest.approx(-np.log(8), abs=1e-3)
    collapsed = torch.tensor([[100.0, 0, 0]]).expand(6, 3)
    assert entropy_loss(collapsed, temperature=1.0).item() == pytest.approx(0, abs=1e-3)


def test_argmax_entropy_has_the_gradient_of_softmax():
    affinity = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    entropy_loss(affinity, "argmax", 1.0).backward()
    assert affinity.grad is not None
    assert affinity.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["hinge", "non-saturating"])
def test_adversarial_losses_are_official(official, kind):
    real, fake = tensor(official["real_logit"]), tensor(official["fake_logit"])
    found = discriminator_loss(real, fake, kind), generator_loss(fake, kind)
    torch.testing.assert_close(found[0], tensor(official[f"discriminator_{kind}"]), **TIGHT)
    torch.testing.assert_close(found[1], tensor(official[f"generator_{kind}"]), **TIGHT)


@pytest.mark.parametrize("call", [
    lambda: generator_loss(torch.zeros(1), "wgan"),
    lambda: discriminator_loss(torch.zeros(1), torch.zeros(1), "hing"),
    lambda: entropy_loss(torch.zeros(2, 2), "mean"),
])  # fmt: skip
def test_unknown_names_are_refused(call):
    with pytest.raises(ConfigError, match="Choose from"):
        call()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_mean_of_sequence_losses_is_official(official, smoothing):
    logits, labels = tensor(official["mlm_logits"]), tensor(official["mlm_labels"])
    found = sequence_losses(logits, labels, tensor(official["mlm_weights"]), smoothing).mean()
    torch.testing.assert_close(found, tensor(official[f"mlm_loss_smoothing_{smoothing}"]), **TIGHT)


def test_sequence_losses_are_those_of_the_definition():
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[0, 1, 4], [2, 2, 3]])
    target = F.one_hot(labels, 5) * 0.8 + 0.2 / 5
    expected = -(target * logits.log_softmax(-1)).sum(-1)
    weights = torch.tensor([[1, 0, 1], [0, 0, 2]])
    means = torch.stack([(expected[0, 0] + expected[0, 2]) / 2, expected[1, 2]])
    torch.testing.assert_close(sequence_losses(logits, labels, weights, 0.2), means)
    torch.testing.assert_close(sequence_losses(logits, labels, torch.ones(2, 3), 0.2), expected.mean(-1))


def test_pixel_losses():
    a, b = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([2.0, 5.0], dtype=torch.float64)
    assert l1_loss(a, b).item() == 2
    assert l2_loss(a, b).item() == 5


def test_quantizer_losses_are_official(tiny):
    with np.load(GOLDEN / "tiny_forward.npz") as file:
        image = tensor(file["image_BHWC"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = tiny.tokenizer.encoder(image)
        found = quantizer_loss(tiny.tokenizer.quantizer(features))
    with np.load(GOLDEN / "tiny_quantizer_losses.npz") as file:
        expected = {name: tensor(file[name]) for name in file}
    torch.testing.assert_close(found.total, expected["quantizer_loss"], **TIGHT)
    torch.testing.assert_close(found.commitment, expected["e_latent_loss"], **TIGHT)
    torch.testing.assert_close(found.codebook, expected["q_latent_loss"], **TIGHT)
    torch.testing.assert_close(found.entropy, expected["entropy_loss"], **TIGHT)


def test_quantizer_losses_move_the_right_side():
    quantizer = VectorQuantizer(TokenizerConfig(codebook_size=4, embedding_dim=3))
    features = torch.randn(1, 3, 2, 2, requires_grad=True)
    losses = quantizer_loss(quantizer(features), entropy_weight=0.0)
    assert losses.entropy == 0
    (to_codes,) = torch.autograd.grad(
        losses.commitment, quantizer.codebook, retain_graph=True, allow_unused=True
    )
    (to_features,) = torch.autograd.grad(losses.codebook, features, allow_unused=True)
    assert to_codes is None or not to_codes.any()
    assert to_features is None or not to_features.any()


def official_discriminator(blur: bool) -> Discriminator:
    """Make the official 32-pixel network with the golden weights."""
    shapes = json.loads((GOLDEN / "discriminator32_shapes.json").read_text())
    weights = arrays(shapes, 1)
    network = Discriminator(32, blur_resample=blur)

    def kernel(array: np.ndarray) -> Tensor:
        return tensor(array).permute(3, 2, 0, 1) if array.ndim == 4 else tensor(array).T

    names = {"conv_in": "Conv_0", "conv_out": "Conv_1", "dense2": "Dense_1"}
    for i in range(3):
        for ours, theirs in (("conv1", "Conv_0"), ("shortcut", "Conv_1"), ("conv2", "Conv_2")):
            names[f"blocks.{i}.{ours}"] = f"ResBlock_{i}/{theirs}"
    state = {}
    for ours, theirs in names.items():
        state[f"{ours}.weight"] = kernel(weights[f"params/{theirs}/kernel"])
        if "shortcut" not in ours:
            state[f"{ours}.bias"] = tensor(weights[f"params/{theirs}/bias"])
    # The official network flattens (height, width, channels), ours (channels, height, width).
    dense = tensor(weights["params/Dense_0/kernel"]).view(4, 4, 512, 512)
    state["dense1.weight"] = dense.permute(3, 2, 0, 1).flatten(1)
    state["dense1.bias"] = tensor(weights["params/Dense_0/bias"])
    network.load_state_dict(state)
    return network


@pytest.mark.parametrize("blur", [True, False])
def test_discriminator_and_r1_are_official(official, blur):
    network = official_discriminator(blur)
    images = tensor(official["discriminator_image_BHWC"]).permute(0, 3, 1, 2)
    penalty, logits = r1_penalty(network, images)
    torch.testing.assert_close(logits, tensor(official[f"discriminator_logits_blur{int(blur)}"]), **TIGHT)
    expected = float(official[f"r1_blur{int(blur)}_cost10"])
    assert penalty.item() == pytest.approx(expected, rel=1e-5)


def test_a_discriminator_that_was_evaluated_first_can_be_trained():
    network, images = Discriminator(8, max_filters=2), torch.rand(1, 3, 8, 8)
    # Its kernel is kept from the first use on.
    discriminator._blur_kernel.cache_clear()
    with torch.inference_mode():
        network(images)
    network(images).sum().backward()
    assert network.conv_in.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("blur", [True, False])
def test_r1_has_second_order_gradients(blur):
    torch.manual_seed(0)
    network = Discriminator(8, blur_resample=blur, max_filters=4).double()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    r1_penalty(network, images)[0].backward()
    weight, place, step = network.conv_in.weight, (1, 2, 0, 1), 1e-4
    values = []
    for shift in (step, -2 * step):
        with torch.no_grad():
            weight[place] += shift
        values.append(r1_penalty(network, images)[0].item())
    assert weight.grad is not None
    expected = (values[0] - values[1]) / (2 * step)
    assert weight.grad[place].item() == pytest.approx(expected, rel=0.05, abs=1e-3)


def test_blur_is_binomial():
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, 3, 3] = 64
    # Output i reads pixels 2i − 1 to 2i + 2: pixel 3 stands third in output 1's window, and first in output 2's.
    line = torch.tensor([0.0, 3, 1, 0])
    torch.testing.assert_close(blur_downsample(x)[0, 0], line[:, None] * line)


@pytest.mark.parametrize("size", [4, 5, 6, 8, 20, 36, 64, 96, 192, 1024])
@pytest.mark.parametrize(("kind", "blur"), [("stylegan", True), ("stylegan", False), ("patchgan", False)])
def test_discriminator_sizes(size, kind, blur):
    network = DISCRIMINATORS[kind](size, max_filters=4, blur_resample=blur)
    images = torch.rand(2, 3, size, size, requires_grad=True)
    logits = network(images)
    assert logits.shape[:2] == (2, 1)
    assert logits.ndim == (2 if kind == "stylegan" else 4)
    (gradient,) = torch.autograd.grad(logits.sum(), images)
    assert (gradient != 0).any(dim=1).all(), "every pixel is looked at"


def test_a_size_between_two_powers_has_the_layers_of_the_larger():
    def widths(size):
        return [tuple(p.shape) for name, p in Discriminator(size).named_parameters() if "dense1" not in name]

    assert widths(96) == widths(128)
    assert widths(192) == widths(256)
    assert Discriminator(96).dense1.in_features == 512 * 3 * 3
    assert Discriminator(384, max_filters=8).dense1.in_features == 8 * 3 * 3


def test_patches_of_70_pixels_are_judged_one_by_one():
    torch.manual_seed(0)
    network = PatchDiscriminator(96, max_filters=4)
    # Normalization looks at whole images; without it a logit sees its patch alone.
    network.layers = torch.nn.Sequential(
        *(m for m in network.layers if not isinstance(m, torch.nn.GroupNorm))
    )
    images = torch.rand(1, 3, 96, 96, requires_grad=True)
    logits = network(images)
    assert logits.shape == (1, 1, 10, 10)
    (gradient,) = torch.autograd.grad(logits[0, 0, 5, 5], images)
    rows = gradient.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == 70


def test_lecam_pulls_logits_to_the_other_sides_mean():
    lecam = LeCam(decay=0.5)
    real, fake = torch.tensor([[2.0], [4.0]]), torch.tensor([[-1.0], [1.0]])
    first = lecam(real, fake)  # The means are 1.5 and 0 after it.
    assert lecam.means.tolist() == [1.5, 0.0]
    assert first == pytest.approx((2**2 + 4**2) / 2 + (2.5**2 + 0.5**2) / 2)
    lecam(real, fake)
    assert lecam.means.tolist() == [2.25, 0.0]
    near = torch.tensor([[-3.0]]), torch.tensor([[7.0]])
    assert LeCam(decay=1.0)(*near) == 0, "only the side that runs away is pulled"


def test_discriminator_does_not_see_memory_order():
    network = Discriminator(16, max_filters=8)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = network(images)
        found = network.to(memory_format=torch.channels_last)(
            images.contiguous(memory_format=torch.channels_last)
        )
    torch.testing.assert_close(found, expected)


def test_discriminator_widths():
    assert num_filters(32, 2) == 512
    assert num_filters(256, 2) == 128
    assert num_filters(256, 2, 100) == 100
    assert [num_filters(size) for size in (32, 64, 128, 256, 512, 1024)] == [512, 256, 128, 64, 32, 16]
    with pytest.raises(ConfigError, match="4 pixels a side or more, but image_size is 2"):
        Discriminator(2)


def test_adaptive_weight_balances_gradients():
    weight = torch.randn(3, 3, requires_grad=True)
    a, b = (weight * 6).sum(), (weight * 2).sum()
    assert adaptive_weight(a, b, weight).item() == pytest.approx(3, rel=1e-3)
