"""The transformer's vocabulary (codes, class tokens, the mask token) and the way from grid to sequence.

    row              0 … K−1      K … K+C−1        K+C
    stands for       image code   class 0 … C−1    the mask

A sequence is the class token followed by the image's tokens in raster order (rows from the top, each from
the left). Source: official inference.py, `create_input_tokens_normal`; there the mask is −1, which reads the
same last row of the embedding.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from maskgit.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Vocabulary:
    """The layout of one model's vocabulary.

    Attributes:
        num_codes: image codes K.
        num_classes: classes C.
        grid_size: tokens a side of the image.
    """

    num_codes: int
    num_classes: int
    grid_size: int

    @property
    def mask(self) -> int:
        """The token that stands for "to be predicted": the last row."""
        return self.num_codes + self.num_classes

    @property
    def size(self) -> int:
        """Rows of the embedding."""
        return self.num_codes + self.num_classes + 1

    @property
    def num_tokens(self) -> int:
        """Image tokens in a sequence."""
        return self.grid_size**2

    def sequence(
        self,
        labels: "torch.Tensor",
        tokens: "torch.Tensor | None" = None,
        mask: "torch.Tensor | None" = None,
    ) -> "torch.Tensor":
        """Return the transformer's input for images that are wholly, partly or not masked.

        Args:
            labels: int64 (B,), class numbers in [0, num_classes); −1 leaves the class open (masked).
            tokens: int64 (B, h, w) image codes; None masks everything.
            mask: bool (B, h, w) or (h, w), True = to be predicted; None masks nothing of `tokens`.

        Returns:
            int64 (B, N + 1).

        Raises:
            ConfigError: a label is out of range (looked at on the CPU alone), or the grid is not this model's.
        """
        import torch

        if labels.ndim != 1 or not labels.numel():
            raise ConfigError(f"labels must be of shape (B,) with B ≥ 1, but are {tuple(labels.shape)}.")
        # On a GPU the look would make the host wait.
        if labels.device.type == "cpu" and not (labels.min() >= -1 and labels.max() < self.num_classes):
            raise ConfigError(
                f"A label must be a class number from 0 to {self.num_classes - 1}, but they are {labels.tolist()[:8]}."
            )
        batch = labels.shape[0]
        class_token = torch.where(labels < 0, self.mask, labels + self.num_codes)
        if tokens is None:
            rest = labels.new_full((batch, self.num_tokens), self.mask)
        else:
            if tokens.shape != (batch, self.grid_size, self.grid_size):
                raise ConfigError(
                    f"tokens must be of shape ({batch}, {self.grid_size}, {self.grid_size}), "
                    f"but are {tuple(tokens.shape)}."
                )
            rest = tokens if mask is None else torch.where(mask, self.mask, tokens)
            rest = rest.reshape(batch, self.num_tokens)
        return torch.cat([class_token[:, None], rest], dim=1)

    def grid(self, sequence: "torch.Tensor") -> "torch.Tensor":
        """Return the image tokens of a sequence as a grid: int64 (…, N + 1) → (…, h, w)."""
        return sequence[..., 1:].unflatten(-1, (self.grid_size, self.grid_size))
