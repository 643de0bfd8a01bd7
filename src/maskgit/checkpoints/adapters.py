"""Adapters on disk and on the Hub: what fine-tuning by low-rank adaptation adds to a model.

    adapter_config.json     the ranks, classes and sampler settings, and which model it belongs to
    adapter.safetensors     the pairs of matrices and the rows of the classes

They are a few percent of the model's size, and of use with that model alone.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from maskgit.checkpoints import hugging_face, weights
from maskgit.config import ModelConfig, SamplerConfig
from maskgit.errors import CheckpointError, ConfigError
from maskgit.foundation.checks import Config, check_range
from maskgit.foundation.files import expand, read_json, write_folder, write_json
from maskgit.model import Parts
from maskgit.networks.lora import LoraConfig, adapter_shapes, merged

ADAPTER_FORMAT = 1
CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
_REMEDY = "Check that this is an adapter's folder, or that of the run that trained it."


@dataclass(frozen=True)
class AdapterConfig(Config):
    """What an adapter is.

    Attributes:
        base: what the user called the model that was adapted: a name, a folder or a Hugging Face id.
        base_fingerprint: of its transformer in float32; see `weights.weights_fingerprint`.
        lora: the adapted layers.
        num_classes: classes of the adapted model.
        class_names: their names, or none.
        label_dropout: share of training sequences whose class was masked.
        sampler: the adapted model's own settings.
    """

    base: str
    base_fingerprint: str
    lora: LoraConfig
    num_classes: int
    class_names: tuple[str, ...] | None = None
    label_dropout: float = 0.0
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def validate(self) -> None:
        check_range("num_classes", self.num_classes, 1, 1_000_000)
        check_range("lora.rank", self.lora.rank, 1, 4096)


class Adapter(NamedTuple):
    """An adapter: its config, and its tensors by name, float32 on the CPU."""

    config: AdapterConfig
    state: dict[str, Tensor]


def save_adapter(adapter: Adapter, path: str | Path) -> Path:
    """Write an adapter's folder, whole or not at all, and return it; one that is there is replaced.

    Raises:
        CheckpointError: a tensor is NaN or infinite.
        OutputError: it cannot be written, or the path holds something else.
    """
    state = {name: tensor.float().cpu().contiguous() for name, tensor in adapter.state.items()}
    weights.check_finite(state, "The adapter is not saved", "Training has failed: lower the learning rate.")

    def write(folder: Path) -> None:
        write_json(folder / CONFIG, {"format_version": ADAPTER_FORMAT, **adapter.config.to_dict()})
        weights.write(folder / WEIGHTS, state)

    return write_folder(path, (CONFIG, WEIGHTS), write)


def load_adapter(
    path: str | Path, *, token: str | bool | None = None, local_files_only: bool = False
) -> Adapter:
    """Return an adapter.

    Args:
        path: its folder, that of the run that trained it, or a Hugging Face id such as "user/adapter".
        token, local_files_only: for the Hub; see `hub.locate`.

    Raises:
        CheckpointError: it is not there, or broken.
        DownloadError: it cannot be downloaded.
    """
    folder, hub_id = expand(path), hugging_face.HUB_ID.fullmatch(str(path))
    if not folder.is_dir() and hub_id:
        folder = hugging_face.download(
            hub_id[1], revision=hub_id[2], token=token, local_files_only=local_files_only
        )
    elif (folder / "adapter").is_dir():
        folder = folder / "adapter"
    if (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} is a model, not an adapter: give it as the model.")
    values = read_json(folder / CONFIG, remedy=_REMEDY)
    version = values.pop("format_version", None)
    if version != ADAPTER_FORMAT:
        raise CheckpointError(
            f"{folder / CONFIG} has format_version {version}; this package reads {ADAPTER_FORMAT}."
        )
    try:
        config = AdapterConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    with weights.opened(folder / WEIGHTS) as file:
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    weights.check_finite(state, folder / WEIGHTS, "The file is broken: use another.")
    return Adapter(config, state)


def adapted(parts: Parts, adapter: Adapter, scale: float = 1.0) -> Parts:
    """Return the parts of a model with an adapter merged into its transformer; those given stay as they are.

    Args:
        parts: of the model that was adapted, in float32.
        adapter: what to merge.
        scale: of what the pairs of matrices add; 0 is the model as it was, with its own classes.

    Raises:
        CheckpointError: the adapter is of another model, or its tensors are not those of its config.
        ConfigError: the scale is out of range.
    """
    scale = check_range("adapter_scale", scale, 0, 100)
    config = adapter.config
    if weights.weights_fingerprint(parts.transformer) != config.base_fingerprint:
        raise CheckpointError(
            f"The adapter was trained on another model, which was called {config.base}: load it with that one."
        )
    expected = adapter_shapes(parts.transformer, config.lora, config.num_classes)
    problems = weights.differences(expected, weights.shapes(adapter.state))
    if problems:
        raise CheckpointError(f"The adapter does not match its config: {weights.listed(problems)}.")
    if not scale:
        return parts
    transformer = merged(parts.transformer, config.lora, adapter.state, scale)
    made = ModelConfig(
        parts.config.tokenizer,
        transformer.config,
        parts.config.image_size,
        config.class_names,
        config.label_dropout,
        config.sampler,
    )
    return Parts(made, parts.tokenizer, transformer)


def push_adapter(
    path: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | bool | None = None,
    commit_message: str = "Upload MaskGIT adapter",
) -> str:
    """Upload an adapter to the Hugging Face Hub and return its URL.

    Args:
        path: its folder, or that of the run that trained it.
        repo_id: "user/name"; created if it does not exist.
        private: whether a new repository is private.
        token: the user's; None uses the one that `hf auth login` stored.
        commit_message: for the upload.

    Raises:
        CheckpointError: there is no adapter, or it is broken.
        DownloadError: the Hub refuses the upload or cannot be reached.
    """
    adapter = load_adapter(path)
    with tempfile.TemporaryDirectory() as folder:
        return hugging_face.upload(
            save_adapter(adapter, Path(folder) / "adapter"),
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
        )
