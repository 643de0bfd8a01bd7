"""Both loops on streams of tiny pictures: like caches, resumed to the bit, in any number of processes."""

import functools
import io
import itertools
import json
import os
import shutil
import signal
import threading
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit import hub
from maskgit.checkpoints.weights import weights_fingerprint
from maskgit.data import huggingface
from maskgit.data.image_cache import ImageCache
from maskgit.data.pack import pack_images
from maskgit.data.streaming import StreamedImages, files_fingerprint
from maskgit.data.token_cache import write_token_cache
from maskgit.errors import ConfigError, DataError
from maskgit.networks.config import TokenizerConfig, TransformerConfig
from maskgit.networks.tokenizer import Tokenizer
from maskgit.sampler.config import SamplerConfig
from maskgit.training import inputs, train_tokenizer, train_transformer
from maskgit.training.dry_run import dry_run_tokenizer, dry_run_transformer
from maskgit.training.run.checkpoint import Checkpoints
from maskgit.training.run.stopping import TrainingError
from maskgit.training.stream_config import StreamConfig, TokenStreamConfig
from maskgit.training.tokenizer_config import TokenizerTrainingConfig
from maskgit.training.transformer_config import TransformerTrainingConfig
from runs import run_two

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SIDE, SHARDS, EACH, CODES = 8, 4, 6, 16
LOOPS = {"tokenizer": train_tokenizer, "transformer": train_transformer}
TRAIN = {
    "tokenizer": train_tokenizer.train_tokenizer,
    "transformer": train_transformer.train_transformer,
}


