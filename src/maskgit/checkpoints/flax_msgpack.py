"""Read and write Flax's msgpack checkpoints with msgpack and numpy alone; nothing in a file is ever executed.

A checkpoint is a msgpack map of maps whose leaves are arrays. Flax marks them with extension types:
    1  an array: msgpack of [shape, dtype name, bytes in C order]
    2  a complex number: msgpack of [real, imaginary]
    3  a numpy scalar, written as an array of shape ()
and cuts an array of more than 2^30 bytes into chunks, a map {"__msgpack_chunked_array__": true, "shape": …,
"chunks": …} whose lists are maps with the keys "0", "1", ….

Source: flax.serialization (`msgpack_serialize`, `msgpack_restore`).
"""

import math
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import msgpack
import numpy as np

from maskgit.errors import CheckpointError

Tree = dict[str, Any]

MAX_CHUNK_BYTES = 2**30
_CHUNKED = "__msgpack_chunked_array__"
_DTYPES = {
    name: np.dtype(name)
    for name in [
        "bool",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "int8",
        "int16",
        "int32",
        "int64",
        "float16",
        "float32",
        "float64",
    ]
}
# msgpack allocates an array's list before it reads the items, so a header that lies would cost memory: no
# list or key of a checkpoint is longer than this.
_MAX_LIST = 64
_MAX_KEYS = 100_000
_MAX_KEY_LENGTH = 1024
_MAX_DEPTH = 32
_MAX_DIMENSIONS = 32


def decode(data: bytes | memoryview, collections: Container[str] | None = None) -> Tree:
    """Return the tree of numpy arrays in a Flax msgpack checkpoint.

    bfloat16 arrays come back as float32, which holds them exactly.

    Args:
        data: the whole file.
        collections: the keys at the top that are wanted, in whose place the others have None, whatever they hold;
            None is all.

    Returns:
        Nested dicts with str keys and numpy arrays as leaves.

    Raises:
        CheckpointError: the data are truncated, damaged, or not a Flax checkpoint.
    """
    try:
        tree = msgpack.unpackb(
            data,
            ext_hook=_extension,
            strict_map_key=True,
            raw=False,
            max_str_len=_MAX_KEY_LENGTH,
            max_bin_len=0,
            max_array_len=_MAX_LIST,
            max_map_len=_MAX_KEYS,
            max_ext_len=len(data),
        )
    # Whatever a damaged file makes msgpack raise (its own errors, ValueError, RecursionError), it is damaged.
    except Exception as error:
        raise CheckpointError(
            f"Not a Flax msgpack checkpoint, or a damaged one ({type(error).__name__}: {error})."
        ) from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"A Flax checkpoint is a map, but this file holds a {type(tree).__name__}.")
    if collections is not None:
        tree = {key: node if key in collections else None for key, node in tree.items()}
        wanted = {key: node for key, node in tree.items() if node is not None}
        return dict.fromkeys(tree) | _join_chunks(wanted, 0)
    return _join_chunks(tree, 0)


class _Refused(NamedTuple):
    """What stands in place of a value that cannot be read; it matters only where a value is wanted."""

    error: CheckpointError


def _extension(code: int, payload: bytes) -> Any:
    try:
        return _read_extension(code, payload)
    except CheckpointError as error:
        return _Refused(error)
    # As in `decode`.
    except Exception as error:
        return _Refused(
            CheckpointError(f"An array in the checkpoint is damaged ({type(error).__name__}: {error}).")
        )


def _read_extension(code: int, payload: bytes) -> Any:
    if code == 2:
        raise CheckpointError("The checkpoint holds complex numbers, which no MaskGIT has.")
    if code not in (1, 3):
        raise CheckpointError(f"The checkpoint holds the unknown extension type {code}.")
    parts = msgpack.unpackb(
        payload,
        raw=False,
        max_str_len=64,
        max_bin_len=len(payload),
        max_array_len=_MAX_LIST,
        max_map_len=0,
        max_ext_len=0,
    )
    if not isinstance(parts, list) or len(parts) != 3:
        raise CheckpointError("An array in the checkpoint is not [shape, dtype, bytes].")
    shape, dtype, buffer = parts
    sizes = isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS
    if not sizes or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise CheckpointError(f"An array in the checkpoint has the shape {shape!r:.80}.")
    if not isinstance(buffer, bytes) or not isinstance(dtype, str):
        raise CheckpointError("An array in the checkpoint lacks its dtype or its bytes.")
    return _array(tuple(shape), dtype, buffer)


