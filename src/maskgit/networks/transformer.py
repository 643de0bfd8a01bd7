"""The bidirectional transformer that predicts masked tokens, in its three kinds.

| `block` | layers | source |
|---|---|---|
| "official" | BERT's: attention and MLP, each added to its input and then normalized | nets/maskgit_transformer.py |
| "pre_norm" | the same, each reading its input normalized | MaskBit (arXiv 2409.16211) |
| "modern" | RMSNorm before each half, normalized queries and keys, SwiGLU, no biases; the class as a token or by adaLN, \
positions learned or rotary, registers | Halton-MaskGIT (arXiv 2503.17076), DiT (2212.09748), ViT-22B (2302.05442) |

A sequence names the class first in all of them; where a network puts it is the network's own matter.

Shapes: B batch, M positions of the image, g groups, N = M·g image tokens, S = N + 1 the sequence with its class, P some
of its places, E hidden_size, H heads, D a head's width, V vocabulary, K codes of a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit.errors import ConfigError
from maskgit.networks.config import TransformerConfig

LAYER_NORM_EPS = 1e-12  # BERT's
RMS_NORM_EPS = 1e-5
# Of the slowest rotation a turn is this many positions; grids are tens of tokens a side.
ROTARY_BASE = 100.0


class Attention(nn.Module):
    """Multi-head self-attention over the whole sequence, added to its input, with LayerNorm after or before."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.pre_norm = config.block == "pre_norm"
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.attend(x_BSE, *self.project(self.norm(x_BSE) if self.pre_norm else x_BSE))

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
        y = x_BPE + F.dropout(self.out(y.transpose(1, 2).flatten(2)), self.dropout, self.training)
        return y if self.pre_norm else self.norm(y)


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the type of its input, whose weight autocast would leave in float32, beyond torch's fused form."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def _gelu(config: TransformerConfig) -> nn.GELU:
    return nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")


class Mlp(nn.Module):
    """Two linear layers with a GELU between, added to the input, with LayerNorm after or before."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.pre_norm = config.block == "pre_norm"
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = _gelu(config)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, x_BSE: Tensor) -> Tensor:
        y = self.down(self.activation(self.up(self.norm(x_BSE) if self.pre_norm else x_BSE)))
        y = x_BSE + F.dropout(y, self.dropout, self.training)
        return y if self.pre_norm else self.norm(y)


class Layer(nn.Module):
    """One layer of an official or pre-norm transformer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.mlp = Mlp(config)

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.mlp(self.attention(x_BSE))


