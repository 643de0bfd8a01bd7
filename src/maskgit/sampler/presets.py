"""Sampler settings in files: presets, and tables of values for each step."""

import json
from pathlib import Path
from typing import Any

from maskgit.errors import ConfigError, OutputError
from maskgit.foundation import files
from maskgit.sampler.config import SamplerConfig, StepTables

MAX_BYTES = 2**20


def read_preset(path: str | Path) -> dict[str, Any]:
    """Return the settings of a preset: those fields of `SamplerConfig` that it sets.

    A preset is a JSON object; its settings are under `sampler`, and what else it holds says how it was found.

    Raises:
        ConfigError: the file cannot be read, or a setting is unknown or out of range.
    """
    values = files.read_json(files.expand(path), ConfigError, limit=MAX_BYTES)
    settings = values.get("sampler", values)
    try:
        # A table's length can only be checked beside the steps that it is used with.
        config = SamplerConfig.from_dict(settings)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return {name: getattr(config, name) for name in settings}


def write_preset(
    path: str | Path,
    settings: dict[str, Any],
    *,
    about: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write sampler settings as a preset named after its file.

    Args:
        path: a .json file.
        settings: fields of `SamplerConfig`.
        about: how they were found: plain JSON values.
        overwrite: replace a file that is there.

    Raises:
        ConfigError: a setting is not allowed.
        OutputError: the file is there already, or cannot be written.
    """
    path = files.expand(path)
    whole = SamplerConfig.from_dict(settings).to_dict()
    if path.exists() and not overwrite:
        raise OutputError(f"{path} is there already; choose another name, or say --overwrite.")
    values = {"name": path.stem, **(about or {}), "sampler": {name: whole[name] for name in settings}}
    files.write_bytes(path, json.dumps(values, indent=2).encode() + b"\n", overwrite=overwrite)
    return path


def read_tables(path: str | Path) -> StepTables:
    """Return tables of values for each step from a JSON object of lists.

    Raises:
        ConfigError: the file cannot be read, a name is unknown, or the lists are of different lengths.
    """
    values = files.read_json(files.expand(path), ConfigError, limit=MAX_BYTES)
    try:
        tables = StepTables.from_dict(values)
        tables.check_length(tables.num_steps)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return tables
