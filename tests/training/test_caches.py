"""Image and token caches: what is written, what is refused, and going on after a stop."""

import errno
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from maskgit.data.batches import TokenBatches
from maskgit.data.image_cache import ImageCache, new_image_cache, write_image_cache
from maskgit.data.token_cache import TokenCache, write_token_cache
from maskgit.errors import ConfigError, DataError, OutputError

NUM_CODES = 256


class RedTokenizer:
    """A stand-in whose token is the red level of a patch's first pixel."""

    patch_size = 4

    def __init__(self, stop_after: int | None = None) -> None:
        self.calls = 0
        self.stop_after = stop_after

    def encode(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.stop_after is not None and self.calls > self.stop_after:
            raise KeyboardInterrupt
        return (images[:, 0, ::4, ::4] * 255).round().long()


@pytest.fixture
def images(tmp_path) -> ImageCache:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    return write_image_cache(tmp_path / "images", pixels, np.arange(10) % 2, ["cat", "dog"])


def write(images, out, tokenizer=None, **changed):
    settings = {"tokenizer_fingerprint": "t" * 64, "num_codes": NUM_CODES, "batch_size": 2, "shard_size": 4}
    return write_token_cache(images, tokenizer or RedTokenizer(), out, **{**settings, **changed})


def test_images_come_back(tmp_path, images):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    opened = ImageCache.open(tmp_path / "images")
    opened.verify()
    assert np.array_equal(opened.images, pixels)
    assert opened.labels.tolist() == [0, 1] * 5
    assert opened.class_names == ("cat", "dog")
    assert (len(opened), opened.size, opened.num_classes, opened.notes) == (10, 8, 2, ())


def test_fingerprint_depends_on_every_part(tmp_path, images):
    pixels, labels = np.array(images.images), np.array(images.labels)
    changed_pixels, changed_labels = pixels.copy(), labels.copy()
    changed_pixels[3, 2, 1, 0] ^= 1
    changed_labels[0] = 1
    same = write_image_cache(tmp_path / "same", pixels, labels, ["cat", "dog"])
    others = [
        write_image_cache(tmp_path / "pixels", changed_pixels, labels, ["cat", "dog"]),
        write_image_cache(tmp_path / "labels", pixels, changed_labels, ["cat", "dog"]),
        write_image_cache(tmp_path / "names", pixels, labels, ["cat", "hot dog"]),
    ]
    assert same.fingerprint == images.fingerprint
    assert len({images.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_changed_bytes_are_noticed(images):
    with (images.path / "images.npy").open("r+b") as file:
        file.seek(-1, 2)
        file.write(bytes([int(images.images[-1, -1, -1, -1]) ^ 255]))
    with pytest.raises(DataError, match="damaged"):
        ImageCache.open(images.path).verify()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda path: (path / "meta.json").unlink(), "not a complete image cache"),
        (lambda path: (path / "meta.json").write_text("{"), "is not JSON"),
        (lambda path: (path / "meta.json").write_text("[]"), "is not a JSON object"),
        (lambda path: edit(path, format=99), "format 99"),
        (lambda path: edit(path, num_images=11), "damaged"),
        (lambda path: edit(path, num_images="ten"), "damaged"),
        (lambda path: edit(path, class_names=["cat"]), "labels from 0 to 1 for 1 classes"),
        (lambda path: edit(path, size=10**9), "damaged"),
        (lambda path: (path / "images.npy").write_bytes(b""), "damaged"),
        (lambda path: truncate(path / "images.npy"), "damaged"),
        (lambda path: np.save(path / "labels.npy", np.array(["x"], object)), "damaged"),
    ],
)
def test_broken_image_caches_are_refused(images, break_it, message):
    break_it(images.path)
    with pytest.raises(DataError, match=message):
        ImageCache.open(images.path)


def edit(path, **changed):
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**meta, **changed}))


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def test_nothing_half_written_is_left(tmp_path):
    def stopped() -> None:
        with new_image_cache(tmp_path / "new", 4) as writer:
            writer.add(np.zeros((3, 4, 4, 3), np.uint8))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_overwritten(tmp_path, images):
    with pytest.raises(OutputError, match="already exists"):
        write_image_cache(images.path, np.zeros((1, 4, 4, 3), np.uint8), np.zeros(1), ["x"])
    ImageCache.open(images.path).verify()


