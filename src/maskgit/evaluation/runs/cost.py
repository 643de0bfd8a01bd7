"""What an image costs, so that settings can be compared at equal cost."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from maskgit.evaluation.report.report import Cost
from maskgit.foundation.devices import shapes_only
from maskgit.foundation.units import Units
from maskgit.model import Model
from maskgit.sampler.config import SamplerConfig
from maskgit.sampler.loop import decode_steps
from maskgit.sampler.noise import ImageNoise


def cost_of_samples(units: Units, model: Model, sampler: SamplerConfig) -> Cost:
    """Return what an image of finished samples costs.

    Args:
        units: of a `Samples` work.
        model: that made them.
        sampler: how they were decoded.
    """
    by_step = passes_by_step(model, sampler)
    notes = [units.read(number).notes for number in range(len(units))]
    count = units.work.count
    if not all("steps" in note for note in notes):
        passes, seconds = float(sum(by_step)), None
    else:
        seconds = sum(note["seconds"] for note in notes) / count
        # A policy that adapts may end early, and later steps than the first may be guided.
        steps = sum(note["steps"] for note in notes) / count
        whole = int(steps)
        passes = sum(by_step[:whole]) + (steps - whole) * (by_step[whole] if whole < len(by_step) else 0)
    forward, decode = network_flops(model)
    return Cost(passes, passes * forward + decode, seconds)


def passes_by_step(model: Model, sampler: SamplerConfig) -> list[int]:
    """Return how many forward passes each step of one image takes, found by decoding without a network."""
    vocabulary = model.vocabulary
    sequence = vocabulary.sequence(torch.zeros(1, dtype=torch.int64))
    passes: list[int] = []
    counted = 0

    def predict(rows: torch.Tensor) -> torch.Tensor:
        nonlocal counted
        counted += len(rows)
        return torch.zeros(*rows.shape, vocabulary.num_logits)

    noise = ImageNoise(0, torch.zeros(1, dtype=torch.int64), sequence.shape[1], vocabulary.num_logits)
    for _ in decode_steps(predict, sequence, sampler, mask_token=vocabulary.mask, noise=noise):
        passes.append(counted)
        counted = 0
    return passes


def network_flops(model: Model) -> tuple[int, int]:
    """Return the operations of one forward pass of the transformer and of decoding one image's tokens."""
    with shapes_only():
        transformer = type(model.transformer)(model.config.transformer).eval()
        tokenizer = type(model.tokenizer)(model.config.tokenizer).eval()
        sequence = model.vocabulary.sequence(torch.zeros(1, dtype=torch.int64))
        grid = torch.zeros_like(model.vocabulary.grid(sequence))
    counts = []
    for run in (
        lambda: transformer(sequence, codes=model.vocabulary.num_logits),
        lambda: tokenizer.decode(grid),
    ):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    return counts[0], counts[1]
