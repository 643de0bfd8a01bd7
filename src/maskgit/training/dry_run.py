"""What a run would be, told before it starts: its size, memory and compute, found without computing anything."""

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskgit.foundation.devices import choose_device, shapes_only
from maskgit.foundation.files import expand
from maskgit.networks.lora import add_lora
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.transformer import Transformer
from maskgit.training.distributed import checkpoint_blocks
from maskgit.training.inputs import open_images, open_tokens
from maskgit.training.numerics import attention, autocast, choose_precision
from maskgit.training.objectives.losses import LeCam, sequence_losses
from maskgit.training.objectives.perceptual import PerceptualLoss
from maskgit.training.run.folder import check_run_folder
from maskgit.training.run.progress import duration, peak_flops
from maskgit.training.tokenizer_config import TokenizerTrainingConfig
from maskgit.training.tokenizer_parts import flops_per_image, make_networks, make_reconstructor
from maskgit.training.train_tokenizer import adversarial_losses, frozen, judge, reconstruction_losses
from maskgit.training.train_transformer import flops_per_image as transformer_flops
from maskgit.training.transformer_config import TransformerTrainingConfig


def dry_run_tokenizer(config: TokenizerTrainingConfig, world: int = 1) -> str:
    """Return what a run would be, in lines for people, after checking all that it reads.

    Args:
        config: the run.
        world: number of processes.

    Raises:
        ConfigError, DataError: as the run would.
    """
    check_run_folder(expand(config.out))
    inputs = open_images(config, world=world)
    size = inputs.size
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    networks = make_networks(config, size, torch.device("cpu"))
    tokenizer, discriminator, _ = networks
    trained = sum(p.numel() for p in tokenizer.parameters() if p.requires_grad)
    counts = [sum(p.numel() for p in network.parameters()) for network in (tokenizer, discriminator)]
    if not config.adversarial_weight:
        counts[1] = 0
    # Weights of both networks, Adam's two averages of what is trained, and the tokenizer's own averages, float32.
    fixed = 4 * ((2 + len(config.extra_ema_decays)) * counts[0] + 2 * trained + 3 * counts[1])
    part = config.batch_size // (world * config.accumulate)
    parts = f"{config.accumulate} parts × " if config.accumulate > 1 else ""
    images = config.steps * config.batch_size
    adversarial = max(0, config.steps - config.adversarial_start) / config.steps
    flops = sum(
        share * flops_per_image(config, *networks, size, adversarial=on)
        for on, share in ((True, adversarial), (False, 1 - adversarial))
    )
    seconds = images * flops / peak_flops(device, precision) / world
    activations = tokenizer_step_bytes(config, networks, size, part, precision)
    side = size // config.model.patch_size
    return "\n".join(
        (
            f"parameters     {counts[0]:,} of the tokenizer, {counts[1]:,} of the discriminator",
            f"data           {counted(inputs.train.num_images)} of {size} × {size} pixels, {side} × {side} tokens of "
            f"{config.model.codebook_size:,} codes",
            f"batch          {config.batch_size} = {world} processes × {parts}{part}",
            f"steps          {config.steps:,}, {passes(images, inputs.train.num_images)}",
            f"precision      {str(precision).removeprefix('torch.')} on {device}",
            memory_line(fixed, activations, device),
            f"compute        {flops / 1e9:.2f} GFLOP an image; {duration(seconds)} if the hardware reached its peak",
        )
    )


def counted(num_images: int | None) -> str:
    """Return how many images there are, in words; None is a stream, whose end is not known."""
    return "a stream of images" if num_images is None else f"{num_images:,} images"


def passes(num_read: int, num_images: int | None) -> str:
    """Return how often a run reads its images, in words."""
    if num_images is None:
        return f"{num_read:,} images; how often through the data is not known of a stream"
    return f"{num_read / num_images:.1f} times through the data"