def test_tokens_are_those_of_the_tokenizer(tmp_path, images):
    tokens = write(images, tmp_path / "tokens")
    red = np.asarray(images.images)[..., 0]
    expected = np.stack([red[:, ::4, ::4], red[:, :, ::-1][:, ::4, ::4]], axis=1)
    assert np.array_equal(np.concatenate(tokens.shards), expected)
    assert [shard.dtype for shard in tokens.shards] == [np.uint16] * 3
    assert (len(tokens), tokens.grid_size, tokens.num_views, tokens.num_classes) == (10, 2, 2, 2)
    assert (tokens.image_size, tokens.views, tokens.images_fingerprint) == (
        8,
        "centre+flip",
        images.fingerprint,
    )
    tokens.verify()
    indices, views = np.array([9, 0, 4, 3, 9]), np.array([0, 1, 1, 0, 1])
    assert np.array_equal(tokens.take(indices, views), expected[indices, views])


def test_tokens_beyond_16_bits_come_back(tmp_path, images):
    class Large(RedTokenizer):
        def encode(self, images: Tensor) -> Tensor:
            return super().encode(images) * 1024

    tokens = write(images, tmp_path / "tokens", Large(), num_codes=2**18)
    expected = np.asarray(images.images)[:, ::4, ::4, 0] * np.int64(1024)
    assert {shard.dtype for shard in tokens.shards} == {np.dtype(np.uint32)}
    assert expected.max() > 2**17
    found = TokenCache.open(tokens.path).take(np.arange(10), np.zeros(10, np.int64))
    assert np.array_equal(found, expected)
    tokens.verify()


def test_random_views_depend_on_the_image_and_the_seed_alone(tmp_path, images):
    settings = {"views": "random", "num_views": 3, "size": 4}
    tokens = write(images, tmp_path / "a", **settings)
    other = write(images, tmp_path / "b", **settings, batch_size=7, shard_size=100)
    again = write(images, tmp_path / "c", **settings, seed=1)
    assert np.array_equal(np.concatenate(tokens.shards), np.concatenate(other.shards))
    assert not np.array_equal(np.concatenate(tokens.shards), np.concatenate(again.shards))
    views = np.concatenate(tokens.shards)
    assert not np.array_equal(views[:, 0], views[:, 1])


def test_going_on_after_a_stop_keeps_what_was_done(tmp_path, images):
    whole = write(images, tmp_path / "whole")
    # A shard takes 2 batches of 2 views: the stop falls into the second shard.
    with pytest.raises(KeyboardInterrupt):
        write(images, tmp_path / "tokens", RedTokenizer(stop_after=6))
    assert sorted(file.name for file in (tmp_path / "tokens").iterdir()) == ["plan.json", "tokens-00000.npy"]
    with pytest.raises(DataError, match="not a complete token cache"):
        TokenCache.open(tmp_path / "tokens")
    rest = RedTokenizer()
    tokens = write(images, tmp_path / "tokens", rest)
    assert rest.calls == 6
    assert tokens.fingerprint == whole.fingerprint
    finished = RedTokenizer()
    assert write(images, tmp_path / "tokens", finished).fingerprint == whole.fingerprint
    assert finished.calls == 0


def test_a_truncated_shard_is_made_again(tmp_path, images):
    whole = write(images, tmp_path / "tokens")
    (tmp_path / "tokens" / "meta.json").unlink()
    truncate(tmp_path / "tokens" / "tokens-00001.npy")
    tokenizer = RedTokenizer()
    assert write(images, tmp_path / "tokens", tokenizer).fingerprint == whole.fingerprint
    assert tokenizer.calls == 4


def test_processes_share_the_shards(tmp_path, images):
    whole = write(images, tmp_path / "whole")
    assert write(images, tmp_path / "tokens", rank=1, world=2) is None
    assert write(images, tmp_path / "tokens", rank=0, world=2).fingerprint == whole.fingerprint


