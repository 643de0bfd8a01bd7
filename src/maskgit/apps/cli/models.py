"""`maskgit export`: a model's networks as files that run without this package.

torch and the model code are imported inside the command, so that `--help` answers at once.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from maskgit.apps.cli.flags import Model


def export(
    model: Positional[str],
    out: Path,
    format: Literal["onnx", "aoti"] = "onnx",
    parts: tuple[Literal["transformer", "decoder", "encoder"], ...] = ("transformer", "decoder", "encoder"),
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    overwrite: bool = False,
) -> None:
    """Export a model's networks to files that run without this package, and check each against the original.

    Args:
        model: Name (`maskgit info` lists them), folder, or Hugging Face id such as user/model or user/model@revision.
        out: Folder to write the networks to, with a config.json on how to use them.
        format: onnx runs anywhere; aoti (AOTInductor) compiles for this machine and needs a C++ compiler.
        parts: Networks to export.
        device: Device that AOTInductor compiles for: cuda, mps or cpu; auto picks the first available.
        dtype: Precision of AOTInductor packages; ONNX is always float32.
        overwrite: Replace an existing export.
    """
    import torch

    from maskgit.export import CONFIG, check_export, export_model
    from maskgit.foundation.files import expand

    # Before a model is fetched for nothing.
    check_export(expand(out), format=format, parts=parts, overwrite=overwrite)
    pipe = Model(model, device).plain().to(dtype=getattr(torch, dtype))
    with _quiet():
        for made in export_model(pipe, out, format=format, parts=parts, overwrite=overwrite, progress=True):
            print(f"{made.path}: {made.num_bytes / 1e6:.1f} MB, max difference {made.difference:.1e}")
    print(out / CONFIG)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep remarks that nobody can act on off the terminal: missing torchvision, torch's deprecations.

    They are silenced for the whole process, which is the command's own.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
