"""The benchmarks run at a tiny size, count rightly, and fill in the tables of docs/performance.md."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maskgit import MaskGIT
from maskgit.config import ModelConfig, TokenizerConfig, TransformerConfig
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.transformer import Transformer

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
MODES = ["eager", "exact", "int8"]


@pytest.fixture(autouse=True)
def _modules(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, BENCHMARKS / name, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def counted(work) -> int:
    # Fused attention on a CPU is not counted; taken apart it is.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_operations_are_counted_as_torch_counts_them():
    import flops
    import models

    config = models.tiny()
    model = models.random_model(config)
    sequence = model.vocabulary.sequence(torch.tensor([1, 2]))
    images = torch.rand(2, 3, 8, 8)
    tokens = torch.zeros(2, 4, 4, dtype=torch.long)
    assert counted(lambda: model.predict_logits(sequence)) == flops.forward(config.transformer, 2)
    assert counted(lambda: model.encode_pixels(images)) == flops.encode(config.tokenizer, 8, 2)
    assert counted(lambda: model.decode_tokens(tokens)) == flops.decode(config.tokenizer, 8, 2)
    made = counted(lambda: model.generate([1, 2], steps=3, policy="random"))
    assert made == flops.generate(config, 3, 2)


@pytest.mark.parametrize("multipliers", [(1, 2), (1, 1, 2, 2, 4)])
@pytest.mark.parametrize("conv_downsample", [False, True])
def test_operations_of_every_form_of_tokenizer(multipliers, conv_downsample):
    import flops
    from maskgit.networks.config import TokenizerConfig
    from maskgit.networks.tokenizer import Tokenizer

    config = TokenizerConfig(
        filters=32, channel_multipliers=multipliers, embedding_dim=8, conv_downsample=conv_downsample
    )
    side = 2 * config.patch_size
    with torch.device("meta"):
        tokenizer = Tokenizer(config)
        images, features = torch.empty(1, 3, side, side), torch.empty(1, 8, 2, 2)
    encoded = counted(lambda: tokenizer.quantizer.distances(tokenizer.encoder(images)))
    assert encoded == flops.encode(config, side)
    assert counted(lambda: tokenizer.decoder(features)) == flops.decode(config, side)


def test_the_released_model_has_the_known_operations():
    import flops
    import models

    config = models.SIZES["256"]()
    assert flops.forward(config.transformer) == pytest.approx(93e9, rel=5e-3)
    assert flops.decode(config.tokenizer, 256) == pytest.approx(187e9, rel=5e-3)


def test_roofline_and_scaling_write_rows(tmp_path):
    file = tmp_path / "roofline.json"
    small = ("--size", "tiny", "--device", "cpu", "--rounds", "2", "--json", file)
    printed = run("roofline.py", *small, "--modes", *MODES, "--product", "64", "--convolution", "4")
    record = json.loads(file.read_text())
    assert {(row["mode"], row["name"]) for row in record["rows"]} == {
        (mode, name) for mode in MODES for name in ("forward", "decode", "encode", "image8", "again8")
    }
    assert all(row["seconds"] > 0 and row["rounds"] == 2 and row["share"] > 0 for row in record["rows"])
    mixed = next(row for row in record["rows"] if (row["mode"], row["name"]) == ("int8", "image8"))
    assert set(mixed["gflop"]) == {"int8", "float32"} == set(record["attainable_gflop_per_s"])
    assert record["environment"]["device"] == "cpu"
    assert "attainable in float32" in printed

    file = tmp_path / "scaling.json"
    small = ("--size", "tiny", "--device", "cpu", "--rounds", "1", "--json", file)
    run("scaling.py", *small, "--steps", "1", "2", "--batches", "1", "3")
    record = json.loads(file.read_text())
    axes = [row["axis"] for row in record["rows"]]
    assert {axis: axes.count(axis) for axis in axes} == {"steps": 2, "batch": 2, "resolution": 3, "model": 5}
    assert all(row["images_per_second"] > 0 for row in record["rows"])


def test_both_sides_are_compared_in_turns(tmp_path):
    import against_official
    import models
    from workers import Worker, WorkerError

    config = models.tiny()
    models.write_official(models.random_model(config), tmp_path / "checkpoints")
    against_official.write_inputs(tmp_path / "inputs2.npz", config, 2)
    command = [sys.executable, str(BENCHMARKS / "our_worker.py"), "--device", "cpu"]
    with Worker(command, tmp_path) as theirs, Worker(command, tmp_path) as ours:
        # Ours stands in for the official code, which the tests do not have.
        theirs.ask("describe")
        for name in ("forward", "decode", "encode"):
            stand_in = _StandIn(theirs)
            (row,) = against_official.compare(name, 2, ["exact"], stand_in, ours, tmp_path, rounds=2)
            assert row["ratio"] == pytest.approx(row["official_s"] / row["ours_s"])
            assert row["agreement"] in ((None,) if name == "decode" else (1.0,))
            if name == "decode":
                assert row["image_difference_greatest"] < 1e-5
            assert stand_in.timed == 3  # a warm-up and two rounds
        with pytest.raises(WorkerError, match="no_such_work"):
            ours.ask("no_such_work")


class _StandIn:
    """A worker whose mode is always eager, as the official one has none."""

    def __init__(self, worker) -> None:
        self.worker = worker
        self.timed = 0

    def ask(self, do, **arguments):
        self.timed += do == "time"
        if do == "outputs":
            arguments["noise"] = ""
        return self.worker.ask(do, **arguments | {"mode": "eager"})


def test_given_noise_makes_the_image_that_it_makes_in_the_pipeline():
    import models
    import our_worker
    from maskgit.sampler.noise import ImageNoise

    model = models.random_model(models.tiny())
    labels = torch.tensor([3, 4])
    steps = torch.arange(models.STEPS)
    drawn = ImageNoise(5, torch.arange(2), 17, 64)
    record = {
        "gumbel_tokens": torch.stack([drawn.tokens(step.expand(2, 1)) for step in steps]).numpy(),
        "gumbel_choice": torch.stack([drawn.choice(step.expand(2, 1)) for step in steps]).numpy(),
    }
    made = our_worker.with_noise(model, labels, our_worker.Recorded(record, torch.device("cpu")))
    expected = model.generate(labels, seed=5, steps=models.STEPS)
    assert torch.equal(made["tokens"].view(2, 4, 4), expected.tokens)
    assert torch.equal(made["images"], expected.images.movedim(1, -1))


def test_a_worker_that_dies_is_told(tmp_path):
    from workers import Worker, WorkerError

    command = [sys.executable, "-c", "raise SystemExit(3)"]
    with Worker(command, tmp_path) as worker, pytest.raises(WorkerError, match="exit code 3"):
        worker.ask("describe")


def test_tables_say_what_the_json_says(tmp_path):
    import tables

    text = "before\n<!-- table: scaling one -->\nold\n<!-- end -->\nafter\n"
    assert tables.filled(text, tmp_path) == text.replace("old", "Not measured.")
    row = {
        "axis": "steps",
        "value": "8",
        "seconds_per_image": 2.5,
        "images_per_second": 0.4,
        "gflop_per_s": 99.6,
    }
    where = {"processor": "P", "features": [], "threads": 2, "torch": "2", "load_average": None}
    (tmp_path / "one.json").write_text(json.dumps({"environment": where, "rows": [row]}))
    made = tables.filled(text, tmp_path)
    assert "| steps | 8 | 2.500 | 0.40 | 100 |" in made
    assert tables.filled(made, tmp_path) == made


def test_the_documents_tables_are_those_of_the_results():
    import tables

    text = tables.DOCUMENT.read_text()
    assert tables.filled(text, tables.RESULTS) == text
    kinds = [kind for _, kind, _, _ in tables.TABLE.findall(text)]
    assert set(kinds) == set(tables.TABLES)


def test_stand_ins_stand_in_and_go(monkeypatch):
    import importlib.util

    import official_worker

    missing = ("requests", "matplotlib", "tensorflow")
    found = importlib.util.find_spec

    def without(name: str, package: str | None = None):
        # As in a Python that has none of them, where sys.modules is asked first.
        return None if name in missing and name not in sys.modules else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    for name in [name for name in sys.modules if name.partition(".")[0] in missing]:
        monkeypatch.delitem(sys.modules, name)
    before = set(sys.modules)
    with official_worker.stand_ins():
        import matplotlib.patches as patches
        import matplotlib.pyplot as plt
        import requests
        import tensorflow.compat.v1 as tf

        for name in missing:
            # What asks whether a package is there is answered, whatever it does then.
            assert importlib.util.find_spec(name) is not None
        with tf.io.gfile.GFile(__file__, "rb") as file:
            assert file.read(3) == b'"""'
    assert {plt, patches, requests}.isdisjoint(sys.modules.values())
    assert set(sys.modules) == before
    assert not any(official_worker.installed(name) for name in missing)


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("against_official", ["--official", "gone"]),
        ("official_worker", ["gone"]),
        ("against_official", ["--official", "empty"]),
        ("against_official", ["--official", "there", "--official-python", "no-such-python"]),
        ("against_official", ["--official", "there", "--official-python", "false"]),
    ],
)
def test_what_the_official_side_lacks_is_a_sentence(script, options, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "there" / "maskgit").mkdir(parents=True)
    (tmp_path / "there" / "maskgit" / "inference.py").touch()
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    told = done.stderr.splitlines()[-1]
    assert "git clone" in told if "there" not in options else options[-1] in told


