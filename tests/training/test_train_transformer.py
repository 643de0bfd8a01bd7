"""Training of the second stage: what it learns, resuming, processes, fine-tuning, and bad input."""

import json
import math
import os
import shutil
import signal
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from maskgit import hub
from maskgit.checkpoints.weights import weights_fingerprint
from maskgit.data.image_cache import ImageCache, write_image_cache
from maskgit.data.token_cache import TokenCache, write_token_cache
from maskgit.errors import CheckpointError, ConfigError, DataError, OutputError
from maskgit.evaluation.metrics import frechet_distance
from maskgit.evaluation.networks.features import load_feature_net
from maskgit.foundation.notes import listening
from maskgit.networks.config import TokenizerConfig, TransformerConfig
from maskgit.networks.lora import LoraConfig
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.transformer import Transformer
from maskgit.sampler.config import SamplerConfig
from maskgit.training import numerics
from maskgit.training import train_transformer as module
from maskgit.training.distributed import Distributed
from maskgit.training.dry_run import dry_run_transformer, transformer_step_bytes
from maskgit.training.evaluation import RatioLosses, warn_of_samples
from maskgit.training.inputs import completed
from maskgit.training.run.checkpoint import Checkpoints
from maskgit.training.run.folder import annealed, held_run
from maskgit.training.run.stopping import EXIT_INTERRUPTED, TrainingError
from maskgit.training.saving import save_model
from maskgit.training.train_transformer import flops_per_image, train_transformer
from maskgit.training.transformer_config import TransformerTrainingConfig
from maskgit.training.warm_start import draw_transformer, start_from
from runs import checkpointed, logged, run_two, start

CODES, CLASSES, GRID = 16, 3, 4
MODEL = TransformerConfig(
    CODES, CLASSES, GRID, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32
)


class ClassAsTokens:
    """Stands in for a tokenizer: an image's tokens are all the number in its first pixel."""

    patch_size = 2

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        number = (images[:, 0, 0, 0] * 255).round().long()
        return number[:, None, None].expand(-1, GRID, GRID)


