"""Models on disk, in the registry, on the Hugging Face Hub, and in the cache.

A model is a folder that diffusers users know:

    model_index.json                     image size, classes, sampler settings
    tokenizer/config.json, model.safetensors
    transformer/config.json, model.safetensors

Nothing is unpickled; shapes are compared with the config before any tensor is read.
"""

import re
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from maskgit.checkpoints import hugging_face, weights
from maskgit.checkpoints.adapters import adapted, load_adapter
from maskgit.checkpoints.official import read_official
from maskgit.checkpoints.published import (
    PUBLISHED,
    HubFile,
    Published,
    read_published,
    read_published_tokenizer,
)
from maskgit.config import ModelConfig
from maskgit.errors import (
    CheckpointError,
    ConfigError,
    DownloadError,
    unknown_name,
)
from maskgit.foundation import download
from maskgit.foundation.checks import Config
from maskgit.foundation.devices import Device, Dtype, choose_device, choose_dtype, shapes_only
from maskgit.foundation.files import cache_dir, expand, naming_the_cache, read_json, write_folder, write_json
from maskgit.foundation.locks import locked, waits_for
from maskgit.model import Model, Parts
from maskgit.networks.config import TokenizerConfig
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.transformer import Transformer

Module = TypeVar("Module", bound=nn.Module)

FORMAT_VERSION = 1
INDEX, WEIGHTS = "model_index.json", "model.safetensors"
_REMEDY = "Check that this is a model folder."


class Official(NamedTuple):
    """The URLs of a released pair of checkpoints."""

    tokenizer: str
    transformer: str

    @property
    def about(self) -> str:
        """What `maskgit info` says of it."""
        return self.transformer


_RELEASED = "https://storage.googleapis.com/maskgit-public/checkpoints"
# A path is a folder inside the package.
REGISTRY: dict[str, Official | Published | Path] = {
    "cifar10": Path(__file__).parents[1] / "assets" / "models" / "cifar10",
    "imagenet256": Official(
        f"{_RELEASED}/tokenizer_imagenet256_checkpoint", f"{_RELEASED}/maskgit_imagenet256_checkpoint"
    ),
    "imagenet512": Official(
        f"{_RELEASED}/tokenizer_imagenet512_checkpoint", f"{_RELEASED}/maskgit_imagenet512_checkpoint"
    ),
    **PUBLISHED,
}
DEFAULT_MODEL = "cifar10"
LFS_CHECKSUM = re.compile(r"oid sha256:([0-9a-f]{64})")


