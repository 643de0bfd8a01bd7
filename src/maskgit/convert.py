"""Official Flax checkpoints ↔ ours, and other projects' torch files → ours: the face of `maskgit.checkpoints`."""

from pathlib import Path

from maskgit.checkpoints.official import (
    find_official,
    from_state_dict,
    infer_tokenizer_config,
    infer_transformer_config,
    read_checkpoint,
    read_official,
    save_official,
    to_state_dict,
)
from maskgit.checkpoints.published import read_published, read_published_tokenizer
from maskgit.networks.tokenizer import Tokenizer
from maskgit.pipeline import MaskGIT

__all__ = [
    "find_official",
    "from_state_dict",
    "infer_tokenizer_config",
    "infer_transformer_config",
    "load_official",
    "load_published",
    "load_published_tokenizer",
    "read_checkpoint",
    "save_official",
    "to_state_dict",
]


def load_official(
    tokenizer: str | Path,
    transformer: str | Path,
    activation: str | None = None,
    quantizer: str | None = None,
) -> MaskGIT:
    """Return the model of two official checkpoints.

    Args:
        tokenizer, transformer: paths of Flax msgpack files.
        activation, quantizer: these cannot be inferred from shapes; None means what `save_official` wrote beside the
            transformer's file, else "swish" and "vq", as in the released checkpoints.

    Returns:
        A `MaskGIT` in float32 on the CPU. Class names, label dropout and sampler settings come from the file that
        `save_official` wrote beside the checkpoints; without it, 1000 classes get ImageNet's names.

    Raises:
        CheckpointError: a file is damaged, is of the other stage, or does not match its network.
        ConfigError: the tokenizer and the transformer do not belong together.
    """
    return MaskGIT(*read_official(tokenizer, transformer, activation, quantizer))


def load_published(
    project: str, tokenizer: str | Path, transformer: str | Path, *, num_heads: int | None = None
) -> MaskGIT:
    """Return the model of two torch checkpoints that another project published.

    Args:
        project: "halton", for Halton-MaskGIT with LlamaGen's tokenizer, or "maskbit".
        tokenizer, transformer: paths; they are untrusted, and read without running code.
        num_heads: attention heads, if the transformer is of no published size.

    Returns:
        A `MaskGIT` in float32 on the CPU.

    Raises:
        CheckpointError: a file is damaged, of another project, or asks for code to be run.
        ConfigError: the project is unknown, or the two do not belong together.
    """
    return MaskGIT(*read_published(project, tokenizer, transformer, num_heads=num_heads))


def load_published_tokenizer(project: str, path: str | Path) -> Tokenizer:
    """Return the tokenizer that another project published, in evaluation mode; see `load_published`."""
    return read_published_tokenizer(project, path)
