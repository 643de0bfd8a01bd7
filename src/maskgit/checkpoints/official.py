"""Official Flax checkpoints ↔ ours.

Every parameter goes through an explicit table of (official path, our name, layout); a missing, unexpected or misshapen
parameter is an error that names it.
"""

import json
import logging
import math
import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from maskgit.checkpoints import flax_msgpack as flaxio
from maskgit.checkpoints import weights
from maskgit.checkpoints.official_table import FLAX_NORMS, Row, tokenizer_table, transformer_table
from maskgit.config import ModelConfig
from maskgit.errors import CheckpointError, ConfigError, MaskGITError
from maskgit.foundation import files
from maskgit.foundation.checks import check_choice
from maskgit.model import Model, Parts
from maskgit.networks.config import ACTIVATIONS, TokenizerConfig, TransformerConfig
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.transformer import Transformer
from maskgit.sampler.config import SamplerConfig

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
Module = TypeVar("Module", bound=nn.Module)

# The collections of a model; a training checkpoint may hold more.
COLLECTIONS = frozenset(("params", "batch_stats"))
OFFICIAL_QUANTIZERS = ("vq", "gumbel")
# The file beside checkpoints for what their format cannot hold.
TOLD, TOLD_VERSION = "model.json", 1
# The largest official checkpoint has 692 MB.
MAX_FILE_BYTES = 2**34


def to_state_dict(arrays: Arrays, table: list[Row]) -> dict[str, Tensor]:
    """Return our state dict for the arrays of an official checkpoint.

    Args:
        arrays: by official path.
        table: `tokenizer_table` or `transformer_table` of the model's config.

    Returns:
        float32 tensors by our names.

    Raises:
        CheckpointError: parameters are missing, unexpected, misshapen or not finite; up to five are named.
    """
    _check(arrays, table)
    parts: dict[str, dict[int, Tensor]] = {}
    for row in table:
        array = row.layout.to_torch(_float32(arrays[row.path]))
        parts.setdefault(row.name, {})[row.part or 0] = torch.from_numpy(np.array(array, order="C"))
    return {name: torch.cat([p[i] for i in sorted(p)]) if len(p) > 1 else p[0] for name, p in parts.items()}


def _check(arrays: Arrays, table: list[Row]) -> None:
    expected = {row.path: row.shape for row in table}
    problems = [f"{path} is missing" for path in expected if path not in arrays]
    problems += [f"{path} is unknown" for path in arrays if path not in expected]
    for path, shape in expected.items():
        if path not in arrays:
            continue
        array = arrays[path]
        if array.shape != shape:
            problems.append(f"{path} has the shape {array.shape} instead of {shape}")
        elif array.dtype.kind != "f":
            problems.append(f"{path} is {array.dtype} instead of a float")
        elif not np.isfinite(_float32(array)).all():
            problems.append(f"{path} holds NaN, infinity, or values too large for float32")
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"The checkpoint does not fit this network: {'; '.join(problems[:5])}{more}.")


def _float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(array, np.float32)


def from_state_dict(state: dict[str, Tensor], table: list[Row]) -> Arrays:
    """Return the official arrays for one of our state dicts; the inverse of `to_state_dict`."""
    num_parts = {row.name: row.part + 1 for row in table if row.part is not None}
    arrays = {}
    for row in table:
        tensor = state[row.name].detach().cpu().float()
        if row.part is not None:
            tensor = tensor.chunk(num_parts[row.name])[row.part]
        arrays[row.path] = np.ascontiguousarray(row.layout.to_flax(tensor.numpy(), row.shape))
    return arrays


