"""Optimization as both loops do it: learning rates as functions of the step, clipping, averaged weights."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from maskgit.errors import CheckpointError
from maskgit.foundation.checks import check_choice
from maskgit.foundation.devices import copies_aside
from maskgit.networks.transformer import Transformer

# What remains of the peak at some progress in [0, 1] after the warm-up, before the final decay.
LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    # Warm-up, stable, decay.
    "wsd": lambda progress: 1.0,
}
# Steps of "wsd" for each step of its decay, where the config does not say.
WSD_DECAY = 5


def final_decay(schedule: str, total_steps: int, decay_steps: int | None) -> int:
    """Return how many steps at the end a learning rate falls to zero over: as given, or as the schedule has it."""
    if decay_steps is None:
        return total_steps // WSD_DECAY if schedule == "wsd" else 0
    return decay_steps


def learning_rate(
    step: int,
    *,
    peak: float,
    schedule: str = "constant",
    warmup_steps: int = 0,
    total_steps: int = 1,
    decay_steps: int | None = None,
    schedule_steps: int | None = None,
) -> float:
    """Return the learning rate of a step: a linear warm-up, a curve down from the peak, and a final decay.

    A function of the step and these settings alone, so that a run resumes exactly and settings may change in its
    middle.

    Args:
        step: counted from 0; the first step of a warm-up already moves, by peak / warmup_steps.
        peak: the highest rate.
        schedule: a name in `LR_SCHEDULES`.
        warmup_steps: steps until the peak.
        total_steps: the run's length.
        decay_steps: at the end, the rate is scaled by a straight line from 1 to 0 over so many steps; None is a
            fifth of all for "wsd", and none for the others.
        schedule_steps: where a falling schedule ends; None is the run's length. It lets a run be ended early by a
            decay from where the schedule stands.

    Returns:
        The rate, in [0, peak].

    Raises:
        ConfigError: the schedule is unknown.
    """
    check_choice("lr_schedule", schedule, LR_SCHEDULES)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, (schedule_steps or total_steps) - warmup_steps)
    rate = peak * LR_SCHEDULES[schedule](min(progress, 1.0))
    decay = final_decay(schedule, total_steps, decay_steps)
    return rate * min(1.0, max(0, total_steps - step) / decay) if decay else rate


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Give all parameter groups of some optimizers one learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def parameter_groups(
    model: nn.Module, weight_decay: float, but: Iterable[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Return a model's parameters for an optimizer, with weight decay on matrices alone.

    Args:
        model: its trainable parameters are taken, shared ones once.
        weight_decay: for parameters of two dimensions or more; biases and norms get none.
        but: parameters that are left out.

    Returns:
        Two groups (or one, if the other is empty), in the order of `model.named_parameters`.
    """
    others = {id(p) for p in but}
    trainable = [p for p in model.parameters() if p.requires_grad and id(p) not in others]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


OPTIMIZERS = ("adamw", "muon")


def transformer_optimizers(
    transformer: Transformer, name: str, *, weight_decay: float, betas: tuple[float, ...]
) -> list[torch.optim.Optimizer]:
    """Return a transformer's optimizers: AdamW alone, or Muon for the matrices of the layers and AdamW for the rest.

    Args:
        transformer: on its device.
        name: a name in `OPTIMIZERS`.
        weight_decay: of matrices.
        betas: AdamW's.

    Source: Muon is torch's, whose updates are scaled to be as large as AdamW's, so that one learning rate serves both
    (arXiv 2502.16982, §2.2).
    """
    check_choice("optimizer", name, OPTIMIZERS)
    own = [p for p in transformer.layers.parameters() if p.ndim == 2 and p.requires_grad]
    matrices = own if name == "muon" else []
    device = transformer.token_embedding.weight.device
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            parameter_groups(transformer, weight_decay, matrices),
            lr=0.0,
            betas=(betas[0], betas[1]),
            fused=device.type == "cpu" or copies_aside(device),
        )
    ]
    if matrices:
        muon = torch.optim.Muon(matrices, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        made.append(muon)
    return made


def make_adam(parameters: Iterable[nn.Parameter], betas: tuple[float, ...]) -> torch.optim.Adam:
    """Return Adam with its state at zero, so that a checkpoint taken before its first step changes nothing.

    Args:
        parameters: what it moves.
        betas: the decay rates of its two averages.
    """
    parameters = list(parameters)
    # On a GPU, where every kernel is launched, and where `UpdateGate` needs it.
    fused = copies_aside(parameters[0].device)
    optimizer = torch.optim.Adam(parameters, lr=0.0, betas=(betas[0], betas[1]), fused=fused)
    for parameter in parameters:
        optimizer.state[parameter] = {
            # Where it is not fused the host reads it at each step.
            "step": torch.zeros((), device=parameter.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients so that their norm over all parameters is at most `max_norm`.

    Args:
        parameters: those whose `grad` is set.
        max_norm: infinity only measures.

    Returns:
        float32 (), the norm before clipping, over all shards where parameters are sharded.
    """
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def warm_decay(decay: float, step: int) -> float:
    """Return the decay of an average at a step: small at first, so that it forgets the initial weights.

    It averages over about the last ninth of the run until that is longer than `decay` reaches.

    Source: TensorFlow's ExponentialMovingAverage with `num_updates`, min(decay, (1 + n) / (10 + n)).
    """
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """An exponential moving average of a module's parameters, with its buffers as they are.

    The average is float32 and lies, sharded or not, where the parameters lie.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Start the average at the module's present weights.

        Args:
            module: what to average.
            decay: the share of the average that an update keeps, in [0, 1).
        """
        self.decay = decay
        self.average = {name: _averaged(value).clone() for name, value in _weights(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int | None = None) -> None:
        """Move the average a step towards the module's weights.

        Args:
            module: what is averaged.
            step: the run's, counted from 0, by which the decay warms up; None is one whose warm-up is over.
        """
        decay = self.decay if step is None else warm_decay(self.decay, step)
        averages, values = [], []
        for name, value in _weights(module).items():
            if isinstance(value, nn.Parameter):
                averages.append(_local(self.average[name]))
                values.append(_local(value).float())
            else:
                self.average[name].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's weights with the average."""
        for name, value in _weights(module).items():
            value.copy_(self.average[name])

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Let the module hold the average inside a `with` block, and its own weights again after it."""
        own = {name: value.detach().clone() for name, value in _weights(module).items()}
        self.copy_to(module)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in _weights(module).items():
                    value.copy_(own[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by name; the tensors are those in use, not copies."""
        return dict(self.average)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take averages that `state_dict` returned.

        Raises:
            CheckpointError: the names or shapes are not those of the module.
        """
        shapes = {name: value.shape for name, value in self.average.items()}
        if {name: value.shape for name, value in state.items()} != shapes:
            raise CheckpointError(
                "The averaged weights in the checkpoint are not those of this network. "
                "Go on with the config that the run began with."
            )
        for name, value in state.items():
            self.average[name].copy_(value)


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _averaged(value: Tensor) -> Tensor:
    value = value.detach()
    return value.float() if value.is_floating_point() else value


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
