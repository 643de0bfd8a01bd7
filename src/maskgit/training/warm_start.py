"""Starting a network from one that is trained; a transformer also onto another list of classes, or by an adapter."""

import dataclasses
from collections.abc import Iterable

import torch
from torch import nn

from maskgit.errors import ConfigError
from maskgit.foundation.checks import check_choice
from maskgit.foundation.notes import note
from maskgit.networks.config import TokenizerConfig, TransformerConfig
from maskgit.networks.lora import LoraConfig, Trained, add_lora
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.transformer import Transformer
from maskgit.pipeline import MaskGIT

INIT_CLASSES = ("auto", "keep", "new")


def start_from(
    transformer: Transformer, source: MaskGIT, class_names: tuple[str, ...], init_classes: str = "auto"
) -> bool:
    """Give a fresh transformer the weights of a trained one.

    The rows of codes, the mask's row or that of no class, positions and layers are taken over. The classes' rows are taken over if
    the classes are the same, and otherwise stay as they were drawn.

    Args:
        transformer: what to fill.
        source: a trained model.
        class_names: those of the classes to train on.
        init_classes: "keep" takes the classes' rows over, by number, with a note where the names differ; "new" does
            not; "auto" compares the names.

    Returns:
        Whether the classes' rows were taken over.

    Raises:
        ConfigError: the transformers are of different shapes, or there are not as many classes to keep.
    """
    check_choice("init_classes", init_classes, INIT_CLASSES)
    config, theirs = transformer.config, source.transformer.config
    _check_shapes(config, theirs, "transformer", free=("num_classes", "dropout"))
    keep = init_classes == "keep" or (init_classes == "auto" and class_names == source.config.class_names)
    if keep and config.num_classes != theirs.num_classes:
        raise ConfigError(
            f"init_classes is 'keep', but the data have {config.num_classes} classes and the model has "
            f"{theirs.num_classes}; choose 'new'."
        )
    own_names = source.config.class_names
    differ = [pair for pair in zip(own_names or (), class_names, strict=False) if pair[0] != pair[1]]
    if keep and differ:
        theirs_first, ours_first = differ[0]
        note(
            f"init_classes is 'keep': classes are taken over by number, and {len(differ)} of {len(class_names)} have "
            f"another name in the model, such as {theirs_first!r} for {ours_first!r}. Choose 'new' if they are others."
        )
    state = {name: value.float() for name, value in source.transformer.state_dict().items()}
    if not keep and config.owns_classes:
        own = transformer.class_embedding.weight.detach().cpu().clone()
        own[-1] = state["class_embedding.weight"][-1]
        state["class_embedding.weight"] = own
    elif not keep:
        for name in ("token_embedding.weight", "head.bias"):
            own, codes = transformer.state_dict()[name].cpu().clone(), config.num_codes
            own[:codes], own[-1] = state[name][:codes], state[name][-1]
            state[name] = own
    transformer.load_state_dict(state, strict=True)
    return keep


def start_tokenizer_from(tokenizer: Tokenizer, source: Tokenizer) -> None:
    """Give a fresh tokenizer the weights of a trained one.

    Raises:
        ConfigError: the tokenizers are of different shapes.
    """
    _check_shapes(tokenizer.config, source.config, "tokenizer")
    tokenizer.load_state_dict(
        {name: value.float() for name, value in source.state_dict().items()}, strict=True
    )


def _check_shapes(
    config: TokenizerConfig | TransformerConfig,
    theirs: TokenizerConfig | TransformerConfig,
    network: str,
    *,
    free: Iterable[str] = (),
) -> None:
    different = [
        f"{field.name} (model {getattr(theirs, field.name)}, here {getattr(config, field.name)})"
        for field in dataclasses.fields(config)
        if field.name not in free and getattr(config, field.name) != getattr(theirs, field.name)
    ]
    if different:
        raise ConfigError(
            f"init_from is a {network} of another shape: {', '.join(different)}. Give `model` its values."
        )


def first_transformer(
    config: TransformerConfig,
    seed: int,
    *,
    source: MaskGIT | None = None,
    class_names: tuple[str, ...] = (),
    init_classes: str = "auto",
    lora: LoraConfig | None = None,
) -> Transformer:
    """Return the transformer that a run begins with, on the CPU.

    Args:
        config: its shape.
        seed: of weights that are drawn.
        source: the model that it starts from; see `start_from` for what is said of classes.
        class_names, init_classes: see `start_from`.
        lora: of rank 1 or more, all but an adapter is frozen.

    Raises:
        ConfigError: something does not fit the source.
    """
    transformer = draw_transformer(config, seed)
    if source is not None:
        start_from(transformer, source, class_names, init_classes)
    if lora is not None and lora.rank:
        add_lora(transformer, lora, seed)
    return transformer


def trained_part(transformer: Transformer, lora: LoraConfig) -> nn.Module:
    """Return what of a transformer is trained, averaged and kept in checkpoints: an adapter's parameters, or all."""
    return Trained(transformer) if lora.rank else transformer


def draw_transformer(config: TransformerConfig, seed: int) -> Transformer:
    """Return a transformer on the CPU whose first weights are drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        return Transformer(config)
