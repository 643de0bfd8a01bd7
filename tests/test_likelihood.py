"""Pseudo-likelihoods against plain loops over tokens; the best of many against a plain generation."""

import math

import numpy as np
import pytest
import torch

from maskgit.editing import likelihood
from maskgit.errors import ConfigError, RegionError


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 64, (3, 8, 8), generator=torch.Generator().manual_seed(1))


def one_by_one(model, tokens, label, known):
    """Return the sum of log p(token | all other known ones), by as many evaluations as tokens."""
    sequence = model.vocabulary.sequence(torch.tensor([label]), tokens[None], ~known)
    total = 0.0
    for place in known.flatten().nonzero()[:, 0].tolist():
        asked = sequence.clone()
        asked[0, place + 1] = model.vocabulary.mask
        total += float(model.predict_logits(asked)[0, place + 1].log_softmax(-1)[sequence[0, place + 1]])
    return total


def test_as_many_folds_as_tokens_are_the_definition(tiny, tokens):
    known = torch.zeros(8, 8, dtype=torch.bool)
    known[:3, 2:7] = True
    found = tiny.log_likelihood(tokens, [1, 5, 9], token_mask=~known, folds=15)
    for image, label, value in zip(tokens, (1, 5, 9), found, strict=True):
        assert float(value) == pytest.approx(one_by_one(tiny, image, label, known), abs=1e-3)


def test_one_fold_scores_each_token_by_the_class_alone(tiny, tokens):
    masked = tiny.vocabulary.sequence(torch.tensor([4]))
    log_probs = tiny.predict_logits(masked)[0, 1:].log_softmax(-1)
    expected = [float(log_probs[torch.arange(64), image.flatten()].sum()) for image in tokens]
    assert tiny.log_likelihood(tokens, 4, folds=1).tolist() == pytest.approx(expected, abs=1e-3)


def test_unknown_tokens_are_neither_scored_nor_shown(tiny, tokens):
    unknown = torch.zeros(3, 8, 8, dtype=torch.bool)
    unknown[:, 4:] = True
    other = torch.where(unknown, tokens.flip(0), tokens)
    for folds in (1, 4):
        scores = [tiny.log_likelihood(t, 2, token_mask=unknown, folds=folds) for t in (tokens, other)]
        assert torch.equal(*scores)
    assert (tiny.log_likelihood(tokens, 2, token_mask=torch.ones_like(unknown)) == 0).all()


def test_a_score_depends_on_the_seed_but_not_on_the_batch(tiny, tokens):
    together = tiny.log_likelihood(tokens, 2)
    for size in (1, 2):
        torch.testing.assert_close(tiny.log_likelihood(tokens, 2, batch_size=size), together)
    torch.testing.assert_close(tiny.log_likelihood(tokens[2:], 2), together[2:])
    assert not torch.equal(tiny.log_likelihood(tokens, 2, seed=1), together)


@pytest.fixture
def biased(tiny, monkeypatch):
    """A model that gives class c's code c the probability 1/2 everywhere, and the others the rest."""

    def predict(sequence):
        logits = torch.full((*sequence.shape, 64), math.log(0.5 / 63))
        label = (sequence[:, 0] - 64).clamp(0, 63)
        return logits.scatter(2, label[:, None, None].expand(-1, sequence.shape[1], 1), math.log(0.5))

    monkeypatch.setattr(tiny, "predict_logits", predict)
    return tiny


@pytest.mark.parametrize("shortlist", [1, 3, 32])
def test_the_class_is_guessed_by_bayes_rule(biased, shortlist):
    tokens = torch.full((8, 8), 63)
    tokens[:2], tokens[2] = 7, 3
    found = biased.guess_class(tokens, shortlist=shortlist)
    counts = torch.tensor([(tokens == label).sum() for label in range(10)])
    expected = counts * math.log(0.5) + (64 - counts) * math.log(0.5 / 63)
    listed = found.isfinite()
    assert int(listed.sum()) == min(10, shortlist if shortlist < 5 else 10)
    torch.testing.assert_close(found[listed], expected[listed].float())
    assert int(found.argmax()) == 7
    unknown = torch.zeros(8, 8, dtype=torch.bool)
    unknown[:2] = True
    assert int(biased.guess_class(tokens, unknown).argmax()) == 3


