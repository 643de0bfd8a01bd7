"""Masked sequences filled in, a batch at a time, and turned into images.

Shapes: B images, S the sequence with its class token, h × w the token grid.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from maskgit.foundation.checks import check_whole
from maskgit.foundation.devices import Landing, copies_aside, upload
from maskgit.foundation.forks import check_process
from maskgit.model import Model
from maskgit.results import Draw, Output, Trace, join_outputs
from maskgit.sampler.config import SamplerConfig
from maskgit.sampler.loop import Decoded, decode_steps
from maskgit.sampler.noise import ImageNoise
from maskgit.sampler.plans import num_steps
from maskgit.sampler.policies import make_policy
from maskgit.sampler.policies.base import log_probs_of


def fill(
    model: Model,
    sequences: Tensor,
    config: SamplerConfig,
    draw: Draw | None = None,
    *,
    start_step: int = 0,
    switch: tuple[int, Tensor] | None = None,
) -> Output:
    """Fill in masked sequences, a batch at a time, and turn the result into images.

    Args:
        sequences: int64 (B, S), as `Vocabulary.sequence` makes them.
        config: how they are decoded.
        draw: which images these are; None is seed 0 from index 0.
        start_step: the step to begin decoding at.
        switch: (step, class tokens int64 (B,)) to go on with other classes from that step.

    Returns:
        `Output` with B images.

    Raises:
        ConfigError: a setting is out of range.
    """
    # The model's own, which may be another one: a server's model fills in its worker's batches.
    made = model.fill_batches(sequences, config, draw or Draw(), start_step=start_step, switch=switch)
    return join_outputs(list(made))


def fill_batches(
    model: Model,
    sequences: Tensor,
    config: SamplerConfig,
    draw: Draw,
    *,
    start_step: int = 0,
    switch: tuple[int, Tensor] | None = None,
) -> Iterator[Output]:
    """Give the `Output` of each batch as soon as it is there; see `fill`.

    On a GPU the steps of a batch are under way before the pixels of the last are waited for, so that the
    device is busy while the caller writes them.
    """
    check_process(model.device)
    start_step = check_whole("start_step", start_step)
    policy = make_policy(config.policy, config.policy_options)
    known = draw.return_steps or policy.reads_known
    steps = num_steps(config, model.vocabulary.num_tokens, remasks=policy.remasks, start_step=start_step)
    draw.announce(steps * math.ceil(len(sequences) / draw.batch_size))
    waiting: tuple[Landing, list[Trace]] | None = None
    for start in range(0, len(sequences), draw.batch_size):
        rows = slice(start, start + draw.batch_size)
        batch = upload(sequences[rows], model.device)
        first = draw.first_index + start
        indices = torch.arange(first, first + len(batch), device=model.device)
        noise = ImageNoise(draw.seed, indices, batch.shape[1], model.vocabulary.num_logits)
        part = None if switch is None else (switch[0], upload(switch[1][rows], model.device))
        history = []
        for made in _steps(model, batch, config, noise, start_step, part, known=known, drafts=draw.drafts):
            grid = model.vocabulary.grid(made.tokens)
            if draw.return_steps:
                history.append(_record(model, made))
            if draw.callback is not None:
                draw.callback(made.step, indices, grid)
        landing = Landing(grid, model.decode_on_device(grid)) if draw.pixels else Landing(grid)
        if waiting is not None:
            yield _output(*waiting)
        waiting = landing, history
        if not copies_aside(model.device):
            yield _output(*waiting)
            waiting = None
    if waiting is not None:
        yield _output(*waiting)


def _steps(
    model: Model,
    sequences: Tensor,
    config: SamplerConfig,
    noise: ImageNoise,
    start_step: int,
    switch: tuple[int, Tensor] | None,
    *,
    known: bool,
    drafts: bool,
) -> Iterator[Decoded]:
    """Give the steps of decoding; from the step of the switch on, the class tokens are others.

    The logits of known tokens are there only if `known` says so, and tokens that are masked again if `drafts` does.
    """
    options: dict[str, Any] = {
        "mask_token": model.vocabulary.mask,
        "noise": noise,
        "start_step": start_step,
        "step_function": model.decode_step,
        "groups": model.vocabulary.groups,
        "drafts": drafts,
    }
    state = None
    if switch is not None:
        step, classes = switch
        if step > start_step:
            for made in decode_steps(model.predictor(known=known), sequences, config, **options):
                yield made
                state = made.state
                if state is None:
                    return
                if state.step == step:
                    sequences = state.sequence
                    break
        sequences = torch.cat([classes[:, None], sequences[:, 1:]], dim=1)
        state = None if state is None else state._replace(sequence=sequences)
    yield from decode_steps(model.predictor(known=known), sequences, config, state=state, **options)


def _record(model: Model, made: Decoded) -> Trace:
    """Return what a trace keeps of one step."""
    parts = (made.tokens, made.unknown, log_probs_of(made.logits, made.tokens).exp())
    return Trace(*(model.vocabulary.grid(part).cpu() for part in parts))


def _output(landing: Landing, history: list[Trace]) -> Output:
    """Wait for a batch."""
    tokens, *pixels = landing.wait()
    images = pixels[0] if pixels else torch.empty(len(tokens), 3, 0, 0)
    return Output(images, tokens, _stack(history) if history else None)


def _stack(history: list[Trace]) -> Trace:
    """Join the steps of a batch."""
    return Trace(
        *(
            torch.stack([getattr(step, name) for step in history], 1)
            for name in ("tokens", "unknown", "confidence")
        )
    )