def tokenizer_step_bytes(
    config: TokenizerTrainingConfig,
    networks: tuple[Tokenizer, nn.Module, PerceptualLoss],
    size: int,
    part: int,
    precision: torch.dtype,
) -> int:
    """Return the bytes that a step takes for a part of a process's share of a batch, beside weights and optimizers.

    All three networks count, and gradients; the networks are of no use afterwards.
    """
    tokenizer, discriminator, perceptual = networks
    num_tokens = (size // config.model.patch_size) ** 2

    def step() -> None:
        images = torch.zeros(part, 3, size, size).contiguous(memory_format=torch.channels_last)
        noise = None
        if config.model.quantizer == "gumbel":
            noise = torch.zeros(part, num_tokens * config.model.codebook_size)
        made = make_reconstructor(config, tokenizer, precision)(images, noise)
        logs = reconstruction_losses(config, images, made, perceptual, precision)
        loss = logs["reconstruction_loss"] + logs["quantizer_loss"]
        if config.adversarial_weight:
            with frozen(discriminator), autocast(images.device, precision):
                fake_logits = discriminator(made.images)
            logs |= adversarial_losses(config, logs["reconstruction_loss"], fake_logits, tokenizer)
            loss = loss + logs["adversarial_weight"] * logs["generator_loss"]
        loss.backward()
        if config.adversarial_weight:
            # Step 0 is one with the R1 penalty.
            judged = judge(config, discriminator, LeCam(), images, made.images.detach(), 0, precision)
            judged["discriminator_total_loss"].backward()

    return step_bytes(networks, step)


def dry_run_transformer(config: TransformerTrainingConfig, world: int = 1) -> str:
    """Return what a run would be, in lines for people, after checking all that it reads.

    Args:
        config: the run.
        world: number of processes.

    Raises:
        ConfigError, CheckpointError, DataError: as the run would.
    """
    check_run_folder(expand(config.out))
    inputs = open_tokens(config, world=world)
    num_images, model = inputs.train.num_images, config.model
    with shapes_only():
        transformer = _transformer_of(config)
    parameters = sum(p.numel() for p in transformer.parameters())
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    part = config.batch_size // (world * config.accumulate)
    shards = world if config.fsdp else 1
    # Weights, and of what is trained both averages of AdamW and those of the weights, float32.
    fixed = 4 * (parameters + (3 + len(config.extra_ema_decays)) * trained) / shards
    activations = transformer_step_bytes(config, part, precision)
    images = config.steps * config.batch_size
    flops = transformer_flops(config.model)
    seconds = images * flops / peak_flops(device, precision) / world
    return "\n".join(
        (
            f"parameters     {parameters:,}" + (f", {trained:,} of them trained" if config.lora.rank else ""),
            f"data           {counted(num_images)}, {model.num_classes:,} classes, "
            f"{model.grid_size} × {model.grid_size} tokens of {model.num_codes:,} codes",
            f"batch          {config.batch_size} = {world} processes × {config.accumulate} parts × {part}",
            f"steps          {config.steps:,}, {passes(images, num_images)}",
            f"precision      {str(precision).removeprefix('torch.')} on {device}",
            memory_line(fixed, activations, device),
            f"compute        {flops / 1e9:.1f} GFLOP an image; {duration(seconds)} if the hardware reached its peak",
        )
    )


def _transformer_of(config: TransformerTrainingConfig) -> Transformer:
    """Return a transformer of a run's shape, with the adapter that it trains, if any."""
    transformer = Transformer(config.model)
    if config.lora.rank:
        add_lora(transformer, config.lora)
    return transformer


def transformer_step_bytes(config: TransformerTrainingConfig, part: int, precision: torch.dtype) -> int:
    """Return the bytes that a step takes for a part of a batch, beside weights and optimizer, gradients included."""
    model = config.model
    with shapes_only():
        transformer = _transformer_of(config)
    transformer.to_empty(device="cpu")
    if config.gradient_checkpointing:
        checkpoint_blocks(transformer.layers, lambda: attention(choose_device(config.device)))

    def step() -> None:
        tokens = torch.zeros(part, model.num_tokens, dtype=torch.int64)
        sequence = torch.zeros(part, model.num_tokens + 1, dtype=torch.int64)
        device = torch.device("cpu")
        with autocast(device, precision), attention(choose_device(config.device)):
            logits = transformer(sequence, codes=model.unit_codes)
        mask = torch.ones(part, model.num_tokens, dtype=torch.bool)
        sequence_losses(logits[:, 1:], tokens, mask, config.label_smoothing).mean().backward()

    return step_bytes([transformer], step)


# What is taken for each byte of tensors that live: the C library's allocator keeps what was freed in pieces, and
# convolutions need scratch space. Measured on tokenizers of 32 and 64 pixels in float32 and bfloat16: 1.6 to 1.9.
CPU_SLACK = 1.65
# torch's own allocator wastes less.
GPU_SLACK = 1.1


def step_bytes(networks: Sequence[nn.Module], step: Callable[[], Any]) -> int:
    """Return the most bytes that tensors made in a training step take at once, gradients included.

    Args:
        networks: those that take part. Their weights become tensors without values, so they are of no use afterwards.
        step: makes its own input, and goes forwards and backwards on the CPU. It may not read values.

    Returns:
        Bytes of tensors; allocators take more.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for network in networks:
        for module in network.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    hollow = mode.from_tensor(weight.detach())
                    module._parameters[name] = nn.Parameter(hollow, weight.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = mode.from_tensor(buffer)
    with mode, _Living() as living:
        step()
    return living.peak


class _Living(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes


def resident_bytes() -> int:
    """Return the memory of the host that this process takes now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * 4096


def memory_line(weights: float, activations: float, device: torch.device) -> str:
    """Return the memory of a process in words.

    Args:
        weights: bytes of weights, optimizers and averages.
        activations: bytes of the tensors of a step besides.
        device: where the networks are; on a CPU, Python and its libraries count too.
    """
    libraries = resident_bytes() if device.type == "cpu" else 0
    activations *= CPU_SLACK if device.type == "cpu" else GPU_SLACK
    parts = f"{weights / 2**30:.2f} for weights and optimizers, {activations / 2**30:.2f} for a step"
    if libraries:
        parts += f", {libraries / 2**30:.2f} for Python and its libraries"
    return f"memory         about {(weights + activations + libraries) / 2**30:.2f} GiB a process: {parts}"
