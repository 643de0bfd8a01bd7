"""The official losses of both training stages.

Shapes: B batch, N positions, K codes, D embedding_dim, h × w the token grid.
Source: official libml/losses.py and nets/vqgan_tokenizer.py.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit.foundation.checks import check_choice
from maskgit.networks.quantizer import Quantized
from maskgit.training.distributed import mean_over_processes

# Added inside logarithms of mean probabilities, as the official code does.
_LOG_FLOOR = 1e-5


def l1_loss(target: Tensor, prediction: Tensor) -> Tensor:
    """Return the mean absolute difference of two tensors of one shape, in float32."""
    return (target - prediction).float().abs().mean()


def l2_loss(target: Tensor, prediction: Tensor) -> Tensor:
    """Return the mean squared difference of two tensors of one shape, in float32."""
    return (target - prediction).float().square().mean()


class AdversarialLoss(NamedTuple):
    """The two sides of an adversarial loss, as functions of logits of any one shape; each returns a mean."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


ADVERSARIAL_LOSSES = {
    "hinge": AdversarialLoss(
        lambda real, fake: (F.relu(1 - real) + F.relu(1 + fake)).mean(),
        lambda fake: -fake.mean(),
    ),
    # softplus(−x) is the cross-entropy of the logit x with the label 1, softplus(x) with the label 0.
    "non-saturating": AdversarialLoss(
        lambda real, fake: (F.softplus(-real) + F.softplus(fake)).mean(),
        lambda fake: F.softplus(-fake).mean(),
    ),
}


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: str = "non-saturating") -> Tensor:
    """Return what the discriminator minimizes.

    Args:
        real_logits: float (B, …), of images.
        fake_logits: float (B, …), of reconstructions.
        kind: a name in `ADVERSARIAL_LOSSES`.

    Returns:
        float32 ().

    Raises:
        ConfigError: the name is unknown.
    """
    check_choice("adversarial_loss", kind, ADVERSARIAL_LOSSES)
    return ADVERSARIAL_LOSSES[kind].discriminator(real_logits.float(), fake_logits.float())


def generator_loss(fake_logits: Tensor, kind: str = "non-saturating") -> Tensor:
    """Return the adversarial part of what the tokenizer minimizes.

    Args:
        fake_logits: float (B, 1), of reconstructions.
        kind: a name in `ADVERSARIAL_LOSSES`.

    Returns:
        float32 ().

    Raises:
        ConfigError: the name is unknown.
    """
    check_choice("adversarial_loss", kind, ADVERSARIAL_LOSSES)
    return ADVERSARIAL_LOSSES[kind].generator(fake_logits.float())


def r1_penalty(discriminator: nn.Module, images: Tensor, cost: float = 10.0) -> tuple[Tensor, Tensor]:
    """Return the R1 gradient penalty on real images, differentiable in the discriminator's weights.

    Args:
        discriminator: maps images to logits, each image on its own.
        images: float (B, 3, H, W).
        cost: multiplies the penalty.

    Returns:
        penalty: float32 (), cost · mean over the batch of ‖∂logit / ∂image‖².
        logits: float (B, …), of the same images; the penalty is of each image's mean.

    Source: official `r1_gradient_penalty`; Mescheder et al., Which Training Methods for GANs do actually
    Converge? (ICML 2018), eq. 9, whose factor 1/2 the official code leaves out.
    """
    images = images.detach().requires_grad_()
    logits = discriminator(images)
    (gradient,) = torch.autograd.grad(logits.flatten(1).mean(1).sum(), images, create_graph=True)
    return gradient.float().square().sum(dim=(1, 2, 3)).mean() * cost, logits


class LeCam(nn.Module):
    """Keeps a discriminator's logits of each side from running away from the other side's running mean.

    relu(D(real) − mean of fake)² + relu(mean of real − D(fake))²: Tseng et al., Regularizing Generative Adversarial
    Networks under Limited Data (arXiv 2104.03310), eq. 4, with the one-sided distances of its authors' code.

    Attributes:
        means: float32 (2,), of the logits of images and of reconstructions; they start at 0.
        decay: the share of them that a step keeps.
    """

    means: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("means", torch.zeros(2))

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Follow the logits, float32 (B, …) of all processes, and return the loss, float32 ()."""
        new = torch.stack([real_logits.detach().mean(), fake_logits.detach().mean()])
        # Not in place: an evaluation or a dry run may hold the former one.
        self.means = self.means.lerp(mean_over_processes(new), 1 - self.decay)
        real, fake = self.means
        return F.relu(real_logits - fake).square().mean() + F.relu(real - fake_logits).square().mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Return the weight at which both losses pull equally hard on the decoder's last layer.

    Args:
        reconstruction: float (), a loss with a graph that is kept.
        adversarial: float (), likewise.
        last_layer: the weight of the decoder's last convolution.

    Returns:
        float32 () without gradient, in [0, 10⁴], the same on all processes.

    Source: Esser et al., Taming Transformers (CVPR 2021), eq. 7 and its code's clamp.
    """
    norms = []
    for loss in (reconstruction, adversarial):
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        norms.append(mean_over_processes(gradient.detach().float()).norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)


