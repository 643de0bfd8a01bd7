"""The bidirectional transformer that predicts masked tokens (BERT, post-norm).

Shapes: B batch, N image tokens, S = N + 1 the sequence with its class token, P some of its positions, E hidden_size,
H heads, D = E / H, V vocabulary.
Source: official nets/maskgit_transformer.py; paper §3.1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit.errors import ConfigError
from maskgit.networks.config import TransformerConfig

LAYER_NORM_EPS = 1e-12  # BERT's


class Attention(nn.Module):
    """Multi-head self-attention over the whole sequence, added to its input and normalized."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.attend(x_BSE, *self.project(x_BSE))

    def project(self, x_BSE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values of positions, each (B, H, S, D)."""
        return self.split(self.qkv(x_BSE))

    def split(self, qkv_BSF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (B, H, S, D), from what `qkv` makes, (B, S, 3E)."""
        q, k, v = qkv_BSF.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def attend(self, x_BPE: Tensor, q_BHPD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> Tensor:
        """Return what positions become by looking at the keys and values of others."""
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q_BHPD, k_BHSD, v_BHSD, dropout_p=dropout)
        y = self.out(y.transpose(1, 2).flatten(2))
        return self.norm(x_BPE + F.dropout(y, self.dropout, self.training))


class Mlp(nn.Module):
    """Two linear layers with a tanh-GELU between, added to the input and normalized."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = nn.GELU(approximate="tanh")
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, x_BSE: Tensor) -> Tensor:
        y = self.down(self.activation(self.up(x_BSE)))
        return self.norm(x_BSE + F.dropout(y, self.dropout, self.training))


class Layer(nn.Module):
    """One transformer layer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.mlp = Mlp(config)

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.mlp(self.attention(x_BSE))


class Head(nn.Module):
    """Features to logits; its matrix is the token embedding's."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.GELU(approximate="tanh")
        self.norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x_BSE: Tensor, embedding_VE: Tensor, codes: int) -> Tensor:
        y = self.norm(self.activation(self.dense(x_BSE)))
        weight, bias = embedding_VE[:codes], self.bias[:codes]
        if y.device.type != "cpu":
            # Rounded to 8 bits, the scores of neighbouring codes would often be equal; there it costs little.
            y, weight, bias = y.float(), weight.float(), bias.float()
        return F.linear(y, weight, bias)


class Transformer(nn.Module):
    """The second stage: a partly masked sequence to the logits of every token."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_tokens + 1, config.hidden_size)
        self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.apply(_initialize)

    def forward(
        self, sequence: Tensor, *, positions: Tensor | None = None, codes: int | None = None
    ) -> Tensor:
        """Return the logits of every token of the vocabulary at every position, or at some.

        Args:
            sequence: int64 (B, N + 1), class token first (`Vocabulary.sequence` makes it).
            positions: int64 (B, P), the positions wanted; None is all. The head's work shrinks with them.
            codes: the first rows of the vocabulary wanted, such as `vocabulary.num_codes`; None is all.

        Returns:
            float (B, N + 1, V), or (B, P, codes) as asked.

        Raises:
            ConfigError: the sequence is not of the model's length.

        Source: official `Transformer` and `MlmLayer`.
        """
        x = self.embed(sequence)
        for layer in self.layers:
            x = layer(x)
        if positions is not None:
            x = x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))
        return self.head(x, self.token_embedding.weight, self.config.vocab_size if codes is None else codes)

    def embed(self, sequence: Tensor) -> Tensor:
        """Return what goes into the first layer: int64 (B, N + 1) → float (B, N + 1, E).

        Raises:
            ConfigError: the sequence is not of the model's length.
        """
        if sequence.ndim != 2 or sequence.shape[1] != self.position_embedding.num_embeddings:
            raise ConfigError(
                f"A sequence must be of shape (B, {self.position_embedding.num_embeddings}), "
                f"but is {tuple(sequence.shape)}."
            )
        x = self.token_embedding(sequence) + self.position_embedding.weight
        return F.dropout(self.embedding_norm(x), self.config.dropout, self.training)


def _initialize(module: nn.Module) -> None:
    """Initialize as the official code: truncated normal 0.02 for matrices, zero for biases."""
    if isinstance(module, nn.Linear | nn.Embedding):
        # Flax draws a standard normal cut at ±2 and scales it: the same law.
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
