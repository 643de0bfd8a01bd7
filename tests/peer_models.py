"""Tiny models of the kinds that others published: their authors' keys and shapes, with weights made by a rule."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

from maskgit import MaskGIT
from maskgit.checkpoints import halton, maskbit
from maskgit.checkpoints.weights import loaded
from maskgit.config import ModelConfig, SamplerConfig
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.transformer import Transformer

GOLDEN = Path(__file__).parent / "golden" / "peers"
SHAPES = json.loads((GOLDEN / "tiny_shapes.json").read_text())
BUFFERS = ("codebook", "bits_to_indices", "codebook_used")
# By kind: the project, the shapes of its tokenizer and of its transformer.
PEERS = {
    "halton": ("halton", "tiny_vq", "tiny_registers"),
    "maskbit": ("maskbit", "tiny_lfq", "tiny_lfq_bert_2"),
    "grouped codebook": ("maskbit", "tiny_vqgan_plus", "tiny_bert_2"),
}


def weight(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return an entry of a state dict: it depends on its key, its shape and a seed alone."""
    drawn = np.random.Generator(np.random.Philox(key=[zlib.crc32(key.encode()), seed])).standard_normal(
        shape, dtype=np.float32
    )
    if key.endswith(("bias", "in_proj_bias")):
        return drawn * np.float32(0.1)
    if any(word in key for word in ("emb", "pos", "tokens")) and len(shape) > 1:
        return drawn * np.float32(0.5)
    if len(shape) < 2:
        return 1 + drawn * np.float32(0.1)
    return drawn * np.float32(1 / np.sqrt(np.prod(shape[1:])))


def weights(shapes: dict, seed: int = 1) -> dict[str, torch.Tensor]:
    """Return a state dict of some keys and shapes, without buffers that follow from the model."""
    kept = {key: shape for key, shape in shapes.items() if key.rsplit(".", 1)[-1] not in BUFFERS}
    return {key: torch.from_numpy(weight(key, tuple(shape), seed)) for key, shape in kept.items()}


def peer_model(kind: str, **sampler) -> MaskGIT:
    """Return a model of a kind: images of 16×16 pixels in 8×8 tokens, ten classes."""
    project, of_tokenizer, of_transformer = PEERS[kind]
    read = halton.tokenizer_of_llamagen if project == "halton" else maskbit.tokenizer_of_torch
    first_config, first = read(weights(SHAPES[project][of_tokenizer]))
    read = halton.transformer_of_halton if project == "halton" else maskbit.transformer_of_maskbit
    second_config, second = read(weights(SHAPES[project][of_transformer]), num_heads=4)
    settings = {"policy": "halton"} if project == "halton" else {}
    config = ModelConfig(
        first_config,
        second_config,
        image_size=16,
        label_dropout=0.1,
        sampler=SamplerConfig(**{"steps": 4, "mask_schedule": "arccos", **settings, **sampler}),
    )
    return MaskGIT(config, loaded(Tokenizer, first_config, first), loaded(Transformer, second_config, second))
