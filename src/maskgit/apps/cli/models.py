"""The commands about a model's files: `maskgit info`, `convert` and `export`.

torch and the model code are imported inside the commands, so that `--help` answers at once.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from maskgit.apps.cli.flags import Model
from maskgit.errors import ConfigError, OutputError


def info(model: Positional[str] = "", classes: bool = False) -> None:
    """Describe a model, or list the named models.

    Args:
        model: Name, folder, or Hugging Face id such as user/model or user/model@revision; leave out to list names.
        classes: Also list the model's classes.
    """
    from maskgit import hub

    if not model:
        for name, entry in hub.REGISTRY.items():
            print(f"{name:18}{'bundled with the package' if isinstance(entry, Path) else entry.about}")
        return
    pipe = hub.from_pretrained(model)
    config = pipe.config
    for stage, module in (("tokenizer", pipe.tokenizer), ("transformer", pipe.transformer)):
        count = sum(p.numel() for p in module.parameters())
        print(f"{stage}: {count / 1e6:.1f} M parameters")
        for key, value in getattr(config, stage).to_dict().items():
            print(f"    {key}: {value}")
    print(f"image_size: {config.image_size}")
    print(f"label_dropout: {config.label_dropout}")
    print("sampler: " + ", ".join(f"{key} {value}" for key, value in config.sampler.to_dict().items()))
    if classes:
        for number in range(config.transformer.num_classes):
            print(f"{number:5} {config.class_names[number] if config.class_names else ''}")


def convert(
    source: Positional[Path],
    dest: Positional[Path],
    transformer: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")] = None,
    to_flax: bool = False,
    activation: Annotated[
        str | None, arg(metavar="{swish,relu}", help_behavior_hint="(default: swish)")
    ] = None,
    quantizer: Annotated[str | None, arg(metavar="{vq,gumbel}", help_behavior_hint="(default: vq)")] = None,
    project: Annotated[str | None, arg(name="as", metavar="{halton,maskbit}", help_behavior_hint="")] = None,
    heads: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None,
    overwrite: bool = False,
) -> None:
    """Convert official or other projects' checkpoints to a model folder, or to official ones.

    Args:
        source: The tokenizer's checkpoint; a folder with `tokenizer_*` and `maskgit_*` checkpoints; or, with
            --to-flax, a model folder.
        dest: Folder to write.
        transformer: The transformer's checkpoint, if the source is the tokenizer's.
        to_flax: Convert a model folder to official checkpoints, for the JAX code.
        activation: Activation of the tokenizer, which official checkpoints do not record.
        quantizer: Quantizer of the tokenizer, which official checkpoints do not record.
        project: The project whose torch files these are: halton (with LlamaGen's tokenizer) or maskbit (VQGAN+ and Google's
            tokenizer in torch form included). They are read without running code. Without --transformer, the tokenizer alone.
        heads: With --as, the transformer's attention heads, if it is of no published size.
        overwrite: Replace an existing model or existing checkpoints.
    """
    from maskgit import convert as conversion
    from maskgit import hub

    given = {"activation": activation, "quantizer": quantizer}
    kinds = {name: value for name, value in given.items() if value is not None}
    if dest.is_dir() and any(dest.iterdir()) and not overwrite:
        raise OutputError(f"{dest} already exists; choose another folder, or add --overwrite.")
    if to_flax:
        if kinds or transformer:
            raise ConfigError(
                "--to-flax reads a model folder; leave out --transformer, --activation and --quantizer."
            )
        for path in conversion.save_official(hub.from_pretrained(source), dest):
            print(path)
        return
    if project is not None:
        if kinds:
            raise ConfigError("--as finds activation and quantizer itself; leave them out.")
        if transformer is None:
            print(hub.save_tokenizer(conversion.load_published_tokenizer(project, source), dest))
            return
        made = conversion.load_published(project, source, transformer, num_heads=heads)
        print(hub.save_model(made, dest))
        return
    first, second = (source, transformer) if transformer else conversion.find_official(source)
    print(hub.save_model(conversion.load_official(first, second, **kinds), dest))


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
