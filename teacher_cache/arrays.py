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
from safetensors.numpy import load as load_safetensors

from teacher_cache.records import Array

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


def layout_from_metadata(metadata: bytes) -> ArrayLayout:
    """The layout that ``zarr.json`` describes; raises ``ValueError`` for an array of another make."""
    plain = json.loads(metadata)
    try:
        sharding = plain["codecs"][0]["configuration"]
        rows, *shape = plain["shape"]
        return ArrayLayout(
            plain["data_type"],
            tuple(shape),
            rows,
            sharding["chunk_shape"][0],
            any(codec["name"] == "zstd" for codec in sharding["codecs"]),
        )
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"not an array this package wrote ({error!r} missing in zarr.json)") from error


def view(buffer: Any, layout: ArrayLayout) -> npt.NDArray[Any]:
    """The array over the bytes of its uncompressed file, without a copy: (rows, *shape)."""
    count = layout.rows * math.prod(layout.shape)
    flat = np.frombuffer(buffer, np.dtype(layout.dtype).newbyteorder("<"), count=count)
    return flat.reshape(layout.rows, *layout.shape)


def load_safetensors_array(data: bytes, name: str) -> Array:
    """One tensor of a safetensors file as numpy; bfloat16, which numpy lacks, as float32."""
    (length,) = struct.unpack("<Q", data[:8])
    entry = json.loads(data[8 : 8 + length])[name]
    if entry["dtype"] != "BF16":
        return np.asarray(load_safetensors(data)[name])
    begin, end = entry["data_offsets"]
    raw = np.frombuffer(data, np.uint16, count=(end - begin) // 2, offset=8 + length + begin)
    return (raw.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])


def _json(plain: dict[str, Any]) -> bytes:
    return (json.dumps(plain, indent=1, sort_keys=True) + "\n").encode()
