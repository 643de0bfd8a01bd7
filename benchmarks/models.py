"""The models that the benchmarks time: architectures by name, their weights drawn at random.

The values of weights do not change the time, but they do change what a rounding error does to tokens: these
are drawn so that features keep their size from layer to layer and positions stay different, as in trained
models.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from maskgit import MaskGIT, convert
from maskgit.config import ModelConfig
from maskgit.foundation.devices import shapes_only
from maskgit.networks.config import TokenizerConfig, TransformerConfig
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.transformer import Transformer
from maskgit.sampler.config import SamplerConfig


def official(grid_size: int, **transformer: int) -> ModelConfig:
    """Return the released architecture, at another grid or with another transformer if asked."""
    tokenizer = TokenizerConfig()
    return ModelConfig(
        tokenizer=tokenizer,
        transformer=TransformerConfig(grid_size=grid_size, **transformer),
        image_size=grid_size * tokenizer.patch_size,
        sampler=SamplerConfig(steps=12 if grid_size > 16 else 8),
    )


def tiny() -> ModelConfig:
    """Return an architecture that takes no time, for trying a benchmark out."""
    tokenizer = TokenizerConfig(filters=32, channel_multipliers=(1, 1), embedding_dim=16, codebook_size=64)
    transformer = TransformerConfig(
        num_codes=64,
        num_classes=10,
        grid_size=4,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=64,
    )
    return ModelConfig(
        tokenizer=tokenizer, transformer=transformer, image_size=8, sampler=SamplerConfig(steps=8)
    )


SIZES: dict[str, Callable[[], ModelConfig]] = {
    "tiny": tiny,
    "256": lambda: official(16),
    "512": lambda: official(32),
}
STEPS = 8  # of the image that is timed: the paper's at 256×256
# `eager` is the model as it is loaded; the others are `MaskGIT.optimize`'s.
MODES = ("eager", "exact", "fast", "int8")


def in_mode(model: MaskGIT, mode: str, device: torch.device | str) -> MaskGIT:
    """Return a model on a device as a mode runs it."""
    return model.to(device) if mode == "eager" else model.optimize(mode, device=device)


class NewClasses:
    """Gives ever other classes, so that none is still remembered from before (see `maskgit.engine.masked`)."""

    def __init__(self, config: ModelConfig) -> None:
        """Begin with class 0 of a model."""
        self._numbers = itertools.cycle(range(config.transformer.num_classes))

    def take(self, count: int) -> list[int]:
        """Return the next classes."""
        return list(itertools.islice(self._numbers, count))


def engine_of(model: MaskGIT) -> dict[str, Any]:
    """Return what a model's engine was set to, nothing if it has none."""
    engine = getattr(model, "engine", None)
    return {} if engine is None else engine.to_dict()


@torch.no_grad()
def random_model(config: ModelConfig, seed: int = 1) -> MaskGIT:
    """Return a model with random weights, float32 on the CPU.

    A kernel has variance 1 / fan-in, so that features keep their size; a scale is near 1, a bias near 0.
    What a transformer layer adds to its input is a fifth of that, or attention would make all positions
    alike.
    """
    generator = torch.Generator().manual_seed(seed)
    with shapes_only():
        networks = Tokenizer(config.tokenizer), Transformer(config.transformer)
    for network in networks:
        network.to_empty(device="cpu")
        for name, weight in network.named_parameters():
            weight.normal_(generator=generator)
            if name.endswith("embedding.weight"):
                weight.mul_(0.05)
            elif weight.ndim > 1 and name != "quantizer.codebook":
                weight.mul_(math.sqrt(weight.shape[0] / weight.numel()))
                if name.endswith(("attention.out.weight", "mlp.down.weight")):
                    weight.mul_(0.2)
            elif weight.ndim == 1:
                weight.mul_(0.1)
                if "norm" in name and name.endswith("weight"):
                    weight.add_(1)
    return MaskGIT(config, networks[0].eval(), networks[1].eval())


def write_official(model: MaskGIT, folder: Path) -> None:
    """Write a model as the two official checkpoints, named as the official code looks for them."""
    for path in convert.save_official(model, folder):
        stage = path.name.removesuffix("_checkpoint")
        path.rename(folder / f"{stage}_imagenet{model.config.image_size}_checkpoint")
