"""One reader of folders of pictures, for packing, streaming and evaluation: what it takes, and what it says."""

import itertools
import os
import re
import sys

import numpy as np
import pytest
from PIL import Image, features

from maskgit.apps.cli import commands as cli
from maskgit.data.image_cache import META, ImageCache
from maskgit.data.pack import pack_images
from maskgit.data.picture_sets import open_pictures
from maskgit.data.rows import ClassNumbers, Row
from maskgit.data.streaming import StreamedImages
from maskgit.errors import DataError

SIDE = 8


def write(root, *paths):
    """Write pictures, the first all of grey 0, the next of grey 1, and so on."""
    for value, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((SIDE, SIDE, 3), value, np.uint8)).save(file)
    return root


def packed(root, out, **settings) -> dict[int, str]:
    """Return the class of each picture, known by its grey, as packing has it."""
    cache = pack_images(root, out, size=SIDE, **settings)
    return {
        int(image[0, 0, 0]): cache.class_names[k] for image, k in zip(cache.images, cache.labels, strict=True)
    }


def evaluated(root, **settings) -> dict[int, str]:
    """Return the class of each picture as evaluation has it, "" where there are none."""
    found = open_pictures(root, **settings)
    batch = found.read(range(len(found)))
    names = found.class_names or ("",)
    return {
        int(image[0, 0, 0]): names[max(k, 0)] for image, k in zip(batch.images, batch.labels, strict=True)
    }


def streamed(root, count, **settings) -> dict[int, str]:
    """Return the class of each picture as a stream has it."""
    stream = StreamedImages(
        root, seed=0, global_batch=1, size=SIDE, augment="none", shuffle_buffer=0, num_workers=1, **settings
    )
    batches = stream.from_step(0)
    found = {
        int(b.images[0, 0, 0, 0]): stream.class_names[int(b.labels[0])]
        for b in itertools.islice(batches, count)
    }
    batches.close()
    return found


@pytest.mark.parametrize(
    "paths",
    [
        ("cat/0.png", "cat/1.png", "cat/test_drive.png", "dog/0.png", "dog/cat-val-1.png"),
        ("train_station/0.png", "train_station/1.png", "test_track/0.png", "test_track/1.png"),
        ("bus/0.png", "car/0.png", "train/0.png"),
        ("train/0.png", "test/0.png", "train/1.png"),
        ("images/cat/0.png", "images/cat/validation.png", "images/dog/0.png"),
        ("animals/cat/0.png", "animals/dog/0.png", "things/car/0.png"),
        ("training/0.png", "testing/0.png", "dev/0.png"),
    ],
)
def test_sub_folders_are_classes_whatever_files_and_folders_are_called(tmp_path, paths):
    write(tmp_path / "data", *paths)
    expected = {value: path.split("/")[-2] for value, path in enumerate(paths)}
    assert packed(tmp_path / "data", tmp_path / "out") == expected
    assert evaluated(tmp_path / "data") == expected
    assert streamed(tmp_path / "data", len(paths)) == expected


@pytest.mark.parametrize(
    "paths",
    [
        ("cat/0.png", "cat/young/1.png", "dog/0.png"),
        ("cat/indoor/0.png", "cat/outdoor/1.png", "dog/indoor/2.png"),
        ("cat/train/0.png", "cat/test/0.png", "dog/train/0.png", "dog/test/0.png"),
    ],
)
def test_no_class_is_lost_where_folders_are_nested(tmp_path, paths):
    write(tmp_path / "data", *paths)
    expected = {value: path.split("/")[0] for value, path in enumerate(paths)}
    assert packed(tmp_path / "data", tmp_path / "out") == expected
    assert evaluated(tmp_path / "data") == expected
    said = ImageCache.open(tmp_path / "out").left_out
    if paths[-1].count("/") > 1:
        assert re.fullmatch(r"Folders with the same name \(cat/(\w+), dog/\1\) are not classes: .*", said[0])
    else:
        assert said == ()


