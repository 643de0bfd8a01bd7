"""Statistics files: what was written is read, ADM's too, and what does not belong together is refused."""

import zipfile

import numpy as np
import pytest
import torch

from maskgit.data.npz import open_samples
from maskgit.errors import DataError, ImageError, OutputError
from maskgit.evaluation.metrics.frechet import Gaussian
from maskgit.evaluation.networks.features import FeatureNet, Features
from maskgit.evaluation.scores import statistics as module
from maskgit.evaluation.scores.references import open_reference
from maskgit.evaluation.scores.statistics import (
    Collector,
    ImageStatistics,
    check_comparable,
    compare,
    merge_statistics,
    read_statistics,
    write_statistics,
)

DIM, SPATIAL = 6, 4


def net(name="Inception", resize="tf1", weights="6726825d", spatial=True):
    """A feature net that averages, so that features are known."""

    def compute(images):
        pooled = torch.cat([images.mean((2, 3)), images.square().mean((2, 3))], 1)
        return Features(pooled, images[:, 0, :2, :2].flatten(1) if spatial else None)

    return FeatureNet(name, DIM, 299, resize, weights, compute, torch.device("cpu"))


def pictures(count=40, size=8, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def collected(images, of=None, keep=10_000, batch=7):
    collector = Collector(of or net(), keep=keep)
    for piece in images.split(batch):
        collector.add(piece)
    return collector.finish()


def adm(path, seed=0, spatial=True, **changes):
    """A file as ADM's evaluator reads it."""
    x = np.random.default_rng(seed).normal(size=(50, DIM))
    arrays = {"mu": x.mean(0), "sigma": np.cov(x, rowvar=False)}
    if spatial:
        arrays |= {"mu_s": x.mean(0)[:SPATIAL], "sigma_s": np.cov(x[:, :SPATIAL], rowvar=False)}
    arrays = {name: value for name, value in (arrays | changes).items() if value is not None}
    np.savez(path, **arrays)
    return path


def test_collected_statistics_are_those_of_all_features(monkeypatch):
    monkeypatch.setattr(module, "_GATHERED", 16)
    images = pictures()
    features = net().outputs(images)
    statistics = collected(images, keep=25)
    assert statistics.identity == net().identity
    assert statistics.resolution == (8, 8)
    assert statistics.pooled.num_images == 40
    for gaussian, x in ((statistics.pooled, features.pooled), (statistics.spatial, features.spatial)):
        assert np.allclose(gaussian.mean, x.double().mean(0))
        assert np.allclose(gaussian.covariance, np.cov(x.double().numpy(), rowvar=False))
    assert np.array_equal(statistics.features, features.pooled[:25].numpy())


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_shards_are_merged_in_any_order(tmp_path, order):
    images, reference = pictures(), collected(pictures(seed=1))
    shards = []
    for index, piece in enumerate(images.split([3, 20, 17])):
        write_statistics(tmp_path / f"{index}.npz", collected(piece, keep=2))
        shards.append(read_statistics(tmp_path / f"{index}.npz"))
    merged, whole = merge_statistics([shards[i] for i in order]), collected(images)
    assert merged.pooled.num_images == merged.spatial.num_images == 40
    assert np.allclose(merged.pooled.covariance, whole.pooled.covariance, rtol=1e-9)
    for ours, expected in zip(compare(reference, merged), compare(reference, whole), strict=True):
        assert ours.distance == pytest.approx(expected.distance, rel=1e-6)
    assert np.array_equal(merged.features[:2], shards[order[0]].features)
    assert len(merged.features) == 6


def test_shards_that_do_not_belong_together_are_refused(tmp_path):
    ours = collected(pictures())
    with pytest.raises(DataError, match="no statistics to merge"):
        merge_statistics([])
    with pytest.raises(DataError, match="different feature nets"):
        merge_statistics([ours, collected(pictures(), net(weights="00"))])
    with pytest.raises(DataError, match="cannot be merged"):
        merge_statistics([ours, read_statistics(adm(tmp_path / "adm.npz"))])


def test_images_of_two_sizes_are_no_set():
    collector = Collector(net())
    collector.add(pictures(2))
    with pytest.raises(ImageError, match="cannot be one set"):
        collector.add(pictures(2, size=16))


@pytest.mark.parametrize("spatial", [True, False])
@pytest.mark.parametrize("keep", [0, 10])
def test_what_is_written_is_read(tmp_path, spatial, keep):
    path = tmp_path / "folder" / "reference.npz"
    written = collected(pictures(), net(spatial=spatial), keep=keep)
    write_statistics(path, written)
    read = read_statistics(path)
    assert (read.identity, read.resolution) == (written.identity, written.resolution)
    for ours, theirs in ((read.pooled, written.pooled), (read.spatial, written.spatial)):
        if theirs is None:
            assert ours is None
        else:
            assert np.array_equal(ours.mean, theirs.mean)
            assert np.array_equal(ours.covariance, theirs.covariance)
            assert ours.num_images == 40
    assert (read.features is None) == (keep == 0)
    if keep:
        assert np.array_equal(read.features, written.features)
    assert compare(read, written).pooled.distance == pytest.approx(0, abs=1e-9)
    assert (compare(read, written).spatial is None) == (not spatial)
    with np.load(path, allow_pickle=False) as plain:
        assert int(plain["count"]) == 40


def test_nothing_is_overwritten_unasked(tmp_path):
    path = tmp_path / "reference.npz"
    write_statistics(path, collected(pictures()))
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists"):
        write_statistics(path, collected(pictures(seed=1)))
    assert path.read_bytes() == before
    write_statistics(path, collected(pictures(seed=1)), overwrite=True)
    assert path.read_bytes() != before
    assert [entry.name for entry in tmp_path.iterdir()] == ["reference.npz"]
    with pytest.raises(OutputError, match=r"\.npz"):
        write_statistics(tmp_path / "reference.pkl", collected(pictures()))
    with pytest.raises(DataError, match="are known"):
        write_statistics(tmp_path / "adm.npz", read_statistics(adm(tmp_path / "source.npz")))


def test_adms_files_are_read_and_their_stored_statistics_are_used(tmp_path):
    images = np.zeros((3, 8, 8, 3), np.uint8)
    path = adm(tmp_path / "VIRTUAL_imagenet.npz", arr_0=images)
    read = read_statistics(path)
    with np.load(path) as plain:
        assert np.array_equal(read.pooled.mean, plain["mu"])
        assert np.array_equal(read.pooled.covariance, plain["sigma"])
        assert np.array_equal(read.spatial.covariance, plain["sigma_s"])
    assert (read.identity, read.resolution, read.pooled.num_images) == (None, (8, 8), None)
    result = compare(read, collected(pictures()))
    assert result.pooled.distance > 0
    assert result.spatial.distance > 0


def test_statistics_of_other_nets_and_sizes_are_refused(tmp_path):
    ours = collected(pictures())
    for other in (net("EffNet-Lite0"), net(resize="half-pixel"), net(weights="00")):
        with pytest.raises(DataError, match="different feature nets"):
            compare(ours, collected(pictures(), other))
    with pytest.raises(DataError, match="8 × 8 pixels and the samples of 16 × 16"):
        compare(ours, collected(pictures(size=16)))
    with pytest.raises(DataError, match="dimensions"):
        compare(ours, ImageStatistics(Gaussian(np.zeros(3), np.eye(3)), identity=ours.identity))


def test_files_without_a_name_are_inceptions(tmp_path):
    theirs = read_statistics(adm(tmp_path / "adm.npz"))
    check_comparable(theirs, collected(pictures()))
    check_comparable(collected(pictures()), theirs)
    for other in (net("EffNet-Lite0"), net(resize="half-pixel")):
        with pytest.raises(DataError, match="use the feature net inception"):
            check_comparable(theirs, collected(pictures(), other))
    # pytorch-fid's files have no spatial statistics, and either resize may have made them.
    plain = read_statistics(adm(tmp_path / "plain.npz", spatial=False))
    check_comparable(plain, collected(pictures(), net(resize="half-pixel")))
    with pytest.raises(DataError, match="Inception's"):
        check_comparable(plain, collected(pictures(), net("EffNet-Lite0")))
    sized = read_statistics(adm(tmp_path / "sized.npz", arr_0=np.zeros((1, 16, 16, 3), np.uint8)))
    with pytest.raises(DataError, match="16 × 16"):
        check_comparable(sized, collected(pictures()))


def features_of(dim, count=30, seed=0):
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


@pytest.mark.parametrize("name", ["pool_3", "reps", "feats"])
def test_features_that_others_saved_are_read(tmp_path, name):
    x = features_of(DIM)
    np.savez(tmp_path / "theirs.npz", **{name: x[:, :, None, None] if name == "pool_3" else x})
    read = read_statistics(tmp_path / "theirs.npz")
    assert np.allclose(read.pooled.covariance, np.cov(x.astype(float), rowvar=False))
    assert np.array_equal(read.features, x)
    assert read.pooled.num_images == 30
    np.savez(tmp_path / "theirs.npz", **{name: x[0]})
    with pytest.raises(DataError, match=r"must be finite features, float \(N, D\)"):
        read_statistics(tmp_path / "theirs.npz")


def test_torch_fidelitys_cache_is_read_and_nothing_else_unpickled(tmp_path):
    x = features_of(DIM)
    mu, sigma = x.mean(0), np.cov(x, rowvar=False)
    stem = "cifar10-train-inception-v3-compat"
    torch.save(torch.from_numpy(x), tmp_path / f"{stem}-features-2048.pt")
    torch.save({"mu": mu, "sigma": sigma}, tmp_path / f"{stem}-stat-fid-2048.pt")
    for path in tmp_path.iterdir():
        read = open_reference(path).statistics
        assert np.allclose(read.pooled.mean, mu)
        assert np.allclose(read.pooled.covariance, sigma, atol=1e-6)
        check_comparable(read, collected(pictures()))
        with pytest.raises(DataError, match=r"torch-fidelity's here.*use the feature net inception, or"):
            check_comparable(read, collected(pictures(), net(resize="half-pixel")))
    for number, held in enumerate(({"mu": mu}, [1], {"mu": mu, "sigma": np.array([None])}, print)):
        torch.save(held, tmp_path / f"{number}.pt")
        with pytest.raises(DataError, match=r"neither|more than numbers|cannot be read"):
            read_statistics(tmp_path / f"{number}.pt")


@pytest.mark.parametrize(
    ("name", "dim", "fits", "refused", "advice"),
    [
        ("stats.npz", 2048, "Inception, half-pixel", "DINOv2, ", "inception-pytorch-fid"),
        ("cifar10_clean_train_32.npz", 2048, None, "Inception, tf1 ", ""),
        ("ffhq_legacy_pytorch_train_256.npz", 2048, "Inception, half-pixel ", "Inception, tf1 ", ""),
        ("ffhq_legacy_tensorflow_train_256.npz", 2048, "Inception, tf1 ", "Inception, half-pixel ", ""),
        ("img512-dinov2.npz", 1024, "DINOv2, ", "Inception, tf1 ", "dgm-eval"),
        ("coco.npz", 768, None, "Inception, tf1 ", ""),
    ],
)
def test_what_others_statistics_must_have_been_made_with(tmp_path, name, dim, fits, refused, advice):
    np.savez(tmp_path / name, mu=np.zeros(dim), sigma=np.eye(dim))
    reference = open_reference(tmp_path / name)

    def of(identity):
        return ImageStatistics(Gaussian(np.zeros(dim), np.eye(dim)), identity=f"{identity}resize, weights 0")

    if fits is not None:
        check_comparable(reference.statistics, of(fits))
    with pytest.raises(DataError, match="do not name their feature net"):
        check_comparable(reference.statistics, of(refused))
    assert [advice in text for text in reference.cautions] == [True] * bool(advice)


def test_cmmds_embeddings_are_told_from_other_features_of_clip_by_their_length(tmp_path):
    features = np.random.default_rng(0).normal(size=(20, 768)).astype(np.float32)
    np.save(tmp_path / "plain.npy", features)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    np.save(tmp_path / "cmmd.npy", features)
    np.savez(tmp_path / "cmmd.npz", reps=features)
    ours = ImageStatistics(Gaussian(np.zeros(768), np.eye(768)), identity="CLIP, bicubic resize, weights 0")
    for name in ("cmmd.npy", "cmmd.npz"):
        reference = open_reference(tmp_path / name)
        check_comparable(reference.statistics, ours)
        assert np.array_equal(reference.statistics.features, features)
        assert "feature net clip" in reference.cautions[0]
    with pytest.raises(DataError, match="no feature net fits"):
        check_comparable(read_statistics(tmp_path / "plain.npy"), ours)
    np.save(tmp_path / "objects.npy", np.array([None]), allow_pickle=True)
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY")
    for name in ("objects.npy", "torn.npy"):
        with pytest.raises(DataError, match="cannot be read as an array"):
            read_statistics(tmp_path / name)


def test_labels_beside_images_are_read(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "labelled.npz", images, np.array([2, 0, 1, 2, 2, 0]))
    found = open_reference(tmp_path / "labelled.npz").images
    assert found.read([1, 3]).labels.tolist() == [0, 2]
    assert found.count_labels().tolist() == [2, 1, 3]
    assert found.num_classes == 3
    np.savez(tmp_path / "plain.npz", images)
    assert open_reference(tmp_path / "plain.npz").images.read([5]).labels.tolist() == [-1]
    for labels in (np.arange(5), np.zeros(6), np.full(6, -2), np.full(6, 10**7)):
        np.savez(tmp_path / "wrong.npz", images, labels)
        with pytest.raises(DataError, match="'arr_1'"):
            open_reference(tmp_path / "wrong.npz")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sigma": None}, "lacks the array 'sigma'"),
        ({"sigma": np.eye(5)}, "not a mean and covariance"),
        ({"mu": np.zeros((DIM, 1))}, "not a mean and covariance"),
        ({"mu": np.full(DIM, np.nan)}, "impossible"),
        ({"sigma": -np.eye(DIM)}, "impossible"),
        ({"sigma": np.triu(np.ones((DIM, DIM)))}, "impossible"),
        ({"sigma": np.eye(DIM, dtype=int)}, "impossible"),
        ({"mu": np.array([None] * DIM)}, "plain numbers"),
        ({"mu": None, "arr_0": np.zeros((1, 8, 8, 3), np.uint8)}, "measure them first"),
        ({"mu": None}, "holds no statistics"),
    ],
)
def test_adm_files_with_something_else_inside_are_refused(tmp_path, changes, match):
    with pytest.raises(DataError, match=match):
        read_statistics(adm(tmp_path / "adm.npz", **changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": np.array(2)}, "format 2"),
        ({"format": np.array("1")}, "wrong shape or type"),
        ({"count": np.array(1)}, "impossible"),
        ({"resolution": np.array([0, 8])}, "impossible"),
        ({"resolution": np.array([8])}, "wrong shape"),
        ({"identity": np.array(3)}, "not text"),
        ({"identity": np.array("x" * 2000)}, "more than the 4096"),
        ({"features": np.zeros((3, DIM + 1), np.float32)}, "'features' has the wrong"),
        ({"covariance": None}, "lacks the array 'covariance'"),
    ],
)
def test_our_files_with_something_else_inside_are_refused(tmp_path, changes, match):
    path = tmp_path / "reference.npz"
    write_statistics(path, collected(pictures()))
    with np.load(path) as plain:
        arrays = dict(plain) | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(DataError, match=match):
        read_statistics(path)


