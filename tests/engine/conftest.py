"""The ways that a CPU computes a model in: every engine test goes each of them, and none is found by a measurement."""

import pytest
import torch

from maskgit.engine import host
from maskgit.engine.layers import PATHS, ways

FLOAT32 = [{"dtype": "float32", "linear": way} for way in PATHS if way != "int8"]
FORMS = [
    *FLOAT32,
    {"dtype": "bfloat16", "linear": "torch"},
    {"dtype": "bfloat16", "linear": "onednn"},
    {"mode": "int8"},
]


def named(form: dict[str, str]) -> str:
    return "-".join(form.values())


def here(form: dict[str, str]) -> dict[str, str]:
    """Return what `optimize` is to be given for a form, or skip the test."""
    dtype, way = form.get("dtype", "float32"), form.get("linear", "int8")
    if way not in ways(getattr(torch, dtype)):
        pytest.skip(f"this CPU, or this build of torch, has no {way} products of {dtype}")
    return {"mode": "exact", **form}


@pytest.fixture(autouse=True)
def _nothing_is_measured(monkeypatch):
    def measure():
        raise AssertionError("A test of the engine must say which way it goes.")

    monkeypatch.setattr(host, "_measure", measure)


@pytest.fixture(params=FLOAT32, ids=named)
def float32(request):
    """What `optimize` is given for each way in float32."""
    return here(request.param)


@pytest.fixture(params=FORMS, ids=named)
def form(request):
    """What `optimize` is given for each number type and way."""
    return here(request.param)


@pytest.fixture(params=[form for form in FORMS if form.get("dtype") == "bfloat16"], ids=named)
def bfloat16(request):
    """What `optimize` is given for each way in bfloat16."""
    return here(request.param)