@pytest.mark.parametrize("wrapping", ["", "archive/"])
@pytest.mark.parametrize(
    "names", [("train", "test"), ("Train", "VAL"), ("train", "validation"), ("valid", "test")]
)
def test_folders_of_splits_that_hold_classes_are_splits(tmp_path, names, wrapping):
    first, second = names
    paths = (f"{first}/cat/0.png", f"{first}/dog/1.png", f"{second}/dog/2.png")
    write(tmp_path / "data", *(wrapping + path for path in paths))
    for split, expected in ((first, {0: "cat", 1: "dog"}), (second, {2: "dog"})):
        assert packed(tmp_path / "data", tmp_path / split, split=split) == expected
        assert evaluated(tmp_path / "data", split=split) == expected
        assert streamed(tmp_path / "data", len(expected), split=split) == expected
    if "train" in map(str.lower, names):
        assert (
            packed(tmp_path / "data", tmp_path / "out")
            == evaluated(tmp_path / "data")
            == {0: "cat", 1: "dog"}
        )
    else:
        with pytest.raises(DataError, match="no split 'train'"):
            open_pictures(tmp_path / "data")
    # The numbers of classes are those of all splits together.
    assert ImageCache.open(tmp_path / second).class_names == ("cat", "dog")


def test_a_split_without_classes_is_read_where_it_is_named(tmp_path):
    root = write(tmp_path / "data", "train/cat/0.png", "train/dog/1.png", "test/2.png")
    assert packed(root, tmp_path / "out") == {0: "cat", 1: "dog"}
    assert evaluated(root, split="test") == {2: ""}
    with pytest.raises(DataError, match="no class folders"):
        pack_images(root, tmp_path / "test", size=SIDE, split="test")
    assert packed(root, tmp_path / "test", split="test", label_column=None) == {2: "image"}


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (("train/cat/0.png", "test/cat/1.png"), r"no split 'nosuch'\. Choose from: train, test\."),
        (
            ("bus/0.png", "car/1.png", "train/2.png"),
            r"no splits at all: its folders \(bus, car, train\) are classes",
        ),
        (("0.png", "1.png"), "no splits at all: it holds only images"),
    ],
)
def test_a_split_that_is_not_there_is_an_error_everywhere(tmp_path, capsys, paths, said):
    root = write(tmp_path / "data", *paths)
    with pytest.raises(DataError, match=said):
        pack_images(root, tmp_path / "out", size=SIDE, split="nosuch")
    with pytest.raises(DataError, match=said):
        open_pictures(root, split="nosuch")
    with pytest.raises(DataError, match=said):
        StreamedImages(root, seed=0, global_batch=1, size=SIDE, split="nosuch")
    assert cli.main(["stats", str(root), "--split", "nosuch", "--out", str(tmp_path / "x.npz")]) == 2
    assert "no split" in capsys.readouterr().err


def test_what_is_packed_has_no_splits(tmp_path):
    pack_images(write(tmp_path / "data", "cat/0.png", "dog/1.png"), tmp_path / "out", size=SIDE)
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, SIDE, SIDE, 3), np.uint8))
    for place in ("out", "images.npz"):
        with pytest.raises(DataError, match="no splits at all"):
            open_pictures(tmp_path / place, split="test")


def test_links_are_followed_and_loops_are_not(tmp_path):
    root = write(tmp_path / "data", "cat/0.png")
    write(tmp_path / "elsewhere", "x/9.png", "dogs/1.png", "deep/dogs/2.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere" / "dogs")
    (root / "cat" / "2.png").symlink_to(tmp_path / "elsewhere" / "deep" / "dogs" / "2.png")
    (root / "cat" / "back").symlink_to(root)
    (root / "cat" / "itself").symlink_to(root / "cat" / "itself")
    (root / "dog" / "gone.png").symlink_to(tmp_path / "nothing")
    expected = {0: "cat", 2: "cat", 1: "dog"}
    assert packed(root, tmp_path / "out") == expected
    assert evaluated(root) == expected
    assert streamed(root, 3) == expected
    left_out = ImageCache.open(tmp_path / "out").left_out
    assert left_out == open_pictures(root).left_out
    assert left_out == (
        "Left out, a link back to a folder above it: 1 (cat/back).",
        "Left out, a link to nothing, or not a regular file: 2 (cat/itself, dog/gone.png).",
    )


