"""What the functions that make and edit images ask of a model.

`MaskGIT` is one; a server's model, whose images are made in batches with those of others, and the model behind
`maskgit.diffusers` are others. Whatever is decoded goes through `fill_batches` of the model that was asked.

Shapes: B images, S = N + 1 the sequence with its class token, K codes, h × w the token grid.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskgit.config import ModelConfig
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.vocabulary import Vocabulary
from maskgit.results import Callback, Output
from maskgit.sampler.config import SamplerConfig

Label = int | str | None
Picture = str | Path | Image.Image | np.ndarray | Tensor


class Model(Protocol):
    """A tokenizer and a transformer that belong together; `MaskGIT` says what its members do."""

    config: ModelConfig
    tokenizer: Tokenizer
    vocabulary: Vocabulary

    @property
    def device(self) -> torch.device: ...

    def label(self, query: Label) -> int: ...

    def labels(self, queries: Label | Sequence[Label] | Tensor | np.ndarray) -> list[int]: ...

    def sampler_config(self, **settings: Any) -> SamplerConfig: ...

    def prepare(self, image: Picture) -> Tensor: ...

    def encode_pixels(self, pixels: Tensor) -> Tensor: ...

    def decode_tokens(self, tokens: Tensor) -> Tensor: ...

    def predict_logits(self, sequence: Tensor) -> Tensor: ...

    def free_memory(self) -> None: ...

    def fill_batches(
        self,
        sequences: Tensor,
        config: SamplerConfig,
        *,
        start_step: int,
        switch: tuple[int, Tensor] | None,
        seed: int,
        first_index: int,
        batch_size: int,
        return_steps: bool,
        callback: Callback | None,
    ) -> Iterator[Output]: ...
