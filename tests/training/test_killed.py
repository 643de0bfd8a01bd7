"""Either loop, killed over and over or stopped: the same command ends as if nothing had happened."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from maskgit import hub
from maskgit.checkpoints.weights import weights_fingerprint
from maskgit.data.image_cache import ImageCache, write_image_cache
from maskgit.data.token_cache import write_token_cache
from maskgit.foundation.checks import Config
from maskgit.networks.config import TokenizerConfig, TransformerConfig
from maskgit.networks.tokenizer import Tokenizer
from maskgit.sampler.config import SamplerConfig
from maskgit.training.run.checkpoint import Checkpoints
from maskgit.training.run.stopping import EXIT_INTERRUPTED
from maskgit.training.tokenizer_config import TokenizerTrainingConfig
from maskgit.training.transformer_config import TransformerTrainingConfig
from runs import checkpointed, logged, run_two, start

STEPS = 12
SETTINGS = {
    "steps": STEPS,
    "batch_size": 4,
    "num_workers": 1,
    "device": "cpu",
    "precision": "float32",
    "log_every": 1,
    "checkpoint_every": 2,
    "tracker": "none",
}
SHAPE = TokenizerConfig(
    filters=8, norm="LN", num_res_blocks=1, channel_multipliers=(1, 1), embedding_dim=4, codebook_size=16
)

# It imports once and trains in children. A child is killed from outside after a share of the time that a whole
# run takes, or kills itself before a write of one of its checkpoints. At last one is left alone.
SCRIPT = """
import io, json, os, signal, sys, time
import torch
from maskgit.training.run.checkpoint import Checkpoints
from maskgit.training.tokenizer_config import TokenizerTrainingConfig
from maskgit.training.train_tokenizer import train_tokenizer
from maskgit.training.train_transformer import train_transformer
from maskgit.training.transformer_config import TransformerTrainingConfig

