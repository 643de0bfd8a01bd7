"""The command line, as a user runs it."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from maskgit import MaskGIT, images
from maskgit.apps.cli import commands as cli
from maskgit.images import reading
from maskgit.sampler.config import SamplerConfig


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
    return cli.main([str(a) for a in arguments])


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
        **{f.name: settings[f.name] for f in dataclasses.fields(SamplerConfig) if f.name in settings},
    )
    assert np.array_equal(np.asarray(again.to_pil()[0]), np.asarray(Image.open(out / "0-4-00003.png")))


def test_classes_called_none_and_guess_are_asked_for_by_name(tiny, tmp_path, capsys):
    names = ("none", "guess", "12", *(f"kind {i}" for i in range(7)))
    named = MaskGIT(dataclasses.replace(tiny.config, class_names=names), tiny.tokenizer, tiny.transformer)
    named.save_pretrained(tmp_path / "model")
    asked = ("name:none", "name:guess", "12", "number:4", "5")
    common = ("--model", tmp_path / "model", "--steps", 2)
    assert run("generate", "--class", *asked, "--out", tmp_path / "out", *common) == 0
    pictures = {images.read_settings(path)["class"]: path for path in (tmp_path / "out").glob("*-00*.png")}
    assert pictures.keys() == set(asked)
    for number, query in zip((0, 1, 2, 4, 5), asked, strict=True):
        index = asked.index(query)
        expected = named.generate(number, seed=0, first_index=index, steps=2).to_pil()[0]
        assert np.abs(np.asarray(Image.open(pictures[query]), int) - np.asarray(expected)).max() <= 1
    assert run("generate", "--class", "13", "--out", tmp_path / "x", *common) == 2
    assert "no class 13" in capsys.readouterr().err
    photo = tmp_path / "photo.png"
    Image.new("RGB", (32, 32), "grey").save(photo)
    edit = ("--box", 0, 0, 16, 16, "--class", "name:guess", "--out", tmp_path / "edit")
    assert run("edit", photo, *edit, *common) == 0


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
    assert images.read_settings(out / "photo-lorikeet-0-00000.png")["box"] == [[8, 8, 12, 12]]


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
    assert "transformer checkpoint" in sentence(capsys)
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
        (["reconstruct", "--model", "MODEL"], "at least one image"),
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


def test_unknown_flags_and_the_module_itself():
    assert run("generate", "--class", "1", "--nonsense") == 2
    assert run("generate") == 2
    done = subprocess.run([sys.executable, "-m", "maskgit", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "generate" in done.stdout


@pytest.fixture
def mask(tmp_path):
    painted = np.zeros((48, 64), np.uint8)
    painted[10:20, 30:44] = 255
    Image.fromarray(painted).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def test_edits_come_back_at_the_photos_own_size(model, photo, mask, tmp_path, capsys):
    before = np.asarray(Image.open(photo))
    painted = np.asarray(Image.open(mask)) > 0
    assert run("inpaint", photo, "--mask", mask, "--class", 3, "--model", model, "--out", tmp_path / "a") == 0
    after = np.asarray(Image.open(tmp_path / "a" / "photo-3-0-00000.png"))
    assert after.shape == before.shape
    assert (after != before)[painted].any()
    assert np.array_equal(after[-4:], before[-4:])
    two = ("--box", 2, 2, 8, 8, "--box", 50, 30, 6, 6)
    assert run("edit", photo, *two, "--class", 3, "--model", model, "--out", tmp_path / "b") == 0
    settings = images.read_settings(tmp_path / "b" / "photo-3-0-00000.png")
    assert settings["box"] == [[2, 2, 8, 8], [50, 30, 6, 6]]
    assert settings["command"] == "edit"


def test_a_guess_is_shown(model, photo, mask, tmp_path, capsys):
    assert run("inpaint", photo, "--mask", mask, "--model", model, "--out", tmp_path / "a") == 0
    assert "class guessed, by log-likelihood:" in capsys.readouterr().out


def test_outpaint_and_panorama_make_the_size_asked_for(model, photo, tmp_path):
    command = ("outpaint", photo, "--left", 5, "--bottom", 9, "--class", 1, "--model", model)
    assert run(*command, "--out", tmp_path / "a") == 0
    # The photo's shorter side is brought to the model's 32 pixels first.
    assert Image.open(tmp_path / "a" / "photo-outpainted-0-00000.png").size == (43 + 5, 32 + 9)
    # Before, mask and after beside each other.
    sheet = np.asarray(Image.open(tmp_path / "a" / "sheet.png").convert("RGB")).astype(int)
    assert ((sheet[..., 0] > sheet[..., 1] + 60) & (sheet[..., 0] > sheet[..., 2] + 60)).any()
    assert run("panorama", "--class", 1, 2, "--width", 75, "--model", model, "--out", tmp_path / "b") == 0
    assert Image.open(tmp_path / "b" / "1-2-0-00000.png").size == (75, 32)


def test_vary_and_interpolate_write_their_pictures(model, photo, tmp_path):
    assert (
        run(
            "vary", photo, "--strength", 0.5, "-n", 2, "--class", 1, "--model", model, "--out", tmp_path / "a"
        )
        == 0
    )
    assert (tmp_path / "a" / "photo-1-0-00001.png").exists()
    assert run("interpolate", 1, "lorikeet", "--model", model, "--out", tmp_path / "b") == 0
    assert run("interpolate", photo, photo, "--class", 1, "--model", model, "--out", tmp_path / "c") == 0


def test_decoding_is_explained(model, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("generate", "--class", 1, "--explain", "--model", model, "--out", out) == 0
    assert Image.open(out / "explain.png").width > 300
    assert Image.open(out / "forming.gif").n_frames > 1
    assert str(out / "forming.gif") in capsys.readouterr().out
    assert run("generate", "--class", 1, "--explain", "--model", model, "--out", out) == 2


def test_pictures_are_written_before_they_are_explained(model, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    # Too few for an animation of all steps.
    monkeypatch.setattr(reading, "MAX_PIXELS", 100_000)
    assert run("generate", "--class", 1, "--model", model, "--explain", "--out", out) == 2
    assert "pixels" in sentence(capsys)
    assert (out / "1-0-00000.png").exists()


def test_as_many_are_explained_as_an_animation_holds(model, tmp_path, monkeypatch):
    # Eight images of 30 steps take more, two take less.
    monkeypatch.setattr(reading, "MAX_PIXELS", 2_500_000)
    out = tmp_path / "out"
    command = ("generate", "--class", 1, "-n", 8, "--policy", "mdlm", "--steps", 30, "--explain")
    assert run(*command, "--model", model, "--out", out) == 0
    assert (out / "forming.gif").exists()


def test_the_best_of_many_are_not_explained(model, tmp_path, capsys):
    command = ("generate", "--class", 1, "--model", model, "--candidates", 2, "--explain")
    assert run(*command, "--out", tmp_path / "out") == 2
    assert "--explain" in sentence(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "names", [("gone.jpg", "photo.png"), ("photo.png", "gone.jpg"), ("a/gone.jpg", "b.png")]
)
def test_pictures_that_are_not_there_are_named(model, photo, tmp_path, capsys, names):
    files = [photo.parent / name for name in names]
    assert run("interpolate", *files, "--class", 1, "--model", model, "--out", tmp_path / "out") == 2
    missing = next(file for file in files if not file.exists())
    assert f"{missing} cannot be read" in sentence(capsys)


def test_the_best_of_many_can_be_made_again_alone(model, tmp_path):
    out = tmp_path / "out"
    command = ("generate", "--class", 1, "-n", 2, "--candidates", 5, "--model", model)
    assert run(*command, "--out", out) == 0
    paths = sorted(out.glob("1-*.png"))
    assert len(paths) == 2
    for path in paths:
        settings = images.read_settings(path)
        again = ("generate", "--class", 1, "--first-index", settings["index"], "--model", model)
        assert run(*again, "--out", tmp_path / str(settings["index"])) == 0
        made = next((tmp_path / str(settings["index"])).glob("1-*.png"))
        assert np.array_equal(np.asarray(Image.open(made)), np.asarray(Image.open(path)))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("edit", "PHOTO", "--box", 60, 40, 20, 20, "--class", 1), "inside the 64 × 48 image"),
        (("inpaint", "PHOTO", "--mask", "gone.png", "--class", 1), "gone.png"),
        (("inpaint", "PHOTO", "--mask", "PHOTO", "--share", 2), "share"),
        (("outpaint", "PHOTO", "--left", -1, "--class", 1), "left"),
        (("outpaint", "PHOTO", "--canvas", 10, 10, "--class", 1), "canvas"),
        (("panorama", "--class", 1, "--width", 0), "width"),
        (("vary", "PHOTO", "--strength", 2, "--class", 1), "strength"),
        (("interpolate", "PHOTO", 1), "two classes or two images"),
        (("generate", "--class", 1, "--candidates", 1, "-n", 2), "num_images"),
        (("generate", "--class", 1, "--policy", "haltn"), "Did you mean 'halton'"),
    ],
)
def test_wrong_edits_are_told_in_a_sentence(model, photo, tmp_path, capsys, command, message):
    given = [photo if word == "PHOTO" else word for word in command]
    assert run(*given, "--model", model, "--out", tmp_path / "out") == 2
    assert message in sentence(capsys)
    assert not list((tmp_path / "out").glob("*"))


def test_policies_are_listed(capsys):
    assert run("policies") == 0
    text = capsys.readouterr().out
    assert "halton" in text
    assert "--policy-options eta=0.05" in text


def test_a_reader_that_has_had_enough_is_no_error():
    command = [sys.executable, "-m", "maskgit", "policies"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
