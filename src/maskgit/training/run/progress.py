"""What people watch while a model trains: one line, a file of scalars, image grids, TensorBoard."""

import contextlib
import functools
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from maskgit.errors import ConfigError, unknown_name
from maskgit.foundation.files import output_error, write_bytes
from maskgit.images import contact_sheet, save_png
from maskgit.training.run.curves import LOSSES, Logged, draw_charts, run_charts

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from maskgit.training.distributed import Distributed

# Dense bfloat16 (float16 where there is none) FLOP/s by the makers' data sheets, by a part of the device's name.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}

# Steps at the beginning whose time says nothing of the others'.
WARM_UP_STEPS = 5
# Steps after which a run says how long it will take, if no line has said so before.
FORETELLING_STEPS = 20
# What a line tells of the test data: the first of these that was measured.
TESTED = {"test_loss": "test loss {:.4f}", "test_psnr": "test PSNR {:.1f} dB"}


def host_numbers(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Return scalars as plain numbers, those of a device in one reading."""
    scalars = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    read = torch.stack([value.detach().float() for value in scalars.values()]).tolist() if scalars else []
    there = dict(zip(scalars, read, strict=True))
    return {name: there[name] if isinstance(value, Tensor) else value for name, value in values.items()}


@functools.cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s that a large matrix product reaches here, measured once in some tens of milliseconds."""
    side = 1024 if device.type == "cpu" else 4096
    a = torch.ones(side, side, device=device, dtype=dtype)
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return a device's peak FLOP/s: its data sheet's, or what a large matrix product reaches."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = [peak for part, peak in PEAK_FLOPS.items() if part in name]
    return known[0] if known and dtype != torch.float32 else measured_peak(device, dtype)


class RunningMean:
    """The mean of a scalar since it was last read, taken where the scalar lies, so that nothing waits for it."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count = 0

    def update(self, value: Tensor) -> None:
        """Count a scalar in."""
        self._sum = self._sum + value.detach()
        self._count += 1

    def read(self) -> Tensor | float:
        """Return the mean, and begin anew."""
        mean = self._sum / max(1, self._count)
        self._sum, self._count = 0.0, 0
        return mean


class Throughput:
    """Images a second, the share of peak FLOP/s that they use (MFU), and the time left."""

    def __init__(self, images_per_step: int, flops_per_image: float = 0.0, peak: float = math.inf) -> None:
        """Start the clock.

        Args:
            images_per_step: of all processes.
            flops_per_image: forward and backward, of steps that say nothing else.
            peak: FLOP/s of all processes' devices together.
        """
        self.images_per_step = images_per_step
        self.flops_per_image = flops_per_image
        self.peak = peak
        self.images_per_second = self.mfu = 0.0
        self._steps, self._flops, self._start = 0, 0.0, time.perf_counter()
        # Steps since the beginning, and seconds of pauses among them.
        self._all_steps, self._pauses = 0, 0.0
        # FLOPs of an image → seconds of a step that spends as many, when last measured.
        self._seconds: dict[float, float] = {}
        self._kinds: set[float] = set()

    def step(self, flops_per_image: float | None = None) -> None:
        """Count a step, and the FLOPs that it spent on each image."""
        flops = self.flops_per_image if flops_per_image is None else flops_per_image
        self._steps += 1
        self._all_steps += 1
        self._flops += flops
        self._kinds.add(flops)
        if self._all_steps == self._steps == WARM_UP_STEPS:
            # The first steps allocate, compile and fill caches; nothing is to be foretold from them.
            self._restart(time.perf_counter())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of something that is not training, such as a checkpoint."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._start += seconds
        self._pauses += seconds

    def read(self) -> tuple[float, float]:
        """Return images a second and MFU since the last reading."""
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        self.images_per_second = self._steps * self.images_per_step / seconds
        self.mfu = self._flops * self.images_per_step / seconds / self.peak
        if len(self._kinds) == 1:
            self._seconds[self._kinds.pop()] = seconds / self._steps
        self._restart(now)
        return self.images_per_second, self.mfu

    def _restart(self, now: float) -> None:
        self._steps, self._flops, self._start = 0, 0.0, now
        self._kinds.clear()

    def time_left(self, steps: Mapping[float, int]) -> float:
        """Return the seconds that further steps will take, with pauses as many and as long as so far.

        Args:
            steps: how many will spend how many FLOPs on each image, such as {2e9: 500, 5e9: 1500}. Kinds of steps that
                were not measured yet are taken to last as long as their FLOPs say.
        """
        if not any(steps.values()):
            return 0.0
        if not self._seconds:
            return math.nan
        known = max(self._seconds)
        rate = self._seconds[known] / known if known else math.nan
        training = sum(n * self._seconds.get(flops, flops * rate) for flops, n in steps.items() if n)
        return training + sum(steps.values()) * self._pauses / self._all_steps


def peak_memory(device: torch.device) -> float | None:
    """Return the most bytes that training took so far: of the GPU's memory, or of the process's on a CPU, if known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if resource is None or device.type != "cpu":
        return None
    # In KiB, but on macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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


class Sheet(NamedTuple):
    """Images for people to look at, laid out row by row; n of them, H × W pixels each.

    Attributes:
        images: float (n, 3, H, W) nominally in [0, 1].
        captions: a line for each.
        columns: images a row.
    """

    images: Tensor
    captions: tuple[str, ...]
    columns: int


class Logger:
    """Writes what the main process is told; in the others it does nothing."""

    def __init__(
        self,
        run_dir: str | Path,
        distributed: "Distributed",
        *,
        start_step: int = 0,
        tracker: str = "tensorboard",
    ) -> None:
        """Open the log of a run.

        Args:
            run_dir: the run's folder.
            distributed: the processes; the main one writes.
            tracker: where it is shown besides, a name in `TRACKERS`; without the package TensorBoard,
                which is the default, is done without.
            start_step: the step that the run goes on from; what was logged beyond it is removed, for it is
                logged again.

        Raises:
            ConfigError: the tracker's package is not installed.
            OutputError: the folder cannot be written.
        """
        self.run_dir = Path(run_dir)
        self._is_main = distributed.is_main
        self._device = distributed.device
        # What was last measured on test data, as the line tells it.
        self._tested = ""
        self._opened, self._hours_before = time.perf_counter(), 0.0
        self._said: set[str] = set()
        self._bar: tqdm | None = None
        self._file: Any = None
        self._board: Tracker | None = None
        if not self._is_main:
            return
        path = self.run_dir / "scalars.jsonl"
        kept = read_scalars(path, start_step)
        self._hours_before = max((line.get("hours", 0.0) for line in kept), default=0.0)
        write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise output_error(path, error) from error
        try:
            self._board = make_tracker(tracker, self.run_dir, start_step)
        except ConfigError:
            if tracker != "tensorboard":
                raise
            self.say(f"TensorBoard is not installed (pip install tensorboard); scalars go to {path} alone.")

    def scalars(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Log numbers by name, such as {"loss": 6.2, "loss_by_ratio/0.9-1.0": 6.8}."""
        if not self._is_main:
            return
        numbers = {name: float(value) for name, value in host_numbers(values).items()}
        try:
            self._file.write(json.dumps({"step": step, **numbers}) + "\n")
            self._file.flush()
        except OSError as error:
            raise output_error(self.run_dir / "scalars.jsonl", error) from error
        for name, words in TESTED.items():
            if name in numbers:
                self._tested = f", {words.format(numbers[name])} (step {step})"
                self._draw()
                break
        if self._board is not None:
            for name, number in numbers.items():
                self._board.add_scalar(name, number, step)

    def _draw(self) -> None:
        """Draw what was logged so far."""
        draw_charts(run_charts(Logged(read_scalars(self.run_dir / "scalars.jsonl"))), self.run_dir / LOSSES)

    def sheet(self, step: int, name: str, sheet: Sheet) -> None:
        """Log a sheet of images, also as samples/{name}-{step}.png."""
        if not self._is_main:
            return
        picture = contact_sheet(
            sheet.images.float().nan_to_num(), columns=sheet.columns, captions=sheet.captions
        )
        save_png(self.run_dir / "samples" / f"{name}-{step:08d}.png", picture)
        if self._board is not None:
            pixels = torch.from_numpy(np.array(picture))
            self._board.add_image(name, pixels.movedim(-1, 0), step)

    @property
    def hours(self) -> float:
        """Hours that the run has taken, those before it was stopped counted."""
        return self._hours_before + (time.perf_counter() - self._opened) / 3600

    def progress(
        self, step: int, steps: int, *, loss: float, learning_rate: float, throughput: Throughput, left: float
    ) -> None:
        """Renew the one line that tells how the run goes; where nobody watches a terminal, print it.

        Args:
            step, steps: how many are done, and how many there will be.
            loss: the mean since the last line.
            learning_rate: the present one.
            throughput: as last read.
            left: seconds to the end.
        """
        if not self._is_main or sys.stderr is None:
            return
        speed = throughput.images_per_second
        memory = peak_memory(self._device)
        text = (
            f"loss {loss:.4f}{self._tested}, lr {learning_rate:.2g}, {speed:{',.0f' if speed >= 10 else '.2g'}} "
            f"images/s, {duration(left)} left"
        )
        text += "" if memory is None else f", {memory / 2**30:.2f} GiB"
        if not sys.stderr.isatty():
            print(f"step {step}/{steps}: {text}", file=sys.stderr, flush=True)
            return
        if self._bar is None:
            form = "step {n}/{total} |{bar:20}| {desc}"
            self._bar = tqdm(total=steps, initial=step, bar_format=form, dynamic_ncols=True)
        self._bar.n = step
        self._bar.set_description_str(text)

    def foretell(self, left: float) -> None:
        """Say early how many seconds a run will take."""
        self.say(f"About {duration(left)} to go, as the first {FORETELLING_STEPS} steps went.")

    def warn(self, name: str, step: int, sentence: str) -> None:
        """Say once, in words, that something looks wrong; `name` tells one warning from another."""
        if self._is_main and name not in self._said:
            self._said.add(name)
            self.say(f"Warning at step {step}: {sentence}")
            if self._board is not None:
                self._board.add_text("warnings", sentence, step)

    def say(self, sentence: str) -> None:
        """Print a sentence without breaking the line of progress."""
        if self._is_main and sys.stderr is not None:
            tqdm.write(sentence, file=sys.stderr)

    def close(self) -> None:
        """Write everything out, and draw the curves."""
        if self._is_main:
            self._draw()
        for opened in (self._bar, self._file, self._board):
            if opened is not None:
                opened.close()


def read_scalars(path: Path, until: float = math.inf) -> list[dict[str, Any]]:
    """Return what a run logged up to a step, a dict a line; nothing where there is no file."""
    if until == 0 or not path.is_file():
        return []
    kept = []
    for line in path.read_text("utf-8").splitlines():
        # A killed run may leave half a line at the end, and a run at work may be writing one.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            if entry["step"] <= until:
                kept.append(entry)
    return kept


def duration(seconds: float) -> str:
    """Return a duration as people read it, such as "1 h 05 min"."""
    if not math.isfinite(seconds):
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