def test_another_tokenizer_is_refused(tmp_path, images):
    tokens = write(images, tmp_path / "tokens")
    tokens.check_tokenizer("t" * 64)
    with pytest.raises(DataError, match="made by another tokenizer"):
        tokens.check_tokenizer("u" * 64)
    for changed, message in (
        ({"tokenizer_fingerprint": "u" * 64}, "different tokenizer fingerprint"),
        ({"views": "centre"}, "different views"),
        ({"shard_size": 5}, "different shard size"),
    ):
        with pytest.raises(DataError, match=message):
            write(images, tmp_path / "tokens", **changed)
    TokenCache.open(tmp_path / "tokens").verify()


def test_a_full_disk_loses_no_finished_shard(tmp_path, images, monkeypatch):
    save, calls = np.save, []

    def full(stream, array):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(stream, array)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OutputError, match="disk is full"):
        write(images, tmp_path / "tokens")
    monkeypatch.undo()
    assert sorted(file.name for file in (tmp_path / "tokens").iterdir()) == ["plan.json", "tokens-00000.npy"]
    write(images, tmp_path / "tokens").verify()


def test_too_small_a_disk_is_told_beforehand(tmp_path, images, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 1, 99))
    tokenizer = RedTokenizer()
    with pytest.raises(OutputError, match="are free there"):
        write(images, tmp_path / "tokens", tokenizer)
    assert tokenizer.calls == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"views": "tencrop"}, "ten_crop"),
        ({"views": "ten_crop"}, "need images of 9"),
        ({"views": "random"}, "the number of random crops"),
        ({"num_views": 3}, "cannot be 3"),
        ({"size": 6}, "multiple of 4"),
        ({"size": 12}, "need images of 12"),
        ({"num_codes": 16}, "instead of 16 codes"),
        ({"num_codes": 2**18 + 1}, "num_codes"),
        ({"rank": 1}, "rank"),
    ],
)
def test_bad_settings_are_refused(tmp_path, images, changed, message):
    with pytest.raises(ConfigError, match=message):
        write(images, tmp_path / "tokens", **changed)


def test_broken_token_caches_are_refused(tmp_path, images):
    tokens = write(images, tmp_path / "tokens")
    file = tokens.path / "tokens-00002.npy"
    with pytest.raises(DataError, match="holds no image cache, but token cache"):
        ImageCache.open(tokens.path)
    values = np.load(file)
    values[0, 0] = NUM_CODES
    np.save(file, values)
    with pytest.raises(DataError, match="holds the token 256"):
        TokenCache.open(tokens.path).take(np.array([8]), np.array([0]))
    with pytest.raises(DataError, match="damaged"):
        TokenCache.open(tokens.path).verify()
    file.unlink()
    with pytest.raises(DataError, match="damaged"):
        TokenCache.open(tokens.path)


def test_token_batches_are_those_of_the_cache_whatever_the_processes(tmp_path, images):
    cache = write(images, tmp_path / "tokens")
    settings = {"seed": 2, "global_batch": 6}
    stored, views = np.concatenate(cache.shards), []
    for step in range(20):
        batch = TokenBatches(cache, **settings).batch(step)
        parts = [TokenBatches(cache, **settings, rank=rank, world=3).batch(step) for rank in range(3)]
        for i, value in enumerate(batch):
            assert value.dtype == torch.int64
            assert torch.equal(torch.cat([part[i] for part in parts]), value)
        for tokens, label in zip(batch.tokens.numpy(), batch.labels, strict=True):
            index, view = next(
                (i, v) for i in range(10) for v in range(2) if np.array_equal(stored[i, v], tokens)
            )
            assert label == index % 2
            views.append(view)
    assert 40 < sum(views) < 80
    first = TokenBatches(cache, **settings, random_view=False, shuffle=False).batch(0)
    assert np.array_equal(first.tokens.numpy(), stored[:6, 0])


def test_reading_caches_needs_no_datasets_package():
    code = "import sys, maskgit.data.batches, maskgit.data.token_cache; print('datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
