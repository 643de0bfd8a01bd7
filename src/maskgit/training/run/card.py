"""The card of a trained model: how it was made, for whoever meets it later."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskgit.errors import OutputError
from maskgit.foundation import __version__
from maskgit.foundation.files import CARD, write_bytes
from maskgit.training.run.folder import RUN
from maskgit.training.run.progress import Logger

# A card without it was written by hand, and stays.
MARK = "<!-- Written by `maskgit train`, which replaces it; without this line it stays. -->"
# What says where things lay on the machine that trained, or does not bear on the model.
LEFT_OUT = (
    "out", "tracker", "device", "num_workers", "log_every", "evaluate_every", "sample_every", "checkpoint_every",
    "keep_last", "keep_best", "async_checkpoints", "num_samples", "sampler",
)  # fmt: skip


@contextmanager
def telling(logger: Logger, goes_on: bool) -> Iterator[None]:
    """Say what a model could not be written for, instead of ending a run that still goes on."""
    try:
        yield
    except OutputError as error:
        if not goes_on:
            raise
        logger.say(f"{error} Training goes on.")


def save_card(model: Path, run_dir: Path, step: int, scores: Mapping[str, float]) -> None:
    """Write the card into a model's folder, unless somebody's own is there.

    Args:
        model: the folder.
        run_dir: the run that made it, whose settings and events are told.
        step: the steps that its weights have behind them.
        scores: what was measured of them, by name.
    """
    path = model / CARD
    if path.is_file() and MARK not in path.read_text("utf-8", "replace"):
        return
    stored = json.loads((run_dir / RUN).read_text("utf-8"))
    write_bytes(path, card(stored, step, scores).encode("utf-8", "backslashreplace"))


def card(stored: Mapping[str, Any], step: int, scores: Mapping[str, float]) -> str:
    """Return the card's text, Markdown.

    Args:
        stored: a run's `run.json`.
        step: the steps that the weights have behind them.
        scores: what was measured of them, by name.
    """
    config, events = stored["config"], [e for e in stored.get("events", []) if e["step"] < step]
    stage = "transformer" if "mask_schedule" in config else "tokenizer"
    made = f"An adapter of {config['init_from']}" if config.get("lora", {}).get("rank") else f"A {stage}"
    settings = {
        key: value for key, value in config.items() if key not in LEFT_OUT and value not in (None, [], {})
    }
    measured = [f"- {name}: {value:.4g}" for name, value in scores.items()]
    changed = [
        f"- At step {event['step']:,}: "
        + ", ".join(
            f"`{key}` from {_shown(old)} to {_shown(new)}" for key, (old, new) in event["changed"].items()
        )
        for event in events
    ]
    data = [f"- {name}: `{fingerprint[:16]}`" for name, fingerprint in stored["data"].items()]
    parts = [
        MARK,
        f"# {made} trained with maskgit {__version__}",
        f"After {step:,} of {config['steps']:,} steps with batches of {config['batch_size']:,}.",
        *(("## Measured\n" + "\n".join(measured),) if measured else ()),
        *(("## Changed while it trained\n" + "\n".join(changed),) if changed else ()),
        "## Fingerprints of the data\n" + "\n".join(data),
        "## Settings\n```json\n" + json.dumps(settings, indent=1, ensure_ascii=False) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _shown(value: Any) -> str:
    return f"`{json.dumps(value)}`"