def load_named(
    name_or_path: str | Path = DEFAULT_MODEL,
    *,
    device: Device = "cpu",
    dtype: Dtype | None = torch.float32,
    torch_dtype: Dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    adapter: str | Path | None = None,
    adapter_scale: float = 1.0,
) -> Parts:
    """Return the parts of a model, by name or path; see `maskgit.hub.from_pretrained`.

    Args:
        name_or_path: a folder written by `save_model`; a name in `REGISTRY` (an official one is downloaded
            and converted once, then kept in the cache); or a Hugging Face Hub id such as "user/model", or
            "user/model@revision".
        device: where the weights go; "auto" uses a GPU if there is one.
        dtype: the dtype that the networks compute in, such as torch.bfloat16 or "bfloat16"; "auto" means the dtype
            that the weights are stored in, None means float32.
        torch_dtype: the older name of dtype in diffusers and transformers; it wins if both are given.
        revision, token, cache_dir, local_files_only: see `locate`.
        adapter: what fine-tuning made of the model, to be merged into it: a folder, or a Hugging Face id.
        adapter_scale: of what the adapter adds; 0 is the model without it.

    Raises:
        CheckpointError, ConfigError, DownloadError: there is no such model or adapter, or it is broken.
        OutputError: it has to be downloaded, and the cache cannot be written.
    """
    entry = REGISTRY.get(str(name_or_path))
    if isinstance(entry, Published) and entry.transformer is None:
        raise ConfigError(
            f"{name_or_path} is a tokenizer without a transformer: it serves `tokenize` and training, "
            "and makes no images by itself."
        )
    folder = locate(
        name_or_path, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    dtype = dtype if torch_dtype is None else torch_dtype
    dtype = torch.float32 if dtype is None else dtype
    if adapter is None:
        return load_parts(folder, device=choose_device(device), dtype=dtype)
    # Merged in float32, and rounded after that.
    found = load_adapter(adapter, token=token, local_files_only=local_files_only)
    config, tokenizer, transformer = adapted(load_parts(folder), found, adapter_scale)
    where: dict[str, Any] = {"device": choose_device(device), "dtype": choose_dtype(dtype)}
    return Parts(config, tokenizer.to(**where), transformer.to(**where))


def locate(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the folder of a model, downloading and converting it if necessary.

    Args:
        name_or_path: see `from_pretrained`; of a training run's folder, its newest model is taken.
        revision: a commit, tag or branch, of a model on the Hugging Face Hub.
        token: for the Hub; None uses the one that `hf auth login` stored, False uses none.
        cache_dir: where downloads are kept, instead of the cache in $MASKGIT_CACHE, or in $HF_HOME for models on the
            Hub.
        local_files_only: use earlier downloads, without contacting a server.

    Raises:
        CheckpointError, ConfigError, DownloadError: there is no such model, or it cannot be downloaded.
        OutputError: it has to be downloaded, and the cache cannot be written.
    """
    name = str(name_or_path)
    # Registered names take precedence over folders of the same name; ./name is the folder.
    entry = REGISTRY.get(name)
    path = expand(name_or_path)
    try:
        is_dir, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise CheckpointError(f"{name:.200} cannot be read: {error.strerror}.") from error
    hub_id = hugging_face.HUB_ID.fullmatch(name)
    if revision is not None and (entry or exists or not hub_id):
        raise ConfigError(
            f"revision applies to models on the Hugging Face Hub, but {name:.200} is not one: leave it out."
        )
    if revision is not None and hub_id and hub_id[2]:
        raise ConfigError(f"{name:.200} already names a revision: give only one.")
    if isinstance(entry, Path):
        return entry
    if isinstance(entry, Official | Published):
        return _converted(name, entry, None if cache_dir is None else expand(cache_dir), local_files_only)
    if is_dir:
        return _model_of_run(path)
    if exists:
        raise CheckpointError(
            f"{path} is a file, not a model folder. Convert official checkpoints with `maskgit convert` first."
        )
    if hub_id:
        return hugging_face.download(
            hub_id[1],
            revision=revision or hub_id[2],
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    if "/" in name:
        raise CheckpointError(f"{name} cannot be read: there is no such folder.")
    unknown = unknown_name("model", name, REGISTRY)
    raise ConfigError(f"{unknown} Or give a model folder, or a Hugging Face id such as user/model.")


def _model_of_run(path: Path) -> Path:
    """Return the newest model in the folder of a training run; any other folder as it is."""
    if not (path / "run.json").is_file():
        return path
    if (path / "adapter").is_dir():
        raise CheckpointError(
            f"{path} is a training run of an adapter: give it as the adapter (--adapter) of the model that it adapts."
        )
    if not (path / "model").is_dir():
        raise CheckpointError(
            f"{path} is a training run without a model. Make one from its newest checkpoint with `maskgit train "
            f"save-model {path} DEST`."
        )
    return path / "model"


def _converted(name: str, entry: Official | Published, cache: Path | None, local_files_only: bool) -> Path:
    """Return the folder of a model that others released, downloading and converting it the first time."""
    files = entry.files if isinstance(entry, Published) else (entry.tokenizer, entry.transformer)
    urls = [file if isinstance(file, str) else file.url() for file in files]
    alone = isinstance(entry, Published) and entry.transformer is None
    index = "config.json" if alone else INDEX
    root = cache or cache_dir()
    folder, downloads = root / "models" / name, root / "downloads"
    if (folder / index).is_file():
        return folder
    if local_files_only and not all(download.cached(url, downloads).is_file() for url in urls):
        raise DownloadError(
            f"{name} is not in {root}, and local_files_only forbids downloads: leave it out once."
        )
    with (
        naming_the_cache() if cache is None else nullcontext(),
        locked(folder.with_name(f".{name}.convert.lock"), waits_for(f"the conversion of {name}")),
    ):
        if (folder / index).is_file():
            return folder
        paths = [_fetched(file, downloads) for file in files]
        try:
            if not isinstance(entry, Published):
                return save_parts(read_official(paths[0], paths[1]), folder)
            if alone:
                return save_tokenizer(read_published_tokenizer(entry.project, paths[0]), folder)
            return save_parts(read_published(entry.project, paths[0], paths[1], entry.sampler), folder)
        except CheckpointError as error:
            # The download may have been a proxy's error page; its checksum must not block the next attempt.
            for path in paths:
                download.forget(path)
            raise CheckpointError(
                f"The downloaded files are not {name}, and were deleted: {error}"
            ) from error


def _fetched(file: str | HubFile, downloads: Path) -> Path:
    """Return the local copy of a URL or of a file on the hub, whose checksum there is compared.

    Raises:
        DownloadError: it cannot be had, or is not what the hub states.
    """
    if isinstance(file, str):
        return download.fetch(file, folder=downloads)
    path = download.fetch(file.url(), folder=downloads)
    stated = LFS_CHECKSUM.search(download.read_text(file.url("raw"), 1024))
    for who, expected in (("the hub states", stated and stated[1]), ("this package names", file.sha256)):
        if expected and expected != download.sha256(path):
            download.forget(path)
            raise DownloadError(
                f"{file.url()} is not the file that {who} (SHA-256 {expected}), and was thrown away; try again."
            )
    return path


def load_parts(path: str | Path, *, device: Device = "cpu", dtype: Dtype | None = torch.float32) -> Parts:
    """Return the parts of the model in a folder.

    Raises:
        CheckpointError: a file is missing or broken, or weights do not match their config.
    """
    path = expand(path)
    index = read_json(path / INDEX, remedy=_REMEDY)
    version = index.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path / INDEX} has format_version {version}; this package reads {FORMAT_VERSION}."
        )
    index = {key: value for key, value in index.items() if not key.startswith("_")}
    stages = {"tokenizer": read_json(path / "tokenizer" / "config.json", remedy=_REMEDY)}
    stages["transformer"] = read_json(path / "transformer" / "config.json", remedy=_REMEDY)
    for key in stages:
        if index.pop(key, None) is None:
            raise CheckpointError(f"{path / INDEX} lacks the entry {key!r}.")
    try:
        config = ModelConfig.from_dict(index | stages)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    first = _load_stage(Tokenizer, config.tokenizer, path / "tokenizer" / WEIGHTS, device, dtype)
    second = _load_stage(Transformer, config.transformer, path / "transformer" / WEIGHTS, device, dtype)
    return Parts(config, first, second)


def load_tokenizer(
    path: str | Path, *, device: Device = "cpu", dtype: Dtype | None = torch.float32
) -> Tokenizer:
    """Return a tokenizer.

    Args:
        path: a model's folder or name, or a folder with only a tokenizer.
        device: where the weights go.
        dtype: the dtype that the network computes in.

    Raises:
        CheckpointError: a file is missing or broken, or weights do not match their config.
        ConfigError, DownloadError: there is no such model.
    """
    path = _model_of_run(expand(path)) if expand(path).is_dir() else locate(path)
    folder = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    try:
        config = TokenizerConfig.from_dict(read_json(folder / "config.json", remedy=_REMEDY))
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return _load_stage(Tokenizer, config, folder / WEIGHTS, device, dtype)


def _load_stage(
    kind: Callable[[Any], Module], config: Config, path: Path, device: Device, dtype: Dtype | None
) -> Module:
    # "auto" keeps the dtype of each weight.
    chosen = torch.float32 if dtype is None else choose_dtype(dtype)
    with shapes_only():
        module = kind(config)
    expected = weights.shapes(module.state_dict())
    counters = {name for name, tensor in module.state_dict().items() if not tensor.is_floating_point()}
    with ExitStack() as opened, weights.blaming_file(path):
        files = [opened.enter_context(weights.opened(file)) for file in _weight_files(path)]
        homes = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        found = {name: tuple(file.get_slice(name).get_shape()) for name, file in homes.items()}
        problems = weights.differences(expected, found)
        if problems:
            raise CheckpointError(f"{path} does not match its config: {weights.listed(problems)}.")
        state = {name: homes[name].get_tensor(name) for name in expected}
    wrong = [name for name, t in state.items() if t.is_floating_point() == (name in counters)]
    if wrong:
        raise CheckpointError(f"{path} does not match its config: {wrong[0]} is {state[wrong[0]].dtype}.")
    state = {name: t.to(chosen) if chosen and t.is_floating_point() else t for name, t in state.items()}
    weights.check_finite(
        state,
        path,
        f"The file is broken, or its values are too large for {chosen}: use another file, or float32.",
    )
    module.load_state_dict({name: t.to(device) for name, t in state.items()}, strict=True, assign=True)
    return module.eval()


def _weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of a network: a single file, or the shards listed in an index beside it."""
    index = path.with_name(path.name + ".index.json")
    if path.exists() or not index.exists():
        return [path]
    shards = read_json(index).get("weight_map")
    names: list[Any] = list(shards.values()) if isinstance(shards, dict) and shards else [None]
    # A name with a slash could lead out of the folder.
    if not all(isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*\.safetensors", name) for name in names):
        raise CheckpointError(f"{index} does not list the safetensors files of its weights as `weight_map`.")
    return [path.with_name(name) for name in sorted(set(names))]


def save_tokenizer(tokenizer: Tokenizer, path: str | Path, *, dtype: Dtype | None = None) -> Path:
    """Write a folder with only a tokenizer; see `save_model`."""
    config = cast(Tokenizer, weights.unwrapped(tokenizer)).config
    state = _stored(Tokenizer, config, tokenizer, dtype)

    def write(folder: Path) -> None:
        _write_stage(folder, config.to_dict(), state)

    return write_folder(path, ("config.json", WEIGHTS), write)


def _stored(
    kind: Callable[[Any], nn.Module], config: Config, module: nn.Module, dtype: Dtype | None
) -> dict[str, Tensor]:
    """Return a network's tensors in the form in which they are stored."""
    stored = choose_dtype(dtype)
    state = {
        name: tensor.to("cpu", stored if tensor.is_floating_point() else None).contiguous()
        for name, tensor in weights.own_state(kind, config, module).items()
    }
    weights.check_finite(
        state,
        f"The {kind.__name__.lower()} is not saved",
        "It is broken, or its values are too large for the dtype of the file.",
    )
    return state


def _write_stage(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config)
    weights.write(folder / WEIGHTS, state)


def push_to_hub(
    model: Model,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload a model to the Hugging Face Hub and return its URL.

    Args:
        model: the model.
        repo_id: "user/name"; created if it does not exist.
        private: whether a new repository is private.
        token: the user's; None uses the one that `hf auth login` stored.
        commit_message: for the upload.

    Raises:
        DownloadError: the Hub refuses the upload or cannot be reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        return hugging_face.upload(
            save_model(model, Path(folder) / "model"),
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message or "Upload MaskGIT model",
        )


def save_model(model: Model, path: str | Path, *, dtype: Dtype | None = None) -> Path:
    """Write a model folder, whole or not at all; an existing model folder is replaced.

    Args:
        model: the model.
        path: the folder, made if needed.
        dtype: the dtype in which floating-point weights are stored; None and "auto" keep theirs.

    Returns:
        The folder.

    Raises:
        CheckpointError: a weight is NaN or infinite, or would be in `dtype`.
        ConfigError: the model is optimized, or a network does not match its config.
        OutputError: it cannot be written, or the path holds something other than a model.
    """
    if model.engine is not None:
        raise ConfigError("An optimized model cannot be saved; save the model that it was made from.")
    return save_parts(Parts(model.config, model.tokenizer, model.transformer), path, dtype=dtype)


def save_parts(parts: Parts, path: str | Path, *, dtype: Dtype | None = None) -> Path:
    """Write the parts of a model; see `save_model`."""
    states = {
        "tokenizer": _stored(Tokenizer, parts.config.tokenizer, parts.tokenizer, dtype),
        "transformer": _stored(Transformer, parts.config.transformer, parts.transformer, dtype),
    }
    config = parts.config.to_dict()
    stages = {key: config.pop(key) for key in ("tokenizer", "transformer")}
    index = {
        "_class_name": "MaskGIT",
        "format_version": FORMAT_VERSION,
        **config,
        "tokenizer": ["maskgit", "Tokenizer"],
        "transformer": ["maskgit", "Transformer"],
    }

    def write(folder: Path) -> None:
        write_json(folder / INDEX, index)
        for name, state in states.items():
            _write_stage(folder / name, stages[name], state)

    return write_folder(path, (INDEX, "tokenizer", "transformer"), write)
