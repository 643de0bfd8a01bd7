"""Models on disk, in the registry, on the Hugging Face Hub, and in the cache.

A model is a folder that diffusers users know:

    model_index.json                     image size, classes, sampler settings
    tokenizer/config.json, model.safetensors
    transformer/config.json, model.safetensors

Nothing is unpickled; shapes are compared with the config before any tensor is read.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from maskgit.config import Config, ModelConfig, TokenizerConfig
from maskgit.devices import choose_device, shapes_only
from maskgit.download import cache_dir, fetch, forget
from maskgit.errors import (
    CheckpointError,
    ConfigError,
    DownloadError,
    MaskGITError,
    OutputError,
    unknown_name,
)
from maskgit.files import expand, file_mode, output_error
from maskgit.pipeline import MaskGIT
from maskgit.tokenizer import Tokenizer
from maskgit.transformer import Transformer

Module = TypeVar("Module", bound=nn.Module)

FORMAT_VERSION = 1
INDEX, WEIGHTS, CARD = "model_index.json", "model.safetensors", "README.md"
MAX_JSON_BYTES = 4 * 2**20


class Official(NamedTuple):
    """The URLs of a released pair of checkpoints."""

    tokenizer: str
    transformer: str


_RELEASED = "https://storage.googleapis.com/maskgit-public/checkpoints"
# A path is a folder inside the package.
REGISTRY: dict[str, Official | Path] = {
    "cifar10": Path(__file__).parent / "data" / "models" / "cifar10",
    "imagenet256": Official(
        f"{_RELEASED}/tokenizer_imagenet256_checkpoint", f"{_RELEASED}/maskgit_imagenet256_checkpoint"
    ),
    "imagenet512": Official(
        f"{_RELEASED}/tokenizer_imagenet512_checkpoint", f"{_RELEASED}/maskgit_imagenet512_checkpoint"
    ),
}
DEFAULT_MODEL = "cifar10"


def from_pretrained(
    name_or_path: str | Path = DEFAULT_MODEL,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> MaskGIT:
    """Return a model by name or path.

    Args:
        name_or_path: a folder written by `save_model`; a name in `REGISTRY` (an official one is downloaded
            and converted once, then kept in the cache); or a Hugging Face Hub id such as "user/model".
        device: where the weights go; "auto" takes what is there.
        dtype: the type that the networks compute in.

    Raises:
        CheckpointError, ConfigError, DownloadError: there is no such model, or it is broken.
    """
    if not dtype.is_floating_point:
        raise ConfigError(f"Networks compute in floating point, not in {dtype}.")
    return load_model(locate(name_or_path), device=choose_device(str(device)), dtype=dtype)


def locate(name_or_path: str | Path) -> Path:
    """Return the folder of a model, downloading and converting it if need be.

    Raises:
        CheckpointError, ConfigError, DownloadError: there is no such model, or it cannot be had.
    """
    name = str(name_or_path)
    # Names come first, so that a folder which happens to be called so does not hide a model; ./name is the folder.
    entry = REGISTRY.get(name)
    if isinstance(entry, Path):
        return entry
    if isinstance(entry, Official):
        return _converted(name, entry)
    path = expand(name_or_path)
    try:
        is_dir, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise CheckpointError(f"{name:.200} cannot be read: {error.strerror}.") from error
    if is_dir:
        return path
    if exists:
        raise CheckpointError(
            f"{path} is a file, not a model folder. Convert official checkpoints with `maskgit convert` first."
        )
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return _from_hugging_face(name)
    if "/" in name:
        raise CheckpointError(f"{name} cannot be read: there is no such folder.")
    unknown = unknown_name("model", name, REGISTRY)
    raise ConfigError(f"{unknown} Or give a model folder, or a Hugging Face id such as user/model.")


def _converted(name: str, urls: Official) -> Path:
    from maskgit.convert import load_official

    folder = cache_dir() / "models" / name
    if not (folder / INDEX).is_file():
        paths = fetch(urls.tokenizer), fetch(urls.transformer)
        try:
            model = load_official(*paths)
        except CheckpointError as error:
            # What came may have been a proxy's page; its checksum must not stand in the way of the next try.
            for path in paths:
                forget(path)
            raise CheckpointError(
                f"What was downloaded is not {name}, and was thrown away: {error}"
            ) from error
        save_model(model, folder)
    return folder


def _from_hugging_face(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=["*.json", "*.safetensors", "*.md"]))
    except MaskGITError:
        raise
    # The hub's client raises its own, its HTTP library's and the system's errors; for the user all are one.
    except Exception as error:
        raise DownloadError(
            f"There is no folder {repo_id!r}, and it could not be fetched from the Hugging Face Hub "
            f"({type(error).__name__}): check the name and the network, and log in with `hf auth login` if it is private."
        ) from error


def load_model(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> MaskGIT:
    """Return the model in a folder.

    Raises:
        CheckpointError: a file is missing or broken, or weights do not fit their config.
    """
    path = Path(path)
    index = _read_json(path / INDEX)
    version = index.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path / INDEX} has format_version {version}; this package reads {FORMAT_VERSION}."
        )
    index = {key: value for key, value in index.items() if not key.startswith("_")}
    stages = {"tokenizer": _read_json(path / "tokenizer" / "config.json")}
    stages["transformer"] = _read_json(path / "transformer" / "config.json")
    for key in stages:
        if index.pop(key, None) is None:
            raise CheckpointError(f"{path / INDEX} lacks the entry {key!r}.")
    try:
        config = ModelConfig.from_dict(index | stages)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    first = _load_stage(Tokenizer, config.tokenizer, path / "tokenizer" / WEIGHTS, device, dtype)
    second = _load_stage(Transformer, config.transformer, path / "transformer" / WEIGHTS, device, dtype)
    return MaskGIT(config, first, second)


def load_tokenizer(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Tokenizer:
    """Return a tokenizer.

    Args:
        path: a model's folder or name, or a folder that holds a tokenizer alone.
        device: where the weights go.
        dtype: the type that the networks compute in.

    Raises:
        CheckpointError: a file is missing or broken, or weights do not fit their config.
        ConfigError, DownloadError: there is no such model.
    """
    path = Path(path) if Path(path).is_dir() else locate(path)
    folder = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    try:
        config = TokenizerConfig.from_dict(_read_json(folder / "config.json"))
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return _load_stage(Tokenizer, config, folder / WEIGHTS, device, dtype)


def _load_stage(
    kind: Callable[[Any], Module], config: Config, path: Path, device: str | torch.device, dtype: torch.dtype
) -> Module:
    with shapes_only():
        module = kind(config)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    counters = {name for name, tensor in module.state_dict().items() if not tensor.is_floating_point()}
    try:
        path.open("rb").close()  # safetensors' own message for a file that may not be read misleads
        with safe_open(path, framework="pt", device=str(device)) as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _compare(path, expected, found)
            state = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}.") from error
    wrong = [name for name, t in state.items() if t.is_floating_point() == (name in counters)]
    if wrong:
        raise CheckpointError(f"{path} does not fit its config: {wrong[0]} is {state[wrong[0]].dtype}.")
    module.load_state_dict(
        {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()},
        strict=True,
        assign=True,
    )
    return module.eval()


def _compare(path: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is unknown" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has the shape {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{path} does not fit its config: {'; '.join(sorted(problems)[:5])}{more}.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than any config.")
        values = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}); is this a model folder?"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return values


def save_model(model: MaskGIT, path: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write a model folder, whole or not at all; one that is there is replaced.

    Args:
        model: the model.
        path: the folder, made if needed.
        dtype: the type that floating-point weights are stored in; None keeps theirs.

    Returns:
        The folder.

    Raises:
        ConfigError: the model is optimized.
        OutputError: it cannot be written, or something that is not a model stands there.
    """
    if model.engine is not None:
        raise ConfigError("An optimized model is for running; save the one that it was made from.")
    config = model.config.to_dict()
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
        for name, module in (("tokenizer", model.tokenizer), ("transformer", model.transformer)):
            _write_stage(folder / name, stages[name], module, dtype)

    return write_folder(expand(path), (INDEX, "tokenizer", "transformer"), write)


