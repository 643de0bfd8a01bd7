"""The deterministic weights of the golden records, made again from their documented rule.

A leaf at path "a/b/kernel" is drawn from Philox keyed by (crc32 of the path, seed): standard normal numbers,
scaled by what the leaf is.
"""

import math
import zlib

import numpy as np


def array(path: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return the float32 array at a path."""
    key = [zlib.crc32(path.encode()), seed]
    drawn = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
    *parents, kind = path.split("/")
    if kind == "codebook":
        return drawn
    if kind == "bias":
        return drawn * np.float32(0.1)
    if kind == "scale":
        return drawn * np.float32(0.1) + 1
    if kind == "embedding":
        return drawn * np.float32(0.05)
    fan_in = shape[0] if parents[-1] in ("query", "key", "value") else math.prod(shape[:-1])
    return drawn * np.float32(np.sqrt(1.0 / fan_in))


def arrays(shapes: dict, seed: int, prefix: str = "") -> dict[str, np.ndarray]:
    """Return every array of a nested dict of shapes by its path."""
    flat = {}
    for key, value in shapes.items():
        if isinstance(value, dict):
            flat |= arrays(value, seed, f"{prefix}{key}/")
        else:
            flat[prefix + key] = array(prefix + key, tuple(value), seed)
    return flat
