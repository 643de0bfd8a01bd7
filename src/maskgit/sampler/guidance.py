"""Classifier-free guidance: the prediction with the class, pushed away from the one without.

Shapes: B batch, S = N + 1 the sequence with its class token, K codes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

PredictLogits = Callable[[Tensor], Tensor]


def guided(predict_logits: PredictLogits, mask_token: int, scale_B1: Tensor) -> PredictLogits:
    """Return a prediction guided by the class: u + s · (c − u), c the logits with the class and u without.

    Both come from one forward pass of twice the batch.

    Args:
        predict_logits: int64 (B, S) → float (B, S, K).
        mask_token: what stands at position 0 where the class is open.
        scale_B1: s, float32 (B, 1); where it is 1 the prediction is c itself.

    Returns:
        int64 (B, S) → float32 (B, S, K).

    Source: Ho and Salimans, arXiv 2207.12598, in the form usual for logits (Muse, arXiv 2301.00704, §2.7).
    """

    def predict(sequence: Tensor) -> Tensor:
        without = sequence.clone()
        without[:, 0] = mask_token
        conditional, unconditional = predict_logits(torch.cat([sequence, without])).float().chunk(2)
        return torch.lerp(unconditional, conditional, scale_B1[..., None])

    return predict