def write_tokens(folder: Path, numbers: np.ndarray, fingerprint: str, names=("a", "b", "c")) -> None:
    images = np.zeros((len(numbers), 8, 8, 3), np.uint8) + numbers[:, None, None, None].astype(np.uint8)
    labels = np.arange(len(numbers)) % len(names)
    cache = write_image_cache(folder / "images", images, labels, names)
    write_token_cache(
        cache,
        ClassAsTokens(),
        folder / "tokens",
        tokenizer_fingerprint=fingerprint,
        num_codes=CODES,
        views="centre",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer; tokens that are the label plus 4, and others."""
    folder = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    shape = TokenizerConfig(
        filters=32, num_res_blocks=1, channel_multipliers=(1, 1), embedding_dim=4, codebook_size=CODES
    )
    tokenizer = Tokenizer(shape).eval()
    hub.save_tokenizer(tokenizer, folder / "tokenizer")
    fingerprint = weights_fingerprint(tokenizer)
    write_tokens(folder, np.arange(30) % CLASSES + 4, fingerprint)
    write_tokens(folder / "other", np.arange(30) % CLASSES + 7, fingerprint)
    write_tokens(folder / "foreign", np.arange(30) % CLASSES + 4, "0" * 64)
    write_tokens(folder / "five", np.arange(30) % 5 + 4, fingerprint, names=("v", "w", "x", "y", "z"))
    return folder


def config_of(folder: Path, out: Path) -> TransformerTrainingConfig:
    return TransformerTrainingConfig(
        data=str(folder / "tokens"),
        out=str(out),
        tokenizer=str(folder / "tokenizer"),
        model=MODEL,
        steps=6,
        batch_size=8,
        num_workers=0,
        learning_rate=1e-2,
        warmup_steps=2,
        device="cpu",
        precision="float32",
        log_every=1,
        sample_every=100,
        num_samples=3,
        sampler=SamplerConfig(steps=2),
    )


@pytest.fixture
def config(folder, tmp_path) -> TransformerTrainingConfig:
    return config_of(folder, tmp_path / "run")


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory) -> TransformerTrainingConfig:
    """A run of `config` that nothing stopped; must not be changed."""
    config = config_of(folder, tmp_path_factory.mktemp("straight") / "run")
    train_transformer(config)
    return config


def scalars(out: str, name: str) -> list[float]:
    return [line[name] for line in logged(out) if name in line]


def final_state(config: TransformerTrainingConfig) -> dict[str, torch.Tensor]:
    return checkpointed(config.out)


def assert_same_run(one: TransformerTrainingConfig, other: TransformerTrainingConfig) -> None:
    a, b = final_state(one), final_state(other)
    assert a.keys() == b.keys()
    assert any("exp_avg_sq" in name for name in a)
    assert any(name.startswith("ema") for name in a)
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
    assert scalars(one.out, "loss") == scalars(other.out, "loss")
    models = [hub.load_model(Path(run.out) / "model").transformer.state_dict() for run in (one, other)]
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name


def interrupt_at(monkeypatch, step: int) -> None:
    """Let a SIGTERM arrive during a step."""
    check = module.UpdateGate.check

    def interrupting(gate: object, now: int, quantities: object) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        check(gate, now, quantities)

    monkeypatch.setattr(module.UpdateGate, "check", interrupting)


@pytest.mark.parametrize("changes", [{}, {"num_workers": 2}, {"optimizer": "muon"}])
def test_a_stopped_run_goes_on_bit_for_bit(config, straight, tmp_path, monkeypatch, changes):
    config = replace(config, **changes)
    if "optimizer" in changes:
        straight = replace(config, out=str(tmp_path / "straight"))
        train_transformer(straight)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(SystemExit) as stopped:
            train_transformer(config)
    assert stopped.value.code == EXIT_INTERRUPTED == 75
    assert Checkpoints(config.out).committed()[-1].step == 4
    train_transformer(config)
    assert_same_run(straight, config)


ROTARY = replace(MODEL, block="modern", positions="rotary", conditioning="adaln", grid_size=2, num_heads=1)
WINDOWS = {"model": ROTARY, "windows": ((2, 2), (1, 4), (4, 1))}


def test_a_run_on_windows_learns_every_shape_and_goes_on_bit_for_bit(config, tmp_path, monkeypatch):
    config = replace(config, **WINDOWS, test_data=config.data, label_smoothing=0.0, steps=60, ema_decay=0.5)
    straight = replace(config, out=str(tmp_path / "straight"))
    train_transformer(straight)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(SystemExit):
            train_transformer(config)
    train_transformer(config)
    assert_same_run(straight, config)
    assert scalars(config.out, "test_loss")[-1] < 0.5 < scalars(config.out, "loss")[0]
    model = hub.load_model(Path(config.out) / "model")
    for size, shape in (((8, 2), (1, 4)), ((2, 8), (4, 1)), ((4, 4), (2, 2))):
        made = model.resized(*size).generate([0, 1, 2], seed=1, temperature=0.0)
        # The data's tokens are the label plus 4.
        assert torch.equal(made.tokens, torch.arange(4, 7)[:, None, None].expand(-1, *shape))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"windows": ((4, 4),)}, 'needs model.positions = "rotary"'),
        ({**WINDOWS, "windows": ((2, 3),)}, "2 × 3 has 6 tokens, but the model's grid has 4"),
        ({**WINDOWS, "windows": ((4,),)}, r"\[rows, columns\], each at least 1, but is \[4\]"),
        (
            {**WINDOWS, "windows": ((1, 100),), "model": replace(ROTARY, grid_size=10)},
            "need up to 100 tokens",
        ),
        ({"model": replace(ROTARY, grid_columns=4)}, "must be 0 in training"),
    ],
)
def test_windows_that_do_not_fit_are_sentences(config, changes, said):
    with pytest.raises(ConfigError, match=said):
        train_transformer(replace(config, **changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fsdp": True}, "shards matrices that Muon needs whole"),
        ({"lora": LoraConfig(rank=2), "init_from": "a"}, "not for the two of an adapter"),
    ],
)
def test_muon_is_refused_where_matrices_are_not_whole(config, changes, said):
    with pytest.raises(ConfigError, match=said):
        replace(config, optimizer="muon", **changes)


@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_layers_computed_anew_give_the_same_run(config, straight, tmp_path, dropout):
    config = replace(config, model=replace(MODEL, dropout=dropout))
    anew = replace(config, gradient_checkpointing=True)
    train_transformer(anew)
    if not dropout:
        straight = replace(config, out=str(tmp_path / "straight"))
        train_transformer(straight)
    assert_same_run(straight, anew)
    assert transformer_step_bytes(anew, 8, torch.float32) < transformer_step_bytes(straight, 8, torch.float32)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_killed_run_goes_on_from_its_last_checkpoint_bit_for_bit(
    config, straight, monkeypatch, asynchronous
):
    config = replace(config, checkpoint_every=2, async_checkpoints=asynchronous)
    check = module.UpdateGate.check

    class KilledError(BaseException):
        pass

    def dying(gate: object, step: int, quantities: object) -> None:
        if step == 5:
            raise KilledError
        check(gate, step, quantities)

    with monkeypatch.context() as patch:
        patch.setattr(module.UpdateGate, "check", dying)
        with pytest.raises(KilledError):
            train_transformer(config)
    train_transformer(config)
    assert_same_run(straight, config)


def test_a_loss_that_is_none_stops_before_it_spoils_a_weight(config, straight, monkeypatch):
    config = replace(config, checkpoint_every=1)
    losses, calls = module.sequence_losses, []

    def spoiled(*arguments: object) -> torch.Tensor:
        calls.append(1)
        return losses(*arguments) * (float("nan") if len(calls) == 3 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(module, "sequence_losses", spoiled)
        with pytest.raises(
            TrainingError, match="step 2 before its update: loss is nan, gradient_norm is nan"
        ):
            train_transformer(config)
    assert Checkpoints(config.out).committed()[-1].step == 2
    train_transformer(config)
    assert_same_run(straight, config)


def test_a_cut_up_batch_gives_the_same_run_to_rounding(config, tmp_path):
    config = replace(config, model=replace(MODEL, dropout=0.0))
    pieces = replace(config, accumulate=4, out=str(tmp_path / "pieces"))
    train_transformer(config)
    train_transformer(pieces)
    assert scalars(pieces.out, "loss") == pytest.approx(scalars(config.out, "loss"), rel=1e-5)


SCRIPT = """
import json, os, sys
from maskgit.training.train_transformer import train_transformer
from maskgit.training.transformer_config import TransformerTrainingConfig
for port, values in zip(os.environ["MASTER_PORTS"].split(), json.loads(sys.argv[1]), strict=True):
    os.environ["MASTER_PORT"] = port
    train_transformer(TransformerTrainingConfig.from_dict(values))
"""


def test_two_processes_and_shards_give_the_same_losses_as_one(config, tmp_path):
    config = replace(config, model=replace(MODEL, dropout=0.0), accumulate=2, test_data=config.data, steps=4)
    train_transformer(config)
    runs = {"ddp": replace(config, out=str(tmp_path / "ddp"))}
    runs["fsdp"] = replace(config, fsdp=True, out=str(tmp_path / "fsdp"))
    run_two(SCRIPT, json.dumps([run.to_dict() for run in runs.values()]), joins=len(runs))
    one = hub.load_model(Path(config.out) / "model").transformer.state_dict()
    for run in runs.values():
        assert scalars(run.out, "loss") == pytest.approx(scalars(config.out, "loss"), rel=1e-5)
        assert scalars(run.out, "test_loss") == pytest.approx(scalars(config.out, "test_loss"), rel=1e-5)
        assert scalars(run.out, "gradient_norm") == pytest.approx(
            scalars(config.out, "gradient_norm"), rel=1e-4
        )
        two = hub.load_model(Path(run.out) / "model").transformer.state_dict()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-4)


def test_blocks_are_compiled_before_anything_wraps_the_network(config, monkeypatch):
    called = []
    parallelize = module.parallelize

    def wrapping(network, *arguments, **options):
        called.append(network)
        return parallelize(network, *arguments, **options)

    monkeypatch.setattr(torch, "compile", lambda forward, **_: called.append(forward.__self__) or forward)
    monkeypatch.setattr(module, "parallelize", wrapping)
    train_transformer(replace(config, compile=True, steps=1))
    network = called[-1]
    assert called == [*network.layers, network]


GATED = """
import sys, torch
from torch.distributed.tensor import DTensor
from maskgit.networks.config import TransformerConfig
from maskgit.training.distributed import Distributed, parallelize
from maskgit.training.run.stopping import TrainingError, UpdateGate
from maskgit.networks.transformer import Transformer
distributed = Distributed.init("cpu", group=True)
torch.manual_seed(0)
network = Transformer(TransformerConfig(16, 3, 4, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32))
parallelize(network, distributed, fsdp=sys.argv[1] == "fsdp", blocks=network.layers)
optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
gate = UpdateGate(distributed.device, optimizer, every=10)
kept = []
for step in range(5):
    network(torch.zeros(2, 17, dtype=torch.int64)).square().mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    gate.check(step, {"gradient_norm": norm * float("nan") if step == 2 else norm})
    optimizer.step()
    weight = network.head.dense.weight
    assert isinstance(weight, DTensor) == (sys.argv[1] == "fsdp")
    state = optimizer.state[weight]
    parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in (weight, state["exp_avg"])]
    kept.append([part.detach().clone() for part in parts] + [float(state["step"])])