def _array(shape: tuple[int, ...], dtype: str, buffer: bytes) -> np.ndarray:
    if dtype not in _DTYPES and dtype != "bfloat16":
        raise CheckpointError(f"An array in the checkpoint has the unsupported dtype {dtype!r:.80}.")
    item = np.dtype(np.uint16) if dtype == "bfloat16" else _DTYPES[dtype]
    if math.prod(shape) * item.itemsize != len(buffer):
        raise CheckpointError(
            f"An array of shape {shape} and dtype {dtype} has {len(buffer)} bytes instead of "
            f"{math.prod(shape) * item.itemsize}."
        )
    flat = np.frombuffer(buffer, item)
    if dtype == "bfloat16":
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    try:
        return flat.reshape(shape)
    except ValueError as error:  # numpy's own bounds, such as one size of 0 beside others that overflow
        raise CheckpointError(f"An array in the checkpoint has the impossible shape {shape}.") from error


def _join_chunks(node: Any, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise CheckpointError(f"The checkpoint is nested deeper than {_MAX_DEPTH} levels.")
    if isinstance(node, np.ndarray):
        return node
    if isinstance(node, _Refused):
        raise node.error
    if not isinstance(node, dict) or not all(isinstance(key, str) for key in node):
        raise CheckpointError(f"The checkpoint holds a {type(node).__name__} where an array should be.")
    if _CHUNKED not in node:
        return {key: _join_chunks(child, depth + 1) for key, child in node.items()}
    shape, chunks = _listed(node.get("shape")), _listed(node.get("chunks"))
    refused = next((chunk for chunk in chunks if isinstance(chunk, _Refused)), None)
    if refused is not None:
        raise refused.error
    if not chunks or not all(isinstance(c, np.ndarray) and c.ndim == 1 for c in chunks):
        raise CheckpointError("A chunked array in the checkpoint has no chunks.")
    sizes = len(shape) <= _MAX_DIMENSIONS and all(type(n) is int and 0 <= n < 2**40 for n in shape)
    if not sizes or math.prod(shape) != sum(c.size for c in chunks):
        raise CheckpointError(f"A chunked array in the checkpoint does not fill its shape {shape!r:.80}.")
    if len({c.dtype for c in chunks}) != 1:
        raise CheckpointError("A chunked array in the checkpoint changes its dtype.")
    try:
        return np.concatenate(chunks).reshape(shape)
    except ValueError as error:  # numpy's own bounds, such as one size of 0 beside others that overflow
        raise CheckpointError(
            f"A chunked array in the checkpoint has the impossible shape {shape!r:.80}."
        ) from error


def _listed(node: Any) -> list[Any]:
    """Return the items of a list, or of Flax's map {"0": …, "1": …} that stands for one."""
    if isinstance(node, list):
        return node
    if isinstance(node, dict) and all(str(i) in node for i in range(len(node))):
        return [node[str(i)] for i in range(len(node))]
    raise CheckpointError("A chunked array in the checkpoint lacks its shape or its chunks.")


def encode(tree: Tree) -> bytes:
    """Return a tree of numpy arrays as a Flax msgpack checkpoint, which `flax.serialization.from_bytes` reads.

    Args:
        tree: nested dicts with str keys and numpy arrays as leaves.
    """
    return msgpack.packb(_cut(tree), default=_write_extension, strict_types=True)


def _cut(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _cut(child) for key, child in node.items()}
    if node.nbytes <= MAX_CHUNK_BYTES:
        return node
    size = MAX_CHUNK_BYTES // node.dtype.itemsize
    flat = node.reshape(-1)
    chunks = [flat[i : i + size] for i in range(0, flat.size, size)]
    return {
        _CHUNKED: True,
        "shape": {str(i): n for i, n in enumerate(node.shape)},
        "chunks": {str(i): chunk for i, chunk in enumerate(chunks)},
    }


def _write_extension(node: Any) -> msgpack.ExtType:
    if not isinstance(node, np.ndarray):
        raise TypeError(f"cannot write a {type(node).__name__}")
    return msgpack.ExtType(1, msgpack.packb((node.shape, node.dtype.name, node.tobytes()), use_bin_type=True))


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("a/b/c", leaf) for every leaf of nested dicts."""
    for key, node in tree.items():
        if isinstance(node, dict):
            yield from leaves(node, f"{prefix}{key}/")
        else:
            yield prefix + key, node


def nest(flat: dict[str, Any]) -> Tree:
    """Return nested dicts for {"a/b/c": leaf}; the inverse of `leaves`."""
    tree: Tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
