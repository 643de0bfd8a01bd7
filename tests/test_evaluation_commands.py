"""`maskgit evaluate`, `stats` and `compare` as users call them, and the places that images are read from."""

import gzip
import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit.apps.cli import commands as cli
from maskgit.apps.cli.evaluation_flags import SampleFlags
from maskgit.data.picture_sets import open_fitting, open_pictures
from maskgit.errors import ConfigError, DataError
from maskgit.evaluation.networks import vit
from maskgit.evaluation.networks.features import FEATURE_NETS
from maskgit.evaluation.scores.references import open_reference
from maskgit.evaluation.scores.statistics import read_statistics

pytest.importorskip("efficientnet_lite_pytorch")
SMALL = ("--feature-size", 32, "--device", "cpu")


def run(*arguments) -> int:
    return cli.main([str(a) for a in arguments])


def write(folder, count, *, seed=0, side=32, classes=2):
    """Write random pictures, in a sub folder for each class, none for 0; return their pixels in order."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, side // 8, side // 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    for i, image in enumerate(images):
        home = folder / f"class{i * classes // count}" if classes else folder
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(home / f"{i:03}.png")
    return images


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """A folder with a model, two sets of pictures, and statistics of the first."""
    folder = tmp_path_factory.mktemp("place")
    tiny.save_pretrained(folder / "model")
    write(folder / "real", 40, classes=10)
    write(folder / "other", 40, seed=1, classes=0)
    assert run("stats", folder / "real", "--out", folder / "real.npz", *SMALL) == 0
    return folder


def test_statistics_say_what_they_are_of(place):
    found = read_statistics(place / "real.npz")
    assert found.pooled.num_images == 40
    assert found.resolution == (32, 32)
    assert found.identity.startswith("EffNet-Lite0, antialiased resize to 32 × 32")
    assert found.features.shape == (40, 1280)
    assert np.bincount(found.labels).tolist() == [4] * 10


def test_evaluate_writes_both_reports_and_refuses_other_settings(place, tmp_path, capsys):
    command = (
        "evaluate",
        place / "model",
        "--reference",
        place / "real.npz",
        "--num-images",
        34,
        "--steps",
        2,
    )
    command = (
        *command,
        "--training-data",
        place / "other",
        "--out",
        tmp_path,
        "--unit-size",
        10,
        "--splits",
        2,
        *SMALL,
    )
    assert run(*command) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert "fd_effnet-lite0" in printed
    assert str(tmp_path / "report.html") in printed
    assert list(report["metrics"]) == [
        f"{kind}_effnet-lite0"
        for kind in (
            "fd",
            "kd",
            "precision",
            "recall",
            "density",
            "coverage",
            "class_agreement",
            "authenticity",
            "copies",
        )
    ]
    assert not any("fid" in name for name in report["metrics"])
    assert report["settings"]["sampler"]["steps"] == 2
    assert "compare only scores of as many images" in report["cautions"][0]
    assert run(*command, "--seed", 3) == 2
    assert "images.seed 0, not 3" in capsys.readouterr().err


def test_evaluate_scores_reconstructions(place, tmp_path, capsys):
    command = (
        "evaluate",
        place / "model",
        "--reconstruction",
        "--reference",
        place / "real",
        "--out",
        tmp_path,
        *SMALL,
    )
    assert run(*command) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["metrics"]) == ["rfd_effnet-lite0", "psnr", "ssim", "codebook_usage", "perplexity"]
    assert report["num_images"] == 40


def test_compare_prints_a_table_or_json(place, capsys):
    assert run("compare", place / "real", place / "other", *SMALL) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["score", "value", "interval", "better"]
    assert table[1].split()[0] == "fd_effnet-lite0"
    # A set is nearer to itself than to another.
    assert run("compare", place / "real.npz", place / "real", "--json", *SMALL) == 0
    itself = json.loads(capsys.readouterr().out)
    assert itself["metrics"]["fd_effnet-lite0"] == pytest.approx(0, abs=1e-6)
    assert float(table[1].split()[1]) > 0.01
    assert itself["metrics"]["precision_effnet-lite0"] == 1
    assert any("the same images" in caution for caution in itself["cautions"])


def test_compare_searches_for_copies_and_says_what_samples_cost(place, tmp_path, capsys):
    images = np.stack([np.asarray(Image.open(file)) for file in sorted((place / "real").rglob("*.png"))[:20]])
    about = np.array(json.dumps({"cost": {"forward_passes": 16.0, "flops": 2e9}}))
    np.savez(tmp_path / "copies.npz", arr_0=images, about=about)
    command = ("compare", place / "other", tmp_path / "copies.npz", "--training-data", place / "real")
    assert run(*command, "--json", *SMALL) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"]["authenticity_effnet-lite0"] == 0
    assert found["cost"]["forward_passes"] == 16
    assert run(*command, *SMALL) == 0
    assert "an image: forward_passes 16, flops 2e+09" in capsys.readouterr().out


def test_compare_takes_several_networks(place, tmp_path, capsys, monkeypatch):
    small = replace(vit.DINOV2, width=16, num_layers=1, num_heads=2)
    monkeypatch.setitem(FEATURE_NETS["dinov2"].make.keywords, "config", small)
    torch.save(vit.ViT(small).state_dict(), tmp_path / "dinov2.pth")
    also = ("--also", f"dinov2={tmp_path / 'dinov2.pth'}")
    assert run("compare", place / "real", place / "other", *SMALL, "--json", *also) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert [name for name in metrics if "dinov2" in name] == ["fd_dinov2", "kd_dinov2"]
    assert run("compare", place / "real.npz", place / "other", *SMALL, *also) == 2
    assert "holds statistics of one feature net alone" in capsys.readouterr().err
    assert run("compare", place / "real", place / "other", *SMALL, *also, also[1]) == 2
    assert "--also names dinov2 twice" in capsys.readouterr().err


def test_torn_pictures_are_counted_listed_and_refused_above_a_share(tmp_path, capsys):
    write(tmp_path / "a", 20, classes=0)
    (tmp_path / "a" / "005.png").write_bytes(b"torn")
    command = ("stats", tmp_path / "a", "--out", tmp_path / "a.npz", *SMALL)
    assert run(*command) == 2
    error = capsys.readouterr().err
    assert "1 of the 20 images" in error
    assert "005.png" in error
    assert not (tmp_path / "a.npz").exists()
    assert run(*command, "--max-bad-share", 0.05) == 0
    printed = capsys.readouterr().out
    assert "1 images could not be read" in printed
    assert "005.png" in printed
    assert read_statistics(tmp_path / "a.npz").pooled.num_images == 19
    assert run(*command) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_wrong_places_are_told(place, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "mixed", 4, classes=0)
    Image.new("RGB", (20, 10)).save(tmp_path / "mixed" / "x.png")
    write(tmp_path / "small", 6, side=16, classes=0)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "a.png").write_bytes(b"")
    np.savez(tmp_path / "nothing.npz", x=np.zeros(3))
    to = ("--out", tmp_path / "out.npz")
    report = ("--out", tmp_path / "report", "--num-images", 4)
    to_images = ("evaluate", place / "model", "--reference", place / "real")
    to_statistics = ("evaluate", place / "model", "--reference", place / "real.npz")
    to_small = ("evaluate", place / "model", "--reference", tmp_path / "small")
    cases = [
        (("stats", tmp_path / "empty", *to), "is empty"),
        (("stats", tmp_path / "gone", *to), "gone"),
        (("stats", tmp_path / "torn", *to), "None of the 1 images"),
        (("stats", tmp_path / "mixed", *to), "of 32 × 32 and of 10 × 20 pixels"),
        (("stats", place / "real", "--out", "x.txt"), "choose another name"),
        (("stats", place / "real", *to, "--num-images", 99), "num_images must be between 2 and 40"),
        (("compare", place / "real", tmp_path / "small"), "32 × 32 pixels and the samples of 16 × 16"),
        (("compare", tmp_path / "nothing.npz", place / "real"), "holds no statistics"),
        (("compare", place / "real.npz", place / "other", "--feature-size", 64), "different feature nets"),
        ((*to_small, *report), "16 × 16 pixels and the samples"),
        ((*to_statistics, "--features", "inception", *report), "needs its weights"),
        ((*to_statistics, "--features", "fid", *report), "Choose from"),
        ((*to_statistics, "--feature-size", 64, *report), "different feature nets"),
        ((*to_statistics, "--reconstruction", *report), "not statistics"),
        ((*to_images, "--reconstruction", "--curve", "steps=1", *report), "--curve applies to samples only"),
        ((*to_images, "--lpips", "alex", *report), "add --reconstruction"),
        ((*to_statistics, "--labels", "dataset", *report), "give --training-data"),
        ((*to_statistics, "--curve", "stepz=1,2", *report), "Did you mean 'steps'"),
        ((*to_statistics, "--curve", "steps", *report), "takes KEY=A,B"),
    ]  # fmt: skip
    for command, message in cases:
        flags = () if "--feature-size" in command or "inception" in command else ("--feature-size", 32)
        flags = () if "fid" in command else flags
        assert run(*command, *flags, "--device", "cpu") == 2, command
        assert message in capsys.readouterr().err, command
        assert not (tmp_path / "report").exists(), command
    assert not (tmp_path / "report").exists()
    # Brought to one size, mixed pictures are a set.
    assert run("stats", tmp_path / "mixed", *to, "--size", 16, *SMALL) == 0


@pytest.mark.parametrize("kind", ["folder", "classes", "packed", "npz", "parquet", "idx"])
def test_images_are_read_by_their_numbers_from_every_place(kind, tmp_path):
    images = write(tmp_path / "pictures", 12, side=16, classes=0 if kind == "folder" else 3)
    where, labels = tmp_path / "pictures", np.arange(12) // 4
    if kind == "packed":
        pytest.importorskip("datasets")
        assert run("pack", where, tmp_path / "cache", "--size", 16) == 0
        where = tmp_path / "cache"
    elif kind == "npz":
        where = tmp_path / "images.npz"
        np.savez(where, arr_0=images)
    elif kind == "parquet":
        pytest.importorskip("datasets")
        pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        rows = {"image": [f.read_bytes() for f in sorted(where.rglob("*.png"))], "label": labels.tolist()}
        where = tmp_path / "images.parquet"
        pq.write_table(pa.table(rows), where)
    elif kind == "idx":
        images = images[..., :1].repeat(3, -1)
        where = tmp_path / "idx"
        where.mkdir()
        for name, head, data in (
            ("train-images-idx3-ubyte.gz", (2051, 12, 16, 16), images[..., 0]),
            ("train-labels-idx1-ubyte.gz", (2049, 12), labels.astype(np.uint8)),
        ):
            packed = struct.pack(f">{len(head)}I", *head) + np.ascontiguousarray(data).tobytes()
            (where / name).write_bytes(gzip.compress(packed))
    found = open_pictures(where)
    assert (len(found), found.resolution) == (12, (16, 16))
    for numbers in ([0, 5, 11], [3], [4, 5], list(range(12))):
        batch = found.read(numbers)
        assert batch.numbers.tolist() == numbers
        assert (batch.images == images[numbers]).all()
        if kind in ("folder", "npz"):
            assert (batch.labels == -1).all()
        else:
            assert (batch.labels == labels[numbers]).all()
    if kind not in ("folder", "npz"):
        assert found.num_classes == 3
        assert found.count_labels().tolist() == [4, 4, 4]
    assert open_pictures(where).fingerprint == found.fingerprint
    assert len(found.fingerprint) == 64


def test_an_adm_reference_gives_its_statistics_and_its_images(tmp_path):
    images = write(tmp_path / "pictures", 8, classes=0)
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=np.zeros(4), sigma=np.eye(4))
    found = open_reference(tmp_path / "adm.npz")
    assert found.statistics.pooled.mean.shape == (4,)
    assert (found.images.read([2, 7]).images == images[[2, 7]]).all()
    np.savez(tmp_path / "moments.npz", mu=np.zeros(4), sigma=np.eye(4))
    assert open_reference(tmp_path / "moments.npz").images is None
    with pytest.raises(DataError, match="taken as they are"):
        open_pictures(tmp_path / "adm.npz", size=16)


def test_a_pack_is_read_at_a_smaller_size(tmp_path):
    pytest.importorskip("datasets")
    write(tmp_path / "pictures", 6, side=32, classes=2)
    assert run("pack", tmp_path / "pictures", tmp_path / "cache", "--size", 32) == 0
    whole, small = open_pictures(tmp_path / "cache"), open_fitting(tmp_path / "cache", 16)
    assert small.resolution == (16, 16)
    batch = small.read([1, 4])
    # Blocks of 8 pixels stay blocks.
    assert np.abs(batch.images.astype(int) - whole.read([1, 4]).images[:, ::2, ::2]).mean() < 12
    assert (batch.labels == whole.read([1, 4]).labels).all()
    assert small.fingerprint != whole.fingerprint == open_fitting(tmp_path / "cache", 32).fingerprint
    with pytest.raises(DataError, match="pack the source again"):
        open_pictures(tmp_path / "cache", size=64)


def test_curves_are_read():
    asked = SampleFlags(curve=("steps=4,8", "policy=confidence,halton", "guidance-scale=1.5"))
    assert asked.axes() == {"steps": (4, 8), "policy": ("confidence", "halton"), "guidance_scale": (1.5,)}
    for wrong in ("steps", "steps=", "=4", "steps=4,,8"):
        with pytest.raises(ConfigError, match="--curve takes"):
            SampleFlags(curve=(wrong,)).axes()
