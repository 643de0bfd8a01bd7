"""Guidance: a prediction, pushed away from a weaker one: without the class, or by a weaker model.

Shapes: B batch, S = N + 1 the sequence with its class token, K codes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PredictLogits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class WithGuide:
    """A prediction int64 (B, S) → float (B, S, K) that is guided by a weaker model's, instead of without the class.

    Attributes:
        predict: the model's.
        weaker: the guide's.

    Source: Karras et al., autoguidance (arXiv 2406.02507) §4.
    """

    predict: PredictLogits
    weaker: PredictLogits

    def __call__(self, sequence: Tensor) -> Tensor:
        return self.predict(sequence)


def guided(predict_logits: PredictLogits, mask_token: int, scale_B1: Tensor) -> PredictLogits:
    """Return a guided prediction: u + s · (c − u), c the logits and u those without the class, or the guide's.

    Those without the class come from one forward pass of twice the batch.

    Args:
        predict_logits: int64 (B, S) → float (B, S, K); of a model with a guide, `WithGuide`.
        mask_token: what stands at position 0 where the class is open.
        scale_B1: s, float32 (B, 1); where it is 1 the prediction is c itself.

    Returns:
        int64 (B, S) → float32 (B, S, K).

    Source: Ho and Salimans, arXiv 2207.12598, in the form usual for logits (Muse, arXiv 2301.00704, §2.7).
    """

    def predict(sequence: Tensor) -> Tensor:
        if isinstance(predict_logits, WithGuide):
            weaker, own = predict_logits.weaker(sequence).float(), predict_logits(sequence).float()
            return torch.lerp(weaker, own, scale_B1[..., None])
        without = sequence.clone()
        without[:, 0] = mask_token
        conditional, unconditional = predict_logits(torch.cat([sequence, without])).float().chunk(2)
        return torch.lerp(unconditional, conditional, scale_B1[..., None])

    return predict


def truncated(logits_BSK: Tensor, temperature_B1: Tensor, top_k_B1: Tensor, top_p_B1: Tensor) -> Tensor:
    """Return logits with all but the likeliest codes set to −∞; at least one code, and all ties with the last, stay.

    Args:
        logits_BSK: before the temperature.
        temperature_B1: what probabilities are measured at.
        top_k_B1: number of codes to keep, float32; infinity keeps all.
        top_p_B1: keep the smallest set of likeliest codes whose probabilities sum to this, float32; 1 keeps all.
    """
    logits_BSK = logits_BSK.float()
    sorted_BSK = logits_BSK.sort(-1, descending=True).values
    probabilities = (sorted_BSK / temperature_B1[..., None].clamp(min=1e-6)).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    rank = torch.arange(logits_BSK.shape[-1], device=logits_BSK.device)
    inside = (rank < top_k_B1[..., None]) & ((before < top_p_B1[..., None]) | (top_p_B1[..., None] >= 1))
    last = inside.sum(-1, keepdim=True).clamp(min=1) - 1
    return logits_BSK.masked_fill(logits_BSK < sorted_BSK.gather(-1, last), -torch.inf)
