"""Packing and streaming images: every kind of source, and every kind of bad one."""

import errno
import gzip
import io
import itertools
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit.data import image_cache
from maskgit.data.pack import pack_images
from maskgit.data.streaming import StreamedImages
from maskgit.errors import ConfigError, DataError, OutputError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SIDE = 6


def picture(value: int) -> np.ndarray:
    """An image that bears a number in every pixel, so that what came from where can be told."""
    pixels = np.full((SIDE, SIDE, 3), value, np.uint8)
    pixels[0, 0] = (255, 0, value)
    return pixels


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def numbers(cache) -> list[int]:
    return cache.images[:, -1, -1, 0].tolist()


def make_folder(path, classes=("cat", "dog"), each=3):
    for c, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for i in range(each):
            (path / name / f"{i}.png").write_bytes(encoded(picture(10 * c + i)))
    return path


def make_parquet(file, count=6, start=0, bad=(), struct_image=False, metadata=None, **columns):
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [b"broken" if i in bad else encoded(picture(start + i)) for i in range(count)]
    if struct_image:
        images = [{"bytes": image, "path": None} for image in images]
    columns = columns or {"label": [i % 3 for i in range(count)]}
    table = pa.table({"image": images, **columns})
    pq.write_table(table.replace_schema_metadata(metadata), file, row_group_size=2)
    return file


