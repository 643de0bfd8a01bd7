"""The Inception network and its resizing against independent ports.

`golden/inception.npz` is what torch-fidelity 0.4.0, an independent port of the same graph, computes in
float32 with the weights and images that `weights` and `pictures` below make from their rules:

- a layer's name: every 499th number of its output (2, C, h, w), flattened;
- `spatial`: the first 7 channels of the output of Mixed_6d.branch1x1, (2, 17, 17, 7) flattened to (2, 2023);
- `pooled`, `logits`: its features "2048" and "logits_unbiased";
- `pooled_half_pixel`: its layers on `2 * interpolate(x, (299, 299), mode="bilinear") - 1`, the input that
  pytorch-fid 0.3.0 makes.
"""

import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from maskgit.errors import CheckpointError, ConfigError
from maskgit.evaluation.networks.features import load_feature_net
from maskgit.evaluation.networks.inception import (
    NUM_CLASSES,
    POOLED_DIM,
    SPATIAL_DIM,
    Inception,
    prepare_tf1,
    resize_half_pixel,
    resize_tf1,
)

LAYERS = (
    "Conv2d_1a_3x3",
    "Conv2d_2b_3x3",
    "Conv2d_4a_3x3",
    "Mixed_5b",
    "Mixed_5d",
    "Mixed_6a",
    "Mixed_6b",
    "Mixed_6e",
    "Mixed_7a",
    "Mixed_7b",
    "Mixed_7c",
)


def weights(shapes):
    """Normal numbers from Philox keyed by the crc32 of the tensor's name, scaled by what the tensor is."""
    state = {}
    for name, shape in shapes.items():
        key = [zlib.crc32(name.encode()), 0]
        x = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
        if len(shape) == 4:
            x *= np.float32(np.sqrt(2 / np.prod(shape[1:])))
        elif name == "fc.weight":
            x *= np.float32(0.05)
        else:
            x *= np.float32(0.1)
            if name.endswith(("bn.weight", "running_var")):
                x = np.abs(1 + x)
        state[name] = torch.from_numpy(x)
    return state


def pictures():
    """Noise, and a slope with an edge in it: uint8 (2, 3, 40, 56)."""
    noise = np.random.Generator(np.random.Philox(key=[7, 7])).integers(0, 256, (3, 40, 56), dtype=np.uint8)
    slope = np.add.outer(4 * np.arange(40), 1 + np.arange(56)) + 20 * np.arange(3)[:, None, None]
    slope[:, :, 30:] //= 2
    return torch.from_numpy(np.stack([noise, slope.astype(np.uint8)]))


def shapes():
    with torch.device("meta"):
        state = Inception().state_dict()
    return {name: tuple(x.shape) for name, x in state.items() if not name.endswith("num_batches_tracked")}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(weights(shapes()), path)
    return path


@pytest.fixture(scope="module")
def net(file):
    return load_feature_net("inception", weights=file)


@pytest.fixture(scope="module")
def record(golden):
    with np.load(golden / "inception.npz", allow_pickle=False) as saved:
        return dict(saved)


def assert_near(ours, expected):
    # Rounding grows through the layers, in proportion to their outputs.
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() < 1e-4 * expected.std()


def test_outputs_are_the_independent_ports(net, record):
    outputs = net.outputs(pictures().float() / 255)
    assert outputs.pooled.shape == (2, POOLED_DIM)
    assert outputs.spatial.shape == (2, SPATIAL_DIM)
    assert outputs.logits.shape == (2, NUM_CLASSES)
    for name, ours in outputs._asdict().items():
        assert_near(ours.numpy(), record[name])


def test_every_layer_is_the_independent_ports(file, record):
    network = Inception().eval()
    network.load_state_dict(torch.load(file, weights_only=True), strict=False)
    seen = {}
    for name in LAYERS:
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output.flatten()[::499].numpy()})
        )
    with torch.no_grad():
        network(prepare_tf1(pictures().float() / 255))
    for name in LAYERS:
        assert_near(seen[name], record[name])


def test_pytorch_fids_resize_is_another_net(file, net, record):
    other = load_feature_net("inception-pytorch-fid", weights=file)
    assert_near(other(pictures().float() / 255).numpy(), record["pooled_half_pixel"])
    assert np.abs(record["pooled"] - record["pooled_half_pixel"]).max() > 0.01 * record["pooled"].std()
    assert other.identity != net.identity


