"""How likely tokens are: which class an image is of, and the best of many images.

A masked model has no likelihood that can be computed, but a pseudo-likelihood: of each token, given others.
Tokens are dealt into folds; each fold is masked in turn and predicted from the rest.

Shapes: B images, h × w the token grid, S the sequence with its class token, C classes.
Source: Besag: Statistical Analysis of Non-Lattice Data (1975); for masked models, Salazar et al., arXiv
1910.14659.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskgit.editing.fill import fill
from maskgit.errors import ConfigError, RegionError
from maskgit.foundation.checks import check_count
from maskgit.foundation.devices import upload
from maskgit.model import Label, Model
from maskgit.results import DEFAULT_BATCH_SIZE, Callback, Draw, Output
from maskgit.sampler.noise import FOLDS, ImageNoise
from maskgit.sampler.plans import num_steps
from maskgit.sampler.policies import make_policy
from maskgit.sampler.policies.critic import scores_by_folds

# Judges images: float32 (B, 3, H, W) in [0, 1] and labels int64 (B,), −1 for none → (B,), higher is better.
Scorer = Callable[[Tensor, Tensor], Tensor]


def log_likelihood(
    model: Model,
    tokens: Tensor,
    labels: Label | Sequence[Label] | Tensor | np.ndarray,
    *,
    token_mask: Tensor | None = None,
    folds: int = 4,
    seed: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Tensor:
    """Return the pseudo-log-likelihood of tokens given classes.

    Args:
        tokens: int64 (B, h, w), image codes.
        labels: a class number or name, None for no class, or one of these for each image.
        token_mask: bool (h, w) or (B, h, w), True where a token is unknown: it is not scored, and never shown
            to the model. None is nowhere.
        folds: parts that the known tokens are dealt into; a part is predicted from the others and costs one
            evaluation.
        seed: in [0, 2⁶⁴), of the dealing, which is the same for all images.
        batch_size: images evaluated together.

    Returns:
        float32 (B,), in nats, on the CPU: the sum over the known tokens.

    Raises:
        ConfigError, RegionError: a label, shape or setting is not allowed.
    """
    sequences, known = _known(model, tokens, token_mask)
    numbers = torch.tensor(model.labels(labels))
    if len(numbers) not in (1, len(sequences)):
        raise ConfigError(f"There are {len(numbers)} labels for {len(sequences)} images; give one for each.")
    return _score(model, sequences, known, numbers.expand(len(sequences)), folds, folds, seed, batch_size)


def guess_class(
    model: Model,
    tokens: Tensor,
    token_mask: Tensor | None = None,
    *,
    folds: int = 4,
    shortlist: int = 32,
    seed: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Tensor:
    """Return the pseudo-log-likelihood of an image under each class; its softmax is the classes' probability.

    Where there are many classes, all are judged by one fold of the tokens first, and only the best by the
    others, too.

    Args:
        tokens: int64 (h, w) or (1, h, w), image codes.
        token_mask: bool (h, w), as in `log_likelihood`.
        folds, seed, batch_size: as in `log_likelihood`.
        shortlist: how many classes are judged by all folds.

    Returns:
        float32 (C,), in nats; −∞ for a class that is not on the shortlist.

    Raises:
        ConfigError: a setting is out of range.
        RegionError: a shape is another one, or no token is known.
    """
    shortlist = check_count("shortlist", shortlist, 1, 1_000_000)
    sequence, known = _known(model, tokens.reshape(-1, *tokens.shape[-2:]), token_mask)
    if len(sequence) != 1:
        raise RegionError(f"One image's class is guessed at a time, but there are {len(sequence)}.")
    if not known.any():
        raise RegionError("Nothing of the image is known that its class could be guessed from; name a class.")

    def scored(labels: Tensor, asked: int) -> Tensor:
        count = len(labels)
        rows, where = sequence.expand(count, -1), known.expand(count, -1)
        return _score(model, rows, where, labels, folds, asked, seed, batch_size)

    every = torch.arange(model.vocabulary.num_classes)
    # With two classes for each on the list, a first look saves nothing at two folds.
    if len(every) <= 2 * shortlist:
        return scored(every, folds)
    best = scored(every, 1).topk(shortlist).indices
    return torch.full((len(every),), -torch.inf).index_copy(0, best, scored(best, folds))


def generate_best(
    model: Model,
    labels: Label | Sequence[Label] | Tensor | np.ndarray,
    *,
    candidates: int,
    num_images: int = 1,
    scorer: Scorer | None = None,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
    callback: Callback | None = None,
    **settings: Any,
) -> Output:
    """Make many images of each class and keep the best.

    The candidates are what `MaskGIT.generate` makes with num_images=candidates; no more than a batch of them
    is held beside the best so far.

    Args:
        labels: as for `MaskGIT.generate`.
        candidates: images made for each label.
        num_images: images kept for each label, at most as many.
        scorer: judges images: float32 (B, 3, H, W) in [0, 1] and labels int64 (B,), −1 for no class → (B,),
            higher is better; such as a classifier's log-probability of the label. None is the model's own
            `log_likelihood`, which favours plain images over rich ones.
        seed, first_index, batch_size, callback, **settings: as for `MaskGIT.generate`.

    Returns:
        `Output` with len(labels) · num_images images, a label's best first, their scores and their indices.

    Raises:
        ConfigError: an argument is not allowed, or the scorer returns something else than B finite numbers.

    Source: paper §4.2 and its appendix, after VQ-VAE-2 (arXiv 1906.00446) §3.3, where a classifier's
    acceptance rate trades diversity for quality.
    """
    candidates = check_count("candidates", candidates, 1, 1_000_000)
    num_images = check_count("num_images", num_images, 1, candidates)
    draw = Draw(seed, first_index, batch_size, callback=callback, pixels=scorer is not None)
    config = model.sampler_config(**settings)
    numbers = torch.tensor(model.labels(labels), dtype=torch.int64)
    if not len(numbers):
        raise ConfigError("There are no labels; give at least one class.")
    remasks = make_policy(config.policy, config.policy_options).remasks
    steps = num_steps(config, model.vocabulary.num_tokens, remasks=remasks)
    draw.announce(steps * len(numbers) * math.ceil(candidates / draw.batch_size))

    def told(step: int, indices: Tensor, grid: Tensor) -> None:
        assert callback is not None
        callback(step, indices, grid)

    kept = []
    for place, number in enumerate(numbers):
        best: list[Tensor] = []
        begin = draw.first_index + place * candidates
        # The tokens of the batches that the best are from, by the index of their first image.
        batches: dict[int, Tensor] = {}
        for first in range(begin, begin + candidates, draw.batch_size):
            count = min(draw.batch_size, begin + candidates - first)
            part = replace(draw, first_index=first, callback=told if callback else None)
            made = fill(model, model.vocabulary.sequence(number.expand(count)), config, part)
            scores = _judge(model, made, number.expand(count), scorer, draw.batch_size)
            new = [scores, made.images, made.tokens, torch.arange(first, first + count)]
            pool = [torch.cat(pair) for pair in zip(best, new, strict=True)] if best else new
            # A stable sort: of equal scores, the lower index is kept, whatever the batch.
            order = pool[0].sort(descending=True, stable=True).indices[:num_images]
            best = [part[order] for part in pool]
            starts = best[3] - (best[3] - begin) % draw.batch_size
            batches = {
                start: tokens for start, tokens in (batches | {first: made.tokens}).items() if start in starts
            }
        if scorer is None:
            # With all of its batch, as `generate` decodes it: convolutions round differently at other sizes.
            best[1] = torch.empty(
                len(starts), 3, *(side * model.tokenizer.patch_size for side in model.vocabulary.shape)
            )
            for start, batch in batches.items():
                rows = starts == start
                best[1][rows] = model.decode_tokens(batch)[best[3][rows] - start]
        kept.append(best)
    scores, pixels, tokens, indices = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return Output(pixels, tokens, scores=scores, indices=indices)


def _judge(model: Model, made: Output, labels: Tensor, scorer: Scorer | None, batch_size: int) -> Tensor:
    """Return the scores of images, float32 (B,), on the CPU."""
    if scorer is None:
        sequences, known = _known(model, made.tokens, None)
        return _score(model, sequences, known, labels, 4, 4, 0, batch_size)
    scores = torch.as_tensor(scorer(made.images, labels)).detach().float().cpu()
    if scores.shape != labels.shape or not scores.isfinite().all():
        raise ConfigError(
            f"The scorer must return {len(labels)} finite numbers for {len(labels)} images, but returned "
            f"{scores.flatten()[:4].tolist()} of shape {tuple(scores.shape)}."
        )
    return scores


def _known(model: Model, tokens: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return sequences int64 (B, S), their classes still open, and their known tokens, bool (B, S)."""
    grid = model.vocabulary.shape
    if tokens.ndim != 3 or tokens.shape[1:] != grid or tokens.dtype != torch.int64 or not len(tokens):
        raise RegionError(
            f"tokens must be int64 of shape (B, {grid[0]}, {grid[1]}), but are {tokens.dtype} of "
            f"{tuple(tokens.shape)}."
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= model.vocabulary.image_codes:
        raise RegionError(f"tokens must be image codes from 0 to {model.vocabulary.image_codes - 1}.")
    shapes = (grid, (len(tokens), *grid))
    if token_mask is not None and (token_mask.shape not in shapes or token_mask.dtype != torch.bool):
        raise RegionError(
            f"token_mask must be bool of shape {shapes[0]} or {shapes[1]}, but is {token_mask.dtype} of "
            f"{tuple(token_mask.shape)}."
        )
    tokens, token_mask = tokens.cpu(), None if token_mask is None else token_mask.cpu()
    sequences = model.vocabulary.sequence(torch.full((len(tokens),), -1), tokens, token_mask)
    known = sequences != model.vocabulary.mask
    return sequences, known


def _score(
    model: Model,
    sequences: Tensor,
    known: Tensor,
    labels: Tensor,
    folds: int,
    asked: int,
    seed: int,
    batch_size: int,
) -> Tensor:
    """Return the sum of the known tokens' log-probabilities, float32 (B,), over the first `asked` folds."""
    folds = check_count("folds", folds, 1, 64)
    batch_size = check_count("batch_size", batch_size, 1, 65_536)
    vocabulary, device = model.vocabulary, model.device
    first = torch.zeros(1, dtype=torch.int64, device=device)
    uniform = ImageNoise(seed, first, sequences.shape[1], vocabulary.num_codes).uniform(0, FOLDS)
    classes = torch.where(labels < 0, vocabulary.mask, labels + vocabulary.num_codes)
    made = []
    for start in range(0, len(sequences), batch_size):
        rows = slice(start, start + batch_size)
        batch = upload(torch.cat([classes[rows, None], sequences[rows, 1:]], dim=1), device)
        free = upload(known[rows], device)
        scores = scores_by_folds(
            model.predict_logits, batch, free, uniform.expand(len(batch), -1), folds, vocabulary.mask, asked
        )
        made.append(scores.sum(-1).cpu())
    return torch.cat(made)
