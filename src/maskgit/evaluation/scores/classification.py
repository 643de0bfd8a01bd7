"""The classification accuracy score: how well a classifier that saw samples alone knows real images.

Shapes: N samples, H × W pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from maskgit.data.pictures import Pictures
from maskgit.errors import DataError
from maskgit.evaluation.networks.classifier import classify, train_classifier
from maskgit.evaluation.scores.classwise import matched_classes, wilson_interval
from maskgit.evaluation.scores.names import Names, Score
from maskgit.foundation.units import Units


def kept_images(units: Units) -> NDArray[np.uint8]:
    """Return the images of samples kept as npz, uint8 (N, H, W, 3)."""
    images = []
    for number in range(len(units)):
        with np.load(units.path(number) / "images.npz", allow_pickle=False) as archive:
            images.append(archive["arr_0"])
    return np.concatenate(images)


def classification_accuracy(
    images: NDArray[np.uint8],
    labels: NDArray[np.int32],
    test: Pictures,
    names: Names,
    *,
    num_classes: int,
    class_names: Sequence[str] | None = None,
    training: Pictures | None = None,
    epochs: int = 14,
    device: str | torch.device = "cpu",
) -> list[Score]:
    """Return how well classifiers trained on samples, and on as many real images, know real test images.

    Args:
        images: uint8 (N, H, W, 3), samples.
        labels: int32 (N,), the classes that were asked for.
        test: real images with labels.
        names: of scores.
        num_classes: of the model.
        class_names: of the model's classes, by which those of the other images are known.
        training: real images with labels, for the ceiling.
        epochs: passes over the training images.
        device: where to train.

    Raises:
        DataError: the test images are of other classes or another size.

    Source: Ravuri, Vinyals: Classification Accuracy Score for Conditional Generative Models, NeurIPS 2019.
    """
    own = class_names, num_classes
    numbers, reason = matched_classes(test.class_names, test.num_classes, *own, f"The set {test.name}")
    if numbers is None:
        raise DataError(
            f"{reason} The classification accuracy score needs test images of the model's classes."
        )
    if test.resolution != images.shape[1:3]:
        raise DataError(
            f"The test images {test.name} have another size than the samples: pack them with --size "
            f"{images.shape[1]}."
        )
    real = test.read(range(len(test)))

    def accuracy(kind: str, pictures: NDArray[np.uint8], classes: NDArray[np.int32]) -> Score:
        classifier = train_classifier(
            pictures,
            classes,
            num_classes=num_classes,
            epochs=epochs,
            batch_size=min(256, len(pictures)),
            device=device,
        )
        right = classify(classifier, real.floats).argmax(1).numpy() == numbers[real.labels]
        return names.score(kind, float(right.mean()), wilson_interval(int(right.sum()), len(right)))

    scores = [accuracy("cas", images, labels)]
    theirs = None
    if training is not None:
        theirs = matched_classes(training.class_names, training.num_classes, *own, training.name).numbers
    if training is not None and theirs is not None:
        count = min(len(labels), len(training))
        known = training.read([i * len(training) // count for i in range(count)])
        scores.append(accuracy("cas_real", known.images, theirs[known.labels]))
    return scores
