"""The first stage's loop on a few tiny images: it learns, resumes to the bit, and says what is wrong."""

import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from maskgit import hub
from maskgit.data.image_cache import new_image_cache
from maskgit.errors import CheckpointError, ConfigError, DataError, OutputError
from maskgit.networks.config import TokenizerConfig
from maskgit.networks.tokenizer import Tokenizer
from maskgit.training import tokenizer_parts
from maskgit.training import train_tokenizer as loop
from maskgit.training.distributed import Distributed
from maskgit.training.dry_run import dry_run_tokenizer
from maskgit.training.inputs import completed_tokenizer
from maskgit.training.optim import make_adam
from maskgit.training.run.checkpoint import Checkpoints
from maskgit.training.run.folder import annealed, held_run
from maskgit.training.run.stopping import TrainingError
from maskgit.training.saving import save_model
from maskgit.training.tokenizer_config import TokenizerTrainingConfig
from maskgit.training.tokenizer_parts import (
    CodeUsage,
    flops_per_image,
    gumbel_noise,
    gumbel_tau,
    make_networks,
    revive_codes,
)
from maskgit.training.train_tokenizer import train_tokenizer
from runs import checkpointed, logged, run_two

ALONE = Distributed(0, 1, torch.device("cpu"))


def write_cache(path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    # Smooth pictures: four colours each, enlarged.
    images = random.integers(0, 256, (24, 2, 2, 3)).repeat(4, 1).repeat(4, 2).astype(np.uint8)
    with new_image_cache(path, 8) as writer:
        writer.add(images)
        facts = {"source": "colours", "num_enlarged": 0, "num_skipped": 0, "skipped": ()}
        writer.finish(np.zeros(24), ["colour"], **facts)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TokenizerTrainingConfig:
    folder = tmp_path_factory.mktemp("colours")
    write_cache(folder / "train", 0)
    write_cache(folder / "test", 1)
    return TokenizerTrainingConfig(
        data=str(folder / "train"),
        test_data=str(folder / "test"),
        out=str(folder / "run"),
        model=TokenizerConfig(
            filters=8,
            norm="LN",
            num_res_blocks=1,
            channel_multipliers=(1, 1, 1),
            embedding_dim=4,
            codebook_size=16,
        ),
        steps=6,
        batch_size=8,
        num_workers=0,
        learning_rate=3e-3,
        perceptual="none",
        adversarial_start=2,
        r1_every=2,
        discriminator_filters=4,
        usage_window=3,
        log_every=1,
        evaluate_every=3,
        checkpoint_every=100,
        device="cpu",
        precision="float32",
    )


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory) -> Path:
    """The model of a run of `config` that nothing stopped."""
    return train_tokenizer(replace(config, out=str(tmp_path_factory.mktemp("straight") / "run")))


def weights(path: Path) -> dict[str, Tensor]:
    return hub.load_tokenizer(path).state_dict()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns(config, tmp_path):
    config = replace(
        config, out=str(tmp_path / "run"), steps=80, ema_decay=0.9, evaluate_every=80, adversarial_start=60
    )
    train_tokenizer(config)
    lines = logged(config.out)
    losses = [line["l2_loss"] for line in lines if "l2_loss" in line]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    scores = next(line for line in lines if "test_psnr" in line)
    assert scores["test_psnr"] > 10
    assert 0 < scores["test_code_usage"] <= 1
    assert any("revived_codes" in line for line in lines)
    assert any("discriminator_loss" in line for line in lines)
    assert list((tmp_path / "run" / "samples").glob("reconstructions-*.png"))


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_is_exact(config, straight, tmp_path, monkeypatch, workers):
    cut = replace(config, out=str(tmp_path / "cut"), num_workers=workers)
    # Stopped before the discriminator's first step, where an optimizer has nothing to save yet, and after it.
    for stop_after in (1, 3):
        steps = iter(range(1, 100))
        with monkeypatch.context() as patch:
            patch.setattr(loop.StopSignal, "agreed", lambda self, i=steps, last=stop_after: next(i) == last)
            with pytest.raises(SystemExit) as stopped:
                train_tokenizer(cut)
        assert stopped.value.code == 75
    assert equal(weights(train_tokenizer(cut)), weights(straight))
    steps = [line["step"] for line in logged(cut.out) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "changes",
    [
        {"adaptive_weight": True},
        {"adversarial_loss": "hinge", "blur_resample": False},
        {"discriminator": "patchgan", "adversarial_loss": "hinge"},
        {"lecam_weight": 0.1},
        {"entropy_kind": "argmax", "l1_weight": 1.0},
        {"adversarial_weight": 0.0, "max_gradient_norm": 0.1, "lr_schedule": "cosine"},
        {"revive_codes": False},
        {"ema_decay": 0.2},
        {"betas": (0.5, 0.9)},
        {"r1_cost": 0.0},
    ],
)
def test_settings_change_the_result(config, straight, tmp_path, changes):
    changed = train_tokenizer(replace(config, out=str(tmp_path / "changed"), **changes))
    assert not equal(weights(straight), weights(changed))