def test_all_that_is_left_out_is_counted_and_listed_but_what_is_hidden(tmp_path, capsys):
    root = write(tmp_path / "data", "cat/0.png", "dog/1.png")
    for hidden in (
        ".ipynb_checkpoints/a.png",
        "__MACOSX/cat/._0.png",
        ".thumbnails/a.png",
        "@eaDir/cat/a.jpg",
    ):
        write(root, hidden)
    for name in ("Thumbs.db", ".DS_Store", "cat/Thumbs.db", "notes.txt", "dog/raw.CR2", "dog/old.zip"):
        (root / name).write_bytes(b"?")
    (root / "fox").mkdir()
    expected = {0: "cat", 1: "dog"}
    assert packed(root, tmp_path / "out") == evaluated(root) == streamed(root, 2) == expected
    assert open_pictures(root).left_out == (
        "Left out, not a supported image format: 3 (dog/old.zip, dog/raw.CR2, notes.txt).",
        "Left out, an empty folder: 1 (fox).",
    )
    assert cli.main(["pack", str(root), str(tmp_path / "again"), "--size", str(SIDE)]) == 0
    assert "3 (dog/old.zip, dog/raw.CR2, notes.txt)" in capsys.readouterr().out


def test_pictures_beside_the_folders_of_classes_count_as_left_out(tmp_path):
    root = write(tmp_path / "data", "cat/0.png", "dog/1.png", "cover.png")
    with pytest.raises(DataError, match=r"1 of the 3 .*cover.png: it is in none of the class folders"):
        pack_images(root, tmp_path / "out", size=SIDE)
    assert packed(root, tmp_path / "out", max_bad_share=0.5) == {0: "cat", 1: "dog"}
    batch = open_pictures(root).read(range(3))
    assert len(batch.images) == 2
    assert "cover.png: it is in none of the class folders" in batch.skipped[0]


def test_a_folder_of_pictures_alone_says_what_to_do(tmp_path, capsys):
    root = write(tmp_path / "data", "0.png", "1.png")
    assert cli.main(["pack", str(root), str(tmp_path / "out"), "--size", str(SIDE)]) == 2
    said = capsys.readouterr().err
    assert "no class folders. Sort them into folders, such as" in said
    assert "--label-column none" in said
    assert packed(root, tmp_path / "out", label_column=None) == {0: "image", 1: "image"}
    assert evaluated(root) == {0: "", 1: ""}
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.cr2").write_bytes(b"?")
    with pytest.raises(DataError, match=r"is empty: .* not a supported image format: 1 \(a.cr2\)"):
        pack_images(tmp_path / "raw", tmp_path / "x", size=SIDE)


def test_avif_is_read_where_pillow_can(tmp_path, monkeypatch):
    root = write(tmp_path / "data", "cat/0.png", "dog/1.png")
    if not features.check("avif"):
        pytest.skip("this Pillow does not read AVIF")
    Image.new("RGB", (SIDE, SIDE), (200, 200, 200)).save(root / "dog" / "2.avif", quality=100)
    assert packed(root, tmp_path / "out") == evaluated(root) == {0: "cat", 1: "dog", 200: "dog"}
    monkeypatch.setattr("PIL.AvifImagePlugin.SUPPORTED", False)
    with pytest.raises(DataError, match=r"2\.avif is an AVIF file; to read it, pip install --upgrade pillow"):
        pack_images(root, tmp_path / "again", size=SIDE)


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1"])
def test_heic_is_named_with_what_to_install(tmp_path, monkeypatch, brand):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    root = write(tmp_path / "data", "cat/0.png", "dog/1.png")
    (root / "dog" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + b"\0" * 100)
    with pytest.raises(
        DataError, match=r"1 of the 3 .*IMG_1\.HEIC is an HEIC file; .* pip install pillow-heif"
    ):
        pack_images(root, tmp_path / "out", size=SIDE)
    assert packed(root, tmp_path / "out", max_bad_share=0.5) == {0: "cat", 1: "dog"}
    assert "pillow-heif" in ImageCache.open(tmp_path / "out").skipped[0]
    assert "pillow-heif" in open_pictures(root).read([2]).skipped[0]