def test_every_arm_of_the_recipes_has_networks_of_about_one_cost(tmp_path, monkeypatch):
    import recipe

    args = SimpleNamespace(train=tmp_path, test=tmp_path)
    tokenizers = {name: recipe.tokenizer_run(args, name, 0, tmp_path).model for name in recipe.TOKENIZERS}
    assert {shape.patch_size for shape in tokenizers.values()} == {8}
    costs = {}
    for first, second in recipe.ARMS:
        cache = SimpleNamespace(num_classes=10, grid_size=12, num_codes=tokenizers[first].codebook_size)
        monkeypatch.setattr(recipe.TokenCache, "open", lambda path, cache=cache: cache)
        run = recipe.transformer_run(args, second, 0, tmp_path, tmp_path, tmp_path)
        costs[first, second] = run.sampler.steps * recipe.flops_per_image(run.model)
    assert all(0.9 < cost / costs[recipe.ARMS[0]] < 1.1 for cost in costs.values()), costs


@pytest.mark.parametrize("groups", [1, 2])
def test_bits_per_image_of_guesses_are_those_of_the_codes(groups):
    import recipe

    shape = TokenizerConfig(filters=32, num_res_blocks=1, channel_multipliers=(1, 1), codebook_size=64)
    backbone = TransformerConfig(
        64, 3, 4, hidden_size=8, num_layers=1, num_heads=1, intermediate_size=8, block="modern", groups=groups
    )
    config = ModelConfig(shape, backbone, image_size=8)
    model = MaskGIT(config, Tokenizer(shape), Transformer(backbone).eval())
    torch.nn.init.zeros_(model.transformer.token_embedding.weight)
    tokens = np.arange(32).reshape(2, 4, 4)
    bits = recipe.bits_per_image(model, CacheOf(tokens), 2)
    assert bits == pytest.approx(16 * 6, rel=1e-4)


class CacheOf:
    """Stands in for a token cache."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens, self.labels = tokens, np.zeros(len(tokens), np.int32)

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, indices: np.ndarray, views: np.ndarray) -> np.ndarray:
        return self.tokens[indices]