assert not torch.equal(kept[0][0], kept[1][0])
for later in kept[2:]:
    assert torch.equal(later[0], kept[1][0]) and torch.equal(later[1], kept[1][1]) and later[2] == 2
try:
    gate.read()
except TrainingError as error:
    print(error, file=sys.stderr)
del network
distributed.close()
"""


@pytest.mark.parametrize("way", ["plain", "fsdp"])
def test_a_gate_that_looks_seldom_keeps_bad_steps_from_weights_and_moments(way):
    worker = start(GATED, way)
    said = worker.communicate(timeout=600)[1]
    assert worker.returncode == 0, said
    assert "Stopped at step 2 before its update: gradient_norm is nan." in said


def test_it_learns_and_generates_with_and_without_a_class(config):
    config = replace(config, steps=250, label_smoothing=0.0, label_dropout=0.2, ema_decay=0.95)
    config = replace(config, test_data=config.data, evaluate_every=250, keep_best=1)
    model = hub.load_model(train_transformer(config))
    assert scalars(config.out, "loss")[0] > 2.0
    # Only a sample that hides all tokens and its class leaves anything to guess.
    assert np.mean(scalars(config.out, "loss")[-20:]) < 0.3
    assert scalars(config.out, "test_loss")[-1] < 0.05
    assert model.config.class_names == ("a", "b", "c")
    assert model.config.label_dropout == 0.2
    for label in range(CLASSES):
        tokens = model.generate(label, num_images=2, seed=1).tokens
        assert float((tokens == label + 4).float().mean()) > 0.95
    assert set(model.generate(None, num_images=4, seed=1).tokens.unique().tolist()) <= {4, 5, 6}
    assert len(list((Path(config.out) / "samples").glob("samples-*.png"))) == 3
    assert {"learning_rate", "gradient_norm"} <= json.loads(
        (Path(config.out) / "scalars.jsonl").read_text().splitlines()[0]
    ).keys()


def test_the_learning_rate_warms_up_and_falls(config):
    train_transformer(replace(config, lr_schedule="cosine"))
    rates = scalars(config.out, "learning_rate")
    expected = [0.005, 0.01, *(0.005 * (1 + math.cos(math.pi * i / 4)) for i in range(4))]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    "change",
    [
        {"mask_schedule": "square"},
        {"label_smoothing": 0.0},
        {"label_dropout": 0.9},
        {"compute_loss_for_all": True},
        {"learning_rate": 1e-3},
        {"lr_schedule": "cosine"},
        {"warmup_steps": 0},
        {"betas": (0.5, 0.9)},
        {"weight_decay": 5.0},
        {"max_gradient_norm": 1e-6},
        {"seed": 1},
        {"precision": "bfloat16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_setting_changes_the_run(config, straight, change):
    other = replace(config, **change)
    train_transformer(other)
    one, two = final_state(straight), final_state(other)
    assert any(not torch.equal(value, two[name]) for name, value in one.items())


def test_losses_are_told_by_tenths_of_the_mask_ratio():
    losses = RatioLosses(torch.device("cpu"))
    losses.update(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.1, 0.1001, 0.95, 1.0]))
    alone = Distributed(0, 1, torch.device("cpu"))
    prefix = "loss_by_mask_ratio/"
    assert losses.read(alone) == {f"{prefix}0.0-0.1": 1.0, f"{prefix}0.1-0.2": 2.0, f"{prefix}0.9-1.0": 6.0}
    assert losses.read(alone) == {}


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = Transformer(replace(MODEL, dropout=0.0))
    with module.attention(torch.device("cpu")), FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, GRID**2 + 1, dtype=torch.int64), codes=CODES)
    assert flops_per_image(model.config) == pytest.approx(3 * counter.get_total_flops() / 2)


def test_dry_run_tells_the_arithmetic_and_writes_nothing(config):
    text = dry_run_transformer(replace(config, steps=15, batch_size=24, accumulate=3), world=2)
    assert f"{sum(p.numel() for p in Transformer(MODEL).parameters()):,}" in text
    assert "24 = 2 processes × 3 parts × 4" in text
    assert "15, 12.0 times through the data" in text
    assert "30 images, 3 classes, 4 × 4 tokens of 16 codes" in text
    assert not Path(config.out).exists()


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Path:
    """A model folder."""
    config = TransformerTrainingConfig(
        data=str(folder / "tokens"),
        out=str(tmp_path_factory.mktemp("trained")),
        tokenizer=str(folder / "tokenizer"),
        model=MODEL,
        steps=3,
        batch_size=8,
        num_workers=0,
        warmup_steps=0,
        device="cpu",
        precision="float32",
    )
    return train_transformer(config)


def test_fine_tuning_keeps_codes_mask_and_layers_and_draws_new_classes(trained):
    source = hub.load_model(trained)
    theirs = source.transformer.state_dict()
    fresh = draw_transformer(replace(MODEL, num_classes=5), seed=9)
    drawn = fresh.token_embedding.weight.detach().clone()
    assert not start_from(fresh, source, ("v", "w", "x", "y", "z"))
    rows, bias = fresh.token_embedding.weight, fresh.head.bias
    assert torch.equal(rows[:CODES], theirs["token_embedding.weight"][:CODES])
    assert torch.equal(rows[CODES:-1], drawn[CODES:-1])
    assert torch.equal(rows[-1], theirs["token_embedding.weight"][-1])
    assert torch.equal(bias[:CODES], theirs["head.bias"][:CODES])
    assert torch.equal(bias[-1], theirs["head.bias"][-1])
    for name, value in fresh.state_dict().items():
        if name not in ("token_embedding.weight", "head.bias"):
            assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize(
    ("names", "init_classes", "kept"),
    [
        (("a", "b", "c"), "auto", True),
        (("a", "b", "d"), "auto", False),
        (("a", "b", "d"), "keep", True),
        (("a", "b", "c"), "new", False),
    ],
)
def test_classes_rows_are_kept_where_the_names_are_the_same(trained, names, init_classes, kept):
    source = hub.load_model(trained)
    fresh = draw_transformer(MODEL, seed=9)
    told = []
    with listening(told.append):
        assert start_from(fresh, source, names, init_classes) is kept
    # Rows that come to stand for another class are not copied silently.
    assert [("1 of 3" in note, "'c' for 'd'" in note) for note in told] == [(True, True)] * (
        init_classes == "keep"
    )
    same = torch.equal(fresh.token_embedding.weight, source.transformer.token_embedding.weight)
    assert same is kept


def test_fine_tuning_runs_from_a_model_onto_other_classes(config, folder, trained):
    config = replace(
        config,
        data=str(folder / "five" / "tokens"),
        tokenizer=None,
        init_from=str(trained),
        model=replace(MODEL, num_classes=5),
    )
    model = hub.load_model(train_transformer(config))
    assert model.config.class_names == ("v", "w", "x", "y", "z")
    assert model.generate("z", seed=1).images.shape == (1, 3, 8, 8)


def test_fine_tuning_refuses_codes_that_mean_something_else(config, folder, trained, tmp_path):
    model = hub.load_model(trained)
    with torch.no_grad():
        model.tokenizer.decoder.conv_out.bias += 1
    hub.save_model(model, tmp_path / "decoder")
    # Another decoder paints the same codes.
    train_transformer(replace(config, init_from=str(tmp_path / "decoder")))
    with torch.no_grad():
        model.tokenizer.quantizer.codebook[0] += 1
    hub.save_model(model, tmp_path / "codes")
    with pytest.raises(ConfigError, match=r"init_from .*codes.* another tokenizer"):
        train_transformer(replace(config, init_from=str(tmp_path / "codes"), out=str(tmp_path / "other")))


def test_fine_tuning_refuses_another_shape_and_classes_it_cannot_keep(trained):
    source = hub.load_model(trained)
    with pytest.raises(ConfigError, match=r"num_layers \(model 2, here 3\)"):
        start_from(draw_transformer(replace(MODEL, num_layers=3), 0), source, ("a", "b", "c"))
    with pytest.raises(ConfigError, match="choose 'new'"):
        start_from(draw_transformer(replace(MODEL, num_classes=5), 0), source, ("a",) * 5, "keep")


def test_data_and_config_that_changed_are_errors_that_lose_nothing(config, folder):
    train_transformer(config)
    before = final_state(config)
    with pytest.raises(DataError, match="changed since the checkpoint"):
        train_transformer(replace(config, data=str(folder / "other" / "tokens")))
    with pytest.raises(ConfigError, match=r"learning_rate \(was 0\.01, is 0\.1\).*model\.num_layers"):
        train_transformer(replace(config, learning_rate=0.1, model=replace(MODEL, num_layers=1)))
    changed = shutil.copytree(config.data, Path(config.out).parent / "changed")
    with (changed / "tokens-00000.npy").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\0\0")
    with pytest.raises(DataError, match="changed since the checkpoint"):
        train_transformer(replace(config, data=str(changed)))
    after = final_state(config)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_run_with_a_constant_rate_may_be_made_longer(config):
    train_transformer(config)
    train_transformer(replace(config, steps=8))
    assert len(scalars(config.out, "loss")) == 8


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"data": "foreign/tokens"}, DataError, "made by another tokenizer"),
        ({"data": "nothing"}, DataError, "not a complete token cache"),
        ({"tokenizer": "nothing"}, CheckpointError, "cannot be read"),
        ({"model": replace(MODEL, num_codes=32)}, ConfigError, r"model\.num_codes is 32, but .* have 16"),
        ({"model": replace(MODEL, num_classes=4)}, ConfigError, r"model\.num_classes is 4, but .* have 3"),
        ({"model": replace(MODEL, grid_size=8)}, ConfigError, r"model\.grid_size is 8, but .* have 4"),
        ({"accumulate": 3}, ConfigError, "multiple of"),
    ],
)
def test_what_does_not_fit_is_a_sentence(config, folder, change, error, sentence):
    change = {key: str(folder / value) if isinstance(value, str) else value for key, value in change.items()}
    with pytest.raises(error, match=sentence):
        train_transformer(replace(config, **change))
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokenizer": None}, "tokenizer is missing"),
        ({"mask_schedule": "cosin"}, "Unknown mask schedule"),
        ({"lr_schedule": "linear"}, "constant, cosine"),
        ({"label_dropout": 1.5}, "label_dropout must be between 0 and 1"),
        ({"keep_best": 1}, "needs test_data"),
        ({"learning_rate": float("nan")}, "learning_rate"),
    ],
)
def test_settings_out_of_range_are_refused_when_given(config, change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        replace(config, **change)


def test_an_unknown_key_of_a_recipe_is_an_error_with_a_suggestion(config):
    with pytest.raises(ConfigError, match="label_dropout"):
        TransformerTrainingConfig.from_dict({**config.to_dict(), "label_drop": 0.1})
    assert TransformerTrainingConfig.from_dict(config.to_dict()) == config


class Warnings:
    """Stands in for a logger."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, name: str, step: int, sentence: str) -> None:
        self.said.append(name)


