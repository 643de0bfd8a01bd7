"""Exported networks: run by their own runtimes, and by the example that has nothing else."""

import importlib.util
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from maskgit import MaskGIT, export
from maskgit.apps.cli import commands as cli
from maskgit.errors import CheckpointError, ConfigError, OutputError
from maskgit.export import FORMATS, PARTS, export_model
from maskgit.sampler import noise, schedules

EXAMPLE = Path(__file__).parents[1] / "examples" / "onnx_generate.py"


def run(*arguments) -> int:
    return cli.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def bundled():
    return MaskGIT.from_pretrained()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "onnx"
    assert run("export", "cifar10", "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("onnx_generate", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake(monkeypatch):
    """Put a format in the place of ONNX whose files compute what the test says."""

    def install(compute):
        kept = []

        def write(part, inputs, path):
            path.write_bytes(b"graph")
            kept.append(part)

        load = lambda path: lambda inputs: compute(kept[-1], inputs)  # noqa: E731
        monkeypatch.setitem(FORMATS, "onnx", export.Format(".onnx", (), write, load))

    return install


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_graphs_compute_what_the_networks_do(bundled, exported):
    assert sorted(p.name for p in exported.iterdir()) == [
        "config.json",
        "decoder.onnx",
        "encoder.onnx",
        "transformer.onnx",
    ]
    numbers = torch.Generator().manual_seed(3)
    tokens = torch.randint(512, (5, 8, 8), generator=numbers)
    sequences = bundled.vocabulary.sequence(torch.tensor([0, 9, -1, 4, 4]), tokens, tokens % 2 == 0)
    images = bundled.tokenizer.decode(tokens).clamp(0, 1)
    for name, inputs, expected in (
        ("transformer", {"sequence": sequences}, {"logits": bundled.predict_logits(sequences)}),
        ("decoder", {"tokens": tokens}, {"images": bundled.tokenizer.decode(tokens)}),
        ("encoder", {"images": images}, {"tokens": bundled.tokenizer.encode(images)}),
    ):
        graph = session(exported / f"{name}.onnx")
        (node,) = graph.get_outputs()
        (wanted,) = expected.values()
        assert [node.name] == list(expected)
        assert node.shape == ["batch", *wanted.shape[1:]]
        for batch in (1, 5):
            (found,) = graph.run(None, {key: value[:batch].numpy() for key, value in inputs.items()})
            assert found.dtype == wanted.numpy().dtype
            np.testing.assert_allclose(found, wanted[:batch].numpy(), atol=2e-5)


def test_the_config_says_all_that_is_needed(bundled, exported):
    config = json.loads((exported / "config.json").read_text("utf-8"))
    assert config["vocabulary"] == {"num_codes": 512, "num_classes": 10, "grid_size": 8, "mask": 522}
    assert config["model"] == json.loads(json.dumps(bundled.config.to_dict()))
    assert list(config["graphs"]) == list(PARTS)
    assert config["graphs"]["decoder"]["file"] == "decoder.onnx"
    assert 0 < config["graphs"]["transformer"]["max_difference"] < 1e-4


def test_graphs_hold_no_paths_of_the_machine(exported):
    for path in exported.glob("*.onnx"):
        assert not any(word in path.read_bytes() for word in (b"site-packages", b".py"))


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ((), {}),
        (
            ("--steps", "70", "--temperature", "0.7", "--guidance-scale", "1"),
            {"steps": 70, "temperature": 0.7, "guidance_scale": 1.0},
        ),
        (
            ("--guidance-scale", "1.7", "--choice-temperature", "2"),
            {"guidance_scale": 1.7, "choice_temperature": 2.0},
        ),
    ],
    ids=["own", "unguided", "guided"],
)
def test_onnx_runtime_alone_makes_the_same_images(bundled, exported, tmp_path, flags, settings):
    seed = 2**63 + 11
    alone = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    alone += "; assert not {'torch', 'maskgit'} & set(sys.modules)"
    command = ["--class", "frog", "--num-images", "3", "--seed", str(seed), "--out", str(tmp_path), *flags]
    done = subprocess.run(
        [sys.executable, "-c", alone, str(EXAMPLE), str(exported), *command], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = bundled.generate("frog", num_images=3, seed=seed, **settings).to_pil()
    for index, picture in enumerate(expected):
        found = np.asarray(Image.open(tmp_path / f"frog-{seed}-{index:05}.png")).astype(int)
        assert abs(found - np.asarray(picture)).max() <= 1


def test_the_example_draws_the_same_noise(example):
    indices = np.array([0, 7, 2**40 + 5])
    found = example.gumbel(2**64 - 3, indices, 11, example.CHOICE, 1023)
    ours = noise.ImageNoise(2**64 - 3, torch.from_numpy(indices), 1023, 1).choice(11)
    np.testing.assert_allclose(found, ours.numpy(), rtol=1e-5, atol=1e-6)


def test_the_example_masks_as_many(example):
    for steps in (1, 8, 12, 13, 64):
        counts = schedules.mask_counts(schedules.mask_ratios("cosine", steps, 1024))
        for num_tokens in (64, 256, 1024):
            found = [example.num_masked_after(step, steps, num_tokens) for step in range(steps)]
            assert found == counts[:, num_tokens].tolist()


def test_the_example_finds_classes(example):
    names = ["tench, Tinca tinca", "lorikeet"]
    assert [example.class_number(name, names, 2) for name in ("tinca TINCA", "1", "none")] == [0, 1, -1]
    for name in ("cat", "2", "-1", ""):
        with pytest.raises(SystemExit, match="from 0 to 1"):
            example.class_number(name, names, 2)


def test_the_example_refuses_what_it_does_not_know(exported, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    config = json.loads((exported / "config.json").read_text("utf-8"))
    model, graphs = config["model"], config["graphs"]
    for change, name, word in (
        ({}, "pig", "Unknown class"),
        ({"model": model | {"sampler": model["sampler"] | {"policy": "halton"}}}, "dog", "confidence"),
        ({"model": model | {"label_dropout": 0.0}}, "dog", "classes only"),
        ({"graphs": {"decoder": graphs["decoder"]}}, "dog", "'transformer'"),
        ({"format": "aoti"}, "dog", "--format onnx"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change), "utf-8")
        command = [sys.executable, EXAMPLE, folder, "--out", tmp_path / "out", "--class", name]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert word in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "compute"),
    [
        ("transformer", lambda part, x: part(x) * 1.01),
        ("transformer", lambda part, x: part(x) * torch.nan),
        ("transformer", lambda part, x: part(x)[:1]),
        ("decoder", lambda part, x: part(x).roll(1, -1)),
        ("encoder", lambda part, x: part(x).roll(1, -1)),
        ("encoder", lambda part, x: part(x) + 2**20),
        ("encoder", lambda part, x: part(x).float()),
    ],
)
def test_a_wrong_file_is_not_left(tiny, tmp_path, fake, part, compute):
    fake(lambda network, x: network(x))
    out = tmp_path / "out"
    export_model(tiny, out, parts=[part])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    fake(compute)
    with torch.no_grad(), pytest.raises(CheckpointError, match=f"exported {part} differs"):
        export_model(tiny, out, parts=[part], overwrite=True)
    with torch.no_grad(), pytest.raises(CheckpointError):
        export_model(tiny, tmp_path / "new", parts=[part])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_codes_that_are_as_near_are_not_wrong(tiny, tmp_path, fake):
    codebook = tiny.tokenizer.quantizer.codebook
    kept = codebook.detach().clone()
    with torch.no_grad():
        codebook[1::2] = codebook[::2]  # every code twice
    fake(lambda part, x: part(x) ^ 1)
    try:
        (made,) = export_model(tiny, tmp_path / "out", parts=["encoder"])
    finally:
        codebook.data.copy_(kept)
    assert made.difference < 1e-4