def test_damaged_and_missing_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="not a file"):
        read_statistics(tmp_path / "none.npz")
    with pytest.raises(DataError, match="cannot be read"):
        read_statistics(tmp_path)
    path = adm(tmp_path / "adm.npz")
    data = path.read_bytes()
    for broken in (b"", b"not a zip", data[: len(data) // 2], data.replace(b"NUMPY", b"GUMPY")):
        path.write_bytes(broken)
        with pytest.raises(DataError):
            read_statistics(path)


def test_a_file_that_claims_to_be_huge_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "bomb.npz"
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (%d,), }"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, side in (("mu", 10**12), ("sigma", 10**12)):
            text = header % side + b"\n"
            file.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    with pytest.raises(DataError, match="at most 8192 dimensions"):
        read_statistics(path)


def test_covariances_in_column_order_are_read(tmp_path):
    sigma = np.cov(np.random.default_rng(0).normal(size=(50, DIM)), rowvar=False)
    read = read_statistics(adm(tmp_path / "adm.npz", sigma=np.asfortranarray(sigma)))
    assert np.array_equal(read.pooled.covariance, sigma)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_sample_batches_are_read_in_pieces(tmp_path, save):
    images = np.random.default_rng(0).integers(0, 256, (11, 6, 5, 3), dtype=np.uint8)
    save(tmp_path / "samples.npz", images, np.arange(11))
    samples = open_samples(tmp_path / "samples.npz")
    assert (samples.num_images, samples.resolution) == (11, (6, 5))
    batches = list(samples.batches(4))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    read = torch.cat(batches)
    assert read.dtype == torch.float32
    assert np.array_equal((read * 255).round().byte().numpy().transpose(0, 2, 3, 1), images)
    assert collected(read).resolution == (6, 5)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
    ],
)
def test_sample_batches_of_another_kind_are_refused(tmp_path, array):
    np.savez(tmp_path / "samples.npz", array)
    with pytest.raises(DataError, match="must be uint8"):
        open_samples(tmp_path / "samples.npz")


def test_a_sample_batch_that_was_cut_off_is_refused(tmp_path):
    path = tmp_path / "samples.npz"
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (9, 8, 8, 3), }\n"
    with zipfile.ZipFile(path, "w") as file:
        start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        file.writestr("arr_0.npy", start + bytes(8 * 8 * 3 * 5))
    with pytest.raises(DataError, match="damaged"):
        list(open_samples(path).batches(4))