def save_tokenizer(tokenizer: Tokenizer, path: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write a folder that holds a tokenizer alone; see `save_model`."""

    def write(folder: Path) -> None:
        _write_stage(folder, tokenizer.config.to_dict(), tokenizer, dtype)

    return write_folder(expand(path), ("config.json", WEIGHTS), write)


def _write_stage(folder: Path, config: dict[str, Any], module: nn.Module, dtype: torch.dtype | None) -> None:
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config)
    state = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in module.state_dict().items()
    }
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(file_mode())  # safetensors makes it private


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write plain values as JSON that can be read by people."""
    # A class that is called after a folder whose name is no text keeps it in JSON's escapes.
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")


def write_folder(path: Path, names: tuple[str, ...], write: Callable[[Path], None]) -> Path:
    """Fill a new folder and put it in the place of `path`.

    An older one is replaced if it holds what `write` makes, `names`, and nothing else but a card, which stays.
    """
    temporary: Path | None = None
    try:
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; choose another folder.")
        held = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
        foreign = sorted(held - {*names, CARD})
        if foreign or (held and names[0] not in held):
            named = foreign[0] if foreign else sorted(held)[0]
            raise OutputError(f"{path} holds {named}, which is not part of a model; choose another folder.")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        write(new)
        if CARD in held:
            shutil.copyfile(path / CARD, new / CARD)
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(new, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise
    except (OSError, SafetensorError) as error:
        reason = error if isinstance(error, OSError) else OSError(str(error))
        raise output_error(path, reason) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return path


def push_to_hub(
    model: MaskGIT,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload a model to the Hugging Face Hub and return its URL.

    Args:
        model: the model.
        repo_id: "user/name"; made if it does not exist.
        private: whether a new one is private.
        token: the user's; None takes the one that `hf auth login` stored.
        commit_message: of the upload.

    Raises:
        DownloadError: the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "model")
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=Path(folder) / "model",
                commit_message=commit_message or "Upload MaskGIT model",
            )
        # The hub's client raises its own, its HTTP library's and the system's errors; for the user all are one.
        except Exception as error:
            raise DownloadError(
                f"{repo_id} could not be uploaded ({type(error).__name__}: {error})."
            ) from error
    return commit.repo_url.url if hasattr(commit, "repo_url") else f"https://huggingface.co/{repo_id}"
