"""Both stages trained through the command line on a device: as on the CPU, resumed, and seldom waited for."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fake_device import FROM, FROM_FREE, READ, TO, TO_FREE, counting
from maskgit import hub
from maskgit.apps.cli import commands as cli
from maskgit.data.batches import ImageBatches
from maskgit.data.image_cache import ImageCache, write_image_cache
from maskgit.training import optim, train_tokenizer, train_transformer
from maskgit.training.distributed import Distributed
from maskgit.training.evaluation import comparison_device
from maskgit.training.objectives.discriminator import Discriminator
from maskgit.training.run import progress, stopping
from maskgit.training.run.checkpoint import Checkpoints
from maskgit.training.run.stopping import TrainingError, UpdateGate
from maskgit.training.tokenizer_parts import CodeUsage, revive_codes

sys.path.append(str(Path(__file__).parents[1] / "training"))
from runs import checkpointed, logged

LOOPS = {"tokenizer": train_tokenizer, "transformer": train_transformer}
TOKENIZER = """
data = "images"
test_data = "images"
steps = 3
batch_size = 8
num_workers = 1
learning_rate = 3e-3
perceptual = "none"
adversarial_start = 1
r1_every = 2
discriminator_filters = 4
usage_window = 2
log_every = 1
tracker = "none"
device = "gpu"
precision = "float32"
[model]
filters = 8
norm = "LN"
num_res_blocks = 1
channel_multipliers = [1, 1, 1]
embedding_dim = 4
codebook_size = 16
"""
TRANSFORMER = """
data = "tokens"
test_data = "tokens"
tokenizer = "trained"
steps = 3
batch_size = 8
num_workers = 1
learning_rate = 1e-2
warmup_steps = 0
log_every = 1
num_samples = 2
tracker = "none"
device = "gpu"
precision = "float32"
[sampler]
steps = 2
[model]
num_codes = 16
num_classes = 3
grid_size = 2
hidden_size = 16
num_layers = 2
num_heads = 2
intermediate_size = 32
dropout = 0.0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both recipes, images, a tokenizer trained on the device for a moment, and tokens made by it there."""
    folder = tmp_path_factory.mktemp("runs")
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (24, 2, 2, 3)).repeat(4, 1).repeat(4, 2).astype(np.uint8)
    write_image_cache(folder / "images", images, np.arange(24) % 3, ["a", "b", "c"])
    for name, recipe in (("tokenizer", TOKENIZER), ("transformer", TRANSFORMER)):
        (folder / f"{name}.toml").write_text(recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train("tokenizer", "trained-run", "adversarial_weight=0.0")
        (folder / "trained-run" / "model").rename("trained")
        assert cli.main(["tokenize", "images", "tokens", "--tokenizer", "trained", "--device", "gpu"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _here(folder, monkeypatch):
    # A large product on what is the CPU in the end would take half a minute.
    monkeypatch.setattr(progress, "measured_peak", lambda device, dtype: 1e12)
    monkeypatch.chdir(folder)


def train(stage: str, out: str, *changes: str, code: int = 0) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "measured_peak", lambda device, dtype: 1e12)
        assert cli.main(["train", stage, f"{stage}.toml", "--set", f"out={out}", *changes]) == code
    return Path(out)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in logged(out) if "loss" in line]


def assert_same_weights(one: Path, other: Path, rtol: float, atol: float) -> None:
    first, second = checkpointed(one), checkpointed(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=rtol, atol=atol, msg=lambda m, n=name: n + m)


# What of Adam's first steps amplifies is rounding: where a gradient is as small as that, its sign decides.
WAYS = {
    "tokenizer": {
        "plain": ["adversarial_weight=0.0"],
        "discriminator": [],
        "adaptive": ["adaptive_weight=true", "adversarial_loss=hinge", "blur_resample=false"],
        "gumbel": ['model.quantizer="gumbel"'],
        "patches": [
            'model.quantizer="ibq"',
            "discriminator=patchgan",
            "r1_cost=0.0",
            "lecam_weight=0.1",
        ],
        "argmax": ['entropy_kind="argmax"', "max_gradient_norm=0.1", "num_workers=0"],
        "perceptual": ["perceptual=effnet-lite0", "perceptual_min_size=32", "perceptual_depth=2", "steps=1"],
    },
    "transformer": {
        "plain": [],
        "accumulated": ["accumulate=4"],
        "muon": ["optimizer=muon", "gradient_checkpointing=true"],
        "all tokens": ["compute_loss_for_all=true", "label_smoothing=0.0", "num_workers=0"],
        "asynchronous": ["async_checkpoints=true", "checkpoint_every=1"],
        "fine-tuned": ["init_from=base"],
    },
}
EACH = [(stage, way) for stage, ways in WAYS.items() for way in ways]


@pytest.mark.parametrize(("stage", "way"), EACH)
def test_three_steps_are_those_of_the_cpu(stage, way, tmp_path):
    if "init_from=base" in WAYS[stage][way] and not Path("base").exists():
        train("transformer", "base-run", "seed=9")
        Path("base-run/model").rename("base")
    there = train(stage, str(tmp_path / "there"), *WAYS[stage][way])
    here = train(stage, str(tmp_path / "here"), *WAYS[stage][way], "device=cpu")
    assert losses(there) == pytest.approx(losses(here), rel=2e-3)
    assert [sorted(line) for line in logged(there)] == [sorted(line) for line in logged(here)]
    # The first step's loss is before any update.
    assert losses(there)[0] == pytest.approx(losses(here)[0], rel=1e-5)
    assert (there / "model").is_dir()
    load = hub.load_tokenizer if stage == "tokenizer" else hub.load_model
    assert load(there / "model") is not None
    assert checkpointed(there).keys() == checkpointed(here).keys()


@pytest.mark.parametrize("stage", LOOPS)
def test_mixed_precision_trains(stage, tmp_path):
    mixed = train(stage, str(tmp_path / "mixed"), "precision=bfloat16")
    full = train(stage, str(tmp_path / "full"))
    assert losses(mixed) == pytest.approx(losses(full), rel=0.1)
    assert losses(mixed) != losses(full)
    assert all(value.dtype != torch.bfloat16 for value in checkpointed(mixed).values())


@pytest.mark.parametrize("stage", LOOPS)
def test_a_resumed_run_is_the_same_to_the_bit(stage, tmp_path):
    straight = train(stage, str(tmp_path / "straight"), "steps=4")
    cut = train(stage, str(tmp_path / "cut"), "steps=2")
    train(stage, str(cut), "steps=4")
    assert losses(cut) == losses(straight)
    assert_same_weights(straight, cut, 0, 0)


@pytest.mark.parametrize("stage", LOOPS)
def test_a_run_of_the_cpu_goes_on_on_the_device(stage, tmp_path):
    straight = train(stage, str(tmp_path / "straight"), "steps=4", "device=cpu")
    moved = train(stage, str(tmp_path / "moved"), "steps=2", "device=cpu")
    train(stage, str(moved), "steps=4")
    assert losses(moved) == pytest.approx(losses(straight), rel=2e-3)


# What each step costs, beside those that log, evaluate, sample or save: uploads that wait for nothing.
UPLOADS = {"tokenizer": 1, "transformer": 3}


@pytest.mark.parametrize(
    ("stage", "way"),
    [
        ("tokenizer", []),
        ("tokenizer", ["adaptive_weight=true", "precision=bfloat16"]),
        ("tokenizer", ['model.quantizer="gumbel"']),
        ("tokenizer", ['model.quantizer="ibq"', "discriminator=patchgan", "r1_cost=0.0", "lecam_weight=0.1"]),
        ("tokenizer", ['model.quantizer="simvq"', "gradient_checkpointing=true"]),
        ("transformer", []),
        ("transformer", ["optimizer=muon", "gradient_checkpointing=true"]),
        ("transformer", ["accumulate=4", "precision=bfloat16"]),
    ],
)
def test_a_step_waits_for_nothing(stage, way, tmp_path):
    rare = ["log_every=100", "usage_window=100"] if stage == "tokenizer" else ["log_every=100"]

    def counted(steps):
        with counting() as counts:
            train(stage, str(tmp_path / f"run-{steps}"), f"steps={steps}", *rare, *way)
        return counts

    train(stage, str(tmp_path / "first"), *way)
    few, many = counted(2), counted(6)
    for kind in (READ, TO, FROM, FROM_FREE):
        assert many[kind] == few[kind], f"{kind} at each step:\n{many}"
    # The gumbel quantizer's noise is of the samples' numbers.
    each = UPLOADS[stage] + (stage == "tokenizer")
    assert many[TO_FREE] - few[TO_FREE] == 4 * each


@pytest.mark.parametrize("stage", LOOPS)
def test_a_step_that_logs_reads_twice_or_thrice(stage, tmp_path):
    rare = ["usage_window=100"] if stage == "tokenizer" else []

    def counted(steps):
        with counting() as counts:
            train(stage, str(tmp_path / f"run-{steps}"), f"steps={steps}", *rare)
        return counts

    counted(1)
    few, many = counted(3), counted(6)
    # Whether it was finite; all scalars; the losses by mask ratio.
    assert many[READ] - few[READ] == 3 * {"tokenizer": 2, "transformer": 3}[stage]
    assert many[TO] == few[TO], many
    assert many[FROM] == few[FROM], many


def spoil(monkeypatch, stage: str, step: int) -> dict[str, list[torch.Tensor]]:
    """Make the loss of a step NaN, and return where the weights before each update will be kept."""
    seen: dict[str, list[torch.Tensor]] = {"weights": [], "moments": []}
    name = {"tokenizer": "l2_loss", "transformer": "sequence_losses"}[stage]
    losses, check = getattr(LOOPS[stage], name), UpdateGate.check
    calls = iter(range(100))

    def spoiled(*arguments):
        return losses(*arguments) * (float("nan") if next(calls) == step else 1)

    init = UpdateGate.__init__

    def watching(gate, device, *optimizers, **options):
        init(gate, device, *optimizers, **options)
        gate.optimizers = optimizers

    def checked(gate, number, quantities):
        parameters = gate.optimizers[0].param_groups[0]["params"]
        seen["weights"].append(parameters[0].detach().clone())
        state = gate.optimizers[0].state.get(parameters[0], {})
        seen["moments"].append(
            torch.stack([part.float().sum() for part in state.values()]) if state else None
        )
        check(gate, number, quantities)

    monkeypatch.setattr(LOOPS[stage], name, spoiled)
    monkeypatch.setattr(UpdateGate, "__init__", watching)
    monkeypatch.setattr(UpdateGate, "check", checked)
    return seen


@pytest.mark.parametrize("stage", LOOPS)
def test_a_step_that_is_not_finite_is_neither_applied_nor_saved(stage, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    long = ["steps=8", "log_every=100", *(["usage_window=100"] if stage == "tokenizer" else [])]
    with monkeypatch.context() as patch:
        seen = spoil(patch, stage, 3)
        train(stage, str(out), *long, "checkpoint_every=6", code=2)
    assert "Stopped at step 3 before its update: " in capsys.readouterr().err
    # The host looked before it would have saved step 6. Weights moved until the step, and not after it.
    weights = seen["weights"]
    assert len(weights) == 6
    assert not torch.equal(weights[2].cpu(), weights[3].cpu())
    for later in weights[4:]:
        assert torch.equal(weights[3].cpu(), later.cpu())
    for later in seen["moments"][4:]:
        assert torch.equal(seen["moments"][3].cpu(), later.cpu())
    assert Checkpoints(out).latest() is None
    straight = train(stage, str(tmp_path / "straight"), *long)
    train(stage, str(out), *long)
    assert_same_weights(straight, out, 0, 0)


def test_the_host_looks_every_so_many_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stopping, "FINITE_EVERY", 5)
    seen = spoil(monkeypatch, "transformer", 1)
    train("transformer", str(tmp_path / "run"), "steps=20", "log_every=100", code=2)
    assert "Stopped at step 1" in capsys.readouterr().err
    assert len(seen["weights"]) == 5


def test_a_gate_tells_of_the_first_bad_step_in_one_reading():
    gate = UpdateGate(torch.device("gpu"), every=10)
    one, bad = torch.ones((), device="gpu"), torch.full((), float("inf"), device="gpu")
    with counting() as counts:
        for step in range(4):
            gate.check(step, {"loss": one, "norm": bad if step in (1, 2) else one})
        assert not counts.events
        with pytest.raises(TrainingError, match=r"step 1 before its update: norm is inf\."):
            gate.read()
    assert counts.events == {READ: 1}


def test_codes_are_revived_as_on_the_cpu():
    features = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[[0, 1], [1, 5]]])
    found = []
    for device in ("cpu", "gpu"):
        alone = Distributed(0, 1, torch.device(device))
        usage = CodeUsage(8, 10, alone)
        usage.update(tokens.to(device))
        book, moment = (torch.full((8, 4), value).to(device) for value in (-1.0, 2.0))
        count = revive_codes(
            [book], usage.unused(), features.to(device), [moment], seed=1, step=2, distributed=alone
        )
        found.append((count, book.cpu(), moment.cpu(), usage.read()))
    assert found[0][0] == found[1][0] == 5
    assert found[0][3] == found[1][3]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1:3], found[1][1:3], strict=True))


def test_the_discriminator_copies_its_kernel_once():
    network, images = Discriminator(16, max_filters=4).to("gpu"), torch.rand(2, 3, 16, 16).to("gpu")
    network(images)
    with counting() as counts:
        network(images).sum().backward()
    assert not counts.events, counts


@pytest.mark.parametrize("fused", [True, False])
def test_adam_reads_nothing(fused, monkeypatch):
    # On MPS it is not fused.
    monkeypatch.setattr(optim, "copies_aside", lambda device: fused)
    weights = [torch.nn.Parameter(torch.ones(3, device="gpu")) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.ones(3, device="gpu")
    optimizer = optim.make_adam(weights, (0.9, 0.99))
    with counting() as counts:
        optimizer.step()
    assert not counts.events, counts


def test_batches_are_pinned_where_they_are_made(folder):
    batches = ImageBatches(ImageCache.open("images"), seed=0, global_batch=4, num_workers=1)
    made = batches.from_step(0, pin=True)
    assert all(part.is_pinned() for part in next(made))
    made.close()
    assert not any(part.is_pinned() for part in next(iter(batches)))


def test_images_are_compared_where_float64_is(kind):
    expected = torch.device("cpu") if kind == "mps" else torch.device("gpu:0")
    assert comparison_device(torch.device("gpu:0")) == expected
    assert comparison_device(torch.device("cpu")) == torch.device("cpu")


def test_a_dry_run_says_where(capsys):
    assert cli.main(["train", "transformer", "transformer.toml", "--set", "out=nowhere", "--dry-run"]) == 0
    assert "float32 on gpu" in capsys.readouterr().out
    assert not Path("nowhere").exists()
