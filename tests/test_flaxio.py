"""Flax's msgpack format: what is read, and what a hostile file cannot do."""

import tracemalloc

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskgit.checkpoints import flax_msgpack as flaxio
from maskgit.errors import CheckpointError


def packed_array(shape, dtype, data, code=1):
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, data), use_bin_type=True))


def test_arrays_of_all_types_survive():
    tree = {
        "a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "c": np.array(3, np.int32)},
        "d": np.zeros((0, 4), np.float64),
        "e": np.array([True, False]),
    }
    again = flaxio.decode(flaxio.encode(tree))
    assert dict(flaxio.leaves(again)).keys() == dict(flaxio.leaves(tree)).keys()
    for path, array in flaxio.leaves(tree):
        found = dict(flaxio.leaves(again))[path]
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def test_bfloat16_becomes_float32_exactly():
    values = np.array([1.0, -2.5, 3.140625, 0.0], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    data = msgpack.packb({"a": packed_array((4,), "bfloat16", bits.tobytes())})
    np.testing.assert_array_equal(flaxio.decode(data)["a"], values)


def test_numpy_scalars_are_arrays_without_shape():
    data = msgpack.packb({"a": packed_array((), "float32", np.float32(2.5).tobytes(), code=3)})
    assert flaxio.decode(data)["a"] == np.float32(2.5)


def test_large_arrays_are_chunked_and_joined(monkeypatch):
    monkeypatch.setattr(flaxio, "MAX_CHUNK_BYTES", 64)
    tree = {"a": {"b": np.arange(100, dtype=np.float32).reshape(4, 25)}}
    data = flaxio.encode(tree)
    raw = msgpack.unpackb(data, ext_hook=lambda code, payload: payload)
    assert raw["a"]["b"]["__msgpack_chunked_array__"] is True
    assert raw["a"]["b"]["shape"] == {"0": 4, "1": 25}
    assert len(raw["a"]["b"]["chunks"]) == 7
    np.testing.assert_array_equal(flaxio.decode(data)["a"]["b"], tree["a"]["b"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (packed_array((2,), "float32", b"1234"), "4 bytes instead of 8"),
        (packed_array((-1,), "float32", b""), "shape"),
        (packed_array((2**39, 2**39), "float32", b""), "bytes instead of"),
        (packed_array((1,), "object", b"12345678"), "dtype 'object'"),
        (packed_array((1,), "complex64", b"12345678"), "dtype"),
        (msgpack.ExtType(2, msgpack.packb((1.0, 2.0))), "complex"),
        (msgpack.ExtType(77, b""), "extension type 77"),
        (msgpack.ExtType(1, b"\x93"), "damaged"),
        (3, "int where an array"),
        ([1, 2], "list where an array"),
        ({"__msgpack_chunked_array__": True}, "chunk"),
        ({"__msgpack_chunked_array__": True, "shape": {"0": 9}, "chunks": {"0": 3}}, "chunks"),
        (
            {
                "__msgpack_chunked_array__": True,
                "shape": {"0": 9},
                "chunks": {"0": packed_array((1,), "float32", b"1234")},
            },
            "fill its shape",
        ),
    ],
)
def test_what_is_no_array_is_refused(value, message):
    with pytest.raises(CheckpointError, match=message):
        flaxio.decode(msgpack.packb({"params": {"a": value}}))


@pytest.mark.parametrize("value", [b"", b"\xc1", b"garbage" * 100, msgpack.packb([1]), msgpack.packb(7)])
def test_what_is_no_checkpoint_is_refused(value):
    with pytest.raises(CheckpointError):
        flaxio.decode(value)


def test_headers_that_lie_cost_no_memory():
    # Every level claims an array of 2^32 − 1 items, a map of as many, or a payload of 4 GiB.
    for hostile in (
        b"\xdd\xff\xff\xff\xff" * 200,
        b"\xdf\xff\xff\xff\xff\xa1a" * 200,
        b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
        b"\x81\xa1a" * 100_000,
    ):
        tracemalloc.start()
        with pytest.raises(CheckpointError):
            flaxio.decode(hostile)
        assert tracemalloc.get_traced_memory()[1] < 50e6
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [(0, 2**63), (0, 2**39, 2**39), (1,) * 40])
def test_impossible_shapes_are_refused(shape):
    flat = {"__msgpack_chunked_array__": True, "shape": {str(i): n for i, n in enumerate(shape)}}
    size = 1 if len(shape) == 40 else 0
    flat["chunks"] = {"0": packed_array((size,), "float32", b"1234" * size)}
    for value in (flat, packed_array(shape, "float32", b"1234" * size)):
        with pytest.raises(CheckpointError, match="shape"):
            flaxio.decode(msgpack.packb({"params": {"a": value}}))


SIZES = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1)), max_size=4)
ARRAYS = st.builds(packed_array, SIZES, st.sampled_from(["float32", "bfloat16", "x"]), st.binary(max_size=16))
CHUNKED = st.builds(
    lambda shape, chunks: {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks},
    st.one_of(SIZES, st.dictionaries(st.sampled_from("012"), st.integers(0, 2**63), max_size=3)),
    st.one_of(st.lists(ARRAYS, max_size=3), st.dictionaries(st.sampled_from("012"), ARRAYS, max_size=3)),
)
TREES = st.recursive(
    st.one_of(
        ARRAYS,
        CHUNKED,
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(),
        st.text(max_size=8),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=300), TREES.map(msgpack.packb)))
def test_any_bytes_decode_to_arrays_or_are_refused(data):
    try:
        tree = flaxio.decode(data)
    except CheckpointError:
        return
    assert all(isinstance(leaf, np.ndarray) for _, leaf in flaxio.leaves(tree))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_damage_to_a_good_file_is_refused_or_harmless(data):
    good = flaxio.encode(
        {"params": {"a": np.arange(4, dtype=np.float32), "b": {"c": np.ones((2, 2), np.float32)}}}
    )
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        tree = flaxio.decode(bytes(damaged[: data.draw(st.integers(0, len(good)))]))
    except CheckpointError:
        return
    assert all(isinstance(leaf, np.ndarray) for _, leaf in flaxio.leaves(tree))
