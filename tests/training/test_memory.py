"""What a dry run says of memory, against sums by hand."""

import pytest
import torch
from torch import nn

from maskgit.training.dry_run import CPU_SLACK, GPU_SLACK, memory_line, step_bytes

WIDTH, BATCH = 128, 4096
VALUE = 4


def test_a_step_takes_activations_and_gradients():
    """Of a chain of linear layers and tanhs, backwards keeps the input and what each of them gave."""
    network = nn.Sequential(
        *[layer for _ in range(5) for layer in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())]
    )
    taken = step_bytes([network], lambda: network(torch.zeros(BATCH, WIDTH)).sum().backward())
    activations = BATCH * WIDTH * VALUE
    # The input and five outputs of tanh; of a linear layer's output, none is kept once tanh has read it. At the
    # peak, beside them, the gradients of one layer on both its sides.
    assert 6 * activations < taken <= (6 + 3) * activations + 5 * WIDTH**2 * VALUE


def test_what_was_freed_does_not_count():
    def step() -> None:
        for _ in range(10):
            torch.zeros(1000, 1000).exp().sum()

    assert step_bytes([], step) <= 2.01 * 4e6


def test_nothing_is_allocated_and_twice_the_batch_takes_twice_as_much():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
    # Four terabytes.
    taken = [
        step_bytes([network], lambda n=n: network(torch.zeros(n, 3, 4096, 4096)).sum().backward())
        for n in (1000, 2000)
    ]
    assert taken[0] > 1e12
    assert taken[1] == pytest.approx(2 * taken[0], rel=1e-3)


def test_on_a_cpu_the_libraries_count_too():
    assert "GiB a process: 1.00 for weights and optimizers, 2.00 for a step" in memory_line(
        2**30, 2**31 / GPU_SLACK, torch.device("cuda")
    )
    words = memory_line(2**30, 2**31 / CPU_SLACK, torch.device("cpu")).split()
    total, libraries = float(words[2]), float(words[-6])
    assert words[-5:] == ["for", "Python", "and", "its", "libraries"]
    assert 0.1 < libraries < 30
    assert total == pytest.approx(3 + libraries, abs=0.011)