def picture(random: np.random.Generator) -> bytes:
    """A smooth picture of four colours, as PNG."""
    pixels = random.integers(0, 256, (2, 2, 3)).repeat(SIDE // 2, 0).repeat(SIDE // 2, 1).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Shards of pictures, the same packed, a tokenizer, and what it makes of them."""
    folder = tmp_path_factory.mktemp("streams")
    random = np.random.default_rng(0)
    (folder / "shards").mkdir()
    for shard in range(SHARDS):
        columns = {"image": [picture(random) for _ in range(EACH)], "label": [i % 3 for i in range(EACH)]}
        table = pa.table(columns).replace_schema_metadata({"label_names": "a,b,c"})
        pq.write_table(table, folder / "shards" / f"train-{shard:05}-of-{SHARDS:05}.parquet")
    cache = pack_images(folder / "shards", folder / "images", size=SIDE)
    torch.manual_seed(0)
    shape = TokenizerConfig(
        filters=8,
        norm="LN",
        num_res_blocks=1,
        channel_multipliers=(1, 1),
        embedding_dim=4,
        codebook_size=CODES,
    )
    tokenizer = Tokenizer(shape).eval()
    hub.save_tokenizer(tokenizer, folder / "tokenizer")
    write_token_cache(
        cache,
        tokenizer,
        folder / "tokens",
        tokenizer_fingerprint=weights_fingerprint(tokenizer),
        num_codes=CODES,
        views="centre",
    )
    return folder


@pytest.fixture
def configs(folder, tmp_path) -> dict:
    """Runs of both stages, a pass and a half through the pictures each."""
    source = str(folder / "shards")
    shared = {"steps": 6, "batch_size": 6, "num_workers": 2, "device": "cpu", "precision": "float32"}
    shared |= {"log_every": 1, "checkpoint_every": 100, "tracker": "none", "learning_rate": 3e-3}
    first = TokenizerTrainingConfig(
        out=str(tmp_path / "tokenizer"),
        stream=StreamConfig(source=source, shuffle_buffer=4),
        image_size=SIDE,
        model=hub.load_tokenizer(folder / "tokenizer").config,
        perceptual="none",
        discriminator_filters=4,
        usage_window=3,
        **shared,
    )
    second = TransformerTrainingConfig(
        out=str(tmp_path / "transformer"),
        stream=TokenStreamConfig(source=source, shuffle_buffer=4),
        tokenizer=str(folder / "tokenizer"),
        model=TransformerConfig(
            CODES, 3, SIDE // 2, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16
        ),
        sample_every=100,
        num_samples=2,
        sampler=SamplerConfig(steps=2),
        **shared,
    )
    return {"tokenizer": first, "transformer": second}


def weights(path: Path) -> dict[str, torch.Tensor]:
    if (path / "transformer").is_dir():
        return hub.load_model(path).transformer.state_dict()
    return hub.load_tokenizer(path).state_dict()


def assert_equal(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def losses(out: str) -> list[float]:
    lines = [json.loads(line) for line in (Path(out) / "scalars.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def stop_at(monkeypatch, loop, step: int) -> None:
    """Let a SIGTERM arrive during a step."""
    check = loop.UpdateGate.check

    def interrupting(gate: object, now: int, quantities: object) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        check(gate, now, quantities)

    monkeypatch.setattr(loop.UpdateGate, "check", interrupting)


@pytest.mark.parametrize("stage", LOOPS)
@pytest.mark.parametrize("lanes", [1, 2])
def test_a_stopped_run_goes_on_bit_for_bit(configs, folder, tmp_path, monkeypatch, stage, lanes):
    config = replace(configs[stage], stream=replace(configs[stage].stream, lanes=lanes))
    straight = TRAIN[stage](replace(config, out=str(tmp_path / "straight")))
    threads = set(threading.enumerate())
    # Within the first pass, and within the second.
    for step in (0, 4):
        with monkeypatch.context() as patch:
            stop_at(patch, LOOPS[stage], step)
            with pytest.raises(SystemExit) as stopped:
                TRAIN[stage](config)
        assert stopped.value.code == 75
        assert set(threading.enumerate()) <= threads
    # The source may lie elsewhere by then, and be read by more threads.
    shutil.copytree(folder / "shards", tmp_path / "moved")
    moved = replace(config.stream, source=str(tmp_path / "moved"))
    assert_equal(straight, TRAIN[stage](replace(config, stream=moved, num_workers=3)))
    assert losses(config.out) == losses(str(tmp_path / "straight"))
    assert set(threading.enumerate()) <= threads


@pytest.mark.parametrize("stage", LOOPS)
def test_a_stream_in_order_trains_as_a_cache_does(configs, folder, tmp_path, monkeypatch, stage):
    stream = replace(configs[stage].stream, shuffle_buffer=0)
    config = replace(configs[stage], stream=stream)
    if stage == "transformer":
        config = replace(config, stream=replace(stream, augment="none"))
    cached = {"tokenizer": "images", "transformer": "tokens"}[stage]
    cached = replace(config, stream=type(stream)(), data=str(folder / cached), out=str(tmp_path / "cached"))
    for name in ("ImageBatches", "TokenBatches"):
        batches = getattr(inputs, name)
        in_order = functools.partialmethod(batches.__init__, shuffle=False)
        monkeypatch.setattr(inputs, name, type(name, (batches,), {"__init__": in_order}))
    assert_equal(TRAIN[stage](config), TRAIN[stage](cached))


# It leaves without the interpreter's clean-up, in which gloo's threads have been seen to hang.
SCRIPT = """
import json, os, sys, torch
torch.set_num_threads(1)
if sys.argv[1] == "tokenizer":
    from maskgit.training.tokenizer_config import TokenizerTrainingConfig as Config
    from maskgit.training.train_tokenizer import train_tokenizer as train
else:
    from maskgit.training.transformer_config import TransformerTrainingConfig as Config
    from maskgit.training.train_transformer import train_transformer as train
train(Config.from_dict(json.loads(sys.argv[2])))
sys.stderr.flush()
os._exit(0)
"""


# One lane that both processes read, and one for each.
@pytest.mark.parametrize(("stage", "lanes"), [("tokenizer", 1), ("transformer", 2)])
def test_two_processes_train_as_one(configs, stage, lanes):
    config = configs[stage]
    # So low a rate that rounding, which differs between batches of 6 and of 3, does not grow.
    one = replace(config, stream=replace(config.stream, lanes=lanes), learning_rate=1e-6)
    if stage == "tokenizer":
        one = replace(one, discriminator_learning_rate=1e-6, revive_codes=False)
    else:
        one = replace(one, model=replace(one.model, dropout=0.0))
    two = replace(one, out=f"{one.out}-two")
    TRAIN[stage](one)
    run_two(SCRIPT, stage, json.dumps(two.to_dict()))
    assert losses(two.out) == pytest.approx(losses(one.out), rel=1e-5)


@pytest.mark.parametrize("stage", LOOPS)
def test_what_changes_the_order_or_the_images_is_refused_when_a_run_goes_on(configs, folder, tmp_path, stage):
    config = replace(configs[stage], steps=1)
    TRAIN[stage](config)
    for change in ({"lanes": 2}, {"shuffle_buffer": 5}, {"decoded_size": SIDE + 2}):
        with pytest.raises(ConfigError, match=rf"stream\.{next(iter(change))}"):
            TRAIN[stage](replace(config, stream=replace(config.stream, **change)))
    shutil.copytree(folder / "shards", tmp_path / "other")
    swapped = sorted((tmp_path / "other").iterdir())[:2]
    contents = [file.read_bytes() for file in swapped]
    for file, content in zip(swapped, reversed(contents), strict=True):
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"\(train\) changed since the checkpoint"):
        TRAIN[stage](replace(config, stream=replace(config.stream, source=str(tmp_path / "other"))))
    assert [kept.step for kept in Checkpoints(config.out).committed()] == [1]


def test_tokens_of_another_tokenizer_are_refused_when_a_run_goes_on(configs, tmp_path):
    config = replace(configs["transformer"], steps=1)
    TRAIN["transformer"](config)
    torch.manual_seed(1)
    other = Tokenizer(hub.load_tokenizer(config.tokenizer).config)
    hub.save_tokenizer(other, tmp_path / "other")
    with pytest.raises(DataError, match=r"\(train\) changed since the checkpoint"):
        TRAIN["transformer"](replace(config, tokenizer=str(tmp_path / "other")))


@pytest.mark.parametrize("stage", LOOPS)
def test_threads_end_when_a_run_fails(configs, monkeypatch, stage):
    threads = set(threading.enumerate())

    def broken(gate: object, step: int, quantities: object) -> None:
        raise TrainingError("broken")

    monkeypatch.setattr(LOOPS[stage].UpdateGate, "check", broken)
    with pytest.raises(TrainingError):
        TRAIN[stage](configs[stage])
    assert set(threading.enumerate()) <= threads


def test_an_interrupt_ends_a_run_that_still_passes_over_rows(folder, monkeypatch):
    threads = set(threading.enumerate())
    read = huggingface.read_rows
    monkeypatch.setattr(huggingface, "read_rows", lambda *source: itertools.cycle(read(*source)))
    images = StreamedImages(folder / "shards", seed=0, global_batch=6, size=SIDE)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(images.from_step(2**40))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert set(threading.enumerate()) <= threads


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"augment": "none"}, None),
        ({"label_column": "none"}, r"num_classes is 3, but .* has 1"),
        ({"class_names": ("a", "b", "c", "d")}, r"num_classes is 3, but .* has 4"),
        ({"label_column": "colour"}, "no column 'colour'"),
        ({"image_column": "photo"}, "no column 'photo'"),
        ({"split": "test"}, "no split 'test'"),
        ({"lanes": 3}, "lanes must be 1, or a multiple of the 2 processes"),
        ({"source": "nothing/at/all"}, "does not exist"),
        ({"revision": "main"}, "revision applies to data sets on the Hub"),
    ],
)
def test_streams_that_do_not_fit_are_refused_before_a_run_begins(configs, change, sentence):
    config = configs["transformer"]
    config = replace(config, stream=replace(config.stream, **change))
    if sentence is None:
        assert dry_run_transformer(config, world=2)
        return
    with pytest.raises((ConfigError, DataError), match=sentence):
        dry_run_transformer(config, world=2)
    assert not Path(config.out).exists()