def infer_tokenizer_config(
    arrays: Arrays, *, activation: str = "swish", quantizer: str = "vq"
) -> TokenizerConfig:
    """Infer the config of an official tokenizer from its parameters' paths and shapes.

    Args:
        arrays: by official path.
        activation, quantizer: these cannot be inferred from shapes.

    Raises:
        CheckpointError: it is not a tokenizer.
    """
    if "params/Embed_0/word_embeddings/embedding" in arrays:
        raise CheckpointError("This is a transformer checkpoint, but a tokenizer checkpoint is needed.")
    try:
        filters = arrays["params/encoder/Conv_0/kernel"].shape[3]
        codebook_size, embedding_dim = arrays["params/quantizer/codebook"].shape
        levels = _count(arrays, r"params/decoder/Conv_(\d+)/") - 1
        num_blocks = _count(arrays, r"params/encoder/ResBlock_(\d+)/")
        num_res_blocks = num_blocks // (levels + 1)
        widths = [
            arrays[f"params/encoder/ResBlock_{level * num_res_blocks}/Conv_0/kernel"].shape[3]
            for level in range(levels)
        ]
        norm = next(k for k, v in FLAX_NORMS.items() if f"params/encoder/{v}_0/scale" in arrays)
    except (KeyError, IndexError, ValueError, StopIteration, ZeroDivisionError) as error:
        raise CheckpointError("This is not the checkpoint of an official MaskGIT tokenizer.") from error
    return TokenizerConfig(
        filters=filters,
        num_res_blocks=num_res_blocks,
        channel_multipliers=tuple(width // filters for width in widths),
        embedding_dim=embedding_dim,
        codebook_size=codebook_size,
        conv_downsample=_count(arrays, r"params/encoder/Conv_(\d+)/") > 2,
        activation=activation,
        norm=norm,
        quantizer=quantizer,
    )


def infer_transformer_config(arrays: Arrays, *, num_codes: int = 1024) -> TransformerConfig:
    """Infer the config of an official transformer from its parameters' paths and shapes.

    Args:
        arrays: by official path.
        num_codes: the tokenizer's codebook size; the shapes only give the sum of codes and classes.

    Raises:
        CheckpointError: it is not a transformer.
    """
    if "params/quantizer/codebook" in arrays:
        raise CheckpointError("This is a tokenizer checkpoint, but a transformer checkpoint is needed.")
    try:
        vocab_size, hidden_size = arrays["params/Embed_0/word_embeddings/embedding"].shape
        positions, _ = arrays["params/Embed_0/position_embeddings/embedding"].shape
        layer = "params/TransformerLayer_0"
        _, num_heads, _ = arrays[f"{layer}/Attention_0/self_attention/query/kernel"].shape
        _, intermediate_size = arrays[f"{layer}/Mlp_0/intermediate_output/kernel"].shape
    except (KeyError, ValueError) as error:
        raise CheckpointError("This is not the checkpoint of an official MaskGIT transformer.") from error
    grid_size = math.isqrt(max(positions - 1, 0))
    if grid_size**2 != positions - 1:
        raise CheckpointError(
            f"The transformer has {positions} positions, which is not a square number plus one."
        )
    if vocab_size <= num_codes + 1:
        raise CheckpointError(
            f"The transformer's vocabulary of {vocab_size} has no room for {num_codes} codes."
        )
    return TransformerConfig(
        num_codes=num_codes,
        num_classes=vocab_size - num_codes - 1,
        grid_size=grid_size,
        hidden_size=hidden_size,
        num_layers=_count(arrays, r"params/TransformerLayer_(\d+)/"),
        num_heads=num_heads,
        intermediate_size=intermediate_size,
    )


def _count(arrays: Arrays, pattern: str) -> int:
    return len({match[1] for path in arrays if (match := re.match(pattern, path))})


def read_checkpoint(path: str | Path) -> Arrays:
    """Return the arrays of an official checkpoint by path ("params/encoder/Conv_0/kernel").

    Anything besides the model's collections, such as an optimizer's state, is left out, which is logged.

    Raises:
        CheckpointError: the file cannot be read or is not a Flax checkpoint.
    """
    path = files.expand(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if not 0 < size <= MAX_FILE_BYTES:
                raise CheckpointError(f"{path} has {size} bytes, which is no size of a MaskGIT checkpoint.")
            weights.check_is_no_pointer(path)
            # Mapped, so that the file is not held in memory a second time while its arrays are copied.
            with (
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
                memoryview(data) as view,
                _blame(path),
            ):
                tree = flaxio.decode(view, COLLECTIONS)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    others = sorted(tree.keys() - COLLECTIONS)
    if others:
        log.warning("%s: ignoring %s, which the model does not use.", path, ", ".join(map(repr, others[:8])))
    arrays = dict(flaxio.leaves({key: tree[key] for key in tree if key in COLLECTIONS}))
    if not any(key.startswith("params/") for key in arrays):
        raise CheckpointError(f"{path} holds no 'params', so it is not a Flax model checkpoint.")
    return arrays


def read_official(
    tokenizer: str | Path,
    transformer: str | Path,
    activation: str | None = None,
    quantizer: str | None = None,
) -> Parts:
    """Return the parts of the model in two official checkpoints; see `maskgit.convert.load_official`."""
    from maskgit.networks.classes import imagenet_class_names

    told = _read_told(files.expand(transformer).with_name(TOLD))
    kinds = {
        "activation": activation or (told.tokenizer.activation if told else "swish"),
        "quantizer": quantizer or (told.tokenizer.quantizer if told else "vq"),
    }
    check_choice("activation", kinds["activation"], ACTIVATIONS)
    check_choice("quantizer", kinds["quantizer"], OFFICIAL_QUANTIZERS)
    arrays = read_checkpoint(tokenizer)
    with _blame(tokenizer):
        tokenizer_config = infer_tokenizer_config(arrays, **kinds)
        first = weights.loaded(
            Tokenizer, tokenizer_config, to_state_dict(arrays, tokenizer_table(tokenizer_config))
        )
    arrays = read_checkpoint(transformer)
    with _blame(transformer):
        transformer_config = infer_transformer_config(arrays, num_codes=tokenizer_config.codebook_size)
        if told:
            transformer_config = replace(transformer_config, dropout=told.transformer.dropout)
        second = weights.loaded(
            Transformer, transformer_config, to_state_dict(arrays, transformer_table(transformer_config))
        )
    config = ModelConfig(
        tokenizer=tokenizer_config,
        transformer=transformer_config,
        image_size=transformer_config.grid_size * tokenizer_config.patch_size,
        class_names=imagenet_class_names() if transformer_config.num_classes == 1000 else None,
        # The paper's: 8 steps at 256×256 and 12 at 512×512.
        sampler=SamplerConfig(steps=12 if transformer_config.grid_size > 16 else 8),
    )
    if told:
        shape = replace(
            tokenizer_config, activation=told.tokenizer.activation, quantizer=told.tokenizer.quantizer
        )
        if (told.tokenizer, told.transformer) != (shape, transformer_config):
            raise CheckpointError(
                f"{files.expand(transformer).with_name(TOLD)} does not describe the checkpoints beside it; remove it."
            )
        config = replace(told, tokenizer=tokenizer_config)
    return Parts(config, first, second)


def save_official(model: Model, directory: str | Path) -> tuple[Path, Path]:
    """Write a model as two official checkpoints, for users of the JAX code.

    Args:
        model: any `MaskGIT`.
        directory: made if needed; `tokenizer_checkpoint` and `maskgit_checkpoint` are written to it, and `model.json`
            with what their format cannot hold: class names, label dropout, sampler settings.

    Returns:
        The two paths, tokenizer first.

    Raises:
        CheckpointError: a weight is NaN or infinite.
        ConfigError: a network does not match its config, or has parts that the official networks lack.
        OutputError: the folder cannot be written.
    """
    directory = files.expand(directory)
    config = model.config
    for part, network in (("tokenizer", config.tokenizer), ("transformer", config.transformer)):
        later = network.later_choices()
        if later:
            listed = ", ".join(f"{name} = {value!r}" for name, value in later.items())
            raise ConfigError(
                f"Google's format has no place for this {part}'s {listed}; save it as a folder."
            )
    if config.tokenizer.quantizer not in OFFICIAL_QUANTIZERS:
        raise ConfigError(f"Google's format has no place for the quantizer {config.tokenizer.quantizer!r}.")
    first = weights.own_state(Tokenizer, config.tokenizer, model.tokenizer)
    second = weights.own_state(Transformer, config.transformer, model.transformer)
    stages = (
        ("tokenizer_checkpoint", first, tokenizer_table(config.tokenizer)),
        ("maskgit_checkpoint", second, transformer_table(config.transformer)),
    )
    for name, state, _ in stages:
        weights.check_finite(state, f"{name} is not written", "The model is broken.")
    for name, state, table in stages:
        arrays = from_state_dict(state, table)
        files.write_bytes(directory / name, flaxio.encode(flaxio.nest(dict(sorted(arrays.items())))))
    told = {"format_version": TOLD_VERSION, **config.to_dict()}
    files.write_bytes(directory / TOLD, json.dumps(told, indent=2, ensure_ascii=False).encode() + b"\n")
    return directory / stages[0][0], directory / stages[1][0]


def _read_told(path: Path) -> ModelConfig | None:
    """Return the config that `save_official` wrote beside its checkpoints, or None."""
    if not path.is_file():
        return None
    values = files.read_json(path)
    if values.pop("format_version", None) != TOLD_VERSION:
        raise CheckpointError(
            f"{path} was not written by this package's `convert --to-flax`; move it elsewhere."
        )
    with _blame(path):
        return ModelConfig.from_dict(values)


@contextmanager
def _blame(path: str | Path) -> Iterator[None]:
    """Prefix errors about a file's contents with its name."""
    try:
        yield
    except MaskGITError as error:
        raise CheckpointError(f"{path}: {error}") from error


def find_official(folder: str | Path) -> tuple[Path, Path]:
    """Return the tokenizer's and the transformer's checkpoint in a folder, by their released names.

    Raises:
        CheckpointError: there is not exactly one `tokenizer_*` and one `maskgit_*`.
    """
    folder = files.expand(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder. Give the folder of both checkpoints, or the tokenizer's with --transformer."
        )
    found = []
    for pattern in ("tokenizer_*", "maskgit_*"):
        matches = sorted(path for path in folder.glob(pattern) if path.is_file())
        if len(matches) != 1:
            listed = ", ".join(path.name for path in matches) or "none"
            raise CheckpointError(f"{folder} must hold one file named {pattern}, but holds: {listed}.")
        found.append(matches[0])
    return found[0], found[1]