@pytest.mark.parametrize("batch_size", [2, 5, 16])
def test_the_best_are_the_best_of_a_plain_generation(tiny, batch_size):
    options = {"steps": 3, "seed": 8, "first_index": 4}
    plain = tiny.generate([1, 2], num_images=5, **options)
    light = plain.images.mean((1, 2, 3)).unflatten(0, (2, 5))
    best = light.topk(2).indices + torch.tensor([[0], [5]])
    seen = []

    def scorer(images, labels):
        seen.append((len(images), set(labels.tolist())))
        return images.mean((1, 2, 3))

    made = tiny.generate_best(
        [1, 2], candidates=5, num_images=2, scorer=scorer, batch_size=batch_size, **options
    )
    assert torch.equal(made.tokens, plain.tokens[best.flatten()])
    assert made.indices.tolist() == (best.flatten() + 4).tolist()
    torch.testing.assert_close(made.scores, light.topk(2).values.flatten())
    assert max(count for count, _ in seen) == min(batch_size, 5)
    assert [labels for _, labels in seen] == sorted((labels for _, labels in seen), key=min)
    alone = tiny.generate(2, steps=3, seed=8, first_index=int(made.indices[2]))
    assert torch.equal(alone.tokens[0], made.tokens[2])


def test_the_model_judges_its_own_images(tiny):
    plain = tiny.generate(1, num_images=6, steps=3)
    scores = tiny.log_likelihood(plain.tokens, 1)
    made = tiny.generate_best(1, candidates=6, num_images=6, steps=3)
    assert torch.equal(made.tokens, plain.tokens[scores.sort(descending=True, stable=True).indices])
    torch.testing.assert_close(made.scores, scores.sort(descending=True).values)


def test_only_batches_of_the_best_are_decoded(tiny, monkeypatch):
    plain = tiny.generate(1, num_images=9, steps=3, batch_size=2)
    decoded = []
    decode = type(tiny).decode_on_device
    monkeypatch.setattr(
        type(tiny),
        "decode_on_device",
        lambda self, tokens: decoded.append(len(tokens)) or decode(self, tokens),
    )
    made = tiny.generate_best(1, candidates=9, num_images=2, steps=3, batch_size=2)
    assert torch.equal(made.images, plain.images[made.indices]), "to the bit"
    assert sum(decoded) <= 4


def test_equal_scores_keep_the_first(tiny):
    made = tiny.generate_best(
        1, candidates=7, num_images=3, steps=1, batch_size=2, scorer=lambda images, _: np.zeros(len(images))
    )
    assert made.indices.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "scorer", [lambda i, _: i, lambda i, _: torch.full((len(i),), torch.nan), lambda *_: [0.0] * 99]
)
def test_wrong_scorers_are_told(tiny, scorer):
    with pytest.raises(ConfigError, match="finite numbers"):
        tiny.generate_best(1, candidates=2, steps=1, scorer=scorer)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, t: m.log_likelihood(t[0], 1), RegionError, r"shape \(B, 8, 8\)"),
        (lambda m, t: m.log_likelihood(t.float(), 1), RegionError, "int64"),
        (lambda m, t: m.log_likelihood(t + 64, 1), RegionError, "codes from 0 to 63"),
        (lambda m, t: m.log_likelihood(t, [1, 2]), ConfigError, "2 labels for 3 images"),
        (lambda m, t: m.log_likelihood(t, 10), ConfigError, "classes are 0 to 9"),
        (lambda m, t: m.log_likelihood(t, 1, folds=0), ConfigError, "folds must be"),
        (lambda m, t: m.log_likelihood(t, 1, batch_size=0), ConfigError, "batch_size"),
        (lambda m, t: m.log_likelihood(t, 1, token_mask=torch.ones(3, 3) > 0), RegionError, "token_mask"),
        (lambda m, t: m.guess_class(t), RegionError, "One image"),
        (lambda m, t: m.guess_class(t[0], torch.ones(8, 8) > 0), RegionError, "name a class"),
        (lambda m, t: m.guess_class(t[0], shortlist=0), ConfigError, "shortlist"),
        (lambda m, t: m.generate_best(1, candidates=0), ConfigError, "candidates must be"),
        (lambda m, t: m.generate_best(1, candidates=2, num_images=3), ConfigError, "num_images must be"),
        (lambda m, t: m.generate_best([], candidates=2), ConfigError, "label"),
    ],
)
def test_wrong_arguments_are_told(tiny, tokens, call, error, message):
    with pytest.raises(error, match=message):
        call(tiny, tokens)


def test_the_functions_are_the_models_methods(tiny):
    assert type(tiny).guess_class is likelihood.guess_class
