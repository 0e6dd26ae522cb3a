"""One array, one file: a Zarr v3 array whose single shard holds the rows one after another.

Zarr's sharding codec stores a shard as its inner chunks, then an index of (offset, length) pairs and the index's
CRC-32C. Written uncompressed and in order, with chunks of whole rows, the file *begins with the array's bytes*, so a
local reader maps it, and zarr, tensorstore and xarray read the same file through its index (a remote reader fetches
single chunks). The last chunk is padded to full size with zeros, as the codec demands.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs.zstd import Zstd

from teacher_cache.errors import CacheError
from teacher_cache.store.records import Array, ArraySpec
from teacher_cache.store.tables import json_object, mapping, whole

_ZARR_DTYPES = {
    "bool": "bool",
    "int8": "int8",
    "uint8": "uint8",
    "uint16": "uint16",
    "uint32": "uint32",
    "int64": "int64",
    "float16": "float16",
    "float32": "float32",
}


@dataclass(frozen=True)
class ArrayLayout:
    """How one array lies in its file: ``rows`` lines in chunks of ``chunk_rows``."""

    dtype: str
    shape: tuple[int, ...]
    rows: int
    chunk_rows: int
    compressed: bool = False

    @property
    def line_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * math.prod(self.shape))

    @property
    def chunks(self) -> int:
        return -(-self.rows // self.chunk_rows)

    @property
    def file_bytes(self) -> int:
        """Size of the file when nothing is compressed."""
        return self.chunks * self.chunk_rows * self.line_bytes + 16 * self.chunks + 4


def chunk_rows_for(line_bytes: int, rows: int, chunk_bytes: int) -> int:
    """Whole rows that make about ``chunk_bytes``, never more than there are."""
    return max(1, min(max(rows, 1), chunk_bytes // max(line_bytes, 1)))


def data_file(layout: ArrayLayout) -> str:
    """The one chunk key of the array, relative to its folder: ``c/0``, ``c/0/0`` …"""
    return "/".join(["c", *["0"] * (1 + len(layout.shape))])


def dimension_names(spec: ArraySpec) -> tuple[str, ...]:
    """The names of an array's axes, for xarray: ``row``, ``hidden_1``."""
    return (spec.axis, *(f"{spec.name}_{axis}" for axis in range(1, 1 + len(spec.shape))))


def zarr_metadata(layout: ArrayLayout, dimensions: tuple[str, ...]) -> bytes:
    """``zarr.json`` of the array; ``dimensions`` names its axes, for xarray."""
    inner = [layout.chunk_rows, *layout.shape]
    codecs: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if np.dtype(layout.dtype).itemsize == 1:
        codecs = [{"name": "bytes"}]
    if layout.compressed:
        codecs.append({"name": "zstd", "configuration": {"level": 3, "checksum": False}})
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": inner,
            "codecs": codecs,
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "index_location": "end",
        },
    }
    outer = [max(layout.chunks, 1) * layout.chunk_rows, *layout.shape]
    return _json(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [layout.rows, *layout.shape],
            "data_type": _ZARR_DTYPES[layout.dtype],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": outer}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": False if layout.dtype == "bool" else (0.0 if layout.dtype.startswith("float") else 0),
            "codecs": [sharding],
            "attributes": {},
            "dimension_names": list(dimensions),
        }
    )