torch.set_num_threads(1)
stage, values, folder = json.loads(sys.argv[1])
kind, train = {
    "tokenizer": (TokenizerTrainingConfig, train_tokenizer),
    "transformer": (TransformerTrainingConfig, train_transformer),
}[stage]
WRITES = ((os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"), (io, "open"))


def die_in_checkpoint(call):
    calls = 0
    saving = False
    whole = Checkpoints.save

    def save(*args):
        nonlocal saving
        saving = True
        return whole(*args)

    def dying(write):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += saving
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*args, **kwargs)

        return wrapped

    Checkpoints.save = save
    for module, name in WRITES:
        setattr(module, name, dying(getattr(module, name)))


def attempt(out, asynchronous=False, call=None, seconds=None):
    config = kind.from_dict({**values, "out": f"{folder}/{out}", "async_checkpoints": asynchronous})
    child = os.fork()
    if child == 0:
        try:
            if call is not None:
                die_in_checkpoint(call)
            train(config)
            os._exit(0)
        finally:
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


begin = time.monotonic()
assert attempt("straight") == 0
whole = time.monotonic() - begin
told = []
for i, (call, share) in enumerate(
    [(6, None), (None, 0.3), (9, None), (6, None), (None, 0.15), (14, None), (4, None)]
):
    status = attempt("killed", i % 2 == 1, call, share and share * whole)
    assert status in (0, signal.SIGKILL), status
    checkpoints = Checkpoints(f"{folder}/killed")
    begun = len(list(checkpoints.folder.glob("step-*")))
    told.append([status, begun - len(checkpoints.committed())])
assert attempt("killed") == 0
print(json.dumps(told), file=sys.stderr)
sys.stderr.flush()
os._exit(0)
"""


def tokenizer_run(folder: Path, images: ImageCache) -> Config:
    return TokenizerTrainingConfig(
        data=str(images.path),
        out="",
        model=SHAPE,
        **SETTINGS,
        perceptual="none",
        adversarial_start=4,
        r1_every=2,
        discriminator_filters=4,
        usage_window=3,
    )


def transformer_run(folder: Path, images: ImageCache) -> Config:
    tokenizer = Tokenizer(SHAPE).eval()
    hub.save_tokenizer(tokenizer, folder / "tokenizer")
    write_token_cache(
        images,
        tokenizer,
        folder / "tokens",
        tokenizer_fingerprint=weights_fingerprint(tokenizer),
        num_codes=SHAPE.codebook_size,
        views="centre+flip",
    )
    return TransformerTrainingConfig(
        data=str(folder / "tokens"),
        out="",
        tokenizer=str(folder / "tokenizer"),
        model=TransformerConfig(16, 2, 4, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32),
        **SETTINGS,
        sample_every=STEPS,
        num_samples=2,
        sampler=SamplerConfig(steps=2),
    )


@pytest.fixture
def images(tmp_path) -> ImageCache:
    torch.manual_seed(0)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3)).astype(np.uint8)
    return write_image_cache(tmp_path / "images", pixels, np.arange(12) % 2, ("a", "b"))


@pytest.mark.parametrize("make", [tokenizer_run, transformer_run])
def test_a_run_that_is_killed_over_and_over_ends_bit_for_bit_as_one_that_is_not(tmp_path, images, make):
    stage = make.__name__.removesuffix("_run")
    run = start(SCRIPT, json.dumps([stage, make(tmp_path, images).to_dict(), str(tmp_path)]))
    _, errors = run.communicate(timeout=600)
    assert run.returncode == 0, errors
    told = json.loads(errors.splitlines()[-1])
    assert sum(status == 9 for status, _ in told) >= 5
    # Some kills cut a checkpoint short.
    assert any(unfinished for _, unfinished in told)
    straight, killed = checkpointed(tmp_path / "straight"), checkpointed(tmp_path / "killed")
    assert straight.keys() == killed.keys()
    assert all(torch.equal(value, killed[name]) for name, value in straight.items())
    for file in (tmp_path / "straight" / "model").rglob("*.safetensors"):
        name = file.relative_to(tmp_path / "straight")
        assert file.read_bytes() == (tmp_path / "killed" / name).read_bytes()
    losses = [
        [(line["step"], line["loss"]) for line in logged(tmp_path / out) if "loss" in line]
        for out in ("straight", "killed")
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, STEPS + 1))


# The second process is asked to stop while the fourth step runs. It leaves by the interpreter's own way out.
STOPPED = """
import json, os, signal, sys
import torch
from maskgit.training import train_tokenizer, train_transformer
from maskgit.training.tokenizer_config import TokenizerTrainingConfig
from maskgit.training.transformer_config import TransformerTrainingConfig

torch.set_num_threads(1)
stage, values = json.loads(sys.argv[1])
loop, train, kind = {
    "tokenizer": (train_tokenizer, train_tokenizer.train_tokenizer, TokenizerTrainingConfig),
    "transformer": (train_transformer, train_transformer.train_transformer, TransformerTrainingConfig),
}[stage]
check = loop.UpdateGate.check


def stopping(gate, step, quantities):
    if step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    check(gate, step, quantities)


loop.UpdateGate.check = stopping
train(kind.from_dict(values))
"""


@pytest.mark.parametrize(
    ("make", "changes"),
    [(tokenizer_run, {}), (transformer_run, {"fsdp": True})],
    ids=["tokenizer", "transformer"],
)
def test_processes_of_which_one_is_stopped_leave_together(tmp_path, images, make, changes):
    run = {
        **make(tmp_path, images).to_dict(),
        **changes,
        "out": str(tmp_path / "run"),
        "async_checkpoints": True,
    }
    stage = make.__name__.removesuffix("_run")
    run_two(STOPPED, json.dumps([stage, run]), code=EXIT_INTERRUPTED)
    assert [line["step"] for line in logged(run["out"]) if "loss" in line] == [1, 2, 3, 4]
    assert int(Checkpoints(run["out"]).committed()[-1].step) == 4
    assert (tmp_path / "run" / "model").is_dir()  # What a stop leaves can be used.
