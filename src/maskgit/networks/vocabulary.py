"""The transformer's vocabulary (codes, class tokens, the mask token) and the way from grid to sequence.

    row              0 … K−1      K … K+C−1        K+C
    stands for       image code   class 0 … C−1    the mask

A sequence is the class token followed by the image's tokens in raster order (rows from the top, each from
the left). Where a transformer predicts a code in groups (`TransformerConfig.groups`), the sequence holds each code as that
many tokens, the lowest first, and K is the number of codes of such a token. Source: official inference.py, `create_input_tokens_normal`; there the mask is −1, which reads the
same last row of the embedding.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from maskgit.errors import ConfigError
from maskgit.networks.config import TransformerConfig

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Vocabulary:
    """The layout of one model's vocabulary.

    Attributes:
        num_codes: codes K that a token of the sequence chooses among.
        num_classes: classes C.
        grid_size: rows of tokens.
        groups: tokens of the sequence for each of the image.
        predict_mask: whether the mask itself can be drawn, as the code K. Such a token stays masked for the
            transformer, is never drawn anew, and counts as the last code in the end.
        grid_columns: tokens in a row, 0 for `grid_size`.
    """

    num_codes: int
    num_classes: int
    grid_size: int
    groups: int = 1
    predict_mask: bool = False
    grid_columns: int = 0

    @classmethod
    def of(cls, config: TransformerConfig) -> "Vocabulary":
        """Return a transformer's vocabulary."""
        return cls(
            config.unit_codes,
            config.num_classes,
            config.grid_size,
            config.groups,
            config.predict_mask,
            config.grid_columns,
        )

    @property
    def mask(self) -> int:
        """The token that stands for "to be predicted": the last row."""
        return self.num_codes + self.num_classes

    @property
    def num_logits(self) -> int:
        """What a token is drawn from: the codes, and perhaps the mask."""
        return self.num_codes + self.predict_mask

    @property
    def image_codes(self) -> int:
        """Codes of an image's token: those of all its groups together."""
        return self.num_codes**self.groups

    @property
    def size(self) -> int:
        """Rows of the embedding."""
        return self.num_codes + self.num_classes + 1

    @property
    def num_tokens(self) -> int:
        """Image tokens in a sequence."""
        return self.shape[0] * self.shape[1] * self.groups

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.grid_size, self.grid_columns or self.grid_size

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
            mask: bool (B, h, w) or (h, w), True = to be predicted, or (B, h, w, groups), each group for itself; None masks
                nothing of `tokens`.

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
            if tokens.shape != (batch, *self.shape):
                square = tokens.ndim == 3 and tokens.shape[1] == tokens.shape[2]
                hint = " Photographs are edited as squares: take the model before `resized`."
                raise ConfigError(
                    f"tokens must be of shape ({batch}, {self.shape[0]}, {self.shape[1]}), "
                    f"but are {tuple(tokens.shape)}.{hint if self.grid_columns and square else ''}"
                )
            rest = self.split(tokens)
            if mask is not None:
                mask = mask if mask.ndim == rest.ndim else mask[..., None]
                rest = torch.where(mask, self.mask, rest)
            rest = rest.reshape(batch, self.num_tokens)
        return torch.cat([class_token[:, None], rest], dim=1)

    def grid(self, sequence: "torch.Tensor") -> "torch.Tensor":
        """Return the image tokens of a sequence as a grid: int64 (…, N + 1), none masked → (…, h, w).

        Of what is said of each token, a place takes what its groups have: bool, whether any is True; float, the lowest.
        """
        import torch

        grid = sequence[..., 1:].unflatten(-1, (*self.shape, self.groups))
        if self.predict_mask and grid.dtype == torch.int64:
            grid = grid.clamp(max=self.num_codes - 1)
        if self.groups == 1:
            return grid[..., 0]
        if grid.dtype == torch.bool:
            return grid.any(-1)
        if grid.dtype.is_floating_point:
            return grid.amin(-1)
        return (grid * self.num_codes ** torch.arange(self.groups, device=grid.device)).sum(-1)

    def split(self, tokens: "torch.Tensor") -> "torch.Tensor":
        """Return the tokens of a sequence that stand for codes: int64 (…) → (…, groups)."""
        if self.groups == 1:
            return tokens[..., None]
        import torch

        sizes = self.num_codes ** torch.arange(self.groups, device=tokens.device)
        return tokens[..., None] // sizes % self.num_codes