def make_tar(file, count=4, start=0):
    with tarfile.open(file, "w") as tar:
        for i in range(count):
            for ending, data in (("png", encoded(picture(start + i))), ("cls", str(i % 2).encode())):
                info = tarfile.TarInfo(f"{start + i:04}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file


def make_idx(folder, count=5, split="train", pack=gzip.compress, ending=".gz"):
    folder.mkdir(exist_ok=True)
    grey = np.stack([picture(i)[..., 0] for i in range(count)])
    images = b"\0\0\x08\x03" + struct.pack(">3I", count, SIDE, SIDE) + grey.tobytes()
    labels = b"\0\0\x08\x01" + struct.pack(">I", count) + bytes(i % 2 for i in range(count))
    (folder / f"{split}-images-idx3-ubyte{ending}").write_bytes(pack(images))
    (folder / f"{split}-labels-idx1-ubyte{ending}").write_bytes(pack(labels))
    return folder


def test_folder_of_classes(tmp_path):
    source = make_folder(tmp_path / "data")
    (source / "cat" / "notes.txt").write_text("no picture")
    cache = pack_images(source, tmp_path / "out", size=SIDE)
    cache.verify()
    assert cache.class_names == ("cat", "dog")
    assert dict(zip(numbers(cache), cache.labels.tolist(), strict=True)) == {
        0: 0,
        1: 0,
        2: 0,
        10: 1,
        11: 1,
        12: 1,
    }
    assert np.array_equal(cache.images[numbers(cache).index(11)], picture(11))
    assert (cache.num_skipped, cache.notes) == (0, ())
    assert cache.left_out == ("Left out, not a supported image format: 1 (cat/notes.txt).",)
    again = pack_images(source, tmp_path / "again", size=SIDE, num_workers=1)
    assert again.fingerprint == cache.fingerprint


def test_folder_with_splits(tmp_path):
    make_folder(tmp_path / "data" / "train")
    make_folder(tmp_path / "data" / "test", each=1)
    assert len(pack_images(tmp_path / "data", tmp_path / "train", size=SIDE)) == 6
    test = pack_images(tmp_path / "data", tmp_path / "test", size=SIDE, split="test")
    assert (numbers(test), test.class_names) == ([0, 10], ("cat", "dog"))
    with pytest.raises(DataError, match=r"no split 'val'. Choose from: train, test"):
        pack_images(tmp_path / "data", tmp_path / "val", size=SIDE, split="val")


def test_one_class_and_one_image(tmp_path):
    cache = pack_images(make_folder(tmp_path / "data", classes=("cat",), each=1), tmp_path / "out", size=SIDE)
    assert (cache.class_names, cache.labels.tolist()) == (("cat",), [0])
    assert len(cache.notes) == 2
    assert "only one image" in cache.notes[0]
    assert "only one class" in cache.notes[1]


def test_pictures_without_classes(tmp_path):
    source = make_folder(tmp_path / "data", classes=(".",))
    with pytest.raises(DataError, match=r"no class folders\. Sort them .*--label-column none"):
        pack_images(source, tmp_path / "out", size=SIDE)
    cache = pack_images(source, tmp_path / "out", size=SIDE, label_column=None)
    assert (numbers(cache), cache.labels.tolist(), cache.num_classes) == ([0, 1, 2], [0, 0, 0], 1)


@pytest.mark.parametrize("struct_image", [False, True])
@pytest.mark.parametrize("names", [b"ant,bee,cow", b'["ant", "bee", "cow"]'])
@pytest.mark.parametrize("pattern", ["data.parquet", "*.parquet"])
def test_parquet(tmp_path, struct_image, names, pattern):
    metadata = {b"label_names": names}
    make_parquet(tmp_path / "data.parquet", struct_image=struct_image, metadata=metadata)
    file = tmp_path / pattern
    cache = pack_images(file, tmp_path / "out", size=SIDE)
    assert (numbers(cache), cache.labels.tolist()) == (list(range(6)), [0, 1, 2, 0, 1, 2])
    assert cache.class_names == ("ant", "bee", "cow")
    assert np.array_equal(cache.images[4], picture(4))


def test_parquet_folder_and_pattern(tmp_path):
    for i in range(2):
        make_parquet(tmp_path / "data" / f"train-0000{i}-of-00002.parquet", start=10 * i)
    make_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", start=30)
    expected = [*range(6), *range(10, 16)]
    assert numbers(pack_images(tmp_path / "data", tmp_path / "a", size=SIDE)) == expected
    assert numbers(pack_images(tmp_path / "data" / "train-*.parquet", tmp_path / "b", size=SIDE)) == expected
    assert numbers(pack_images(tmp_path / "data", tmp_path / "c", size=SIDE, split="test")) == [
        *range(30, 36)
    ]


def test_class_names_of_datasets_features(tmp_path):
    import datasets

    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["x", "y"])})
    rows = {"img": [{"bytes": encoded(picture(i)), "path": None} for i in range(3)], "fine": [1, 0, 1]}
    datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "data.parquet"))
    cache = pack_images(tmp_path / "data.parquet", tmp_path / "out", size=SIDE, label_column="fine")
    assert (cache.labels.tolist(), cache.class_names) == ([1, 0, 1], ("x", "y"))


def test_text_labels_and_given_names(tmp_path):
    file = make_parquet(tmp_path / "text.parquet", count=3, label=["dog", "cat", "dog"])
    cache = pack_images(file, tmp_path / "a", size=SIDE)
    assert (cache.labels.tolist(), cache.class_names) == ([1, 0, 1], ("cat", "dog"))
    given = pack_images(file, tmp_path / "b", size=SIDE, class_names=["eel", "dog", "cat"])
    assert (given.labels.tolist(), given.class_names) == ([1, 2, 1], ("eel", "dog", "cat"))
    assert given.notes == ("1 of 3 classes have no images.",)
    plain = pack_images(make_parquet(tmp_path / "plain.parquet"), tmp_path / "c", size=SIDE)
    assert plain.class_names == ("0", "1", "2")


def test_webdataset(tmp_path):
    (tmp_path / "data").mkdir()
    make_tar(tmp_path / "data" / "train-0000.tar")
    make_tar(tmp_path / "data" / "train-0001.tar", start=20)
    cache = pack_images(tmp_path / "data", tmp_path / "out", size=SIDE)
    assert numbers(cache) == [0, 1, 2, 3, 20, 21, 22, 23]
    assert cache.labels.tolist() == [0, 1] * 4