@pytest.mark.parametrize("stage", LOOPS)
def test_settings_that_contradict_are_refused_when_given(configs, stage):
    config = configs[stage]
    for change, sentence in (
        ({"data": "somewhere"}, r"either data, .*, or stream\.source, but both are given"),
        ({"stream": type(config.stream)()}, "but neither is given"),
        ({"num_workers": 0}, "num_workers must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            replace(config, **change)
    with pytest.raises(ConfigError, match=r"stream\.lanes is given, but stream\.source"):
        type(config.stream)(lanes=2)
    with pytest.raises(ConfigError, match=r"stream\.max_bad_share must be between"):
        replace(config.stream, max_bad_share=2.0)
    assert type(config).from_dict(config.to_dict()) == config


def test_what_one_stage_has_no_use_for_it_does_not_take(configs):
    with pytest.raises(ConfigError, match="image_size is missing"):
        replace(configs["tokenizer"], image_size=None)
    values = configs["tokenizer"].to_dict()
    values["stream"]["class_names"] = ["a"]
    with pytest.raises(ConfigError, match="class_names"):
        TokenizerTrainingConfig.from_dict(values)
    with pytest.raises(ConfigError, match=r"stream\.augment"):
        TokenStreamConfig(source="here", augment="blur")


def test_dry_runs_say_what_a_stream_does_not_tell(configs):
    for stage, tell in (("tokenizer", dry_run_tokenizer), ("transformer", dry_run_transformer)):
        told = tell(configs[stage], world=2)
        assert "a stream of images" in told
        assert "6, 36 images; how often through the data is not known of a stream" in told
        assert not Path(configs[stage].out).exists()


def test_the_first_stage_needs_no_labels(configs, tmp_path):
    random = np.random.default_rng(1)
    table = pa.table({"picture": [picture(random) for _ in range(6)], "colour": [1.5] * 6})
    pq.write_table(table, tmp_path / "plain.parquet")
    stream = StreamConfig(source=str(tmp_path / "plain.parquet"), image_column="picture")
    TRAIN["tokenizer"](replace(configs["tokenizer"], stream=stream, steps=1))


def test_a_folder_is_shuffled_as_a_whole(tmp_path):
    random = np.random.default_rng(2)
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(12):
            (tmp_path / "data" / name / f"{i:02}.png").write_bytes(picture(random))
    settings = {"seed": 0, "global_batch": 6, "size": SIDE}
    labels = [
        torch.cat([batch.labels for batch in itertools.islice(made, 4)]).tolist()
        for made in (
            StreamedImages(tmp_path / "data", **settings, shuffle_buffer=1),
            StreamedImages(tmp_path / "data", **settings, shuffle_buffer=0),
        )
    ]
    assert sorted(labels[0]) == labels[1] == [0] * 12 + [1] * 12
    assert 0 < sum(labels[0][:12]) < 12


def test_files_are_known_by_names_sizes_and_samples_wherever_they_lie(tmp_path):
    files = [tmp_path / "one" / name for name in ("a/x.bin", "b/y.bin")]
    for i, file in enumerate(files):
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes([i]) * 10_000)
    known = files_fingerprint([str(file) for file in files])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    copies = [tmp_path / "two" / file.relative_to(tmp_path / "one") for file in files]
    os.utime(copies[0], (0, 0))
    assert files_fingerprint([str(file) for file in copies]) == known
    assert files_fingerprint([str(file) for file in reversed(files)]) != known
    changed = bytearray(copies[1].read_bytes())
    changed[-1] ^= 1
    copies[1].write_bytes(changed)
    assert files_fingerprint([str(file) for file in copies]) != known
    at = "hf://datasets/someone/pictures@{}/train.parquet"
    assert files_fingerprint([at.format("c1")]) == files_fingerprint([at.format("c1")])
    assert files_fingerprint([at.format("c1")]) != files_fingerprint([at.format("c2")])


def test_a_name_on_the_hub_is_read_at_its_revision(configs, folder, monkeypatch):
    asked = []
    load = datasets.load_dataset_builder

    def builder(name: str, config: str | None, **options: object):
        asked.append((name, config, options))
        return load("parquet", data_dir=str(folder / "shards"))

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    stream = StreamConfig(source="someone/pictures", config="small", revision="c0ffee")
    opened = inputs.open_images(replace(configs["tokenizer"], stream=stream))
    assert asked == [("someone/pictures", "small", {"revision": "c0ffee", "cache_dir": None})]
    assert next(opened.train.from_step(0)).images.shape == (6, 3, SIDE, SIDE)


def test_the_documented_table_is_one_that_a_recipe_takes():
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf-8")
    values = tomllib.loads(text.split("```toml\n")[1].split("```")[0])
    config = TokenizerTrainingConfig.from_dict({**values, "out": "run"})
    assert config.stream.source
    assert TokenStreamConfig.from_dict(values["stream"]).lanes == config.stream.lanes


def test_the_cache_that_the_tests_compare_with_is_of_the_same_pictures(folder):
    assert len(ImageCache.open(folder / "images")) == SHARDS * EACH
