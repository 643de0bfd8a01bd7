"""Float32 stays whole where a GPU would round it, and nobody else's settings change."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskgit import MaskGIT
from maskgit.foundation import devices
from maskgit.foundation.compiled import Compiled, is_compiled
from maskgit.foundation.devices import whole_float32

CUDA = torch.device("cuda")
MATMUL = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _settings_as_they_were():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    torch.backends.cudnn.conv.fp32_precision = "tf32"


@pytest.fixture
def rounded(monkeypatch):
    """Take all float32 batches for tensors of a GPU; return what convolutions are asked for."""
    asked = []
    convolution = torch._convolution
    monkeypatch.setattr(devices, "_may_be_rounded", lambda x: x.dtype == torch.float32)
    monkeypatch.setattr(torch, "_convolution", lambda *args: asked.append(args) or convolution(*args))
    return asked


CONVOLUTIONS = [
    lambda x: nn.Conv2d(4, 6, 3, padding=1, bias=False)(x),
    lambda x: nn.Conv2d(4, 6, 4, stride=2, padding=1)(x),
    lambda x: nn.Conv2d(4, 8, 3, groups=4, dilation=(1, 2))(x),
    lambda x: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=2)(x),
    lambda x: F.conv2d(x, torch.ones(2, 4, 3, 3), padding="valid"),
    lambda x: F.conv2d(x, torch.ones(2, 4, 3, 3), None, (2, 1), [1, 0]),
    lambda x: F.conv_transpose2d(x, torch.ones(4, 2, 4, 4), torch.ones(2), stride=2, padding=1),
    lambda x: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1)(x),
]


@pytest.mark.parametrize("number", range(len(CONVOLUTIONS)))
@torch.no_grad()
def test_convolutions_are_the_same_and_not_rounded(number, rounded):
    x = torch.randn(2, 4, 12, 12)
    torch.manual_seed(1)
    expected = CONVOLUTIONS[number](x)
    torch.manual_seed(1)
    with whole_float32(CUDA):
        made = CONVOLUTIONS[number](x)
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-6)
    (asked,) = rounded
    # The last argument is allow_tf32.
    assert asked[-1] is False


def test_a_network_that_tokenizes_or_predicts_is_whole(tiny, rounded, monkeypatch):
    entered = []
    real = devices._PRODUCTS.__class__.__enter__
    monkeypatch.setattr(
        devices._PRODUCTS.__class__, "__enter__", lambda self: entered.append(1) or real(self)
    )
    # As if the tensors were of a GPU.
    for module in ("maskgit.networks.tokenizer", "maskgit.model"):
        monkeypatch.setattr(
            f"{module}.whole_float32", lambda device, network=None: whole_float32(CUDA, network)
        )
    images = torch.rand(1, 3, 32, 32)
    expected = tiny.tokenizer.encode(images)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in tiny.tokenizer.encoder.modules())
    assert len(rounded) == convolutions
    # The convolutions, and the distances to codes.
    assert len(entered) == 2
    tiny.tokenizer.decode(expected)
    tiny.predict_logits(tiny.vocabulary.sequence(torch.tensor([1])))
    assert len(entered) == 4


def test_the_distances_of_an_evaluation_are_whole(tiny, rounded, monkeypatch):
    from maskgit.evaluation.networks.lpips import LPIPS
    from maskgit.evaluation.runs import sampling
    from small_evaluation import real_images, toy_net

    monkeypatch.setattr(sampling, "whole_float32", lambda device: whole_float32(CUDA))
    lpips = LPIPS("alex").requires_grad_(False).eval()
    work = sampling.Reconstructions(
        tiny.tokenizer, real_images(4), toy_net(), weights={}, lpips=lpips, lpips_name="alex", batch_size=4
    )
    work.make(0, 4)
    # Five layers for each of two batches, and the five weighted differences.
    assert len(rounded) == 15
    assert all(asked[-1] is False for asked in rounded)


def test_on_a_cpu_nothing_is_asked():
    with whole_float32(torch.device("cpu")):
        assert not torch.overrides._get_current_function_mode_stack()


def test_compiled_networks_are_left_alone():
    network = nn.Conv2d(1, 1, 1)
    network.forward = Compiled(network.forward, backend="eager")
    with whole_float32(CUDA, network):
        assert not torch.overrides._get_current_function_mode_stack()
    with whole_float32(CUDA, nn.Conv2d(1, 1, 1)):
        assert torch.overrides._get_current_function_mode_stack()


def settings():
    """Return what torch says of its settings, and where it refuses to say."""
    found = []
    for ask in (
        lambda: torch.backends.fp32_precision,
        lambda: MATMUL.fp32_precision,
        lambda: torch.backends.cudnn.conv.fp32_precision,
        lambda: torch.backends.cudnn.allow_tf32,
        lambda: MATMUL.allow_tf32,
        torch.get_float32_matmul_precision,
    ):
        try:
            found.append(ask())
        except RuntimeError:
            found.append("refused")
    return found


USERS = {
    "nothing": lambda: None,
    "older": lambda: torch.set_float32_matmul_precision("high"),
    "older, medium": lambda: torch.set_float32_matmul_precision("medium"),
    "newer": lambda: setattr(MATMUL, "fp32_precision", "tf32"),
    "newer, all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "newer, convolutions": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
}


@pytest.mark.filterwarnings("ignore:Please use the new API settings")
@pytest.mark.parametrize("user", USERS)
def test_the_process_keeps_what_its_user_has_set(user):
    USERS[user]()
    before = settings()
    for _ in range(2):
        with whole_float32(CUDA), whole_float32(CUDA):
            assert MATMUL.fp32_precision != "tf32"
            if user == "nothing":
                assert settings() == before
        assert settings() == before
    if user == "newer, all":
        # What was inherited still is.
        torch.backends.fp32_precision = "ieee"
        assert MATMUL.fp32_precision == "ieee"


def test_the_last_thread_to_leave_gives_the_setting_back():
    MATMUL.fp32_precision = "tf32"
    inside, leave = threading.Event(), threading.Event()

    def other():
        with whole_float32(CUDA):
            inside.set()
            leave.wait(120)

    thread = threading.Thread(target=other)
    with whole_float32(CUDA):
        thread.start()
        assert inside.wait(120)
    assert MATMUL.fp32_precision == "ieee"
    leave.set()
    thread.join()
    assert MATMUL.fp32_precision == "tf32"


def test_optimizing_changes_no_setting_of_the_process(tiny, monkeypatch):
    from maskgit.engine import Engine, build

    before = settings()
    # No GPU is here: the networks stay on the CPU.
    monkeypatch.setattr(MaskGIT, "to", lambda self, *_: self)
    for device in ("cpu", "cuda"):
        build(tiny, Engine(device=device))
    assert settings() == before


def test_a_compiled_function_says_when_it_is_compiled_no_more():
    def double(x):
        return 2 * x

    function = Compiled(double, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=3):
        for size in (2, 3, 4):
            assert torch.equal(function(torch.ones(size)), torch.full((size,), 2.0))
        with pytest.warns(UserWarning, match=r"double runs uncompiled, slower.*recompile_limit"):
            assert torch.equal(function(torch.ones(5)), torch.full((5,), 2.0))
        # Once.
        assert torch.equal(function(torch.ones(6)), torch.full((6,), 2.0))
    assert function.stopped


def test_what_is_wrong_with_its_arguments_a_compiled_function_says_itself():
    def check(x):
        if len(x) > 2:
            raise ValueError("too long")
        return x

    function = Compiled(check, backend="eager")
    with pytest.raises(ValueError, match="too long"):
        function(torch.ones(3))
    assert not function.stopped
    assert torch.equal(function(torch.ones(2)), torch.ones(2))


def test_what_cannot_be_compiled_is_told():
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    function = Compiled(torch.nn.functional.relu, backend=broken)
    with pytest.warns(UserWarning, match="relu runs uncompiled, slower, from now on: .*no compiler here"):
        assert torch.equal(function(-torch.ones(2)), torch.zeros(2))


def test_a_compiled_network_can_be_copied():
    import copy

    network = nn.Linear(2, 2)
    network.forward = Compiled(network.forward, backend="eager")
    made = copy.deepcopy(network)
    assert is_compiled(made)
    assert made.forward.plain.__self__ is made
    made.weight.data.zero_()
    assert not torch.equal(made(torch.ones(1, 2)), network(torch.ones(1, 2)))
