"""Test data whose classes are numbered otherwise than the training data's."""

import numpy as np
import pytest
import torch

from maskgit import hub
from maskgit.checkpoints.weights import weights_fingerprint
from maskgit.data.image_cache import write_image_cache
from maskgit.data.token_cache import write_token_cache
from maskgit.training.distributed import Distributed
from maskgit.training.evaluation import evaluate_loss
from maskgit.training.inputs import open_tokens
from maskgit.training.transformer_config import TransformerTrainingConfig

NAMES = tuple(f"class {c}" for c in "jihgfedcba")


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """A folder with a tokenizer, and tokens of the same images under three lists of class names."""
    folder = tmp_path_factory.mktemp("classes")
    hub.save_tokenizer(tiny.tokenizer, folder / "tokenizer")
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8), np.arange(20) % 10
    for name, names in (
        ("own", NAMES),
        ("sorted", tuple(sorted(NAMES))),
        ("other", tuple(str(i) for i in range(1, 11))),
    ):
        numbers = np.array([names.index(NAMES[label]) if name == "sorted" else label for label in labels])
        write_token_cache(
            write_image_cache(folder / f"{name}-images", images, numbers, names),
            tiny.tokenizer,
            folder / name,
            tokenizer_fingerprint=weights_fingerprint(tiny.tokenizer),
            num_codes=tiny.config.tokenizer.codebook_size,
            views="centre",
        )
    return folder


def opened(place, tiny, test):
    return open_tokens(
        TransformerTrainingConfig(
            data=str(place / "own"),
            test_data=str(place / test),
            tokenizer=str(place / "tokenizer"),
            out=str(place / "run"),
            model=tiny.config.transformer,
            batch_size=4,
        )
    )


def test_the_test_loss_goes_by_the_names_of_classes(place, tiny):
    losses = []
    for test in ("own", "sorted"):
        inputs = opened(place, tiny, test)
        assert inputs.notes == ()
        losses.append(
            evaluate_loss(
                tiny.transformer,
                inputs.test_cache,
                tiny.vocabulary,
                classes=inputs.test_classes,
                seed=0,
                batch_size=4,
                mask_schedule="cosine",
                precision=torch.float32,
                distributed=Distributed(0, 1, torch.device("cpu")),
            )
        )
    assert losses[0] == losses[1]


def test_names_that_do_not_match_are_told(place, tiny):
    inputs = opened(place, tiny, "other")
    assert "differently from the model" in inputs.notes[0]
    assert "taken by their numbers" in inputs.notes[0]
    assert inputs.test_classes.tolist() == list(range(10))
