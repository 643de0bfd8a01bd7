"""What both loops compute in, and what dropout draws from."""

import numpy as np
import torch

from maskgit.engine.host import has_bfloat16_units
from maskgit.foundation.checks import check_choice

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the type that networks compute in: "float32", "bfloat16", or "auto", bfloat16 where it is fast."""
    if name != "auto":
        check_choice("precision", name, PRECISIONS)
        return PRECISIONS[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and has_bfloat16_units()
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return the context in which networks compute in `precision`; their weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch's global generators, which dropout reads, from (seed, step, rank).

    So a resumed run draws what an uninterrupted one would. Differs: dropout depends on the rank, since torch's
    dropout cannot count by sample; runs of 1 and 2 processes agree exactly where dropout is 0.
    """
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state) % 2**63)
