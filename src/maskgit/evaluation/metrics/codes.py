"""How well a codebook is used.

Shapes: K codebook_size.
"""

import numpy as np
from numpy.typing import ArrayLike

from maskgit.errors import DataError
from maskgit.evaluation.metrics.vectors import Floats


def _probabilities(counts: ArrayLike) -> Floats:
    values = np.asarray(counts, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or (values < 0).any():
        raise DataError(
            f"Counts must be numbers of at least 0, one a code, but have the shape {values.shape}."
        )
    total = values.sum()
    if total == 0:
        raise DataError("No code was counted: there is nothing to measure.")
    return values / total


def codebook_usage(counts: ArrayLike) -> float:
    """Return the share of codes that were used at all.

    Args:
        counts: (K,), how often each code was chosen, at least one of them above 0.

    Returns:
        The share, in (0, 1].

    Raises:
        DataError: the counts are not counts, or all 0.
    """
    return float((_probabilities(counts) > 0).mean())


def perplexity(counts: ArrayLike) -> float:
    """Return the exponential of the codes' entropy: how many codes used equally often would be as varied.

    Args:
        counts: (K,), how often each code was chosen, at least one of them above 0.

    Returns:
        The perplexity, in [1, K].

    Raises:
        DataError: the counts are not counts, or all 0.

    Differs: the official `get_perplexity` adds 1e-5 inside the logarithm; this is the exact entropy.
    """
    p = _probabilities(counts)
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))