def group_metadata(attributes: dict[str, Any]) -> bytes:
    return _json({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def shard_bytes(array: Array, layout: ArrayLayout) -> list[bytes | memoryview]:
    """The parts of the array's file, in order; nothing is copied that need not be."""
    array = np.ascontiguousarray(array, np.dtype(layout.dtype).newbyteorder("<"))
    assert array.shape == (layout.rows, *layout.shape), (array.shape, layout)
    chunk = layout.chunk_rows * layout.line_bytes
    body: list[bytes | memoryview] = []
    index = np.empty((layout.chunks, 2), "<u8")
    if not layout.compressed:
        body = [array.reshape(-1).view(np.uint8).data, b"\0" * (layout.chunks * chunk - array.nbytes)]
        index[:, 0], index[:, 1] = np.arange(layout.chunks, dtype=np.uint64) * chunk, chunk
    else:
        offset = 0
        raw = array.tobytes().ljust(layout.chunks * chunk, b"\0")
        for number in range(layout.chunks):
            packed = bytes(Zstd(level=3).encode(raw[number * chunk : (number + 1) * chunk]))
            index[number] = offset, len(packed)
            body.append(packed)
            offset += len(packed)
    encoded = index.tobytes()
    return [*body, encoded, struct.pack("<I", google_crc32c.value(encoded))]


def layout_from_metadata(metadata: bytes, dimensions: tuple[str, ...], where: str) -> ArrayLayout:
    """The layout that ``zarr.json`` describes.

    The file must be just what :func:`zarr_metadata` writes for it, so no other codec, grid or attribute of a stranger
    is ever acted on; ``CacheError`` names it (``where``) otherwise.
    """
    plain = json_object(metadata, where)
    try:
        sharding = plain["codecs"][0]["configuration"]
        rows, *shape = (whole(n, 0, 1 << 48, "shape", where) for n in plain["shape"])
        layout = ArrayLayout(
            plain["data_type"],
            tuple(shape),
            rows,
            whole(sharding["chunk_shape"][0], 1, 1 << 48, "chunk_shape", where),
            any(codec["name"] == "zstd" for codec in sharding["codecs"]),
        )
        same = json.loads(zarr_metadata(layout, dimensions)) == plain
    except CacheError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise CacheError(f"{where}: not an array this package wrote ({error!r})") from error
    if not same:
        raise CacheError(f"{where}: not an array this package wrote (not as it writes one of this shape)")
    return layout


def view(buffer: Any, layout: ArrayLayout) -> npt.NDArray[Any]:
    """The array over the bytes of its uncompressed file, without a copy: (rows, *shape)."""
    count = layout.rows * math.prod(layout.shape)
    flat = np.frombuffer(buffer, np.dtype(layout.dtype).newbyteorder("<"), count=count)
    return flat.reshape(layout.rows, *layout.shape)


def load_safetensors_array(data: bytes, name: str, where: str, shape: tuple[int, ...]) -> Array:
    """The tensor ``name`` (of ``shape``) of a safetensors file as numpy; bfloat16, which numpy lacks, as float32.

    Raises ``CacheError``, which names the file (``where``), for another file, another shape, or one that is cut.
    """
    entry = tensor_entries(data, where).get(name)
    if entry is None:
        raise CacheError(f"{where}: no tensor {name!r} in it")
    kind, found, raw = entry
    if found != shape:
        raise CacheError(f"{where}: {name}: expected the shape {shape}, found {found}")
    if kind != "BF16":
        return np.array(np.frombuffer(raw, _TENSOR_DTYPES[kind]).reshape(shape))
    return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)


def tensor_entries(data: bytes, where: str) -> dict[str, tuple[str, tuple[int, ...], memoryview]]:
    """(dtype, shape, bytes) by name of a safetensors file of floating-point tensors, every number checked."""
    if len(data) < 8 or (length := struct.unpack("<Q", data[:8])[0]) > len(data) - 8:
        found = "an empty file" if not data else f"a file of {len(data):,} bytes that ends within its header"
        raise CacheError(f"{where}: expected safetensors, found {found}")
    body = memoryview(data)[8 + length :]
    entries = {}
    for name, entry in json_object(data[8 : 8 + length], where).items():
        if name == "__metadata__":
            continue
        entry = mapping(entry, ascii(name)[:80], where)
        kind, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if kind not in _TENSOR_DTYPES or not isinstance(shape, list) or not isinstance(offsets, list):
            raise CacheError(f"{where}: {ascii(name)[:80]}: not a tensor that a cache holds")
        sizes = tuple(whole(n, 0, 1 << 40, "shape", where) for n in shape)
        begin, end = (whole(n, 0, 1 << 62, "data_offsets", where) for n in (*offsets, -1, -1)[:2])
        if not begin <= end <= len(body) or end - begin != np.dtype(_TENSOR_DTYPES[kind]).itemsize * math.prod(sizes):
            raise CacheError(f"{where}: {ascii(name)[:80]}: {sizes} of {kind} do not lie at bytes {begin:,} to {end:,}")
        entries[name] = (kind, sizes, body[begin:end])
    return entries


def safetensors_facts(data: bytes, where: str) -> dict[str, Any]:
    """The file's own metadata; call :func:`tensor_entries` first, which checks the header."""
    (length,) = struct.unpack("<Q", data[:8])
    return mapping(json_object(data[8 : 8 + length], where).get("__metadata__", {}), "__metadata__", where)


_TENSOR_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def _json(plain: dict[str, Any]) -> bytes:
    return (json.dumps(plain, indent=1, sort_keys=True) + "\n").encode()
