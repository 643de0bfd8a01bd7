"""The first stage's loop on a few tiny images: it learns, resumes to the bit, and says what is wrong."""

import json
import os
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from maskgit import hub
from maskgit.config import TokenizerConfig
from maskgit.errors import ConfigError, DataError
from maskgit.tokenizer import Tokenizer
from maskgit.training import train_tokenizer as loop
from maskgit.training.codebook import CodeUsage, revive_codes
from maskgit.training.run import Distributed, TrainingError
from maskgit.training.tokenizer_config import TokenizerTrainingConfig
from maskgit.training.tokenizer_dry_run import dry_run
from maskgit.training.tokenizer_parts import gumbel_noise, gumbel_tau
from maskgit.training.train_tokenizer import train_tokenizer
from maskgit.training.writers import new_image_cache

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
        out="",
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


def scalars(run_dir: str) -> list[dict]:
    return [json.loads(line) for line in (Path(run_dir) / "scalars.jsonl").read_text().splitlines()]


def weights(path: Path) -> dict[str, Tensor]:
    return hub.load_tokenizer(path).state_dict()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns(config, tmp_path):
    config = replace(
        config, out=str(tmp_path / "run"), steps=80, ema_decay=0.9, evaluate_every=80, adversarial_start=60
    )
    train_tokenizer(config)
    logged = scalars(config.out)
    losses = [line["l2_loss"] for line in logged if "l2_loss" in line]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    scores = next(line for line in logged if "test_psnr" in line)
    assert scores["test_psnr"] > 10
    assert 0 < scores["test_code_usage"] <= 1
    assert any("revived_codes" in line for line in logged)
    assert any("discriminator_loss" in line for line in logged)
    assert list((tmp_path / "run" / "samples").glob("reconstructions-*.png"))


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_is_exact(config, tmp_path, monkeypatch, workers):
    straight = train_tokenizer(replace(config, out=str(tmp_path / "straight")))
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
    steps = [line["step"] for line in scalars(cut.out) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "changes",
    [
        {"adaptive_weight": True},
        {"adversarial_loss": "hinge", "blur_resample": False},
        {"entropy_kind": "argmax", "l1_weight": 1.0},
        {"adversarial_weight": 0.0, "max_gradient_norm": 0.1, "lr_schedule": "cosine"},
        {"revive_codes": False},
        {"ema_decay": 0.5},
        {"betas": (0.5, 0.9)},
        {"r1_cost": 0.0},
    ],
)
def test_settings_change_the_result(config, tmp_path, changes):
    plain = train_tokenizer(replace(config, out=str(tmp_path / "plain")))
    changed = train_tokenizer(replace(config, out=str(tmp_path / "changed"), **changes))
    assert not equal(weights(plain), weights(changed))


def test_gumbel_trains(config, tmp_path):
    model = replace(config.model, quantizer="gumbel")
    path = train_tokenizer(replace(config, out=str(tmp_path / "run"), model=model))
    assert hub.load_tokenizer(path).config.quantizer == "gumbel"


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


def test_bad_settings_are_refused(config):
    for changes, name in (
        ({"perceptual": "vgg"}, "perceptual"),
        ({"image_size": 9}, "image_size"),
        ({"image_size": 12}, "adversarial_weight"),
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
    usage.restart()
    assert not usage.totals().any()


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


# The scripts leave without the interpreter's clean-up, in which gloo's threads have been seen to hang.
RUN = """
import json, os, sys, torch
torch.set_num_threads(1)
from maskgit.training.tokenizer_config import TokenizerTrainingConfig
from maskgit.training.train_tokenizer import train_tokenizer
train_tokenizer(TokenizerTrainingConfig.from_dict(json.loads(sys.argv[1])))
sys.stderr.flush()
os._exit(0)
"""


def test_two_processes_train_as_one(config, tmp_path):
    single = replace(config, out=str(tmp_path / "one"), adaptive_weight=True)
    train_tokenizer(single)
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(RUN))
    double = json.dumps(replace(single, out=str(tmp_path / "two")).to_dict())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launch, str(script), double], env=environment, check=True, timeout=120)
    one, two = scalars(single.out), scalars(str(tmp_path / "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"images_per_second", "mfu"}:
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=2e-4), (a["step"], name)
    a, b = (weights(tmp_path / name / "model") for name in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_dry_run_tells_the_numbers(config):
    told = dry_run(config, world=2)
    parameters = sum(p.numel() for p in Tokenizer(config.model).parameters())
    assert f"{parameters:,} of the tokenizer" in told
    assert "8 = 2 processes × 4" in told
    assert "2.0 times through the data" in told
    with pytest.raises(ConfigError, match="multiple"):
        dry_run(config, world=3)


@pytest.mark.parametrize("name", ["cifar10", "smoke"])
def test_recipes_are_valid(name):
    path = Path(__file__).parents[2] / "recipes" / name / "tokenizer.toml"
    config = TokenizerTrainingConfig.from_dict(tomllib.loads(path.read_text("utf-8")))
    assert config.model.patch_size == 4
