"""DINOv2's and CLIP's networks against their authors' code and against transformers.

`golden/dinov2.npz` is what facebookresearch/dinov2's DinoVisionTransformer (img_size 518, patch_size 14,
width 48, 3 layers, 4 heads, init_values 1, interpolate_offset 0.1) computes in float32 with the
weights and inputs that `weights` and `inputs` below make from their rules: the normalised class token of each input.
"""

import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

from maskgit.errors import CheckpointError
from maskgit.evaluation.networks.features import FEATURE_NETS, load_feature_net
from maskgit.evaluation.networks.vit import CLIP, DINOV2, ViT, load_vit, prepare

SMALL = replace(DINOV2, width=48, num_layers=3, num_heads=4)
SMALL_CLIP = replace(CLIP, size=56, grid=4, width=48, num_layers=3, num_heads=4, embedding=20)
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
    net = ViT(SMALL).eval()
    net.load_state_dict(weights(shapes(net)))
    return net


@pytest.fixture(scope="module")
def file(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("dinov2") / "small.pth"
    torch.save(small.state_dict() | {"mask_token": torch.zeros(1, 48)}, path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """transformers' CLIP with random weights, and its file with the tensors that are not of its image tower."""
    config = CLIPVisionConfig(
        image_size=SMALL_CLIP.size,
        patch_size=14,
        hidden_size=48,
        intermediate_size=4 * 48,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=20,
    )
    theirs = CLIPVisionModelWithProjection(config).eval()
    theirs.load_state_dict(
        weights({name: tuple(x.shape) for name, x in theirs.state_dict().items()}), strict=False
    )
    state = {name: x.contiguous() for name, x in theirs.state_dict().items()}
    path = tmp_path_factory.mktemp("clip") / "pytorch_model.bin"
    others = {"text_model.final_layer_norm.bias": torch.zeros(4), "logit_scale": torch.zeros(())}
    others |= {
        "text_projection.weight": torch.zeros(2, 2),
        "vision_model.embeddings.position_ids": torch.arange(17),
    }
    torch.save(state | others, path)
    return theirs, path


def test_the_class_token_is_the_authors(small, golden):
    with np.load(golden / "dinov2.npz", allow_pickle=False) as record, torch.no_grad():
        for name, x in inputs().items():
            assert np.allclose(small(x).numpy(), record[name], atol=2e-5)


def test_the_published_layout_is_asked_for():
    with torch.device("meta"):
        layout = shapes(ViT(DINOV2))
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
        prepared = prepare(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255, DINOV2)
        ours = 255 * (prepared[0].permute(1, 2, 0).numpy() * DINOV2.std + DINOV2.mean)
        # Pillow rounds to 8 bits after each pass.
        assert np.abs(ours - expected).max() < 1.5


def test_dinov2_is_transformers():
    grid = 6
    config = Dinov2Config(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=14 * grid, patch_size=14
    )
    theirs = Dinov2Model(config).eval()
    ours = ViT(replace(SMALL, grid=grid)).eval()
    state = weights(shapes(ours))
    ours.load_state_dict(state)
    theirs.load_state_dict(_in_transformers(state), strict=True)
    x = torch.from_numpy(drawn("input", (2, 3, 14 * grid, 14 * grid)))
    with torch.no_grad():
        expected = theirs(x).pooler_output
        assert expected.std() > 0.1
        assert torch.allclose(ours(x), expected, atol=2e-5)


def _in_transformers(state):
    """Return DINOv2's parameters by the names that transformers has for them."""
    found = {"embeddings.mask_token": torch.zeros(1, 48)}
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "blocks.": "encoder.layer.",
        ".attn.proj": ".attention.o_proj",
        ".ls1.gamma": ".layer_scale1.lambda1",
        ".ls2.gamma": ".layer_scale2.lambda1",
    }
    for name, tensor in state.items():
        if name.startswith("norm."):
            name = f"layernorm.{name.removeprefix('norm.')}"
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = piece
        else:
            found[name] = tensor
    return found


def test_clips_embedding_is_transformers(clip):
    theirs, path = clip
    ours, _ = load_vit(path, SMALL_CLIP)
    x = torch.from_numpy(drawn("input", (2, 3, SMALL_CLIP.size, SMALL_CLIP.size)))
    with torch.no_grad():
        expected = theirs(x).image_embeds
        expected = expected / expected.norm(dim=-1, keepdim=True)
        assert expected.std() > 0.1
        assert torch.allclose(ours(x), expected, atol=2e-5)


def test_clips_published_layout_is_asked_for():
    """The larger of the two public image towers: 304.3 M parameters, of 336 pixels in patches of 14."""
    with torch.device("meta"):
        layout = shapes(ViT(CLIP))
        theirs = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=336,
                patch_size=14,
                projection_dim=768,
            )
        )
    assert sum(np.prod(shape) for shape in layout.values()) == sum(x.numel() for x in theirs.parameters())
    assert layout["pos_embed"] == (1, 577, 1024)
    assert layout["head.weight"] == (768, 1024)


def test_the_feature_nets_read_the_files(file, small, clip, monkeypatch):
    images = torch.rand(2, 3, 40, 30, generator=torch.Generator().manual_seed(0))
    for name, path, config in (("dinov2", file, SMALL), ("clip", clip[1], SMALL_CLIP)):
        make = FEATURE_NETS[name].make
        monkeypatch.setitem(make.keywords, "config", config)
        net = load_feature_net(name, weights=path)
        with torch.no_grad():
            expected = load_vit(path, config)[0](prepare(images, config))
            assert torch.allclose(net(images), expected, atol=1e-5)
        outputs = net.outputs(images)
        assert outputs.spatial is outputs.logits is net.published is None
        assert net.dim == outputs.pooled.shape[1]
    assert torch.allclose(net(images).norm(dim=1), torch.ones(2), atol=1e-6)
    assert net.identity.startswith("CLIP, bicubic resize to 336 × 336, weights ")


def test_other_files_are_refused(file, clip, tmp_path):
    state = torch.load(file, weights_only=True)
    torch.save(state | {"register_tokens": torch.zeros(1, 4, 48)}, tmp_path / "registers.pth")
    with pytest.raises(CheckpointError, match="'register_tokens' that is not of this network"):
        load_vit(tmp_path / "registers.pth", SMALL)
    state = torch.load(clip[1], weights_only=True)
    del state["vision_model.encoder.layers.1.self_attn.k_proj.bias"]
    torch.save(state, tmp_path / "torn.pth")
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'blocks\.1\.attn\.qkv\.bias'"):
        load_vit(tmp_path / "torn.pth", SMALL_CLIP)
