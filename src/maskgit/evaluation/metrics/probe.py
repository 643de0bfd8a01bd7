"""A linear classifier of features in closed form: which class an image looks like.

Shapes: N images, D feature dimensions, C classes.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from maskgit.errors import DataError
from maskgit.evaluation.metrics.vectors import Floats, as_doubles, check_same_dim
from maskgit.foundation.checks import check_whole

# Strengths of regularization, in units of a standardized feature's variance, of which one is chosen.
PENALTIES = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)


class LinearProbe:
    """Ridge regression of one-hot classes on standardized features.

    Unlike the vote of nearest neighbours it is not swayed by hubs: few real images that lie near to everything.

    Attributes:
        penalty: the strength that was chosen from `PENALTIES`: that of the least squared leave-one-out error.

    Source: Hastie, Tibshirani, Friedman: The Elements of Statistical Learning, 2nd edition, §4.2, and eq. 7.64 for
    the leave-one-out error in closed form.
    """

    def __init__(self, features: ArrayLike | Tensor, labels: ArrayLike, num_classes: int) -> None:
        """Fit the probe.

        Args:
            features: float (N, D), N at least 2.
            labels: integers (N,) in [0, num_classes).
            num_classes: C.

        Raises:
            ConfigError: the number of classes is no whole number.
            DataError: the shapes do not fit, a value is not finite, or a label is out of range.
        """
        x, classes = as_doubles(features, "Features"), np.asarray(labels)
        num_classes = check_whole("num_classes", num_classes)
        if len(x) < 2 or classes.shape != (len(x),) or classes.dtype.kind not in "iu":
            raise DataError(
                f"A probe needs at least 2 images and a class number for each, but features are {x.shape} and labels "
                f"{classes.shape} of {classes.dtype}."
            )
        if classes.min() < 0 or classes.max() >= num_classes:
            raise DataError(
                f"Labels must be 0 to {num_classes - 1}, but reach from {classes.min()} to {classes.max()}."
            )
        self._mean, scale = x.mean(0), x.std(0)
        # A feature that never changes says nothing, and is not to be divided by 0.
        self._scale = np.where(scale > 0, scale, 1.0)
        z = (x - self._mean) / self._scale
        targets = np.eye(num_classes)[classes]
        self._shares = targets.mean(0)
        targets -= self._shares
        values, vectors = np.linalg.eigh(z.T @ z / len(z))
        rotated, products = z @ vectors, vectors.T @ (z.T @ targets) / len(z)

        def error(penalty: float) -> float:
            shrunk = 1 / (values.clip(min=0) + penalty)
            residuals = targets - rotated @ (shrunk[:, None] * products)
            leverage = (np.square(rotated) @ shrunk + 1) / len(z)
            return float(np.square(residuals / (1 - leverage)[:, None]).mean())

        self.penalty = min(PENALTIES, key=error)
        self._weights: Floats = vectors @ (products / (values.clip(min=0) + self.penalty)[:, None])

    def classes(self, features: ArrayLike | Tensor) -> NDArray[np.int64]:
        """Return the class that each image looks like, int64 (N,).

        Raises:
            DataError: the shape does not fit, or a value is not finite.
        """
        x = as_doubles(features, "Features")
        check_same_dim(x, self._mean[None])
        return ((x - self._mean) / self._scale @ self._weights + self._shares).argmax(1)
