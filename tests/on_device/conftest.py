"""The device that the tests of this folder run on; `tests/test_on_device.py` starts them, by its kind."""

import copy
import os

import pytest

KIND = os.environ.get("FAKE_DEVICE", "")
if not KIND:
    collect_ignore_glob = ["test_*.py"]
else:
    import fake_device

    fake_device.register(KIND)


@pytest.fixture(scope="session")
def kind() -> str:
    """Like what the device is: cuda or mps."""
    return KIND


@pytest.fixture(scope="session")
def on_device(tiny):
    """The tiny golden model on the device; must not be changed."""
    return copy.deepcopy(tiny).to("gpu")