def test_blocks_computed_anew_give_the_same_run(config, tmp_path):
    plain = train_tokenizer(replace(config, out=str(tmp_path / "plain")))
    anew = train_tokenizer(replace(config, out=str(tmp_path / "anew"), gradient_checkpointing=True))
    assert equal(weights(plain), weights(anew))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gumbel", {}),
        ("simvq", {}),
        ("ibq", {}),
        ("bsq", {"entropy_groups": 2}),
        ("fsq", {"model": {"levels": (2, 4, 2, 3), "codebook_size": 48}}),
    ],
)
def test_every_quantizer_trains(config, tmp_path, name, settings):
    model = replace(config.model, quantizer=name, **settings.get("model", {}))
    config = replace(config, out=str(tmp_path / "run"), model=model, revive_codes=False)
    path = train_tokenizer(replace(config, entropy_groups=settings.get("entropy_groups", 1)))
    assert hub.load_tokenizer(path).config == model
    line = [line for line in logged(config.out) if "loss" in line][-1]
    assert (line["commitment_loss"] > 0) == (name not in ("gumbel", "fsq"))
    assert (line["codebook_loss"] > 0) == (name in ("simvq", "ibq"))
    assert (line["entropy_loss"] != 0) == (name in ("ibq", "bsq"))


def test_gumbel_noise_belongs_to_the_sample(config):
    config = replace(config, model=replace(config.model, quantizer="gumbel"))
    together, _ = gumbel_noise(config, 0, torch.tensor([5, 9]), 4)
    alone, tau = gumbel_noise(config, 0, torch.tensor([9]), 4)
    assert together is not None
    assert alone is not None
    assert torch.equal(together[1:], alone)
    assert alone.shape == (1, 4 * 16)
    assert tau == 1.0


def test_tau_falls(config):
    config = replace(config, tau_max=1.0, tau_min=0.6, tau_warmup_steps=10, tau_decay_steps=20)
    assert [round(gumbel_tau(config, step), 6) for step in (0, 10, 20, 30, 99)] == [1, 1, 0.8, 0.6, 0.6]


def test_nan_stops_before_the_update(config, tmp_path, monkeypatch):
    config = replace(config, out=str(tmp_path / "run"), checkpoint_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "l2_loss", lambda a, b: (a - b).mean() * float("nan"))
        with pytest.raises(TrainingError, match=r"step 0.*l2_loss is nan"):
            train_tokenizer(config)
    train_tokenizer(config)


def test_another_config_or_other_data_are_refused(config, tmp_path):
    done = replace(config, out=str(tmp_path / "run"), steps=1)
    train_tokenizer(done)
    with pytest.raises(ConfigError, match="learning_rate"):
        train_tokenizer(replace(done, learning_rate=0.5))
    with pytest.raises(DataError, match="train"):
        train_tokenizer(replace(done, data=config.test_data))
    changed = shutil.copytree(config.data, tmp_path / "changed")
    with (changed / "images.npy").open("r+b") as file:
        file.seek(200)
        file.write(b"changed")
    with pytest.raises(DataError, match="changed since the checkpoint"):
        train_tokenizer(replace(done, data=str(changed)))


