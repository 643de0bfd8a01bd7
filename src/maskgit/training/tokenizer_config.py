"""What a run that trains a tokenizer is told; the defaults are the official ones where there are any."""

from dataclasses import dataclass, field

from maskgit.data.augment import AUGMENTATIONS
from maskgit.errors import ConfigError
from maskgit.evaluation.networks.features import BUNDLED_NETS
from maskgit.foundation.checks import Config, check_choice, check_range
from maskgit.networks.config import TokenizerConfig
from maskgit.training.numerics import PRECISIONS
from maskgit.training.objectives.discriminator import DISCRIMINATORS, check_discriminator_size
from maskgit.training.objectives.losses import ADVERSARIAL_LOSSES, ENTROPY_KINDS
from maskgit.training.objectives.perceptual import PERCEPTUAL
from maskgit.training.optim import LR_SCHEDULES
from maskgit.training.run.progress import TRACKERS
from maskgit.training.stream_config import StreamConfig

FREEZE = ("none", "encoder")


@dataclass(frozen=True)
class TokenizerTrainingConfig(Config):
    """A run that trains a tokenizer.

    Attributes:
        out: the run's folder; the same config goes on where it stopped.
        data: folder of a packed image cache to train on.
        stream: images to train on that are not packed, in place of `data`; needs `image_size`.
        model: the tokenizer's shape.
        test_data: folder of a packed image cache to evaluate on; without one there is no evaluation.
        init_from: a tokenizer or a model (a name or a folder) whose weights training starts from; `model` must be its shape.
        freeze: a name in `FREEZE`: "encoder" leaves the encoder and the codebook of `init_from` as they are and trains
            the decoder alone, so that every image keeps its tokens.
        image_size: pixels a side to train at, at most the cache's; None takes the cache's.
        steps: updates of the tokenizer.
        batch_size: images of a step over all processes.
        accumulate: parts that a process's share of a batch is cut into, one after the other, to save memory.
        seed: of first weights, order, augmentation and noise.
        augment: a name in `augment.AUGMENTATIONS`.
        num_workers: threads that make batches ahead.
        learning_rate, discriminator_learning_rate: their peaks.
        lr_schedule: a name in `optim.LR_SCHEDULES`.
        warmup_steps: of both learning rates.
        betas: Adam's.
        max_gradient_norm: gradients are scaled down to it; None leaves them.
        decay_steps: at the end, the learning rate falls in a straight line to zero over so many steps; None is a
            fifth of `steps` for "wsd" (warm-up, stable, decay), and none for other schedules.
        schedule_steps: where a falling `lr_schedule` ends; None is `steps`. `--anneal` sets it.
        extra_ema_decays: of further averages, kept beside for `maskgit train save-model` to choose from.
        ema_decay: of the averaged weights, after a warm-up; they are those evaluated and saved.
        l2_weight, l1_weight: of the mean squared and absolute difference of pixels.
        perceptual: a name in `perceptual.PERCEPTUAL`.
        perceptual_weight: of the perceptual loss; 0 switches it off.
        perceptual_files: paths or URLs of its weights, where it needs them.
        perceptual_depth, perceptual_min_size: as `make_perceptual` takes them.
        commitment_weight, entropy_weight, entropy_kind, entropy_temperature: as `quantizer_loss` takes them.
        entropy_groups: of quantizers lfq and bsq, the groups of bits whose codes the entropy loss counts, each group's by
            themselves: with 18 bits in 2 groups it holds 2 · 2^9 numbers for each vector, in one group 2^18.
        adversarial_loss: a name in `losses.ADVERSARIAL_LOSSES`.
        adversarial_weight: of the adversarial loss; 0 switches it off.
        adversarial_start: the step from which on the discriminator is trained and heard.
        discriminator: a name in `discriminator.DISCRIMINATORS`: "stylegan", the official one, which judges an image as a
            whole, or "patchgan", which judges patches, usually with "hinge" (arXiv 1611.07004, 2012.09841).
        lecam_weight: of LeCam's regularization of the discriminator; 0 switches it off.
        adaptive_weight: whether `adversarial_weight` is multiplied by VQGAN's adaptive weight.
        r1_cost: of the R1 penalty.
        r1_every: steps from one R1 penalty to the next; each is multiplied by their number.
        discriminator_multiplier, blur_resample, discriminator_filters: as `Discriminator` takes them.
        tau_max, tau_min, tau_warmup_steps, tau_decay_steps: the `gumbel` quantizer's temperature stays at its
            maximum for the first steps, then falls to its minimum by a cosine.
        usage_window: steps over which the use of codes is counted.
        revive_codes: whether codes unused over a window become features of the present batch.
        device: "auto", "cpu", "cuda" or the like.
        precision: what networks compute in: "auto", "float32" or "bfloat16".
        compile: whether `torch.compile` builds the encoder and the decoder.
        gradient_checkpointing: whether residual blocks are computed anew in the backward pass, for less memory and more
            time.
        log_every, evaluate_every, checkpoint_every: in steps.
        num_test_images: how many are evaluated, spread over the classes; None takes all.
        feature_net: a name in `features.BUNDLED_NETS` for the Fréchet distance of reconstructions, or None.
        tracker: where scalars and pictures are shown: "tensorboard", "wandb" or "none".
        keep_last, keep_best: checkpoints that stay; the best are those of the highest PSNR.
        patience: tests in a row without a better score after which the run ends with its best checkpoint's model;
            None never ends it early.
        max_diverged_steps: steps of a diverged loss after which the run stops; None only warns.
        async_checkpoints: whether checkpoints are written while training goes on.

    Source: official configs/vqgan_config.py and base_config.py.
    """

    out: str
    data: str | None = None
    stream: StreamConfig = field(default_factory=StreamConfig)
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    test_data: str | None = None
    init_from: str | None = None
    freeze: str = "none"
    image_size: int | None = None
    steps: int = 1_000_000
    batch_size: int = 256
    accumulate: int = 1
    seed: int = 42
    augment: str = "flip"
    num_workers: int = 2
    learning_rate: float = 1e-4
    discriminator_learning_rate: float = 1e-4
    lr_schedule: str = "constant"
    decay_steps: int | None = None
    schedule_steps: int | None = None
    warmup_steps: int = 0
    betas: tuple[float, ...] = (0.0, 0.99)
    max_gradient_norm: float | None = None
    ema_decay: float = 0.999
    extra_ema_decays: tuple[float, ...] = ()
    l2_weight: float = 1.0
    l1_weight: float = 0.0
    perceptual: str = "effnet-lite0"
    perceptual_weight: float = 0.1
    perceptual_files: tuple[str, ...] = ()
    perceptual_depth: int | None = None
    perceptual_min_size: int | None = None
    commitment_weight: float = 0.25
    entropy_weight: float = 0.1
    entropy_kind: str = "softmax"
    entropy_temperature: float = 0.01
    entropy_groups: int = 1
    adversarial_loss: str = "non-saturating"
    adversarial_weight: float = 0.1
    adversarial_start: int = 0
    discriminator: str = "stylegan"
    lecam_weight: float = 0.0
    adaptive_weight: bool = False
    r1_cost: float = 10.0
    r1_every: int = 16
    discriminator_multiplier: int = 1
    blur_resample: bool = True
    discriminator_filters: int = 512
    tau_max: float = 1.0
    tau_min: float = 0.6
    tau_warmup_steps: int = 0
    tau_decay_steps: int = 100_000
    usage_window: int = 500
    revive_codes: bool = True
    device: str = "auto"
    precision: str = "auto"
    compile: bool = False
    gradient_checkpointing: bool = False
    log_every: int = 50
    evaluate_every: int = 10_000
    num_test_images: int | None = None
    feature_net: str | None = None
    checkpoint_every: int = 10_000
    tracker: str = "tensorboard"
    keep_last: int = 2
    keep_best: int = 0
    patience: int | None = None
    max_diverged_steps: int | None = 200
    async_checkpoints: bool = False

    def validate(self) -> None:
        for name in ("steps", "log_every", "evaluate_every", "checkpoint_every", "usage_window", "r1_every"):
            check_range(name, getattr(self, name), 1, 2**40)
        for name in ("warmup_steps", "adversarial_start", "tau_warmup_steps", "tau_decay_steps"):
            check_range(name, getattr(self, name), 0, 2**40)
        for name in (
            "l2_weight", "l1_weight", "perceptual_weight", "commitment_weight", "entropy_weight",
            "adversarial_weight", "lecam_weight", "r1_cost",
        ):  # fmt: skip
            check_range(name, getattr(self, name), 0, 1e6)
        check_range("batch_size", self.batch_size, 1, 2**24)
        check_range("accumulate", self.accumulate, 1, self.batch_size)
        check_range("seed", self.seed, 0, 2**64 - 1)
        check_range("num_workers", self.num_workers, 0, 256)
        check_range("learning_rate", self.learning_rate, 0, 10)
        check_range("discriminator_learning_rate", self.discriminator_learning_rate, 0, 10)
        check_range("len(betas)", len(self.betas), 2, 2)
        for beta in (*self.betas, self.ema_decay, *self.extra_ema_decays):
            check_range("betas and ema_decay", beta, 0, 1 - 1e-9)
        for name in ("decay_steps", "schedule_steps", "patience", "max_diverged_steps"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1, 2**40)
        if self.patience is not None and not self.keep_best:
            raise ConfigError(
                "patience needs keep_best of at least 1, so that the best checkpoint is still there."
            )
        if self.max_gradient_norm is not None:
            check_range("max_gradient_norm", self.max_gradient_norm, 1e-12, 1e12)
        check_range("entropy_temperature", self.entropy_temperature, 1e-6, 1e6)
        check_range("tau_min", self.tau_min, 1e-6, 1e6)
        check_range("tau_max", self.tau_max, self.tau_min, 1e6)
        check_range("keep_last", self.keep_last, 1, 10_000)
        check_range("keep_best", self.keep_best, 0, 10_000)
        if self.keep_best and self.checkpoint_every % self.evaluate_every:
            raise ConfigError(
                f"keep_best needs a score with every checkpoint: checkpoint_every ({self.checkpoint_every}) must be "
                f"a multiple of evaluate_every ({self.evaluate_every})."
            )
        self._validate_parts()
        self._validate_names()
        self.stream.check(self.data, "an image cache", self.num_workers)
        if self.stream.source and self.image_size is None:
            raise ConfigError(
                "image_size is missing: say at how many pixels a side streamed images are trained on."
            )
        if self.image_size is not None:
            self.check_image_size(self.image_size)

    def _validate_parts(self) -> None:
        check_range("entropy_groups", self.entropy_groups, 1, self.model.embedding_dim)
        if self.entropy_groups > 1 and self.model.quantizer not in ("lfq", "bsq"):
            raise ConfigError(
                f"entropy_groups is for quantizers of bits, lfq and bsq, but the quantizer is {self.model.quantizer}."
            )
        if self.model.embedding_dim % self.entropy_groups:
            raise ConfigError(
                f"entropy_groups must divide the {self.model.embedding_dim} bits of a code, but is {self.entropy_groups}."
            )
        if self.accumulate > 1 and self.model.norm == "BN":
            raise ConfigError(
                "accumulate must be 1 where model.norm is 'BN', whose statistics are those of a whole batch. Choose 'GN' "
                "or 'LN', or a smaller batch_size."
            )
        if self.accumulate > 1 and self.adaptive_weight and self.adversarial_weight:
            raise ConfigError(
                "accumulate must be 1 where adaptive_weight is true, which compares gradients of a whole batch. Set it "
                "to false, or choose a smaller batch_size."
            )
        if self.compile and self.gradient_checkpointing:
            raise ConfigError(
                "compile and gradient_checkpointing exclude each other for tokenizers: choose one."
            )
        if self.accumulate > 1 and self.lecam_weight:
            raise ConfigError(
                "accumulate must be 1 where lecam_weight is not 0, which follows the logits of whole batches. Set it to 0, "
                "or choose a smaller batch_size."
            )
        if self.freeze != "none" and self.init_from is None:
            raise ConfigError(
                f"freeze is {self.freeze!r}, which keeps parts of a trained tokenizer: name one in init_from."
            )

    def _validate_names(self) -> None:
        check_choice("freeze", self.freeze, FREEZE)
        check_choice("discriminator", self.discriminator, DISCRIMINATORS)
        check_choice("augment", self.augment, AUGMENTATIONS)
        check_choice("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        check_choice("tracker", self.tracker, TRACKERS)
        check_choice("perceptual", self.perceptual, PERCEPTUAL)
        check_choice("entropy_kind", self.entropy_kind, ENTROPY_KINDS)
        check_choice("adversarial_loss", self.adversarial_loss, ADVERSARIAL_LOSSES)
        check_choice("precision", self.precision, ("auto", *PRECISIONS))
        if self.keep_best and self.test_data is None:
            raise ConfigError("keep_best needs test_data, whose PSNR decides which checkpoints are best.")
        if self.feature_net is not None:
            check_choice("feature_net", self.feature_net, BUNDLED_NETS)

    def check_image_size(self, size: int) -> None:
        """Raise a `ConfigError` unless the networks can be trained on images of `size` pixels a side."""
        if size % self.model.patch_size or size < 1:
            raise ConfigError(
                f"image_size must be a multiple of the {self.model.patch_size} pixels of a token, "
                f"but is {size}."
            )
        if self.adversarial_weight:
            check_discriminator_size(size)