@pytest.mark.parametrize(("pack", "ending"), [(gzip.compress, ".gz"), (bytes, "")])
def test_idx(tmp_path, pack, ending):
    make_idx(tmp_path / "data", pack=pack, ending=ending)
    make_idx(tmp_path / "data", count=2, split="t10k", pack=pack, ending=ending)
    cache = pack_images(tmp_path / "data", tmp_path / "out", size=SIDE)
    assert (numbers(cache), cache.labels.tolist()) == ([0, 1, 2, 3, 4], [0, 1, 0, 1, 0])
    assert len(pack_images(tmp_path / "data", tmp_path / "test", size=SIDE, split="test")) == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "truncated: it holds 4 of 5"),
        (lambda data: data + b"x", "has data after its 5"),
        (lambda data: b"\0\0\x0d" + data[3:], "not an IDX file"),
        (lambda data: data[:6], "header is incomplete"),
        (lambda data: data[:8] + b"\xff" * 8 + data[16:], "not allowed"),
        (lambda data: gzip.compress(data)[:40], "not an IDX file"),
    ],
)
def test_broken_idx_is_refused(tmp_path, damage, message):
    make_idx(tmp_path / "data", pack=bytes, ending="")
    file = tmp_path / "data" / "train-images-idx3-ubyte"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=message):
        pack_images(tmp_path / "data", tmp_path / "out", size=SIDE)


def test_a_truncated_gzip_file_is_refused(tmp_path):
    make_idx(tmp_path / "data")
    truncate(tmp_path / "data" / "train-images-idx3-ubyte.gz")
    with pytest.raises(DataError, match="cannot be read"):
        pack_images(tmp_path / "data", tmp_path / "out", size=SIDE)


def test_idx_files_of_different_lengths_are_refused(tmp_path):
    make_idx(tmp_path / "data")
    (tmp_path / "data" / "train-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 4) + bytes(4))
    )
    with pytest.raises(DataError, match=r"holds 5 images, but .* holds 4 labels"):
        pack_images(tmp_path / "data", tmp_path / "out", size=SIDE)


def test_mixed_modes_and_sizes(tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    red = Image.new("RGB", (20, 10), (200, 0, 0))
    red.save(tmp_path / "data" / "a" / "0.png")
    red.convert("CMYK").save(tmp_path / "data" / "a" / "1.jpg", quality=100)
    red.quantize(4).save(tmp_path / "data" / "a" / "2.gif")
    red.convert("RGBA").resize((4, 9)).save(tmp_path / "data" / "a" / "3.webp", lossless=True)
    red.convert("L").save(tmp_path / "data" / "a" / "4.PNG")
    cache = pack_images(tmp_path / "data", tmp_path / "out", size=SIDE)
    assert cache.images.shape == (5, SIDE, SIDE, 3)
    for i in range(4):
        assert np.abs(cache.images[i].astype(int) - (200, 0, 0)).max() <= 3
    assert np.all(cache.images[4] == 60)
    assert cache.num_enlarged == 1
    assert "smaller than 6 pixels" in cache.notes[0]


def test_bad_pictures_are_skipped_counted_and_listed(tmp_path):
    source = make_folder(tmp_path / "data", each=10)
    (source / "cat" / "3.png").write_bytes(b"")
    (source / "dog" / "4.png").write_bytes((source / "dog" / "4.png").read_bytes()[:40])
    (source / "dog" / "5.png").write_text("no picture")
    with pytest.raises(
        DataError, match=r"of the 20 images .* cannot be used, more than the allowed share of 0.01"
    ):
        pack_images(source, tmp_path / "out", size=SIDE)
    assert not (tmp_path / "out").exists()
    cache = pack_images(source, tmp_path / "out", size=SIDE, max_bad_share=0.15)
    assert len(cache) + cache.num_skipped == 20
    assert len(cache) == 17
    assert sorted(line.split(" ")[0].rsplit("/", 1)[1] for line in cache.skipped) == [
        "3.png",
        "4.png",
        "5.png",
    ]
    assert not {3, 14, 15} & set(numbers(cache))
    assert "3 of 20 images could not be read" in cache.notes[0]


def test_a_row_cannot_make_this_machine_fetch_an_address(tmp_path):
    images = [
        {"bytes": None, "path": path}
        for path in ("http://127.0.0.1:9/a.png", "zip://a.png::http://127.0.0.1:9/")
    ]
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / "data.parquet")
    with pytest.raises(DataError, match="which is not fetched"):
        pack_images(tmp_path / "data.parquet", tmp_path / "out", size=SIDE)


