"""DINOv2's network against its authors' code.

`golden/dinov2.npz` is what facebookresearch/dinov2's DinoVisionTransformer (img_size 518, patch_size 14,
width 48, 3 layers, 4 heads, init_values 1, interpolate_offset 0.1) computes in float32 with the
weights and inputs that `weights` and `inputs` below make from their rules: the normalised class token of each input.
"""

import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit.errors import CheckpointError
from maskgit.evaluation.networks import dinov2
from maskgit.evaluation.networks.dinov2 import ViT, load_dinov2, prepare
from maskgit.evaluation.networks.features import load_feature_net

SMALL = {"width": 48, "num_layers": 3, "num_heads": 4}
SIZES = {"square": (224, 224), "oblong": (140, 252), "learned": (518, 518)}


def drawn(name, shape):
    key = [zlib.crc32(name.encode()), 0]
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)


def weights(shapes):
    """Normal numbers by the tensor's name, scaled to keep activations alive."""
    state = {}
    for name, shape in shapes.items():
        x = drawn(name, shape)
        if len(shape) in (2, 4):
            x *= np.float32(np.prod(shape[1:]) ** -0.5)
        elif name.endswith(("gamma", "norm1.weight", "norm2.weight", "norm.weight")):
            x = 1 + x * np.float32(0.3)
        else:
            x *= np.float32(0.5)
        state[name] = torch.from_numpy(x)
    return state


def inputs():
    return {name: torch.from_numpy(drawn(name, (1, 3, *size))) for name, size in SIZES.items()}


def shapes(net):
    return {name: tuple(x.shape) for name, x in net.state_dict().items()}


@pytest.fixture(scope="module")
def small():
    net = ViT(**SMALL).eval()
    net.load_state_dict(weights(shapes(net)))
    return net


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ViT.__init__, "__defaults__", (48, 3, 4, 37))
        patch.setattr(dinov2, "DIM", 48)
        path = tmp_path_factory.mktemp("dinov2") / "small.pth"
        torch.save(weights(shapes(ViT())) | {"mask_token": torch.zeros(1, 48)}, path)
        yield path


def test_the_class_token_is_the_authors(small, golden):
    with np.load(golden / "dinov2.npz", allow_pickle=False) as record, torch.no_grad():
        for name, x in inputs().items():
            assert np.allclose(small(x).numpy(), record[name], atol=2e-5)


def test_the_published_layout_is_asked_for():
    with torch.device("meta"):
        layout = shapes(ViT())
    assert layout["pos_embed"] == (1, 1370, 1024)
    assert layout["blocks.23.attn.qkv.weight"] == (3072, 1024)
    assert layout["blocks.0.ls2.gamma"] == (1024,)
    assert layout["patch_embed.proj.weight"] == (1024, 3, 14, 14)
    # With the mask token: 304.4 M parameters.
    assert sum(np.prod(shape) for shape in layout.values()) + 1024 == 304_368_640


def test_images_are_resized_as_pillow_does():
    # Far from black and white, where Pillow clips between its two passes and torch does not.
    image = np.random.default_rng(0).integers(90, 166, (60, 60, 3), dtype=np.uint8)
    for pixels in (image, np.kron(image, np.ones((5, 5, 1), np.uint8))):
        expected = np.asarray(Image.fromarray(pixels).resize((224, 224), Image.BICUBIC))
        prepared = prepare(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
        ours = 255 * (prepared[0].permute(1, 2, 0).numpy() * dinov2.STD + dinov2.MEAN)
        # Pillow rounds to 8 bits after each pass.
        assert np.abs(ours - expected).max() < 1.5


def test_the_feature_net_reads_the_file(files, small):
    net = load_feature_net("dinov2", weights=files)
    images = torch.rand(2, 3, 40, 30, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(net(images), small(prepare(images)), atol=1e-5)
    outputs = net.outputs(images)
    assert outputs.spatial is outputs.logits is None
    assert net.published is None
    assert net.identity.startswith("DINOv2, bicubic resize to 224 × 224, weights ")


def test_other_files_are_refused(files, tmp_path):
    state = torch.load(files, weights_only=True)
    torch.save(state | {"register_tokens": torch.zeros(1, 4, 48)}, tmp_path / "registers.pth")
    with pytest.raises(CheckpointError, match="'register_tokens' that is not of this network"):
        load_dinov2(tmp_path / "registers.pth")