class ModernAttention(nn.Module):
    """Multi-head self-attention with normalized queries and keys; nothing is added to its output."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        width = config.num_heads * config.head_size
        self.qkv = nn.Linear(config.hidden_size, 3 * width, bias=False)
        self.out = nn.Linear(width, config.hidden_size, bias=False)
        self.by_head = config.query_key_norm == "heads"
        if self.by_head:
            self.query_norm = RMSNorm(config.head_size, eps=RMS_NORM_EPS)
            self.key_norm = RMSNorm(config.head_size, eps=RMS_NORM_EPS)

    def forward(self, x_BSE: Tensor, turns: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = self.qkv(x_BSE).chunk(3, dim=-1)
        if not self.by_head:
            q, k = (F.rms_norm(part, part.shape[-1:], eps=RMS_NORM_EPS) for part in (q, k))
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        if self.by_head:
            q, k = self.query_norm(q), self.key_norm(k)
        if turns is not None:
            q, k = _turned(q, *turns), _turned(k, *turns)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return F.dropout(self.out(y.transpose(1, 2).flatten(2)), self.dropout, self.training)


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) · up(x)), arXiv 2002.05202; `gate_up` holds both matrices."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BSE: Tensor) -> Tensor:
        gate, up = self.gate_up(x_BSE).chunk(2, dim=-1)
        return F.dropout(self.down(F.silu(gate) * up), self.dropout, self.training)


class ModernLayer(nn.Module):
    """One layer of a modern transformer: x + gate · attention(norm(x)), then the same with the MLP.

    With adaLN the class, through a SiLU and a linear layer, gives each half a shift, a scale and a gate.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=RMS_NORM_EPS)
        self.attention = ModernAttention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=RMS_NORM_EPS)
        self.mlp = SwiGLU(config)
        self.modulation = (
            nn.Linear(config.hidden_size, 6 * config.hidden_size) if config.conditioning == "adaln" else None
        )

    def forward(
        self, x_BSE: Tensor, condition_BE: Tensor | None, turns: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        if self.modulation is None:
            x_BSE = x_BSE + self.attention(self.attention_norm(x_BSE), turns)
            return x_BSE + self.mlp(self.mlp_norm(x_BSE))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition_BE)[:, None].chunk(6, dim=-1)
        x_BSE = x_BSE + gate1 * self.attention(_modulated(self.attention_norm(x_BSE), shift1, scale1), turns)
        return x_BSE + gate2 * self.mlp(_modulated(self.mlp_norm(x_BSE), shift2, scale2))


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def _turned(x_BHSD: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
    """Return queries or keys whose numbers i and i + D/2 are turned by an angle of their position."""
    a, b = x_BHSD.chunk(2, dim=-1)
    cos_SC, sin_SC = cos_SC.to(a.dtype), sin_SC.to(a.dtype)
    return torch.cat([a * cos_SC - b * sin_SC, b * cos_SC + a * sin_SC], dim=-1)


# The turns of the grids that were met last.
_TURNS: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
_MAX_TURNS = 16


def _turns(
    rows: int, columns: int, head_size: int, before: int, after: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of rotary positions, float32 (before + rows · columns + after, head_size / 2).

    Half of the angles grow with the row, half with the column; positions before and after the image stay unturned. They
    are kept on the device, but for those without values that torch makes when it traces.
    """
    key = rows, columns, head_size, before, after, device
    if torch.compiler.is_compiling():
        return _new_turns(*key)
    found = _TURNS.get(key)
    if found is None:
        # Else those first made for an image could not be used in training.
        with torch.inference_mode(False):
            found = _new_turns(*key)
        if type(found[0]) is Tensor:
            while len(_TURNS) >= _MAX_TURNS:
                _TURNS.popitem()
            _TURNS[key] = found
    return found


def _new_turns(
    rows: int, columns: int, head_size: int, before: int, after: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    count = head_size // 4
    speeds = ROTARY_BASE ** (-torch.arange(count, dtype=torch.float32) / count)
    row = torch.arange(rows, dtype=torch.float32)[:, None, None] * speeds
    column = torch.arange(columns, dtype=torch.float32)[None, :, None] * speeds
    angles = torch.cat([row.expand(-1, columns, -1), column.expand(rows, -1, -1)], dim=-1).flatten(0, 1)
    angles = F.pad(angles, (0, 0, before, after)).to(device)
    return angles.cos(), angles.sin()


class Head(nn.Module):
    """Features to logits; its matrix is the token embedding's, or its own."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.modulation: nn.Linear | None = None
        if config.block == "modern":
            self.norm: nn.Module = RMSNorm(size, eps=RMS_NORM_EPS)
            if config.conditioning == "adaln":
                self.modulation = nn.Linear(size, 2 * size)
        else:
            self.dense = nn.Linear(size, size)
            self.activation = _gelu(config)
            self.norm = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        if not config.tie_embeddings:
            self.weight = nn.Parameter(torch.empty(config.groups * config.num_logits, size))
            nn.init.trunc_normal_(self.weight, std=0.02, a=-0.04, b=0.04)
        if config.output_bias == "positions":
            outputs = config.num_tokens * config.num_logits
        else:
            outputs = config.groups * config.num_logits if config.owns_classes else config.vocab_size
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(
        self,
        x_BPE: Tensor,
        embedding_VE: Tensor,
        codes: int,
        positions: Tensor | None = None,
        condition_BE: Tensor | None = None,
    ) -> Tensor:
        """Return logits (B, P, codes), with groups (B, P − 1, groups, codes), of which the class has none.

        Args:
            x_BPE: what the last layer made.
            embedding_VE: the token embedding.
            codes: rows of the vocabulary to score.
            positions: int64 (B, P), the places of the sequence that x is of; None is all.
            condition_BE: the class, with adaLN.
        """
        y = self.features(x_BPE, condition_BE)
        config = self.config
        if config.groups > 1:
            rows = embedding_VE if config.tie_embeddings else self.weight
            weight = rows.unflatten(0, (config.groups, -1))[:, :codes]
            y, weight, wide = _widened(y[:, 1:], weight, self.bias)
            logits = torch.einsum("bme,gve->bmgv", y, weight)
            shape = (-1, config.groups, config.num_logits)
            return logits + wide.view(shape)[..., :codes]
        weight = (embedding_VE if config.tie_embeddings else self.weight)[:codes]
        if config.output_bias == "positions":
            y, weight, wide = _widened(y, weight, self.bias)
            bias_SV = F.pad(wide.view(config.num_tokens, config.num_logits)[:, :codes], (0, 0, 1, 0))
            return F.linear(y, weight) + (bias_SV if positions is None else bias_SV[positions])
        return F.linear(*_widened(y, weight, self.bias[:codes]))

    def features(self, x_BPE: Tensor, condition_BE: Tensor | None) -> Tensor:
        """Return what is compared with each code's row."""
        if self.config.block != "modern":
            return self.norm(self.activation(self.dense(x_BPE)))
        y = self.norm(x_BPE)
        if self.modulation is None:
            return y
        return _modulated(y, *self.modulation(condition_BE)[:, None].chunk(2, dim=-1))


def _widened(y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return all three in float32 where that costs little: rounded to 8 bits, the scores of near codes would tie."""
    return (y, weight, bias) if y.device.type == "cpu" else (y.float(), weight.float(), bias.float())


class Transformer(nn.Module):
    """The second stage: a partly masked sequence to the logits of every token."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        size, modern = config.hidden_size, config.block == "modern"
        grid = config.grid_size**2
        rows = config.groups * (config.unit_codes + 1) if config.owns_classes else config.vocab_size
        self.token_embedding = nn.Embedding(rows, size)
        if config.owns_classes:
            self.class_embedding = nn.Embedding(config.num_classes + 1, size)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(grid + (config.conditioning == "token"), size)
        if config.registers:
            self.register_embedding = nn.Embedding(config.registers, size)
        if not modern:
            self.embedding_norm = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        kind = ModernLayer if modern else Layer
        self.layers = nn.ModuleList(kind(config) for _ in range(config.num_layers))
        if config.block == "pre_norm":
            self.final_norm = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        self.head = Head(config)
        self.apply(_initialize)
        if modern:
            _initialize_modern(self)

    def forward(
        self,
        sequence: Tensor,
        *,
        positions: Tensor | None = None,
        codes: int | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Return the logits of every token of the vocabulary at every position, or at some.

        Args:
            sequence: int64 (B, N + 1), class first (`Vocabulary.sequence` makes it).
            positions: int64 (B, P), the places of the sequence wanted; None is all. The head's work shrinks with them.
            codes: the first rows of the vocabulary wanted, such as `vocabulary.num_codes`; None is all that the
                head scores.
            grid: rows and columns of the sequence's tokens, with rotary positions; None is the config's.

        Returns:
            float (B, N + 1, V), or (B, P, codes) as asked. What stands at the class's place means nothing where the
            class is no position of the network.

        Raises:
            ConfigError: the sequence is not of the model's length.

        Source: official `Transformer` and `MlmLayer`.
        """
        return self.score(*self.features(sequence, grid), positions=positions, codes=codes)

    def features(self, sequence: Tensor, grid: tuple[int, int] | None = None) -> tuple[Tensor, Tensor | None]:
        """Return what the head reads: of each place of the sequence but groups' (B, 1 + M, E), and the class.

        Args:
            sequence: int64 (B, N + 1).
            grid: as `forward` takes it.
        """
        config = self.config
        x, context = self.embed(sequence, grid), self.context(sequence, grid)
        for layer in self.layers:
            x = layer(x, *context)
        if config.block == "pre_norm":
            x = self.final_norm(x)
        if config.registers:
            x = x[:, : -config.registers]
        if config.conditioning == "adaln":
            x = F.pad(x, (0, 0, 1, 0))
        return x, context[0] if context else None

    def score(
        self,
        x: Tensor,
        condition: Tensor | None,
        *,
        positions: Tensor | None = None,
        codes: int | None = None,
    ) -> Tensor:
        """Return the logits of `features`; see `forward`."""
        config = self.config
        if codes is None:
            codes = config.num_logits if config.owns_classes else config.vocab_size
        if config.groups == 1:
            if positions is not None:
                x = x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))
            return self.head(x, self.token_embedding.weight, codes, positions, condition)
        logits = self.head(x, self.token_embedding.weight, codes, None, condition)
        logits = F.pad(logits.flatten(1, 2), (0, 0, 1, 0))
        return logits if positions is None else logits.gather(1, positions[..., None].expand(-1, -1, codes))

    def embed(self, sequence: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return what goes into the first layer: int64 (B, N + 1) → float (B, positions, E).

        Raises:
            ConfigError: the sequence is not of the model's length.
        """
        config = self.config
        rows, columns = grid or config.grid
        if sequence.ndim != 2 or sequence.shape[1] != rows * columns * config.groups + 1:
            raise ConfigError(
                f"A sequence must be of shape (B, {rows * columns * config.groups + 1}), but is {tuple(sequence.shape)}."
            )
        if config.owns_classes:
            x = self._embed_tokens(sequence[:, 1:])
            if config.conditioning == "token":
                x = torch.cat([self.class_embedding(self._classes(sequence))[:, None], x], dim=1)
        else:
            x = self.token_embedding(sequence)
        if config.positions == "learned":
            x = x + self.position_embedding.weight
        if config.registers:
            x = torch.cat([x, self.register_embedding.weight.expand(x.shape[0], -1, -1)], dim=1)
        if config.block != "modern":
            x = self.embedding_norm(x)
        return F.dropout(x, config.dropout, self.training)

    def context(
        self, sequence: Tensor, grid: tuple[int, int] | None = None
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None] | tuple[()]:
        """Return what layers are told besides their input: nothing, or a modern model's class and rotations."""
        config = self.config
        if config.block != "modern":
            return ()
        adaptive, turns = config.conditioning == "adaln", None
        condition = F.silu(self.class_embedding(self._classes(sequence))) if adaptive else None
        if config.positions == "rotary":
            before = 0 if adaptive else 1
            turns = _turns(
                *(grid or config.grid), config.head_size, before, config.registers, sequence.device
            )
        return condition, turns

    def _classes(self, sequence: Tensor) -> Tensor:
        """Return each sequence's row of the class embedding, int64 (B,); the last is no class."""
        return (sequence[:, 0] - self.config.unit_codes).clamp(0, self.config.num_classes)

    def _embed_tokens(self, tokens_BN: Tensor) -> Tensor:
        """Return the embeddings of tokens, (B, M, E), each group's added; whatever is no code is the mask."""
        config = self.config
        tokens_BN = tokens_BN.clamp(max=config.unit_codes)
        if config.groups == 1:
            return self.token_embedding(tokens_BN)
        first = torch.arange(config.groups, device=tokens_BN.device) * (config.unit_codes + 1)
        return self.token_embedding(tokens_BN.unflatten(1, (-1, config.groups)) + first).sum(2)


def _initialize(module: nn.Module) -> None:
    """Initialize as the official code: truncated normal 0.02 for matrices, zero for biases."""
    if isinstance(module, nn.Linear | nn.Embedding):
        # Flax draws a standard normal cut at ±2 and scales it: the same law.
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _initialize_modern(transformer: Transformer) -> None:
    """Initialize a modern model as DiT: Xavier for matrices, zero for modulations, so that each layer does nothing."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("modulation"):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
