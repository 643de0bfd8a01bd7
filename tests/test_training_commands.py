"""From a folder of pictures to a generated sheet with the commands of docs/training.md and the smoke recipes."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskgit import MaskGIT
from maskgit.apps.cli import commands as cli
from maskgit.apps.cli.training import read_recipe
from maskgit.data.image_cache import ImageCache
from maskgit.errors import ConfigError

RECIPES = Path(__file__).parents[1] / "recipes"
STAGES = {"SMOKE": "tokenizer", "SECOND": "transformer"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of two classes: red squares and green stripes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("square", "stripes"):
        (folder / name).mkdir()
        for i in range(24):
            array = np.full((40, 48, 3), rng.integers(0, 60, 3), np.uint8)
            if name == "square":
                top, left = rng.integers(0, 20, 2)
                array[top : top + 16, left : left + 16, 0] = 230
            else:
                array[rng.integers(0, 4) :: 4, :, 1] = 220
            Image.fromarray(array).save(folder / name / f"{i}.png")
    return folder


def run(*arguments) -> int:
    return cli.main([str(a) for a in arguments])


def test_the_smoke_recipes_go_from_a_folder_to_a_sheet(pictures, tmp_path, monkeypatch, capsys):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    assert run("pack", pictures, "data/images", "--size", 32) == 0
    assert "48 images of 32 × 32 pixels in 2 classes" in capsys.readouterr().out
    shorter = ("steps=12", "adversarial_start=8", "evaluate_every=12", "checkpoint_every=6", "usage_window=6")
    data = ("data=data/images", "test_data=data/images")
    first = ("train", "tokenizer", RECIPES / "smoke" / "tokenizer.toml", "--set", *data, *shorter)
    assert run(*first, "--dry-run") == 0
    assert "parameters" in capsys.readouterr().out
    assert not Path("runs").exists()
    assert run(*first) == 0
    assert run("tokenize", "data/images", "data/tokens", "--tokenizer", "runs/smoke-tokenizer/model") == 0
    second = ("train", "transformer", RECIPES / "smoke" / "transformer.toml", "--set", "data=data/tokens")
    second = (*second, "model.num_classes=2", "steps=12", "sample_every=12", "checkpoint_every=6")
    assert run(*second, "--dry-run") == 0
    assert run(*second) == 0
    capsys.readouterr()

    model = MaskGIT.from_pretrained("runs/smoke-transformer/model")
    assert model.class_names == ("square", "stripes")
    assert model.config.label_dropout == 0.1
    command = ("generate", "--model", "runs/smoke-transformer/model", "--class", "stripes", "none", "-n", 2)
    assert run(*command, "--guidance-scale", 2) == 0
    assert Image.open("out/sheet.png").size[0] > 256
    # A finished run has nothing left to do.
    assert run(*second) == 0


def test_packing_takes_class_names_and_a_configuration(pictures, tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(tmp_path)
    files = sorted(pictures.rglob("*.png"))[::12]
    rows = {"image": [file.read_bytes() for file in files], "label": [0, 0, 1, 1]}
    pq.write_table(pytest.importorskip("pyarrow").table(rows), "data.parquet")
    assert run("pack", "data.parquet", "named", "--size", 8, "--class-names", "square", "big stripes") == 0
    assert ImageCache.open("named").class_names == ("square", "big stripes")
    assert run("pack", "data.parquet", "plain", "--size", 8) == 0
    assert ImageCache.open("plain").class_names == ("0", "1")

    asked = []
    open_builder = datasets.load_dataset_builder

    def builder(name, config=None, **options):
        """Pretend that the file lies on the hub under a name."""
        asked.append((name, config))
        return open_builder("parquet", data_files="data.parquet")

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    assert run("pack", "someone/pictures", "hub", "--size", 8, "--config", "small") == 0
    assert asked == [("someone/pictures", "small")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "EMPTY", "OUT", "--size", "32"], "EMPTY"),
        (["train", "tokenizer", "gone.toml"], "cannot be read"),
        (["train", "tokenizer", "BAD"], "is not TOML"),
        (["train", "tokenizer", "SMOKE", "--set", "stepz=3"], "Did you mean 'steps'"),
        (["train", "tokenizer", "SMOKE", "--set", "steps"], "takes KEY=VALUE"),
        # None of several is lost.
        (["train", "tokenizer", "SMOKE", "--set", "stepz=3", "--set", "data=d"], "Did you mean 'steps'"),
        (["train", "tokenizer", "SMOKE", "--set", "data=d", "--set", "stepz=3"], "Did you mean 'steps'"),
        (["train", "tokenizer", "SMOKE", "--set", "steps=many"], "steps must be a whole number"),
        (["train", "tokenizer", "SMOKE", "--set", "data=gone"], "gone"),
        (["tokenize", "EMPTY", "OUT", "--tokenizer", "cifar"], "Did you mean 'cifar10'"),
        (["train", "tokenizer", "SECOND"], "is a recipe for the transformer"),
        (["train", "transformer", "SMOKE"], "is a recipe for the tokenizer"),
        (["pack", "FLAT", "OUT", "--size", "32"], "no class folders. Sort them into folders"),
        (["train", "tokenizer", "SMOKE", "--set", "data=FLAT", "out=FLAT", "--dry-run"], "holds no run"),
    ],
)
def test_wrong_input_is_told(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").mkdir()
    Path("BAD").write_text("steps = = 3")
    Path("FLAT").mkdir()
    Image.new("RGB", (40, 40)).save("FLAT/1.png")
    names = {stage: str(RECIPES / "smoke" / f"{name}.toml") for stage, name in STAGES.items()}
    assert run(*(names.get(a, a) for a in arguments)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not Path("OUT").exists()


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "r.toml").write_text("steps = 5\n", encoding="utf-8-sig")
    assert read_recipe(tmp_path / "r.toml") == {"steps": 5}


def test_recipes_are_changed_in_toml(tmp_path):
    (tmp_path / "r.toml").write_text('a = 1\n[model]\nb = "x"\n')
    changed = read_recipe(
        tmp_path / "r.toml", ("a=[1, 2]", "model.b=y", "model.c.d=1e-3", "e=runs/a b", "f=true")
    )
    assert changed == {"a": [1, 2], "model": {"b": "y", "c": {"d": 1e-3}}, "e": "runs/a b", "f": True}
    with pytest.raises(ConfigError, match="not a table"):
        read_recipe(tmp_path / "r.toml", ("a.b=1",))
    # A value that smuggles further keys in is text.
    assert read_recipe(tmp_path / "r.toml", ("g=1\nh=2",))["g"] == "1\nh=2"


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.toml")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_recipe_is_a_valid_config(path):
    from maskgit.training.tokenizer_config import TokenizerTrainingConfig
    from maskgit.training.transformer_config import TransformerTrainingConfig

    kind = TokenizerTrainingConfig if path.stem == "tokenizer" else TransformerTrainingConfig
    config = kind.from_dict(read_recipe(path))
    assert json.dumps(config.to_dict())
    head = path.read_text().split("\n\n")[0]
    for word in ("command:", "data:", "hardware:", "time:", "result:"):
        assert word in head


# What each command of docs/training.md is given besides, to be quick.
SMALLER = {
    "tokenizer": (
        "--set", "steps=4", "batch_size=4", "adversarial_start=2", "evaluate_every=4", "checkpoint_every=4",
        "usage_window=2", "model.filters=8", "discriminator_filters=8", "model.codebook_size=32",
    ),
    "transformer": (
        "--set", "steps=4", "batch_size=4", "evaluate_every=4", "sample_every=4", "checkpoint_every=4", "num_samples=4",
        "model.hidden_size=32", "model.num_layers=1", "model.num_heads=2", "model.intermediate_size=64", "sampler.steps=2",
    ),
    # Its shape is that of the model that it starts from.
    "fine_tune": (
        "--set", "steps=4", "batch_size=4", "evaluate_every=4", "sample_every=4", "checkpoint_every=4", "num_samples=2",
        "sampler.steps=2",
    ),
    "evaluate": ("--num-images", 24, "--splits", 2),
}  # fmt: skip


def commands_of_the_page() -> list[list[str]]:
    """Return the commands of the first block of docs/training.md."""
    block = (RECIPES.parent / "docs" / "training.md").read_text("utf-8").split("```sh\n")[1].split("```")[0]
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("maskgit ")]


def test_the_page_leads_from_photographs_to_a_report(pictures, tmp_path, monkeypatch, capsys):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    for name, folder in (("cat", "square"), ("dog", "stripes")):
        (tmp_path / "photos").mkdir(exist_ok=True)
        shutil.copytree(pictures / folder, tmp_path / "photos" / name)
    Path("recipes").symlink_to(RECIPES)
    commands = commands_of_the_page()
    assert [command[0] for command in commands].count("train") == 5
    for command in commands:
        name = Path(command[2]).stem if command[0] == "train" else command[0]
        assert run(*command, *SMALLER.get(name, ())) == 0, command
    told = capsys.readouterr().out
    assert "data/photos/test: " in told
    assert "4/4" in told
    for made in (
        "runs.png",
        "report/report.html",
        "runs/photos-tokenizer/losses.png",
        "out/sheet.png",
        "fine-tuned/sheet.png",
    ):
        assert Path(made).is_file(), made
