"""The processes of a run: how they find each other, agree, and share networks."""

import gc
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from maskgit.errors import ConfigError
from maskgit.foundation.compiled import Compiled
from maskgit.foundation.devices import own_device, rank_and_world


class _Mean(torch.autograd.Function):
    """The mean over all processes, forwards of values and backwards of gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Mean.forward(ctx, gradients[0])


def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes, through which gradients flow to each of them.

    With gradients averaged over processes, as DDP and FSDP do, a loss of this mean has the same gradient as in one
    process that holds the whole batch.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    return _Mean.apply(value)


@dataclass(frozen=True)
class Distributed:
    """The processes of a run.

    Attributes:
        rank: this process's number.
        world: how many there are.
        device: where this process computes.
    """

    rank: int
    world: int
    device: torch.device

    @classmethod
    def init(cls, device: str = "auto", *, group: bool = False) -> Self:
        """Join the processes that torchrun started, or stand alone.

        Args:
            device: a name for `choose_device`; under torchrun "auto" and "cuda" mean one GPU a process.
            group: whether a process that is alone makes a group too, which FSDP needs.

        Raises:
            ConfigError: the device is not there, or the processes do not find each other.
        """
        rank, world = rank_and_world()
        chosen = own_device(device)
        if (world > 1 or group) and not dist.is_initialized():
            # The CPU's backend carries checkpoints and messages beside the GPUs' own.
            on_gpu = chosen.type == "cuda"
            options: dict[str, Any] = {"backend": "cpu:gloo,cuda:nccl" if on_gpu else "gloo"}
            if on_gpu:
                options["device_id"] = chosen
            if "MASTER_ADDR" not in os.environ:
                options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
            try:
                dist.init_process_group(**options)
            except (RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"The {world} processes cannot find each other ({error}); start them with torchrun."
                ) from error
        return cls(rank, world, chosen)

    def close(self) -> None:
        """Leave the group, once everything that used it is gone."""
        if dist.is_initialized():
            gc.collect()
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that logs and writes."""
        return self.rank == 0

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of a tensor over all processes, through which gradients flow.

        With gradients averaged over processes, as DDP and FSDP do, a loss of this mean has the same gradient
        as in one process that holds the whole batch.
        """
        return mean_over_processes(tensor)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true in any process; all must call it."""
        if self.world == 1:
            return flag
        # On the CPU, whose backend every group has, so that nobody waits for a GPU.
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()


def compile_blocks(blocks: Iterable[nn.Module], **options: Any) -> None:
    """Let `torch.compile` build each block of a network, such as a layer, before the network is parallelized.

    Blocks alike are built once. Their gradients are there one after the other in the backward pass, so that DDP
    exchanges some while others are computed, and what FSDP does before and after a block stays outside of it. A block
    that is no longer compiled, because of too many shapes, warns once.

    Args:
        blocks: changed in place.
        **options: as for `torch.compile`.
    """
    for block in blocks:
        block.forward = Compiled(block.forward, **options)


def checkpoint_blocks(
    blocks: Iterable[nn.Module], within: Callable[[], AbstractContextManager[object]] = nullcontext
) -> None:
    """Let each block of a network forget what it computed inside, and compute it anew in the backward pass.

    A step then takes about a third longer, and keeps a block's input and output alone (arXiv 1604.06174).

    Args:
        blocks: changed in place; those that are compiled must be so before.
        within: makes the context that the forward pass is in, for the second time.
    """

    def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        return nullcontext(), within()

    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def parallelize(
    module: nn.Module, distributed: Distributed, *, fsdp: bool = False, blocks: Iterable[nn.Module] = ()
) -> nn.Module:
    """Return a module whose gradients are averaged over all processes.

    Args:
        module: on this process's device, the same in all processes.
        distributed: the processes.
        fsdp: whether parameters, gradients and optimizer state are sharded (FSDP2); the module is changed in
            place and must be given to its optimizer afterwards. Otherwise it is wrapped in DDP if need be.
        blocks: the parts that FSDP gathers one at a time, such as layers.
    """
    if fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(distributed.device.type, (distributed.world,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        # The outermost too, so that between steps its parameters are shards, as the optimizer and the EMA hold them.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        # What the loops do with an output, which may be a view, is never in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        return module
    if distributed.world == 1:
        return module
    devices = [distributed.device] if distributed.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(module, device_ids=devices)


@contextmanager
def gradient_sync(network: nn.Module, wanted: bool) -> Iterator[None]:
    """Average gradients over processes only where they are wanted: in the last part of a batch."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        with nullcontext() if wanted else network.no_sync():
            yield
    else:
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(wanted)
        yield
