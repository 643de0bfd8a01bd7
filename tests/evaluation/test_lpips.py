"""LPIPS against a computation from the published files' names alone."""

import pytest
import torch
import torch.nn.functional as F

from maskgit.errors import CheckpointError, ConfigError, ImageError, RegionError
from maskgit.evaluation.networks.lpips import LPIPS, LPIPS_NETS, load_lpips, masked_lpips


def random_state(module, seed):
    """He's scale for convolutions, and weights of the comparison that are not negative."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in module.state_dict().items():
        values = torch.rand(tensor.shape, generator=generator)
        if tensor.ndim == 4 and not name.startswith("lin"):
            values = (values * 2 - 1) * (6 / tensor[0].numel()) ** 0.5
        state[name] = values
    return state


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("lpips"), {}
    for name in LPIPS_NETS:
        net = LPIPS(name)
        made[name] = (folder / f"{name}-net.pth", folder / f"{name}-lpips.pth")
        backbone = random_state(net.backbone, 0) | {"classifier.1.bias": torch.zeros(4)}
        torch.save(backbone, made[name][0])
        torch.save(random_state(net.lins, 1), made[name][1])
    return made


@pytest.fixture(scope="module")
def pair():
    return torch.rand(2, 2, 3, 64, 48, generator=torch.Generator().manual_seed(0))


def alexnet(state, x):
    """AlexNet's features after each ReLU, by torchvision's names."""
    taps = []
    for index, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
        if index in (3, 6):
            x = F.max_pool2d(x, 3, 2)
        weight, bias = state[f"features.{index}.weight"], state[f"features.{index}.bias"]
        x = F.relu(F.conv2d(x, weight, bias, stride, padding))
        taps.append(x)
    return taps


def reference(files, pair):
    """Weighted squared differences of unit-length features, by stage: (B, h, w) each."""
    state, lins = (torch.load(path, weights_only=True) for path in files)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    # For inputs in [−1, 1], as the files' authors round it.
    shift, scale = (2 * mean - 1).mul(1000).round() / 1000, (2 * std).mul(1000).round() / 1000
    left, right = (alexnet(state, (2 * x - 1 - shift.view(3, 1, 1)) / scale.view(3, 1, 1)) for x in pair)
    for stage, (a, b) in enumerate(zip(left, right, strict=True)):
        weight = lins[f"lin{stage}.model.1.weight"].double().view(1, -1, 1, 1)
        difference = F.normalize(a.double(), dim=1) - F.normalize(b.double(), dim=1)
        yield (weight * difference.square()).sum(1)


def test_alexnets_distance_is_computed_from_the_published_files_layout(files, pair):
    net = load_lpips("alex", weights=files["alex"])
    expected = sum(x.mean((1, 2)) for x in reference(files["alex"], pair))
    assert torch.allclose(net(*pair).double(), expected, rtol=1e-4)
    state = torch.load(files["alex"][0], weights_only=True)
    assert sum(x.numel() for name, x in state.items() if name.startswith("features")) == 2_469_696


def test_maps_are_the_stages_enlarged(files, pair):
    net = load_lpips("alex", weights=files["alex"])
    expected = sum(
        F.interpolate(x[:, None], (64, 48), mode="bilinear")[:, 0] for x in reference(files["alex"], pair)
    )
    maps = net.maps(*pair)
    assert torch.allclose(maps.double(), expected, rtol=1e-4)
    mask = torch.zeros(2, 64, 48, dtype=torch.bool)
    mask[0, 10:30, 5:9] = mask[1, :, 20:] = True
    inside = torch.stack([expected[i][mask[i]].mean() for i in range(2)])
    assert torch.allclose(masked_lpips(net, *pair, mask), inside, rtol=1e-4)


@pytest.mark.parametrize("name", LPIPS_NETS)
def test_distances_see_damage_and_nothing_else(files, pair, name):
    net = load_lpips(name, weights=files[name])
    a, b = pair
    assert net(a, a).abs().max() == 0
    distances = [net(a, torch.lerp(a, b, amount)).mean() for amount in (0.1, 0.3, 1.0)]
    assert sorted(distances) == distances
    assert torch.allclose(net(a, b)[1:], net(a[1:], b[1:]), rtol=1e-4)


def test_masked_lpips_does_not_see_far_from_the_mask(files, pair):
    net = load_lpips("alex", weights=files["alex"])
    a = F.interpolate(pair[0], (320, 320))
    b = a.clone()
    b[..., :20] = 0
    mask = torch.zeros(320, 320, dtype=torch.bool)
    mask[:, 300:] = True
    assert masked_lpips(net, a, b, mask).abs().max() == 0
    assert masked_lpips(net, a, b, ~mask).min() > 0


def test_what_does_not_fit_is_refused(files, pair):
    net = load_lpips("alex", weights=files["alex"])
    with pytest.raises(ImageError, match="at least 32"):
        net(pair[0][..., :31], pair[1][..., :31])
    with pytest.raises(RegionError, match="empty"):
        masked_lpips(net, *pair, torch.zeros(64, 48, dtype=torch.bool))
    with pytest.raises(ConfigError, match="alex"):
        load_lpips("squeeze", weights=files["alex"])
    with pytest.raises(ConfigError, match=r"needs 2 weights files.*alexnet-owt.*v0\.1/alex\.pth"):
        load_lpips("alex")
    with pytest.raises(CheckpointError, match=r"shape|lacks"):
        load_lpips("vgg", weights=files["alex"])
