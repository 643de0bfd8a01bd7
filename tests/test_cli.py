"""The command line, as a user runs it."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from maskgit import MaskGIT, images
from maskgit.apps import cli
from maskgit.config import SamplerConfig


@pytest.fixture(scope="session")
def model(tiny, tmp_path_factory):
    names = ("tench, Tinca tinca", "lorikeet", *(f"class {i}" for i in range(8)))
    config = dataclasses.replace(tiny.config, class_names=names, sampler=SamplerConfig(steps=3))
    return MaskGIT(config, tiny.tokenizer, tiny.transformer).save_pretrained(
        tmp_path_factory.mktemp("m") / "model"
    )


@pytest.fixture
def photo(tmp_path):
    rows, columns = np.mgrid[0:48, 0:64]
    array = np.stack([rows * 5, columns * 4, rows * 0 + 90], axis=-1).astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def run(*arguments) -> int:
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as leaving:
        return int(leaving.code or 0)


def sentence(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


def test_generate_writes_pictures_that_can_be_made_again(model, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        run("generate", "--class", "lorikeet", 0, "--model", model, "-n", 2, "--seed", 4, "--out", out) == 0
    )
    assert capsys.readouterr().out.strip() == str(out / "sheet.png")
    names = ["0-4-00002.png", "0-4-00003.png", "lorikeet-4-00000.png", "lorikeet-4-00001.png", "sheet.png"]
    assert sorted(p.name for p in out.iterdir()) == names
    settings = images.read_settings(out / "0-4-00003.png")
    assert settings["class"] == "0"
    assert (settings["seed"], settings["index"], settings["steps"]) == (4, 3, 3)
    # A picture holds what it takes to make it again.
    again = MaskGIT.from_pretrained(settings["model"]).generate(
        settings["class"],
        seed=settings["seed"],
        first_index=settings["index"],
        **{f.name: settings[f.name] for f in dataclasses.fields(SamplerConfig)},
    )
    assert np.array_equal(np.asarray(again.to_pil()[0]), np.asarray(Image.open(out / "0-4-00003.png")))


def test_nothing_is_overwritten_unasked(model, tmp_path, capsys):
    command = ("generate", "--class", 1, "--model", model, "--out", tmp_path / "out")
    assert run(*command) == 0
    before = (tmp_path / "out" / "1-0-00000.png").read_bytes()
    capsys.readouterr()
    assert run(*command, "--temperature", 0.5) == 2
    assert "--overwrite" in sentence(capsys)
    assert (tmp_path / "out" / "1-0-00000.png").read_bytes() == before
    assert run(*command, "--temperature", 0.5, "--overwrite") == 0
    assert (tmp_path / "out" / "1-0-00000.png").read_bytes() != before


def test_edit_writes_a_before_mask_after_sheet(model, photo, tmp_path):
    out = tmp_path / "out"
    assert (
        run(
            "edit",
            photo,
            "--box",
            8,
            8,
            12,
            12,
            "--class",
            "lorikeet",
            "--model",
            model,
            "-n",
            2,
            "--out",
            out,
        )
        == 0
    )
    assert sorted(p.name for p in out.iterdir()) == [
        "photo-lorikeet-0-00000.png",
        "photo-lorikeet-0-00001.png",
        "sheet.png",
    ]
    sheet = Image.open(out / "sheet.png")
    assert sheet.width > 4 * 128
    assert images.read_settings(out / "photo-lorikeet-0-00000.png")["box"] == [8, 8, 12, 12]


def test_a_sheet_of_many_shows_the_first(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "MAX_SHEET", 3)
    out = tmp_path / "out"
    assert (
        run(
            "generate", "--class", 1, "--model", model, "-n", 5, "--steps", 1, "--batch-size", 2, "--out", out
        )
        == 0
    )
    assert "the first 3 of 5" in capsys.readouterr().out
    assert len(list(out.iterdir())) == 6


def test_reconstruct_writes_both_sides(model, photo, tmp_path):
    assert run("reconstruct", photo, "--model", model, "--out", tmp_path / "out") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["photo-reconstructed.png", "sheet.png"]


def test_convert_goes_both_ways(golden, tmp_path, capsys):
    tokenizer, transformer = golden / "tiny_tokenizer.msgpack", golden / "tiny_transformer.msgpack"
    assert run("convert", tokenizer, tmp_path / "model", "--transformer", transformer) == 0
    assert run("convert", tmp_path / "model", tmp_path / "flax", "--to-flax") == 0
    assert (tmp_path / "flax" / "maskgit_checkpoint").read_bytes() == transformer.read_bytes()
    assert run("convert", tmp_path / "flax", tmp_path / "again") == 0
    assert (tmp_path / "again" / "model_index.json").is_file()
    capsys.readouterr()
    assert run("convert", transformer, tmp_path / "wrong", "--transformer", tokenizer) == 2
    assert "transformer's checkpoint" in sentence(capsys)
    assert not (tmp_path / "wrong").exists()
    assert run("convert", tmp_path / "flax", tmp_path / "model") == 2
    assert "--overwrite" in sentence(capsys)
    assert run("convert", tmp_path / "flax", tmp_path / "model", "--overwrite") == 0
    capsys.readouterr()
    assert run("convert", tmp_path / "model", tmp_path / "more", "--to-flax", "--quantizer", "gumbel") == 2
    assert "--to-flax" in sentence(capsys)


def test_info_describes_models(model, capsys):
    assert run("info", model, "--classes") == 0
    text = capsys.readouterr().out
    assert "codebook_size: 64" in text
    assert "1 lorikeet" in text
    assert run("info") == 0
    assert "imagenet512" in capsys.readouterr().out
    assert run("--version") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--class", "lorikete", "--model", "MODEL"], "Did you mean 1: lorikeet"),
        (["generate", "--class", "10", "--model", "MODEL"], "classes are 0 to 9"),
        (["generate", "--class", "none", "--model", "MODEL"], "name a class"),
        (["generate", "--class", "1", "--model", "nonsense"], "Unknown model 'nonsense'"),
        (["generate", "--class", "1", "--model", "MODEL", "--steps", "0"], "steps must be between"),
        (["generate", "--class", "1", "--model", "MODEL", "--guidance-scale", "3"], "label dropout"),
        (["generate", "--class", "1", "--model", "MODEL", "--mask-schedule", "x"], "Unknown mask schedule"),
        (["generate", "--class", "1", "--model", "MODEL", "--device", "warp"], "device 'warp'"),
        (["generate", "--class", "1", "--model", "MODEL", "--seed", "-1"], "seed"),
        (["generate", "--class", "1", "--model", "MODEL", "--batch-size", "0"], "batch_size"),
        (["generate", "--class=--3", "--model", "MODEL"], "Unknown class '--3'"),
        (["generate", "--class", "1", "--model", "MODEL", "--out", "x" * 300], "x"),
        (
            ["edit", "PHOTO", "--box", "0", "0", "9", "9", "--class", "none", "--model", "MODEL"],
            "name a class",
        ),
        (["reconstruct", "--model", "MODEL"], "at least one picture"),
        (["reconstruct", "PHOTO", "FILE", "--model", "MODEL"], "file"),
        (["generate", "--class", "1", "--model", "MODEL", "--out", "FILE/x"], "cannot be written"),
        (["edit", "PHOTO", "--box", "0", "0", "99", "9", "--class", "1", "--model", "MODEL"], "box must be"),
        (["edit", "FILE", "--box", "0", "0", "9", "9", "--class", "1", "--model", "MODEL"], "file"),
        (["edit", "gone.png", "--box", "0", "0", "9", "9", "--class", "1", "--model", "MODEL"], "gone.png"),
        (["reconstruct", "FILE", "--model", "MODEL"], "file"),
        (["convert", "FILE", "DEST"], "not a folder"),
        (["convert", "FILE", "DEST", "--transformer", "FILE"], "file"),
        (["info", "nonsense"], "Unknown model"),
    ],
)
def test_wrong_input_is_one_sentence_and_code_2(arguments, message, model, photo, tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"not a picture")
    (tmp_path / "out").mkdir()
    names = {"MODEL": model, "PHOTO": photo, "FILE": tmp_path / "file", "DEST": tmp_path / "dest"}
    arguments = [str(names.get(a, a)).replace("FILE", str(tmp_path / "file")) for a in arguments]
    if arguments[0] in ("generate", "edit", "reconstruct") and "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "out")]
    assert run(*arguments) == 2
    assert message in sentence(capsys)
    assert not list((tmp_path / "out").iterdir())
    assert not (tmp_path / "dest").exists()


def test_the_flags_of_the_sampler_are_its_config():
    assert {f.name for f in dataclasses.fields(cli.Sampler)} == {
        f.name for f in dataclasses.fields(SamplerConfig)
    }


def test_unknown_flags_and_the_module_itself():
    assert run("generate", "--class", "1", "--nonsense") == 2
    assert run("generate") == 2
    done = subprocess.run([sys.executable, "-m", "maskgit", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "generate" in done.stdout
