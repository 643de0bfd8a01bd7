"""DINOv2's ViT-L/14, whose features FD-DINOv2 compares.

Shapes: B batch, N = 1 + h × w tokens (the class token first), D width.
Source: Oquab et al.: DINOv2, TMLR 2024; that its class token makes a better Fréchet distance than
Inception's features: Stein et al.: Exposing Flaws of Generative Model Evaluation Metrics, NeurIPS 2023.
Parameters bear the names of the published file.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit.evaluation.networks.weights import load_strictly, read_state_dict
from maskgit.foundation.devices import shapes_only
from maskgit.foundation.download import sha256

URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
SIZE = 224
PATCH = 14
# Patches a side of the images that the published positions were learned for, 518 pixels.
GRID = 37
DIM = 1024
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def prepare(images: Tensor) -> Tensor:
    """Return the network's input: resized (bicubic, antialiased), less ImageNet's mean, over its deviation.

    Args:
        images: float (B, 3, H, W) in [0, 1].

    Returns:
        (B, 3, 224, 224).

    Source: NVlabs edm2, calculate_metrics.py.

    Differs: dgm-eval, the metric's first code, resizes with Pillow and rounds to 8 bits.
    """
    x = F.interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (MEAN, STD))
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


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = _Attention(width, num_heads), _MLP(width)
        self.ls1, self.ls2 = _Scale(width), _Scale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """The vision transformer; the defaults are ViT-L/14."""

    def __init__(self, width: int = DIM, num_layers: int = 24, num_heads: int = 16, grid: int = GRID) -> None:
        """Make a network with weights that are still to be loaded.

        Args:
            width: D.
            num_layers, num_heads: of the transformer.
            grid: patches a side that positions were learned for.
        """
        super().__init__()
        self.grid = grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, PATCH, PATCH)
        self.blocks = nn.ModuleList(_Block(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class token's features.

        Args:
            x: float (B, 3, H, W), prepared; H and W are multiples of 14.

        Returns:
            (B, D).
        """
        patches = self.patch_embed.get_submodule("proj")(x)
        x = patches.flatten(2).transpose(1, 2) + self._positions(*patches.shape[2:])
        first = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([first.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def _positions(self, height: int, width: int) -> Tensor:
        """Return the positions of a grid of patches: (1, h · w, D)."""
        learned = self.pos_embed[:, 1:]
        if (height, width) == (self.grid, self.grid):
            return learned
        # The published network was used with scales a tenth of a patch too large, so they belong to it.
        scales = ((height + 0.1) / self.grid, (width + 0.1) / self.grid)
        square = learned.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        return F.interpolate(square, scale_factor=scales, mode="bicubic").flatten(2).transpose(1, 2)


def load_dinov2(path: Path) -> tuple[ViT, str]:
    """Return ViT-L/14 for inference with its published weights, and their file's SHA-256.

    Args:
        path: a file in the layout of dinov2_vitl14_pretrain.pth, or the same as safetensors.

    Raises:
        CheckpointError: the file is missing, damaged, or of another network.
    """
    state = read_state_dict(path)
    with shapes_only():
        net = ViT()
    net.to_empty(device="cpu")
    # Only training masks patches.
    load_strictly(net, state, path, unused=("mask_token",))
    return net.eval().requires_grad_(False), sha256(path)
