"""Vision transformers whose features are compared: DINOv2's for FD-DINOv2, CLIP's for CMMD.

Shapes: B batch, N = 1 + h × w tokens (the class token first), D width.
Sources: Oquab et al.: DINOv2, TMLR 2024, whose class tokens Stein et al. compare (Exposing Flaws of Generative Model
Evaluation Metrics, NeurIPS 2023); Radford et al.: Learning Transferable Visual Models from Natural Language Supervision,
ICML 2021, whose embeddings Jayasumana et al. compare (Rethinking FID, CVPR 2024, arXiv 2401.09603).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit.evaluation.networks.weights import load_strictly, read_state_dict
from maskgit.foundation.devices import shapes_only
from maskgit.foundation.download import sha256

PATCH = 14


@dataclass(frozen=True)
class ViTConfig:
    """Which of the two networks it is, and how large; the published ones are `DINOV2` and `CLIP`.

    Attributes:
        url: where its weights are published.
        size: pixels a side that images are resized to.
        grid: patches a side of the images that the published positions were learned for.
        mean, std: of the input's channels.
        embedding: the length of CLIP's embeddings, which are of length 1; None makes DINOv2, whose feature vector is
            the class token.
        width, num_layers, num_heads: of the transformer.
    """

    url: str
    size: int
    grid: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    embedding: int | None = None
    width: int = 1024
    num_layers: int = 24
    num_heads: int = 16

    @property
    def dim(self) -> int:
        """The length of a feature vector."""
        return self.embedding or self.width


DINOV2 = ViTConfig(
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    224,
    37,
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)
CLIP = ViTConfig(
    "https://huggingface.co/openai/clip-vit-large-patch14-336/resolve/main/pytorch_model.bin",
    336,
    24,
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
    768,
)


def prepare(images: Tensor, config: ViTConfig) -> Tensor:
    """Return the network's input: resized (bicubic, antialiased), less the mean, over the deviation.

    Args:
        images: float (B, 3, H, W) in [0, 1].
        config: gives size, mean and deviation.

    Returns:
        (B, 3, size, size).

    Sources: NVlabs edm2, calculate_metrics.py; google-research, cmmd/embedding.py.

    Differs: dgm-eval and cmmd/io_util.py resize image files with Pillow, which rounds to 8 bits.
    """
    x = F.interpolate(images, (config.size, config.size), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (config.mean, config.std))
    return (x - mean) / std


class _Scale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # (B, N, 3·D) → three of (B, heads, N, D / heads)
        queries, keys, values = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class _QuickGELU(nn.Module):
    """CLIP's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class _MLP(nn.Module):
    def __init__(self, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1, self.activation = nn.Linear(width, 4 * width), activation
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int, eps: float, *, clip: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn, self.mlp = _Attention(width, num_heads), _MLP(width, _QuickGELU() if clip else nn.GELU())
        self.ls1, self.ls2 = (nn.Identity() if clip else _Scale(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """A vision transformer, whose parameters bear the names of DINOv2's published file."""

    def __init__(self, config: ViTConfig = DINOV2) -> None:
        """Make a network with weights that are still to be loaded."""
        super().__init__()
        self.grid, clip, width = config.grid, config.embedding is not None, config.width
        eps = 1e-5 if clip else 1e-6
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, PATCH, PATCH, bias=not clip)
        self.norm_pre = nn.LayerNorm(width, eps) if clip else nn.Identity()
        blocks = (_Block(width, config.num_heads, eps, clip=clip) for _ in range(config.num_layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps)
        self.head = None if config.embedding is None else nn.Linear(width, config.embedding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return features: DINOv2's class token, or CLIP's embedding at length 1.

        Args:
            x: float (B, 3, H, W), prepared; H and W are multiples of 14.

        Returns:
            (B, dim).
        """
        patches = self.patch_embed.get_submodule("proj")(x)
        x = patches.flatten(2).transpose(1, 2) + self._positions(*patches.shape[2:])
        first = self.cls_token + self.pos_embed[:, :1]
        x = self.norm_pre(torch.cat([first.expand(len(x), -1, -1), x], 1))
        for block in self.blocks:
            x = block(x)
        token = self.norm(x[:, 0])
        return token if self.head is None else F.normalize(self.head(token), dim=-1)

    def _positions(self, height: int, width: int) -> Tensor:
        """Return the positions of a grid of patches: (1, h · w, D)."""
        learned = self.pos_embed[:, 1:]
        if (height, width) == (self.grid, self.grid):
            return learned
        # The published network was used with scales a tenth of a patch too large, so they belong to it.
        scales = ((height + 0.1) / self.grid, (width + 0.1) / self.grid)
        square = learned.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        return F.interpolate(square, scale_factor=scales, mode="bicubic").flatten(2).transpose(1, 2)


# Only training masks patches, and CLIP's other half reads text.
_UNUSED = (
    "mask_token",
    "text_model.",
    "text_projection.",
    "logit_scale",
    "vision_model.embeddings.position_ids",
)
# What transformers calls CLIP's parameters, in whose layout its weights are published.
_CLIP_NAMES = {
    "vision_model.embeddings.class_embedding": "cls_token",
    "vision_model.embeddings.position_embedding.weight": "pos_embed",
    "vision_model.embeddings.patch_embedding.": "patch_embed.proj.",
    "vision_model.pre_layrnorm.": "norm_pre.",
    "vision_model.encoder.layers.": "blocks.",
    "vision_model.post_layernorm.": "norm.",
    "visual_projection.": "head.",
    ".layer_norm": ".norm",
    ".self_attn.out_proj.": ".attn.proj.",
}


def _of_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return CLIP's parameters by the names they have here, queries, keys and values as one."""
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in _CLIP_NAMES.items():
            name = name.replace(theirs, ours)
        renamed[name] = (
            tensor.reshape(1, -1, tensor.shape[-1]) if name in ("cls_token", "pos_embed") else tensor
        )
    for name in [name for name in renamed if ".self_attn.q_proj." in name]:
        parts = [re.sub("q_proj", f"{part}_proj", name) for part in "qkv"]
        if all(part in renamed for part in parts):
            fused = name.replace(".self_attn.q_proj.", ".attn.qkv.")
            renamed[fused] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def load_vit(path: Path, config: ViTConfig) -> tuple[ViT, str]:
    """Return a published network for inference, and its file's SHA-256.

    Args:
        path: a file in the layout of the one at the config's URL, or the same as safetensors.
        config: `DINOV2` or `CLIP`.

    Raises:
        CheckpointError: the file is missing, damaged, or of another network.
    """
    state = read_state_dict(path)
    with shapes_only():
        net = ViT(config)
    net.to_empty(device="cpu")
    state = {name: tensor for name, tensor in state.items() if not name.startswith(_UNUSED)}
    load_strictly(net, state if config.embedding is None else _of_clip(state), path)
    return net.eval().requires_grad_(False), sha256(path)