def test_bad_labels_are_skipped(tmp_path):
    file = make_parquet(tmp_path / "data.parquet", count=4, label=[0, -1, None, 1])
    cache = pack_images(file, tmp_path / "out", size=SIDE, max_bad_share=0.5)
    assert (numbers(cache), cache.labels.tolist()) == ([0, 3], [0, 1])
    assert "label is -1" in cache.skipped[0]
    assert "label is None" in cache.skipped[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "not a local file or folder|does not exist"),
        (lambda path: path.mkdir(), "is empty: it holds no images"),
        (lambda path: make_folder(path, each=0), "is empty: it holds no images"),
        (lambda path: make_parquet(path / "a.parquet", count=3, bad=range(3)), "3 of the 3 images"),
        (lambda path: make_parquet(path / "a.parquet", count=0), "is empty"),
        (lambda path: make_parquet(path / "a.parquet", other=[1] * 6), "Its columns are: image, other"),
        (lambda path: truncate(make_parquet(path / "a.parquet")), "cannot be read"),
        (lambda path: path.write_text("no data"), "not of a supported kind"),
    ],
)
def test_sources_without_images_are_refused(tmp_path, make, message):
    make(tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=message):
        pack_images(tmp_path / "data", tmp_path / "out", size=SIDE)
    assert sorted(tmp_path.rglob("*")) == before


def truncate(file):
    file.write_bytes(file.read_bytes()[:-20])