@pytest.mark.parametrize("size", [(5, 7), (32, 32), (299, 299), (320, 512)])
def test_the_resize_is_tensorflow_1s_definition(size):
    image = np.random.default_rng(0).random(size, dtype=np.float32)
    expected = np.empty((299, 299))
    rows, columns = np.arange(299) * (size[0] / 299), np.arange(299) * (size[1] / 299)
    for i, y in enumerate(rows):
        top, bottom = int(y), min(int(y) + 1, size[0] - 1)
        line = image[top] + (y - top) * (image[bottom].astype(np.float64) - image[top])
        expected[i] = np.interp(columns, np.arange(size[1]), line)
    ours = resize_tf1(torch.from_numpy(image)[None, None], 299)[0, 0].numpy()
    # Positions are float32, as in TensorFlow, which moves them by up to 3e-5 of a pixel.
    assert np.abs(ours - expected).max() < 1e-4


def test_the_resize_is_stylegans():
    # As its TorchScript network writes it: a grid shifted so that the top left pixels lie on each other.
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    shift = 1 / 64 - 1 / 299
    grid = F.affine_grid(
        torch.tensor([[[1, 0, shift], [0, 1, shift]]]), [1, 3, 299, 299], align_corners=False
    )
    theirs = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)
    assert torch.allclose(resize_tf1(image, 299), theirs, atol=2e-5)


def test_neither_resize_is_antialiased():
    fine = torch.zeros(1, 1, 598, 598)
    fine[..., ::2] = 1
    # TensorFlow's positions fall on every second column.
    assert resize_tf1(fine, 299).min() == 1
    coarse = torch.zeros(1, 1, 1196, 1196)
    coarse[..., 1::4] = coarse[..., 2::4] = 1
    assert resize_half_pixel(coarse, 299).min() == 1
    smooth = F.interpolate(coarse, (299, 299), mode="bilinear", antialias=True)
    assert smooth[0, 0, 100, 100] < 0.8


def test_the_published_layout_is_asked_for():
    layout = shapes()
    # pt_inception-2015-12-05-6726825d.pth has 94 convolutions with a BatchNorm each, and the classifier.
    assert len(layout) == 94 * 5 + 2
    assert layout["fc.weight"] == (1008, 2048)
    assert layout["Mixed_6b.branch7x7dbl_2.conv.weight"] == (128, 128, 7, 1)
    assert layout["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
    # torchvision's network without its auxiliary head has 23,834,568 parameters for 1000 classes.
    count = sum(np.prod(shape) for name, shape in layout.items() if "running" not in name)
    assert count == 23_834_568 + 8 * 2049


def test_safetensors_are_read_too(tmp_path, file, net):
    save_file(torch.load(file, weights_only=True), tmp_path / "inception.safetensors")
    other = load_feature_net("inception", weights=tmp_path / "inception.safetensors")
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(other(images), net(images))
    assert other.identity != net.identity


def test_other_files_are_refused(tmp_path, file):
    state = torch.load(file, weights_only=True)
    state["fc.bias"] = torch.zeros(1000)
    torch.save(state, tmp_path / "torchvision.pth")
    with pytest.raises(CheckpointError, match=r"'fc.bias' has the shape \(1000,\), not \(1008,\)"):
        load_feature_net("inception", weights=tmp_path / "torchvision.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="damaged"):
        load_feature_net("inception", weights=tmp_path / "broken.safetensors")


def test_weights_are_asked_for_and_their_origin_is_known(net, monkeypatch, file):
    with pytest.raises(ConfigError, match=r"published at https://.*6726825d\.pth"):
        load_feature_net("inception")
    with pytest.raises(ConfigError, match="299"):
        load_feature_net("inception", size=128, weights=file)
    with pytest.raises(ConfigError, match="takes no weights"):
        load_feature_net("effnet-lite0", weights=file)
    assert not net.published
    assert net.weights in net.identity
    asked = []
    monkeypatch.setattr("maskgit.foundation.download.fetch", lambda url: asked.append(url) or file)
    monkeypatch.setattr("maskgit.evaluation.networks.inception.PUBLISHED_SHA256", net.weights[:8])
    assert load_feature_net("inception", weights="https://example.org/inception.pth").published
    assert asked == ["https://example.org/inception.pth"]


def test_loading_leaves_the_global_generator_alone(file):
    before = torch.random.get_rng_state()
    load_feature_net("inception", weights=file)
    assert torch.equal(before, torch.random.get_rng_state())


def test_features_do_not_depend_on_the_batch(net):
    images = torch.rand(3, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    whole, alone = net.outputs(images), net.outputs(images[1:2])
    for part, single in zip(whole, alone, strict=True):
        assert torch.allclose(part[1:2], single, atol=1e-4)
    empty = net.outputs(images[:0])
    assert [len(part) for part in empty] == [0, 0, 0]
