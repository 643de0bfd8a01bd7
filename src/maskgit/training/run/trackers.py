"""Where scalars and pictures of a run are shown, besides the files in its folder."""

import hashlib
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from maskgit.errors import ConfigError, unknown_name


class Tracker(Protocol):
    """What the log writes to."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Show a number."""
        ...

    def add_image(self, name: str, image: Tensor, step: int) -> None:
        """Show a picture, uint8 (3, H, W)."""
        ...

    def add_text(self, name: str, text: str, step: int) -> None:
        """Show a sentence."""
        ...

    def close(self) -> None:
        """Write everything out."""
        ...


class WeightsAndBiases:
    """Weights & Biases; a run that goes on is the same run there."""

    def __init__(self, run_dir: Path) -> None:
        import wandb

        self._wandb: Any = wandb
        # One id for one folder, so that going on does not begin a second run.
        name = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
        self._run: Any = wandb.init(
            project="maskgit", name=run_dir.name, id=name, dir=str(run_dir), resume="allow"
        )

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Show a number."""
        self._run.log({name: value}, step=step)

    def add_image(self, name: str, image: Tensor, step: int) -> None:
        """Show a picture, uint8 (3, H, W)."""
        self._run.log({name: self._wandb.Image(image.movedim(0, -1).numpy())}, step=step)

    def add_text(self, name: str, text: str, step: int) -> None:
        """Show a sentence."""
        self._run.alert(title=name, text=f"step {step}: {text}")

    def close(self) -> None:
        """Write everything out."""
        self._run.finish()


def _tensorboard(run_dir: Path, start_step: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)


TRACKERS = {
    "tensorboard": _tensorboard,
    "wandb": lambda run_dir, start_step: WeightsAndBiases(run_dir),
    "none": lambda run_dir, start_step: None,
}


def make_tracker(name: str, run_dir: Path, start_step: int = 0) -> Tracker | None:
    """Return the tracker of a name.

    Args:
        name: one of `TRACKERS`.
        run_dir: the run's folder.
        start_step: the step that the run goes on from.

    Returns:
        The tracker; None for "none".

    Raises:
        ConfigError: the name is unknown, or its package is not installed.
    """
    if name not in TRACKERS:
        raise unknown_name("tracker", name, TRACKERS)
    try:
        return TRACKERS[name](run_dir, start_step)
    except ImportError as error:
        raise ConfigError(
            f'{name} is not installed: `pip install {name}`, or choose tracker = "none".'
        ) from error