def test_bad_settings_are_refused(config):
    for changes, name in (
        ({"perceptual": "vgg"}, "perceptual"),
        ({"image_size": 9}, "image_size"),
        ({"betas": (0.9,)}, "betas"),
        ({"tau_min": 2.0}, "tau_max"),
        ({"keep_best": 1, "test_data": None}, "keep_best"),
    ):
        with pytest.raises(ConfigError, match=name):
            replace(config, **changes)


def test_usage_counts_over_the_window():
    usage = CodeUsage(4, 10, ALONE)
    assert usage.read() == {}
    usage.update(torch.tensor([[[0, 1], [1, 0]]]))
    found = usage.read()
    assert found["code_usage"] == 0.5
    assert found["code_perplexity"] == pytest.approx(2)
    other = CodeUsage(4, 10, ALONE)
    other.load_state_dict(usage.state_dict())
    assert other.read() == found
    assert usage.unused().tolist() == [False, False, True, True]
    usage.restart()
    assert not usage.totals().any()
    # Where nothing was counted, nothing is known.
    assert not usage.unused().any()


def test_dead_codes_become_features_of_the_batch():
    features = torch.arange(24.0).view(2, 3, 2, 2)
    vectors = {tuple(vector) for vector in features.movedim(1, -1).flatten(0, -2).tolist()}
    books = [torch.full((5, 3), -1.0) for _ in range(2)]
    dead = torch.tensor([False, True, False, True, True])
    settings = {"seed": 1, "distributed": ALONE}
    assert revive_codes(books, dead, features, step=7, **settings) == 3
    assert torch.equal(*books)
    assert (books[0][~dead] == -1).all()
    assert {tuple(vector) for vector in books[0][dead].tolist()} <= vectors
    again, later = torch.zeros(5, 3), torch.zeros(5, 3)
    revive_codes([again], dead, features, step=7, **settings)
    revive_codes([later], dead, features, step=8, **settings)
    assert torch.equal(again[dead], books[0][dead])
    assert not torch.equal(again, later)
    assert revive_codes(books, torch.zeros(5, dtype=torch.bool), features, step=7, **settings) == 0


def test_a_new_code_begins_without_the_old_ones_moments():
    torch.manual_seed(0)
    book = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = make_adam([book], (0.9, 0.99))
    for _ in range(3):
        book.square().sum().backward()
        optimizer.step()
    state = optimizer.state[book]
    before = {name: state[name].clone() for name in ("exp_avg", "exp_avg_sq")}
    dead = torch.tensor([False, True, False, True])
    moments = [state[name] for name in before]
    revive_codes([book.data], dead, torch.ones(2, 3, 2, 2), moments, seed=1, step=7, distributed=ALONE)
    for name, value in before.items():
        assert not state[name][dead].any()
        assert torch.equal(state[name][~dead], value[~dead])


def test_the_loop_gives_new_codes_fresh_moments(config, tmp_path, monkeypatch):
    revived = []

    def watched(codebooks, dead, features, moments, **settings):
        count = revive_codes(codebooks, dead, features, moments, **settings)
        revived.append((count, [bool(moment[dead].any()) for moment in moments], moments[1][~dead].any()))
        return count

    monkeypatch.setattr(loop, "revive_codes", watched)
    train_tokenizer(replace(config, out=str(tmp_path / "run"), betas=(0.5, 0.9)))
    assert revived
    assert all(count > 0 and moved == [False, False] and kept for count, moved, kept in revived)


def test_the_last_place_of_a_batch_is_the_last(monkeypatch):
    monkeypatch.setattr(tokenizer_parts, "uniform", lambda seed, indices, *_: torch.ones(len(indices), 1))
    features = torch.arange(1.0, 25).view(2, 3, 2, 2)
    book = torch.zeros(2, 3)
    dead = torch.ones(2, dtype=torch.bool)
    revive_codes([book], dead, features, seed=1, step=7, distributed=ALONE)
    assert book.tolist() == [features[-1, :, -1, -1].tolist()] * 2


