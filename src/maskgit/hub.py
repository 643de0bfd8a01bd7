"""Models on disk, in the registry and on the Hugging Face Hub: the face of `maskgit.checkpoints`."""

from pathlib import Path
from typing import Any

import torch

from maskgit.checkpoints.adapters import load_adapter, push_adapter, save_adapter
from maskgit.checkpoints.folder import (
    DEFAULT_MODEL,
    FORMAT_VERSION,
    INDEX,
    REGISTRY,
    WEIGHTS,
    Official,
    load_parts,
    load_tokenizer,
    locate,
    push_to_hub,
    save_model,
    save_tokenizer,
)
from maskgit.foundation.devices import Device, Dtype
from maskgit.pipeline import MaskGIT

__all__ = [
    "DEFAULT_MODEL",
    "FORMAT_VERSION",
    "INDEX",
    "REGISTRY",
    "WEIGHTS",
    "Official",
    "from_pretrained",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "locate",
    "push_adapter",
    "push_to_hub",
    "save_adapter",
    "save_model",
    "save_tokenizer",
]


def from_pretrained(name_or_path: str | Path = DEFAULT_MODEL, **options: Any) -> MaskGIT:
    """Return a model by name or path.

    Args:
        name_or_path: a folder written by `save_model`; a name in `REGISTRY` (an official one is downloaded
            and converted once, then kept in the cache); or a Hugging Face Hub id such as "user/model".
        **options: device, dtype (or torch_dtype), revision, token, cache_dir, local_files_only, adapter and
            adapter_scale, as for `maskgit.checkpoints.folder.load_named`; and guide, the name or path of a weaker model
            (`MaskGIT.guided_by`).

    Raises:
        CheckpointError, ConfigError, DownloadError: there is no such model, or it is broken.
        OutputError: it has to be downloaded, and the cache cannot be written.
    """
    return MaskGIT.from_pretrained(name_or_path, **options)


def load_model(path: str | Path, *, device: Device = "cpu", dtype: Dtype | None = torch.float32) -> MaskGIT:
    """Return the model in a folder.

    Raises:
        CheckpointError: a file is missing or broken, or weights do not fit their config.
    """
    return MaskGIT(*load_parts(path, device=device, dtype=dtype))
