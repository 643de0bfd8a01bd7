"""Batch sizes of a network: those that compute the same bits, and smaller ones where memory runs out."""

from collections.abc import Callable

import torch
from torch import Tensor

from maskgit.model import Model


def equal_sizes(model: Model, max_batch: int) -> tuple[int, ...]:
    """Return the sizes of batch whose rows get the same bits on this machine as in the largest.

    It tries powers of two, for which a matrix product may or may not be computed in another order; the choice
    depends on shapes alone, so that what holds for some tokens holds for all.

    Args:
        model: is run on random tokens.
        max_batch: the largest size.

    Returns:
        Sizes, rising, of which the last is max_batch.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2 * max_batch, model.vocabulary.num_tokens + 1)
    sequences = torch.randint(model.vocabulary.size, shape, generator=generator).to(model.device)
    sizes = [2**power for power in range(max_batch.bit_length()) if 2**power < max_batch]
    # A guided batch goes through the network with a copy of it that has no classes.
    for copies in (1, 2):
        largest = model.predict_logits(sequences[: copies * max_batch])
        sizes = [
            size
            for size in sizes
            if torch.equal(model.predict_logits(sequences[: copies * size]), largest[: copies * size])
        ]
    return (*sizes, max_batch)


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there is no memory left, on the device or the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def free_memory(model: Model, failure: BaseException) -> None:
    """Free what a work that ran out of memory held, and what the model keeps for speed."""
    # The work's tensors live as long as its error's frames.
    failure.with_traceback(None)
    model.free_memory()


def in_parts(
    model: Model,
    rows: Tensor,
    work: Callable[[Tensor], Tensor],
    at_once: Callable[[], int],
    halve: Callable[[], bool],
) -> Tensor:
    """Return what work makes of rows, in parts that become smaller where memory runs out.

    Args:
        model: what the work is done with.
        rows: (B, …), at least one.
        work: makes a row of each.
        at_once: how many rows a part has.
        halve: makes that fewer, for good, and returns whether it could.
    """
    made = []
    while len(rows):
        part = rows[: at_once()]
        failure = None
        try:
            made.append(work(part))
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            failure = error
        if failure is None:
            rows = rows[len(part) :]
            continue
        free_memory(model, failure)
        if not halve():
            raise failure
    return torch.cat(made)
