"""Low-rank adaptation of a transformer: small trainable matrices beside frozen ones, and the rows of its classes.

A linear layer computes W·x + b + (alpha / rank)·B·A·x, in which A (rank, in) and B (out, rank) are trained. B begins
at zero, so a fresh adapter changes nothing. B·A is added to W by `merged`, after which the network is a plain one.

Source: Hu et al., arXiv 2106.09685, §4; initialized and scaled as in the `peft` library.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit.errors import ConfigError
from maskgit.foundation.checks import Config, check_range
from maskgit.networks.transformer import Transformer

CLASS_ROWS = "class_rows"
# Parameters' names may not hold dots.
_DOT = "/"


@dataclass(frozen=True)
class LoraConfig(Config):
    """Which layers of a transformer are adapted, and how.

    Attributes:
        rank: of each pair of matrices; 0 is no adaptation.
        alpha: what the pairs add is multiplied by alpha / rank.
        dropout: share of a pair's inputs dropped in training.
        targets: patterns (`*` and `?`) of the names of linear layers, such as "layers.*.attention.qkv".
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("layers.*.attention.*", "layers.*.mlp.*")

    def validate(self) -> None:
        check_range("rank", self.rank, 0, 4096)
        check_range("alpha", self.alpha, 0, 1e6)
        check_range("dropout", self.dropout, 0, 0.99)
        check_range("len(targets)", len(self.targets), 1, 1000)

    @property
    def scale(self) -> float:
        """What the pairs' products are multiplied by."""
        return self.alpha / self.rank


class LoraLinear(nn.Linear):
    """A linear layer with frozen weights, and a trainable pair beside them: float (…, in) → (…, out)."""

    def __init__(self, linear: nn.Linear, config: LoraConfig) -> None:
        """Adapt a layer, whose weights are shared."""
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.dropout = config.scale, config.dropout
        self.lora_A = nn.Parameter(self.weight.new_empty(config.rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, config.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        return super().forward(x) + F.linear(low, self.lora_B) * self.scale


class ClassRowsEmbedding(nn.Embedding):
    """A token embedding of which the rows of the classes alone are trained: int64 (…) → float (…, E)."""

    def __init__(self, embedding: nn.Embedding, first: int, count: int) -> None:
        """Share the weights of an embedding, and copy `count` rows from row `first` on to be trained."""
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, device="meta")
        self.weight = embedding.weight
        self.first = first
        self.class_rows = nn.Parameter(self.weight[first : first + count].detach().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        rows = tokens - self.first
        is_class = (rows >= 0) & (rows < len(self.class_rows))
        own = F.embedding(rows.clamp(0, len(self.class_rows) - 1), self.class_rows)
        return torch.where(is_class[..., None], own, super().forward(tokens))


def add_lora(transformer: Transformer, config: LoraConfig, seed: int = 0) -> None:
    """Freeze a transformer, and add what an adapter trains: pairs beside the target layers, and the classes' rows.

    Where classes have an embedding of their own, the row of no class is trained, too; elsewhere that is the mask's row,
    which stays.

    Args:
        transformer: a plain one on the CPU, changed in place.
        config: of rank 1 or more.
        seed: of the pairs' first matrices.

    Raises:
        ConfigError: no linear layer, or something else, has a name that the targets match.
    """
    found = _targets(transformer, config)
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        for name, linear in found.items():
            parent, _, own = name.rpartition(".")
            setattr(transformer.get_submodule(parent), own, LoraLinear(linear, config))
    shape = transformer.config
    if shape.owns_classes:
        transformer.class_embedding.requires_grad_(True)
    else:
        transformer.token_embedding = ClassRowsEmbedding(
            transformer.token_embedding, shape.num_codes, shape.num_classes
        )


def _targets(transformer: Transformer, config: LoraConfig) -> dict[str, nn.Linear]:
    linears = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    found = {
        name: module
        for name, module in linears.items()
        if any(fnmatch(name, target) for target in config.targets)
    }
    if not found:
        raise ConfigError(
            f"No linear layer matches the targets {', '.join(config.targets)}. Layers are named "
            f"{', '.join(dict.fromkeys(_general(name) for name in linears))}."
        )
    return found


def _general(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


class Trained(nn.Module):
    """The parameters of a network that are trained, and nothing else, as a module for optimizers and averages."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", _DOT), parameter)


def adapter_state(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's tensors by name, from those that a `Trained` names."""
    renamed = {name.replace(_DOT, "."): tensor for name, tensor in trained.items()}
    return {
        CLASS_ROWS if name.startswith(("token_embedding.", "class_embedding.")) else name: tensor
        for name, tensor in renamed.items()
    }


def adapter_shapes(
    transformer: Transformer, config: LoraConfig, num_classes: int
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that an adapter of a transformer has, by name."""
    shape = transformer.config
    shapes: dict[str, tuple[int, ...]] = {CLASS_ROWS: (num_classes + shape.owns_classes, shape.hidden_size)}
    for name, linear in _targets(transformer, config).items():
        shapes[f"{name}.lora_A"] = (config.rank, linear.in_features)
        shapes[f"{name}.lora_B"] = (linear.out_features, config.rank)
    return shapes


@torch.no_grad()
def merged(
    transformer: Transformer, config: LoraConfig, state: Mapping[str, Tensor], scale: float = 1.0
) -> Transformer:
    """Return a plain transformer that computes what the adapted one does.

    Args:
        transformer: the one that was adapted, plain, float32; it stays as it is, and shares what is not changed.
        config: the adapter's.
        state: its tensors, of the names and shapes that `adapter_shapes` gives, float32.
        scale: multiplies what the pairs add; the rows of the classes are taken as they are.
    """
    rows = state[CLASS_ROWS]
    shape = transformer.config
    new = dataclasses.replace(shape, num_classes=len(rows) - shape.owns_classes)
    weights = dict(transformer.state_dict())
    for name in _targets(transformer, config):
        delta = state[f"{name}.lora_B"] @ state[f"{name}.lora_A"] * (config.scale * scale)
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + delta.to(weights[f"{name}.weight"].device)
    if shape.owns_classes:
        weights["class_embedding.weight"] = rows
    else:
        codes = shape.num_codes
        old = weights["token_embedding.weight"]
        weights["token_embedding.weight"] = torch.cat([old[:codes], rows.to(old.device), old[-1:]])
        if new.num_classes != shape.num_classes and shape.output_bias == "codes":
            # What the head says of classes is never read.
            bias = weights["head.bias"]
            weights["head.bias"] = torch.cat([bias[:codes], bias.new_zeros(new.num_classes), bias[-1:]])
    with torch.device("meta"):
        made = Transformer(new)
    made.load_state_dict(weights, strict=True, assign=True)
    return made.eval().requires_grad_(False)
