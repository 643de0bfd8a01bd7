"""Which device a process takes, and networks that are built without memory."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from maskgit.foundation.devices import own_device, shapes_only


def test_networks_of_shapes_alone_draw_nothing():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with shapes_only():
        net = nn.Sequential(nn.Linear(3, 4), nn.Embedding(5, 6), nn.Conv2d(1, 2, 3), nn.LayerNorm(4))
        nn.init.trunc_normal_(net[0].weight, std=0.02)
        nn.init.normal_(tensor=net[1].weight)
    assert all(parameter.is_meta for parameter in net.parameters())
    assert [tuple(p.shape) for p in net[0].parameters()] == [(4, 3), (4,)]
    assert torch.equal(torch.get_rng_state(), before)
    assert not nn.Linear(3, 4).weight.is_meta


def test_loading_a_model_does_not_load_the_compiler():
    code = "import sys, maskgit; maskgit.MaskGIT.from_pretrained(); print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("asked", "environment", "taken"),
    [
        ("cuda", {}, 0),
        ("cuda:1", {}, 1),
        ("auto", {"WORLD_SIZE": "4", "RANK": "7", "LOCAL_RANK": "3"}, 3),
        ("cuda", {"WORLD_SIZE": "4", "RANK": "2"}, 2),
        ("cuda:1", {"WORLD_SIZE": "4", "LOCAL_RANK": "3"}, 1),
    ],
)
def test_a_process_takes_its_own_gpu_and_makes_it_the_current_one(monkeypatch, asked, environment, taken):
    current = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.__setitem__(0, device))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert own_device(asked) == torch.device("cuda", taken)
    assert current == [taken]


def test_a_process_on_the_cpu_takes_the_cpu():
    assert own_device("cpu") == torch.device("cpu")