def test_a_name_that_is_not_to_be_had_is_refused(tmp_path):
    with pytest.raises(
        DataError, match="nobody/nothing is not a local file or folder, and on the Hub it cannot be read"
    ):
        pack_images("nobody/nothing", tmp_path / "out", size=SIDE)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(self, images):
        raise OSError(errno.ENOSPC, "No space left on device")

    source = make_folder(tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(image_cache.ImageCacheWriter, "add", full)
    with pytest.raises(OutputError, match="disk is full"):
        pack_images(source, tmp_path / "out", size=SIDE)
    assert sorted(tmp_path.rglob("*")) == before


def streamed(source, steps=5, start=0, **changed):
    settings = {"seed": 1, "global_batch": 4, "size": SIDE, "class_names": list("abc"), **changed}
    return list(itertools.islice(StreamedImages(source, **settings).from_step(start), steps))


def stream_numbers(batches):
    return [int(image[0, -1, -1]) for batch in batches for image in batch.images]


@pytest.fixture
def shards(tmp_path):
    for i in range(4):
        make_parquet(tmp_path / "data" / f"train-0000{i}-of-00004.parquet", start=10 * i)
    return tmp_path / "data"


def test_a_stream_in_order_is_what_a_cache_holds(tmp_path, shards):
    cache = pack_images(shards, tmp_path / "out", size=SIDE)
    batches = streamed(shards, steps=12, shuffle_buffer=0, augment="none")
    assert stream_numbers(batches) == numbers(cache) * 2
    assert torch.cat([batch.labels for batch in batches]).tolist() == cache.labels.tolist() * 2
    assert batches[1].images.dtype == torch.uint8
    assert batches[1].sample_numbers.tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(("lanes", "worlds"), [(1, (2, 4)), (4, (2, 4))])
def test_a_stream_does_not_depend_on_processes_or_restarts(shards, lanes, worlds):
    settings = {"lanes": lanes, "augment": "crop+flip", "shuffle_buffer": 3}
    whole = streamed(shards, steps=14, **settings)
    for world in worlds:
        ranks = [streamed(shards, steps=14, rank=rank, world=world, **settings) for rank in range(world)]
        for step, expected in enumerate(whole):
            for i, value in enumerate(expected):
                assert torch.equal(torch.cat([rank[step][i] for rank in ranks]), value)
    for start in (1, 13):
        for batch, expected in zip(
            streamed(shards, 14 - start, start, **settings), whole[start:], strict=True
        ):
            assert all(torch.equal(one, other) for one, other in zip(batch, expected, strict=True))
    first, second = stream_numbers(whole[:6]), stream_numbers(whole[6:12])
    assert sorted(first) == sorted(second)
    assert first != second


def test_a_bad_picture_in_a_stream_is_replaced_by_the_next(tmp_path):
    file = make_parquet(tmp_path / "data.parquet", count=8, bad=(1, 3, 4))
    settings = {"shuffle_buffer": 0, "augment": "none"}
    assert stream_numbers(streamed(file, steps=2, **settings)) == [0, 2, 2, 5, 5, 5, 6, 7]
    assert stream_numbers(streamed(file, steps=1, start=1, **settings)) == [5, 5, 6, 7]
    with pytest.raises(DataError, match="more than the allowed share of 0"):
        streamed(file, steps=1, max_bad_share=0.0)


def test_streams_that_cannot_work_are_refused(tmp_path, shards):
    with pytest.raises(ConfigError, match="at most the source's 4 shards, but is 8"):
        streamed(shards, lanes=8, global_batch=8)
    with pytest.raises(ConfigError, match="multiple of the 4 processes"):
        streamed(shards, lanes=2, world=4)
    with pytest.raises(DataError, match="give their names with class_names"):
        streamed(shards, class_names=None)
    with pytest.raises(DataError, match="IDX files, which are not streamed: pack them"):
        streamed(make_idx(tmp_path / "idx"))
    with pytest.raises(ConfigError, match="revision applies to data sets on the Hub"):
        streamed(shards, revision="main")


@pytest.mark.parametrize("form", ["{path}", "zip://0.png::{path}"])
def test_rows_of_the_hub_name_no_files_here(tmp_path, monkeypatch, form):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "own.png").write_bytes(encoded(picture(1)))
    path = form.format(path=tmp_path / "own.png")
    if form.startswith("zip"):
        with zipfile.ZipFile(tmp_path / "own.png", "w") as archive:
            archive.writestr("0.png", encoded(picture(1)))
    images = [{"bytes": encoded(picture(2)), "path": path}, {"bytes": None, "path": path}]
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / "data.parquet")
    open_builder = datasets.load_dataset_builder

    def builder(name, *_, **options):
        """Pretend that the file lies on the hub under a name."""
        return open_builder("parquet", data_files=[str(tmp_path / "data.parquet")])

    here = pack_images(tmp_path / "data.parquet", tmp_path / "here", size=SIDE)
    assert numbers(here) == [2, 1]
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    cache = pack_images("someone/hostile", tmp_path / "hub", size=SIDE, max_bad_share=0.5)
    assert numbers(cache) == [2]
    assert "own.png, a local file" in cache.skipped[0]
    settings = {"seed": 0, "global_batch": 2, "size": SIDE, "augment": "none", "class_names": ("a", "b")}
    stream = StreamedImages("someone/hostile", max_bad_share=1, shuffle_buffer=0, num_workers=1, **settings)
    batches = stream.from_step(0)
    assert next(batches).images[:, 0, -1, -1].tolist() == [2, 2]
    batches.close()