def test_heic_is_read_where_its_reader_is_installed(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    root = write(tmp_path / "data", "cat/0.png", "dog/1.png")
    heif.from_pillow(Image.new("RGB", (SIDE, SIDE), (200, 200, 200))).save(
        root / "dog" / "2.heic", quality=-1
    )
    assert packed(root, tmp_path / "out").keys() >= {0, 1}
    assert len(ImageCache.open(tmp_path / "out")) == 3


def test_metadata_beside_pictures_says_their_classes(tmp_path):
    root = write(tmp_path / "data", "0.png", "1.png", "2.png")
    (root / "metadata.csv").write_text("file_name,label,kind\n0.png,cat,1\n1.png,dog,0\n2.png,cat,1\n")
    assert packed(root, tmp_path / "a") == evaluated(root) == {0: "cat", 1: "dog", 2: "cat"}
    assert packed(root, tmp_path / "b", label_column="kind") == {0: "1", 1: "0", 2: "1"}
    with pytest.raises(DataError, match=r"no column 'colour'\. Its columns are: image, kind, label"):
        pack_images(root, tmp_path / "c", size=SIDE, label_column="colour")
    (root / "metadata.csv").unlink()
    (root / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "label": "x"}\n{"file_name": "1.png", "label": "y"}\n'
    )
    assert packed(root, tmp_path / "c", max_bad_share=0.5) == {0: "x", 1: "y"}
    assert "2.png: no metadata file gives its label" in ImageCache.open(tmp_path / "c").skipped[0]
    (root / "metadata.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="not a table of images"):
        pack_images(root, tmp_path / "d", size=SIDE)


def test_files_of_tables_that_no_split_holds_are_not_lost(tmp_path):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    root = write(tmp_path / "data", "preview/0.png")
    table = pa.table({"image": [(root / "preview" / "0.png").read_bytes()], "label": [0]})
    for name in ("cars", "test_drive"):
        pq.write_table(table, root / f"{name}.parquet")
    with pytest.raises(DataError, match=r"named after splits \(test\), but .*cars.parquet is not"):
        pack_images(root, tmp_path / "out", size=SIDE)
    assert len(pack_images(root / "*.parquet", tmp_path / "all", size=SIDE)) == 2
    cache = pack_images(root, tmp_path / "test", size=SIDE, split="test")
    assert "in no split: 1" in cache.left_out[0]
    assert "beside .parquet files, which are read instead: 1 (preview/0.png)" in cache.left_out[1]


def test_what_was_read_rightly_before_has_the_same_fingerprints(tmp_path):
    # Recorded before the one reader: names that sort one way as text and another as parts of a path.
    names = ("cat", "cat-2", "dog", "dog big", "Zebra")
    paths = [f"{name}/{i}.png" for name in names for i in (0, 1, 2, 10)]
    for value, path in enumerate(paths):
        (tmp_path / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        # Uncompressed, so that the files' sizes are the same with every zlib.
        pixels = np.full((6, 6, 3), value, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / path, "BMP")
    assert pack_images(tmp_path / "data", tmp_path / "out", size=6).fingerprint == PACKED
    assert open_pictures(tmp_path / "data").fingerprint == EVALUATED
    stream = StreamedImages(
        tmp_path / "data", seed=1, global_batch=4, size=6, augment="flip", shuffle_buffer=3
    )
    assert stream.fingerprint == STREAMED
    order = [int(image[0, -1, -1]) for b in itertools.islice(stream.from_step(0), 5) for image in b.images]
    assert order == [18, 17, 7, 15, 0, 11, 19, 1, 16, 12, 8, 4, 14, 6, 5, 10, 13, 2, 9, 3]


PACKED = "fbab1c62acf35f38e0091e8df2a9cee028899b628cc1bab7c9208d12790b63c8"
EVALUATED = "dec086b00ee9ac07fed7c47de1e5b18cb44ecbae7de48bb845fbb80e622bca8d"
STREAMED = "e880c4de5d00695310f1c8ee6c2c1b65e7111cc68100be241ec247fde360969a"


def test_caches_of_before_are_read(tmp_path):
    cache = pack_images(write(tmp_path / "data", "cat/0.png", "dog/1.png"), tmp_path / "out", size=SIDE)
    text = (tmp_path / "out" / META).read_text()
    assert '"left_out": [],' in text
    (tmp_path / "out" / META).write_text(text.replace('"left_out": [],', ""))
    again = ImageCache.open(tmp_path / "out")
    assert (again.left_out, again.fingerprint) == ((), cache.fingerprint)


def test_labels_are_told_without_looking_through_the_names():
    class Names(list):
        looks = 0

        def __iter__(self):
            Names.looks += 1
            return super().__iter__()

        def __contains__(self, name):
            raise AssertionError("looked through")

        index = __contains__

    names = Names(f"class {i}" for i in range(50))
    classes = ClassNumbers(names)
    assert [classes.of(Row(b"", f"class {i}", "")) for i in range(50)] == list(range(50))
    assert Names.looks == 1
    # Of equal names the first counts, as it always did.
    assert ClassNumbers(["a", "b", "a"]).of(Row(b"", "a", "")) == 0


def test_a_folder_is_looked_through_once(tmp_path, monkeypatch):
    root = write(tmp_path / "data", *(f"class{c}/{i}.png" for c in range(20) for i in range(2)))
    looked = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(str(path)) or scandir(path))
    assert open_pictures(root).num_classes == 20
    assert len(looked) == len(set(looked)) == 21


def test_numeric_folders_are_numbered_as_numbers_everywhere(tmp_path):
    root = write(tmp_path / "data", *(f"{name}/0.png" for name in range(1, 13)))
    expected = tuple(map(str, range(1, 13)))
    cache = pack_images(root, tmp_path / "out", size=SIDE)
    assert cache.class_names == open_pictures(root).class_names == expected
    assert packed(root, tmp_path / "again") == evaluated(root) == {i: expected[i] for i in range(12)}
    assert StreamedImages(root, seed=0, global_batch=1, size=SIDE).class_names == expected


def test_numeric_text_in_a_table_is_numbered_as_numbers_too(tmp_path):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    write(tmp_path / "pictures", *(f"{i}.png" for i in range(3)))
    images = [(tmp_path / "pictures" / f"{i}.png").read_bytes() for i in range(3)]
    pq.write_table(pa.table({"image": images, "label": ["10", "2", "1"]}), tmp_path / "a.parquet")
    expected = {0: "10", 1: "2", 2: "1"}
    assert packed(tmp_path / "a.parquet", tmp_path / "out") == evaluated(tmp_path / "a.parquet") == expected
    assert ImageCache.open(tmp_path / "out").class_names == ("1", "2", "10")
    assert open_pictures(tmp_path / "a.parquet").class_names == ("1", "2", "10")


def test_a_local_folder_needs_no_other_library_and_no_home(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    root = write(tmp_path / "data", "cat/0.png", "dog/1.png")
    assert packed(root, tmp_path / "out") == evaluated(root) == streamed(root, 2) == {0: "cat", 1: "dog"}