def entropy_loss(
    affinity: Tensor, kind: str = "softmax", temperature: float = 0.01, whole_mean: Tensor | None = None
) -> Tensor:
    """Return the mean entropy of each vector's choice of code less the entropy of the mean choice.

    Minimizing it makes choices sharp and all codes used. Holds several (vectors, K) matrices.

    Args:
        affinity: float (…, K), larger for nearer codes: negative distances.
        kind: `softmax`, or `argmax` for one-hot choices with straight-through gradients.
        temperature: divides the affinity.
        whole_mean: float32 (K,), the `mean_choice` of a whole batch of which `affinity` is one of several equal parts.
            The mean of the parts' losses, and of their gradients, is then that of the whole batch.

    Returns:
        float32 (); the mean choice is that over all processes.

    Raises:
        ConfigError: the kind is unknown.

    Source: official `entropy_loss`.
    """
    probs, log_probs = _choices(affinity, kind, temperature)
    mean_K = mean_over_processes(probs.mean(0))
    if whole_mean is not None:
        mean_K = whole_mean + (mean_K - mean_K.detach())
    mean_entropy = -(mean_K * (mean_K + _LOG_FLOOR).log()).sum()
    sample_entropy = -(probs * log_probs).sum(-1).mean()
    return sample_entropy - mean_entropy


def mean_choice(affinity: Tensor, kind: str = "softmax", temperature: float = 0.01) -> Tensor:
    """Return the mean over vectors and processes of the choice of code, as `entropy_loss` has it, float32 (K,)."""
    return mean_over_processes(_choices(affinity, kind, temperature)[0].mean(0))


def _choices(affinity: Tensor, kind: str, temperature: float) -> tuple[Tensor, Tensor]:
    """Return each vector's choice and its logarithm before it is made one-hot, float32 (vectors, K)."""
    check_choice("entropy_kind", kind, ENTROPY_KINDS)
    logits = affinity.float().flatten(0, -2) / temperature
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    if kind == "argmax":
        one_hot = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(probs.dtype)
        probs = probs - (probs - one_hot).detach()
    return probs, log_probs


ENTROPY_KINDS = ("softmax", "argmax")


class QuantizerLosses(NamedTuple):
    """The parts of a quantizer's loss, float32 () each, weights included; `total` is the sum of the others."""

    total: Tensor
    commitment: Tensor
    codebook: Tensor
    entropy: Tensor


def quantizer_loss(
    quantized: Quantized,
    parts: Sequence[str] = ("commitment", "codebook", "entropy"),
    *,
    commitment_weight: float = 0.25,
    entropy_weight: float = 0.1,
    entropy_kind: str = "softmax",
    entropy_temperature: float = 0.01,
    whole_means: Sequence[Tensor] | None = None,
) -> QuantizerLosses:
    """Return the loss of a quantizer.

    Args:
        quantized: what it made of the encoder's features.
        parts: its `losses`: "commitment", of features to their codes; "codebook", of codes to their features, with
            weight 1; "index" in place of both, which weighs them the other way round and adds the features that were
            made with gradients (IBQ, arXiv 2412.02692, §3.2); "entropy", `entropy_loss` summed over the groups of
            `quantized.distances`. Of bits a vector's own entropy is that sum exactly, for its bits are
            independent; that of the mean choice is at most the sum, and it exactly in one group (BSQ, eq. 14).
        commitment_weight: of the commitment, or of the codes in "index".
        entropy_weight: of the entropy loss.
        entropy_kind: as `entropy_loss` takes it.
        entropy_temperature: as `entropy_loss` takes it.
        whole_means: as `entropy_loss` takes it, for each group.

    Source: official `VectorQuantizer`, e_latent_loss, q_latent_loss and entropy_loss. The affinity 2 z·c that
    MAGVIT-v2 has is the negative squared distance but for what all codes share, so that both have one softmax.
    """
    inputs, codes = quantized.inputs.float(), quantized.codes.float()
    zero = torch.zeros((), device=inputs.device)
    commitment, codebook, entropy = zero, zero, zero
    if "commitment" in parts:
        commitment = l2_loss(codes.detach(), inputs) * commitment_weight
    if "codebook" in parts:
        codebook = l2_loss(codes, inputs.detach())
    if "index" in parts:
        commitment = l2_loss(quantized.features, inputs) + l2_loss(codes.detach(), inputs)
        codebook = l2_loss(codes, inputs.detach()) * commitment_weight
    if "entropy" in parts and entropy_weight:
        means: Sequence[Tensor | None] = whole_means or [None] * len(quantized.distances)
        for distances, mean in zip(quantized.distances, means, strict=True):
            entropy = entropy + entropy_loss(-distances, entropy_kind, entropy_temperature, mean)
        entropy = entropy * entropy_weight
    return QuantizerLosses(commitment + codebook + entropy, commitment, codebook, entropy)


def sequence_losses(logits: Tensor, labels: Tensor, weights: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the loss of each sequence: the weighted mean of its tokens' cross-entropies.

    The loss of a batch is the mean of these, so that a sample counts the same however much of it is masked.

    Args:
        logits: float (B, N, K).
        labels: int64 (B, N), each in [0, K).
        weights: (B, N), such as True where a token was masked; no row may be all 0.
        label_smoothing: the share of the target that is spread evenly over all K.

    Returns:
        float32 (B,).

    Source: paper eq. 2; official `weighted_sequence_cross_entropy_loss`, whose mean over sequences this has.
    Differs: the transformer's loss passes logits of the codes alone, for decoding samples from the codes alone;
    over the whole vocabulary smoothing would spread the target onto classes and the mask, never a target.
    """
    losses = F.cross_entropy(
        logits.float().movedim(-1, 1), labels, reduction="none", label_smoothing=label_smoothing
    )
    weights = weights.to(losses.dtype)
    return (losses * weights).sum(-1) / weights.sum(-1)
