"""What a run that trains a transformer is told; the defaults are the paper's for ImageNet 256×256."""

from dataclasses import dataclass, field

from maskgit.errors import ConfigError
from maskgit.foundation.checks import Config, check_choice, check_range
from maskgit.networks.config import TransformerConfig
from maskgit.networks.lora import LoraConfig
from maskgit.sampler.config import SamplerConfig
from maskgit.sampler.schedules import check_mask_schedule
from maskgit.training.numerics import PRECISIONS
from maskgit.training.optim import LR_SCHEDULES, OPTIMIZERS
from maskgit.training.run.progress import TRACKERS
from maskgit.training.stream_config import TokenStreamConfig
from maskgit.training.warm_start import INIT_CLASSES


@dataclass(frozen=True)
class TransformerTrainingConfig(Config):
    """A run that trains a transformer on the tokens of images.

    Attributes:
        out: the run's folder; the same config goes on where it stopped.
        data: folder of a token cache to train on.
        stream: images to train on that are encoded as they come, in place of `data`.
        tokenizer: folder of the tokenizer that made the tokens, or a model that has it; None takes that of
            `init_from`.
        model: the transformer's shape; its codes, classes and grid must be those of the data.
        windows: rows and columns of tokens, such as [[12, 12], [9, 16], [16, 9]]: each step trains on windows of one of
            these shapes, cut from the larger grid of `data`, so that a model with rotary positions learns images of
            several proportions at one cost. They must have about as many tokens as the model's own grid.
        test_data: folder of a token cache to evaluate on; without one there is no evaluation.
        init_from: a model (a name or a folder) whose transformer training starts from.
        init_classes: whether its classes' rows are taken over: "keep", "new", or "auto", if the names are equal.
        lora: with a rank of 1 or more, `init_from` stays as it is, and an adapter is trained beside it and saved.
        steps: updates.
        batch_size: images of a step over all processes.
        accumulate: parts that a process's share of a batch is cut into, one after the other, to save memory.
        seed: of first weights, order, masks, dropout and samples.
        num_workers: threads that make batches ahead.
        mask_schedule: the curve γ that masks are drawn by, a name in `schedules`.
        label_smoothing: the share of the target that is spread over all codes.
        label_dropout: the share of samples whose class is masked; above 0 the model can be guided.
        compute_loss_for_all: whether tokens that were not masked count in the loss too.
        optimizer: "adamw", or "muon" for the matrices of the layers beside AdamW for all else, at the same learning rate.
        learning_rate: its peak.
        lr_schedule: a name in `optim.LR_SCHEDULES`.
        warmup_steps: of the learning rate.
        betas: AdamW's.
        weight_decay: of matrices.
        max_gradient_norm: gradients are scaled down to it; None leaves them.
        decay_steps: at the end, the learning rate falls in a straight line to zero over so many steps; None is a
            fifth of `steps` for "wsd" (warm-up, stable, decay), and none for other schedules.
        schedule_steps: where a falling `lr_schedule` ends; None is `steps`. `--anneal` sets it.
        extra_ema_decays: of further averages, kept beside for `maskgit train save-model` to choose from.
        ema_decay: of the averaged weights, after a warm-up; they are those evaluated, sampled and saved.
        device: "auto", "cpu", "cuda" or the like.
        precision: what the network computes in: "auto", "float32" or "bfloat16".
        compile: whether `torch.compile` builds the layers.
        gradient_checkpointing: whether layers are computed anew in the backward pass, for less memory and more time.
        fsdp: whether weights, gradients and optimizer state are sharded over the processes (FSDP2).
        log_every, evaluate_every, sample_every, checkpoint_every: in steps.
        num_samples: images that are sampled to look at.
        sampler: how; also the finished model's own settings.
        tracker: where scalars and pictures are shown: "tensorboard", "wandb" or "none".
        keep_last, keep_best: checkpoints that stay; the best are those of the lowest loss on `test_data`.
        patience: tests in a row without a better score after which the run ends with its best checkpoint's model;
            None never ends it early.
        max_diverged_steps: steps of a diverged loss after which the run stops; None only warns.
        async_checkpoints: whether checkpoints are written while training goes on.

    Source: paper §4 (Adam with β 0.9 and 0.96, label smoothing 0.1, dropout 0.1, batch 256, 300 epochs);
    official configs/maskgit_class_cond_config.py (learning rate 1e-4, weight decay 4.5e-2).
    """

    out: str
    data: str | None = None
    stream: TokenStreamConfig = field(default_factory=TokenStreamConfig)
    tokenizer: str | None = None
    model: TransformerConfig = field(default_factory=TransformerConfig)
    windows: tuple[tuple[int, ...], ...] = ()
    test_data: str | None = None
    init_from: str | None = None
    init_classes: str = "auto"
    lora: LoraConfig = field(default_factory=LoraConfig)
    steps: int = 1_500_000
    batch_size: int = 256
    accumulate: int = 1
    seed: int = 42
    num_workers: int = 2
    mask_schedule: str = "cosine"
    label_smoothing: float = 0.1
    label_dropout: float = 0.1
    compute_loss_for_all: bool = False
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    lr_schedule: str = "constant"
    decay_steps: int | None = None
    schedule_steps: int | None = None
    warmup_steps: int = 5000
    betas: tuple[float, ...] = (0.9, 0.96)
    weight_decay: float = 4.5e-2
    max_gradient_norm: float | None = 1.0
    ema_decay: float = 0.999
    extra_ema_decays: tuple[float, ...] = ()
    device: str = "auto"
    precision: str = "auto"
    compile: bool = False
    gradient_checkpointing: bool = False
    fsdp: bool = False
    log_every: int = 50
    evaluate_every: int = 5000
    sample_every: int = 5000
    num_samples: int = 16
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    checkpoint_every: int = 5000
    tracker: str = "tensorboard"
    keep_last: int = 2
    keep_best: int = 0
    patience: int | None = None
    max_diverged_steps: int | None = 200
    async_checkpoints: bool = False

    def validate(self) -> None:
        for name in ("steps", "log_every", "evaluate_every", "sample_every", "checkpoint_every"):
            check_range(name, getattr(self, name), 1, 2**40)
        check_range("batch_size", self.batch_size, 1, 2**24)
        check_range("accumulate", self.accumulate, 1, self.batch_size)
        check_range("seed", self.seed, 0, 2**64 - 1)
        check_range("num_workers", self.num_workers, 0, 256)
        check_range("label_smoothing", self.label_smoothing, 0, 0.99)
        check_range("label_dropout", self.label_dropout, 0, 1)
        check_range("learning_rate", self.learning_rate, 0, 10)
        check_range("warmup_steps", self.warmup_steps, 0, 2**40)
        check_range("weight_decay", self.weight_decay, 0, 1e3)
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
        check_range("num_samples", self.num_samples, 1, 4096)
        check_range("keep_last", self.keep_last, 1, 10_000)
        check_range("keep_best", self.keep_best, 0, 10_000)
        if self.keep_best and self.checkpoint_every % self.evaluate_every:
            raise ConfigError(
                f"keep_best needs a score with every checkpoint: checkpoint_every ({self.checkpoint_every}) must be "
                f"a multiple of evaluate_every ({self.evaluate_every})."
            )
        check_mask_schedule(self.mask_schedule)
        check_choice("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        if self.optimizer == "muon" and self.fsdp:
            raise ConfigError(
                'fsdp shards matrices that Muon needs whole: choose optimizer = "adamw", or fsdp = false.'
            )
        check_choice("tracker", self.tracker, TRACKERS)
        check_choice("precision", self.precision, ("auto", *PRECISIONS))
        check_choice("init_classes", self.init_classes, INIT_CLASSES)
        self._validate_windows()
        self.stream.check(self.data, "a token cache", self.num_workers)
        if self.lora.rank and self.optimizer == "muon":
            raise ConfigError(
                'Muon is for whole matrices, not for the two of an adapter: choose optimizer = "adamw" for lora.'
            )
        if self.lora.rank and self.init_from is None:
            raise ConfigError("lora adapts a trained model: name it in init_from, or set lora.rank to 0.")
        if self.tokenizer is None and self.init_from is None:
            raise ConfigError("tokenizer is missing: give the folder of the tokenizer that made the tokens.")
        if self.keep_best and self.test_data is None:
            raise ConfigError("keep_best needs test_data, whose loss decides which checkpoints are best.")

    def _validate_windows(self) -> None:
        if self.model.grid_columns:
            raise ConfigError(
                f"model.grid_columns must be 0 in training, but is {self.model.grid_columns}: give the shapes in windows."
            )
        if self.windows and self.model.positions != "rotary":
            raise ConfigError(
                f'windows needs model.positions = "rotary", but positions are "{self.model.positions}", an embedding for '
                "each place of one square grid."
            )
        if self.windows and self.data is None:
            raise ConfigError("windows needs data, a token cache; streamed images have one size.")
        own = self.model.grid_size**2
        for shape in self.windows:
            if len(shape) != 2 or min(shape) < 1:
                raise ConfigError(f"A window is [rows, columns], each at least 1, but is {list(shape)}.")
            count = shape[0] * shape[1]
            if not 0.9 * own <= count <= 1.1 * own:
                raise ConfigError(
                    f"A window of {shape[0]} × {shape[1]} has {count} tokens, but the model's grid has {own}: windows may "
                    "have a tenth more or fewer. Choose other windows, or another model.grid_size."
                )
