"""What a model is made of, as checkpoints hold it."""

from typing import Any, NamedTuple, Protocol

from maskgit.config import ModelConfig
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.transformer import Transformer


class Parts(NamedTuple):
    """A config and the two networks that it describes."""

    config: ModelConfig
    tokenizer: Tokenizer
    transformer: Transformer


class Whole(Protocol):
    """What is asked of a model that is saved."""

    config: ModelConfig
    tokenizer: Tokenizer
    transformer: Transformer
    engine: Any
