"""Networks that are built without memory."""

import subprocess
import sys

import torch
from torch import nn

from maskgit.devices import shapes_only


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
