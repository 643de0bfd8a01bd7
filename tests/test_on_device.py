"""All that computes, on a fake device, as CUDA and as MPS: the tests in `on_device`.

They run in a process of their own for each kind, for the device is there for all of torch and until the process ends:
among others, `torch.accelerator` finds it, and with it parts of torch that other tests use on the CPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fake_device

FOLDER = Path(__file__).parent / "on_device"


@pytest.mark.parametrize("kind", fake_device.KINDS)
def test_it_runs_on_a_device(kind):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER)],
        env=os.environ | {"FAKE_DEVICE": kind, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


def test_the_device_is_not_in_this_process():
    assert not fake_device.is_registered()