def test_the_discriminator_counts_from_when_it_runs(config, tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(loop.Throughput, "step", lambda self, flops: counted.append(flops))
    config = replace(config, out=str(tmp_path / "run"), steps=4)
    train_tokenizer(config)
    _, discriminator, _ = make_networks(config, 8, torch.device("cpu"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        discriminator(torch.zeros(1, 3, 8, 8))
    assert counted[0] == counted[1] > 0
    assert counted[2] == counted[3]
    # Forwards and back to the pixels for the tokenizer; forwards and back to the weights on two images.
    assert counted[2] - counted[0] == (2 + 2 * 3) * counter.get_total_flops()


def test_counting_operations_leaves_batch_norm_as_it_was(config):
    networks = make_networks(replace(config, model=replace(config.model, norm="BN")), 8, torch.device("cpu"))
    before = [buffer.clone() for network in networks for buffer in network.buffers()]
    assert flops_per_image(config, *networks, 8) > 0
    after = [buffer for network in networks for buffer in network.buffers()]
    assert len(before) > 3
    assert all(map(torch.equal, before, after))
    assert networks[0].training


SCRIPT = """
import json, os, sys, torch
torch.set_num_threads(1)
from maskgit.training.tokenizer_config import TokenizerTrainingConfig
from maskgit.training.train_tokenizer import train_tokenizer
single, double = (TokenizerTrainingConfig.from_dict(values) for values in json.loads(sys.argv[1]))
ports = os.environ["MASTER_PORTS"].split()
train_tokenizer(single)
os.environ["MASTER_PORT"] = ports[1]
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
train_tokenizer(double)
"""


def assert_close_runs(one: str, two: str, tolerance: float) -> None:
    lines = logged(one), logged(two)
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for a, b in zip(*lines, strict=True):
        for name in a.keys() - {"images_per_second", "mfu", "hours"}:
            assert b[name] == pytest.approx(a[name], rel=tolerance, abs=tolerance), (a["step"], name)
    a, b = checkpointed(one), checkpointed(two)
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(
            b[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m
        )


def test_two_processes_train_as_one(config, tmp_path, monkeypatch):
    """A step is the same to float32's rounding, and a run to a thousandth of what that makes of it.

    In float32 runs part slowly, to 2e-4 in six steps, where in float64 they part to 2e-9 and so are the same:
    batches of 8 and of 4 round differently, and Adam with β1 = 0 divides each gradient by its own size, so the
    least of them, which are hardly more than rounding, move weights as far as the rest.
    """
    # After a step exp_avg is the gradient itself, for β1 is 0.
    step = replace(config, steps=1, adaptive_weight=True, adversarial_start=0, evaluate_every=1)
    # Two processes make it of two parts each.
    run = replace(config, accumulate=1)
    names = ("step", "run")
    one, two = ([str(tmp_path / f"{n}-{count}") for n in names] for count in (1, 2))
    shared = (step, replace(run, accumulate=2))
    configs = [replace(c, out=out).to_dict() for c, out in zip(shared, two, strict=True)]
    run_two(SCRIPT, json.dumps(configs), joins=2)
    train_tokenizer(replace(step, out=one[0]))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        train_tokenizer(replace(run, out=one[1]))
    finally:
        torch.set_default_dtype(before)
    assert_close_runs(one[0], two[0], 1e-5)
    assert_close_runs(one[1], two[1], 1e-7)
    assert checkpointed(one[1])["tokenizer.model.quantizer.codebook"].dtype == torch.float64


def test_a_run_with_a_constant_rate_may_be_made_longer(config, tmp_path):
    # The short run ends with a window of code usage, after which unused codes are replaced.
    straight = train_tokenizer(replace(config, out=str(tmp_path / "straight"), steps=9))
    config = replace(config, out=str(tmp_path / "longer"))
    train_tokenizer(config)
    assert equal(weights(train_tokenizer(replace(config, steps=9))), weights(straight))
    assert any("revived_codes" in line for line in logged(config.out))
    before = weights(Path(config.out) / "model")
    for fewer in (8, 6, 1):
        with pytest.raises(ConfigError, match=f"has made 9 steps already, but steps is {fewer}"):
            train_tokenizer(replace(config, steps=fewer))
    assert equal(weights(Path(config.out) / "model"), before)
    assert json.loads((Path(config.out) / "run.json").read_text())["config"]["steps"] == 9
    falling = replace(config, out=str(tmp_path / "falling"), lr_schedule="cosine")
    train_tokenizer(falling)
    with pytest.raises(ConfigError, match="steps"):
        train_tokenizer(replace(falling, steps=9))


def test_dry_run_tells_the_numbers(config):
    told = dry_run_tokenizer(config, world=2)
    parameters = sum(p.numel() for p in Tokenizer(config.model).parameters())
    assert f"{parameters:,} of the tokenizer" in told
    assert "8 = 2 processes × 4" in told
    assert "2.0 times through the data" in told
    with pytest.raises(ConfigError, match="multiple"):
        dry_run_tokenizer(config, world=3)


def test_dry_run_counts_the_discriminator_for_as_long_as_it_runs(config):
    flops = []
    for begin in (0, 3, 6):
        told = dry_run_tokenizer(replace(config, adversarial_start=begin, discriminator_filters=256))
        flops.append(float(told.split("compute")[1].split("GFLOP")[0]))
    assert flops[0] > flops[1] > flops[2]
    assert flops[1] == pytest.approx((flops[0] + flops[2]) / 2, abs=0.006)


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist", "smoke"])
def test_recipes_are_valid(name):
    path = Path(__file__).parents[2] / "recipes" / name / "tokenizer.toml"
    config = TokenizerTrainingConfig.from_dict(tomllib.loads(path.read_text("utf-8")))
    assert config.model.patch_size == 4


def test_every_size_that_the_tokenizer_takes_trains_with_the_discriminator(config):
    config = replace(config, adversarial_weight=0.1)
    for size in (8, 12, 96, 192, 384):
        config.check_image_size(size)
    small = replace(config, out="", model=replace(config.model, channel_multipliers=(1,)))
    with pytest.raises(ConfigError, match="4 pixels a side or more"):
        small.check_image_size(2)


def test_a_folder_that_another_run_holds_is_refused_before_anything_is_done(config, tmp_path):
    run = replace(config, out=str(tmp_path / "run"), data="not even looked at")
    alone = Distributed(0, 1, torch.device("cpu"))
    with held_run(run.out, alone):
        with pytest.raises(OutputError, match="is the folder of a run that process"):
            train_tokenizer(run)
        assert [path.name for path in Path(run.out).iterdir()] == ["run.lock"]


def stopping_at(patch: pytest.MonkeyPatch, step: int) -> None:
    steps = iter(range(1, 1000))
    patch.setattr(loop.StopSignal, "agreed", lambda self: next(steps) == step)


@pytest.mark.parametrize("changes", [{"quantizer": "vq"}, {"quantizer": "bsq"}])
def test_a_cut_up_batch_gives_the_same_run_to_rounding(config, tmp_path, monkeypatch, changes):
    """In float64, as two processes are compared; an entropy of each part would part the runs at once."""
    config = replace(config, model=replace(config.model, **changes))
    config = replace(config, entropy_groups=2 if changes["quantizer"] == "bsq" else 1)
    runs = [replace(config, out=str(tmp_path / str(parts)), accumulate=parts) for parts in (1, 4)]
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for run in runs:
            train_tokenizer(run)
    finally:
        torch.set_default_dtype(before)
    assert_close_runs(runs[0].out, runs[1].out, 1e-7)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"accumulate": 3}, "multiple of the 1 processes times accumulate"),
        ({"accumulate": 2, "adaptive_weight": True}, "gradients of a whole batch"),
        ({"accumulate": 2, "lecam_weight": 0.1}, "follows the logits of whole batches"),
        ({"compile": True, "gradient_checkpointing": True}, "exclude each other"),
        ({"discriminator": "unet"}, "stylegan, patchgan"),
        ({"accumulate": 2, "model": TokenizerConfig(norm="BN")}, "statistics are those of a whole batch"),
        ({"freeze": "encoder"}, "name one in init_from"),
        ({"entropy_groups": 2}, "for quantizers of bits, lfq and bsq, but the quantizer is vq"),
        (
            {"entropy_groups": 3, "model": TokenizerConfig(quantizer="bsq", embedding_dim=10)},
            "must divide the 10 bits of a code, but is 3",
        ),
        ({"freeze": "decoder", "init_from": "a"}, "none, encoder"),
    ],
)
def test_parts_and_frozen_weights_that_do_not_fit_are_refused(config, tmp_path, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        train_tokenizer(replace(config, out=str(tmp_path / "run"), **changes))


def test_the_encoder_and_the_decoder_are_compiled_and_it_is_said_first(
    config, straight, tmp_path, monkeypatch, capsys
):
    called = []
    monkeypatch.setattr(torch, "compile", lambda forward, **_: called.append(forward.__self__) or forward)
    path = train_tokenizer(replace(config, out=str(tmp_path / "run"), compile=True))
    assert [type(network).__name__ for network in called] == ["Encoder", "Decoder"]
    assert "Compiling the layers" in capsys.readouterr().err
    assert equal(weights(path), weights(straight))


def test_training_starts_from_another_tokenizer_and_its_shape(config, tmp_path):
    source = train_tokenizer(replace(config, out=str(tmp_path / "source"), steps=2, seed=5))
    values = {**config.to_dict(), "out": str(tmp_path / "run"), "init_from": str(source), "model": {}}
    start = TokenizerTrainingConfig.from_dict(completed_tokenizer(values))
    assert start.model == config.model
    tokenizer, *_ = make_networks(start, 8, torch.device("cpu"))
    assert equal(tokenizer.state_dict(), weights(source))
    train_tokenizer(start)
    another = replace(start, model=replace(config.model, embedding_dim=8), out=str(tmp_path / "another"))
    with pytest.raises(ConfigError, match=r"tokenizer of another shape: embedding_dim \(model 4, here 8\)"):
        train_tokenizer(another)


@pytest.mark.parametrize("norm", ["LN", "BN"])
def test_a_frozen_encoder_keeps_every_token(config, tmp_path, monkeypatch, norm):
    config = replace(config, model=replace(config.model, norm=norm))
    source = hub.load_tokenizer(train_tokenizer(replace(config, out=str(tmp_path / "source"))))
    frozen = replace(
        config,
        out=str(tmp_path / "run"),
        init_from=str(tmp_path / "source" / "model"),
        freeze="encoder",
        seed=7,
    )
    straight = train_tokenizer(replace(frozen, out=str(tmp_path / "straight")))
    with monkeypatch.context() as patch:
        stopping_at(patch, 3)
        with pytest.raises(SystemExit):
            train_tokenizer(frozen)
    tuned = hub.load_tokenizer(train_tokenizer(frozen))
    assert equal(tuned.state_dict(), weights(straight))
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = source.eval().encode(images)
    assert torch.equal(tuned.eval().encode(images), tokens)
    kept = ("encoder.", "quantizer.")
    for name, value in source.state_dict().items():
        if name.startswith(kept):
            assert torch.equal(tuned.state_dict()[name], value), name
    assert not torch.equal(tuned.decode(tokens), source.decode(tokens))


def test_an_allowed_change_is_written_down_and_exact(config, tmp_path, monkeypatch):
    first = replace(config, out=str(tmp_path / "run"), steps=3, checkpoint_every=1)
    train_tokenizer(first)
    second = replace(first, steps=6, learning_rate=1e-4, entropy_weight=0.0, adversarial_start=4)
    with pytest.raises(ConfigError, match=r"learning_rate \(was 0\.003, is 0\.0001\).*--change"):
        train_tokenizer(second)
    with pytest.raises(ConfigError, match="seed cannot change"):
        train_tokenizer(replace(second, seed=1), change=True)
    straight = replace(second, out=str(tmp_path / "straight"))
    shutil.copytree(first.out, straight.out)
    train_tokenizer(straight, change=True)
    with monkeypatch.context() as patch:
        stopping_at(patch, 1)
        with pytest.raises(SystemExit):
            train_tokenizer(second, change=True)
    assert equal(weights(train_tokenizer(second)), weights(Path(straight.out) / "model"))
    stored = json.loads((Path(second.out) / "run.json").read_text())
    changed = {"adversarial_start": [2, 4], "entropy_weight": [0.1, 0.0], "learning_rate": [0.003, 0.0001]}
    assert stored["events"] == [{"step": 3, "changed": changed}]
    assert "At step 3: `adversarial_start`" in (Path(second.out) / "model" / "README.md").read_text()


def test_a_loss_beyond_black_for_white_stops_the_run(config, tmp_path, monkeypatch, capsys):
    spoiled = replace(
        config, out=str(tmp_path / "run"), steps=100, max_diverged_steps=30, checkpoint_every=10, log_every=5,
        evaluate_every=100,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(loop, "l2_loss", lambda a, b: (a - b).square().mean() + 3000)
        with pytest.raises(TrainingError, match=r"after step 30.*l2_loss is 3\d\d\d"):
            train_tokenizer(spoiled)
    assert "Warning at step 20: the loss has diverged" in capsys.readouterr().err
    # The advice works: its command goes on from the checkpoint before.
    train_tokenizer(replace(spoiled, steps=12, learning_rate=1e-3), change=True)
    assert Checkpoints(spoiled.out).committed()[-1].step == 12


def test_a_tokenizer_is_saved_from_any_checkpoint_and_average(config, tmp_path):
    config = replace(
        config, out=str(tmp_path / "run"), evaluate_every=2, checkpoint_every=2, keep_last=3, keep_best=1,
        extra_ema_decays=(0.2, 0.01), feature_net="effnet-lite0",
    )  # fmt: skip
    train_tokenizer(config)
    newest = checkpointed(config.out)
    for name, key in (("0.999", "ema."), ("0.2", "extra_emas.0.2."), ("raw", "tokenizer.model.")):
        saved = save_model(config.out, tmp_path / name, ema=name)
        assert (saved.step, saved.ema) == (6, name)
        expected = newest[f"{key}quantizer.codebook"]
        assert torch.equal(weights(saved.path)["quantizer.codebook"], expected)
    # Of step 2, as a run of two steps ended.
    brief = train_tokenizer(replace(config, steps=2, out=str(tmp_path / "brief")))
    assert equal(weights(save_model(config.out, tmp_path / "two", step=2, ema="0.999").path), weights(brief))
    # Left to itself it takes the average of the highest PSNR; the main one's was logged.
    chosen = save_model(config.out, tmp_path / "chosen", best=True)
    assert chosen.ema == max(chosen.scores, key=chosen.scores.get)
    best = max(line["test_psnr"] for line in logged(config.out) if "test_psnr" in line)
    assert chosen.scores["0.999"] == pytest.approx(best, rel=1e-5)
    # Or of the least distance of reconstructions to a reference, which was logged too.
    near = save_model(config.out, tmp_path / "near", reference=config.test_data)
    assert (near.measure, near.ema) == ("EffNet-rFD", min(near.scores, key=near.scores.get))
    distances = [line["test_rfd"] for line in logged(config.out) if "test_rfd" in line]
    assert near.scores["0.999"] == pytest.approx(distances[-1], rel=1e-3)
    with pytest.raises(CheckpointError, match=r"of step 3; those of steps: 2, 4, 6"):
        save_model(config.out, tmp_path / "x", step=3)


def test_a_rate_that_has_fallen_to_zero_cannot_be_annealed(config, tmp_path):
    done = replace(config, out=str(tmp_path / "run"), lr_schedule="cosine")
    train_tokenizer(done)
    with pytest.raises(ConfigError, match=r"is 0 since step 6.*--set lr_schedule=constant"):
        annealed(done.out, done, 4)
    longer = annealed(done.out, replace(done, lr_schedule="constant", learning_rate=1e-3), 4)
    train_tokenizer(longer, change=True)
    rates = [line["learning_rate"] for line in logged(done.out) if "learning_rate" in line]
    assert rates[6:] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