def test_nothing_is_overwritten_unasked(tiny, tmp_path, fake):
    fake(lambda part, x: part(x))
    out = tmp_path / "out"
    export_model(tiny, out)
    with pytest.raises(OutputError, match="--overwrite"):
        export_model(tiny, out)
    export_model(tiny, out, parts=["decoder"], overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "decoder.onnx"]
    (out / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match=r"letter\.txt"):
        export_model(tiny, out, overwrite=True)
    assert (out / "letter.txt").read_text() == "dear"


def test_weights_too_large_for_a_graph_lie_beside_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_ONNX_BYTES", 0)
    (made,) = export_model(tiny, tmp_path / "out", parts=["decoder"])
    names = ["config.json", "decoder.onnx", "decoder.onnx.data"]
    assert sorted(p.name for p in made.path.parent.iterdir()) == names
    assert made.num_bytes == sum((made.path.parent / name).stat().st_size for name in names[1:])
    side = tiny.vocabulary.grid_size
    (found,) = session(made.path).run(None, {"tokens": np.zeros((1, side, side), np.int64)})
    expected = tiny.tokenizer.decode(torch.zeros(1, side, side, dtype=torch.int64))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_what_cannot_be_exported_is_said_in_a_sentence(tiny, tmp_path, monkeypatch, capsys):
    with pytest.raises(ConfigError, match=r"Unknown format 'onxx'.*onnx"):
        export_model(tiny, tmp_path / "out", format="onxx")
    with pytest.raises(ConfigError, match=r"Unknown part 'coder'.*encoder"):
        export_model(tiny, tmp_path / "out", parts=["coder"])
    with pytest.raises(ConfigError, match="at least one part"):
        export_model(tiny, tmp_path / "out", parts=[])
    assert run("export", "cifar10", "--dtype", "bfloat16", "--out", tmp_path / "out") == 2
    assert "float32" in capsys.readouterr().err
    tiny.tokenizer.train()
    try:
        with pytest.raises(ConfigError, match="training mode"):
            export_model(tiny, tmp_path / "out")
    finally:
        tiny.tokenizer.eval()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    # Known before a model is looked for.
    assert run("export", "no-such-model", "--out", tmp_path / "out") == 2
    assert "pip install -c constraints.txt '.[export]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_export_leaves_the_programs_warning_filters_alone(tiny, tmp_path, monkeypatch):
    """They belong to all threads; the command silences its own process."""
    whole = torch.onnx.export

    def export(*args, **options):
        warnings.filterwarnings("ignore", message="of another thread")
        return whole(*args, **options)

    monkeypatch.setattr(torch.onnx, "export", export)
    with warnings.catch_warnings():
        export_model(tiny, tmp_path / "net", parts=("decoder",))
        patterns = [entry[1].pattern for entry in warnings.filters if entry[1] is not None]
    assert "of another thread" in patterns