def test_what_looks_wrong_is_said_in_words(config):
    logger = Warnings()
    varied = torch.arange(32).reshape(2, 4, 4)
    warn_of_samples(logger, 1, varied)
    module.warn_if_stuck(logger, config, 5000, math.log(CODES) - 0.5)
    module.warn_if_stuck(logger, config, 10, math.log(CODES))
    assert logger.said == []
    warn_of_samples(logger, 1, varied[:1].expand(2, -1, -1))
    warn_of_samples(logger, 1, varied % 2)
    module.warn_if_stuck(logger, config, 5000, math.log(CODES))
    assert logger.said == ["constant output", "constant output", "stuck"]


def test_the_cache_that_the_tests_read_is_what_they_say(folder):
    cache = TokenCache.open(folder / "tokens")
    assert cache.take(np.arange(3), np.zeros(3, np.int64))[:, 0, 0].tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    "name", ["smoke", "cifar10", "fashion_mnist", "imagenet256", "imagenet512", "halton", "maskbit"]
)
def test_recipes_are_configs_that_say_what_they_cost_and_reach(name):
    path = Path(__file__).parents[2] / "recipes" / name / "transformer.toml"
    text = path.read_text("utf-8")
    for word in ("command:", "data:", "hardware:", "time:", "result:"):
        assert f"# {word}" in text
    recipe = TransformerTrainingConfig.from_dict(tomllib.loads(text))
    assert path.relative_to(path.parents[2]).as_posix() in text
    if name.startswith("imagenet"):
        assert recipe.model == TransformerConfig(grid_size=int(name.removeprefix("imagenet")) // 16)
        # 300 epochs.
        assert recipe.steps * recipe.batch_size == pytest.approx(300 * 1_281_167, rel=1e-3)


def test_a_folder_that_another_run_holds_is_refused_before_anything_is_done(config, tmp_path):
    run = replace(config, out=str(tmp_path / "run"), data="not even looked at")
    alone = Distributed(0, 1, torch.device("cpu"))
    with held_run(run.out, alone):
        with pytest.raises(OutputError, match="is the folder of a run that process"):
            train_transformer(run)
        assert [path.name for path in Path(run.out).iterdir()] == ["run.lock"]


def test_the_shape_comes_from_the_data_and_from_the_model_to_start_from(folder, config, tmp_path):
    own = completed({"data": config.data})
    assert own["model"] == {"num_codes": CODES, "num_classes": CLASSES, "grid_size": GRID}
    source = train_transformer(replace(config, steps=1, model=replace(MODEL, num_layers=1)))
    five = str(folder / "five" / "tokens")
    told = {
        "data": five,
        "init_from": str(source),
        "model": {"dropout": 0.3},
        "sampler": {"temperature": 0.5},
    }
    values = completed(told)
    expected = replace(MODEL, num_layers=1, num_classes=5, dropout=0.3)
    assert values["model"] == expected.to_dict()
    assert values["sampler"] == replace(config.sampler, temperature=0.5).to_dict()
    tuned = TransformerTrainingConfig.from_dict(
        values | {"out": str(tmp_path / "tuned"), "steps": 1, "batch_size": 4, "device": "cpu"}
    )
    assert hub.load_model(train_transformer(tuned)).config.class_names == ("v", "w", "x", "y", "z")


def test_what_will_be_slow_is_said_first(config, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)
    monkeypatch.setattr(numerics, "has_bfloat16_units", lambda: False)
    train_transformer(replace(config, compile=True, precision="bfloat16", steps=1))
    said = capsys.readouterr().err.splitlines()
    assert "this CPU has no units for it" in said[0]
    assert said[1].startswith("Compiling the layers: the first steps may take some minutes")


def test_an_allowed_change_is_said_written_down_and_exact(config, tmp_path, monkeypatch):
    first = replace(config, steps=3, checkpoint_every=1)
    train_transformer(first)
    second = replace(first, steps=7, learning_rate=1e-3, weight_decay=0.0, label_smoothing=0.0)
    with pytest.raises(ConfigError, match=r"learning_rate \(was 0\.01, is 0\.001\).*--change.* from step 3"):
        train_transformer(second)
    with pytest.raises(ConfigError, match=r"seed cannot change"):
        train_transformer(replace(second, seed=1), change=True)
    straight = replace(second, out=str(tmp_path / "straight"))
    shutil.copytree(config.out, straight.out)
    train_transformer(straight, change=True)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(SystemExit):
            train_transformer(second, change=True)
    # The run has these settings now.
    train_transformer(second)
    assert_same_run(straight, second)
    assert scalars(second.out, "learning_rate")[3:] == [1e-3] * 4
    stored = json.loads((Path(second.out) / "run.json").read_text())
    changed = {"label_smoothing": [0.1, 0.0], "learning_rate": [0.01, 0.001], "weight_decay": [0.045, 0.0]}
    assert stored["events"] == [{"step": 3, "changed": changed}]
    card = (Path(second.out) / "model" / "README.md").read_text()
    assert "At step 3: `label_smoothing` from `0.1` to `0.0`, `learning_rate` from `0.01` to `0.001`" in card


def test_other_test_data_are_an_allowed_change(config, folder):
    train_transformer(replace(config, test_data=config.data))
    other = replace(config, test_data=str(folder / "other" / "tokens"), steps=7)
    with pytest.raises(DataError, match=r"\(test\)"):
        train_transformer(other)
    train_transformer(other, change=True)
    (event,) = json.loads((Path(config.out) / "run.json").read_text())["events"]
    assert event["changed"]["test_data"] == [config.data, other.test_data]


def test_a_falling_schedule_is_ended_early_and_that_goes_on(config, monkeypatch):
    long = replace(config, steps=100, lr_schedule="cosine", checkpoint_every=4)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(SystemExit):
            train_transformer(long)
    short = annealed(long.out, long, 4)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(SystemExit):
            train_transformer(short, change=True)
    assert annealed(long.out, long, 4) == short
    train_transformer(annealed(long.out, long, 4), change=True)
    assert annealed(long.out, long, 4) == short
    rates = scalars(long.out, "learning_rate")
    before = [0.005, 0.01, *(0.005 * (1 + math.cos(math.pi * i / 98)) for i in range(6))]
    expected = [rate * factor for rate, factor in zip(before, [1, 1, 1, 1, 1, 0.75, 0.5, 0.25], strict=True)]
    assert rates == pytest.approx(expected)
    # And it can be continued.
    train_transformer(replace(short, steps=10, decay_steps=None), change=True)
    assert len(scalars(long.out, "loss")) == 10


def test_a_loss_beyond_guessing_is_said_and_stops_the_run(config, monkeypatch, capsys):
    losses = module.sequence_losses
    with monkeypatch.context() as patch:
        patch.setattr(module, "sequence_losses", lambda *a: losses(*a) + 3000)
        spoiled = replace(config, steps=100, max_diverged_steps=30, checkpoint_every=10, log_every=5)
        with pytest.raises(TrainingError, match=r"after step 30.*loss is 3\d\d\d, where guessing is 2\.77"):
            train_transformer(spoiled)
        assert "Warning at step 20: the loss has diverged" in capsys.readouterr().err
        assert [entry.step for entry in Checkpoints(config.out).committed()] == [10]
        # One that is too short to be stopped ends without exit code 0.
        brief = replace(spoiled, steps=25, out=config.out + "-brief")
        with pytest.raises(TrainingError, match="after step 25"):
            train_transformer(brief)
    # The advice works: its command goes on from the checkpoint before.
    train_transformer(replace(spoiled, steps=12, learning_rate=1e-3), change=True)
    assert Checkpoints(config.out).committed()[-1].step == 12


def test_patience_ends_a_run_with_its_best_model_and_is_exact(config, tmp_path, monkeypatch):
    scores = {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.6, 5: 1.0, 6: 0.9}
    config = replace(
        config,
        test_data=config.data,
        evaluate_every=1,
        checkpoint_every=1,
        keep_best=1,
        keep_last=1,
        patience=2,
    )
    tested = []
    monkeypatch.setattr(module, "evaluate_loss", lambda *a, **k: tested.append(1) or scores[len(tested)])
    early = train_transformer(config)
    assert [entry.step for entry in Checkpoints(config.out).committed()] == [2, 4]
    assert "After 2 of 6 steps" in (early / "README.md").read_text()
    straight = replace(config, out=str(tmp_path / "straight"), steps=2, patience=None)
    tested.clear()
    expected = hub.load_model(train_transformer(straight)).transformer.state_dict()
    for _ in range(2):
        found = hub.load_model(early).transformer.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        # The same command has nothing left to do.
        train_transformer(config)
    # Stopped in between, it ends where it would have.
    cut = replace(config, out=str(tmp_path / "cut"))
    tested.clear()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(SystemExit):
            train_transformer(cut)
    train_transformer(cut)
    assert Checkpoints(cut.out).committed()[-1].step == 4
    # More patience goes on.
    train_transformer(replace(cut, patience=3))
    assert Checkpoints(cut.out).committed()[-1].step == 6
    assert json.loads((Path(cut.out) / "run.json").read_text())["events"] == [
        {"step": 4, "changed": {"patience": [2, 3]}}
    ]


def test_a_stopped_run_is_a_model(config, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(SystemExit):
            train_transformer(config)
    assert hub.from_pretrained(config.out).config.class_names == ("a", "b", "c")
    assert hub.load_tokenizer(config.out).config.codebook_size == CODES
    shutil.rmtree(Path(config.out) / "model")
    with pytest.raises(CheckpointError, match="maskgit train save-model"):
        hub.from_pretrained(config.out)


def test_a_checkpoint_from_before_there_was_a_watch_goes_on(config, straight, monkeypatch):
    """Written as version 0.1 did: no watch, no further averages, no events."""
    save = Checkpoints.save
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        patch.setattr(
            Checkpoints,
            "save",
            lambda self, step, state, score: save(
                self, step, {k: v for k, v in state.items() if k not in ("watch", "extra_emas")}, score
            ),
        )
        with pytest.raises(SystemExit):
            train_transformer(config)
    path = Path(config.out) / "run.json"
    stored = json.loads(path.read_text())
    stored.pop("events", None)
    for name in ("decay_steps", "schedule_steps", "extra_ema_decays", "patience", "max_diverged_steps"):
        del stored["config"][name]
    path.write_text(json.dumps(stored))
    train_transformer(config)
    assert_same_run(straight, config)


@pytest.mark.parametrize(
    "kind",
    [
        {"groups": 2},
        {"block": "modern", "conditioning": "adaln", "positions": "rotary", "groups": 2},
    ],
)
def test_a_run_of_grouped_codes_gives_its_best_model(config, kind, tmp_path):
    config = replace(
        config, model=replace(MODEL, **kind), test_data=config.data, evaluate_every=2, sample_every=3,
        extra_ema_decays=(0.2,),
    )  # fmt: skip
    model = hub.load_model(train_transformer(config))
    assert model.generate(0, num_images=2, seed=1, steps=3).tokens.max() < CODES
    chosen = save_model(config.out, tmp_path / "chosen")
    main = scalars(config.out, "test_loss")[-1]
    assert chosen.scores["0.999"] == pytest.approx(main, rel=1e-6)


def test_a_model_is_saved_from_any_checkpoint_and_average(config, tmp_path, monkeypatch):
    config = replace(
        config, test_data=config.data, evaluate_every=2, checkpoint_every=2, keep_last=3, keep_best=1,
        extra_ema_decays=(0.2, 0.01),
    )  # fmt: skip
    train_transformer(config)

    def weights(path: Path) -> torch.Tensor:
        return hub.load_model(path).transformer.state_dict()["head.bias"]

    newest = checkpointed(config.out)
    for name, key in (("0.999", "ema."), ("0.2", "extra_emas.0.2."), ("raw", "transformer.model.")):
        saved = save_model(config.out, tmp_path / name, ema=name)
        assert (saved.step, saved.ema) == (6, name)
        assert torch.equal(weights(saved.path), newest[f"{key}head.bias"])
    assert not torch.equal(weights(tmp_path / "0.2"), weights(tmp_path / "0.999"))
    # Of step 2, as a run of two steps ended.
    brief = replace(config, steps=2, out=str(tmp_path / "brief"))
    expected = weights(train_transformer(brief))
    assert torch.equal(weights(save_model(config.out, tmp_path / "two", step=2, ema="0.999").path), expected)
    # Left to itself it takes the average of the lowest test loss; the main one's was logged.
    chosen = save_model(config.out, tmp_path / "chosen", best=True)
    assert chosen.ema == min(chosen.scores, key=chosen.scores.get)
    assert chosen.scores["0.999"] == pytest.approx(min(scalars(config.out, "test_loss")), rel=1e-6)
    assert chosen.scores.keys() == {"0.999", "0.2", "0.01"}
    # Or that whose samples are nearest to a reference.
    images = str(Path(config.data).parent / "images")
    near = save_model(config.out, tmp_path / "near", reference=images, num_images=12)
    assert (near.measure, near.ema) == ("EffNet-FD", min(near.scores, key=near.scores.get))
    net = load_feature_net("effnet-lite0", torch.device("cpu"))
    pictures = torch.from_numpy(ImageCache.open(images).images[:].copy()).movedim(-1, 1) / 255
    samples = (
        hub.load_model(tmp_path / "0.2").generate([i % CLASSES for i in range(12)], seed=config.seed).images
    )
    moments = [(f.mean(0), np.cov(f, rowvar=False)) for f in (net(i).numpy() for i in (pictures, samples))]
    assert near.scores["0.2"] == pytest.approx(frechet_distance(*moments[0], *moments[1]), rel=1e-3)
    with pytest.raises(ConfigError, match=r"one of 0\.999, 0\.2, 0\.01, raw"):
        save_model(config.out, tmp_path / "x", ema="0.5")
    with pytest.raises(CheckpointError, match=r"of step 3; those of steps: 2, 4, 6"):
        save_model(config.out, tmp_path / "x", step=3)
