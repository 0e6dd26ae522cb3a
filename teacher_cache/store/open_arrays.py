"""An array of a folder that lies on this machine, read by lines: mapped as it is, or unpacked chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from teacher_cache.errors import CacheError
from teacher_cache.store.arrays import ArrayLayout, view
from teacher_cache.store.checksums import BLOCK_BYTES, FileSum
from teacher_cache.store.faults import patiently
from teacher_cache.store.index import REPAIR
from teacher_cache.store.maps import MAPS
from teacher_cache.store.records import Array

_LARGE_READ, _MOST_RATIO = 256 << 20, 1000
"""More lines than this of a compressed array at once must come out of a file at least a thousandth as large."""


class MappedArray:
    """An uncompressed array over its mapped file; blocks are checked when first touched.

    ``locate`` gives the file, of the right size; ``sums``: its checksums, None to trust it. The map may be let go of
    between two reads (``maps.py``).
    """

    __slots__ = (
        *("_file", "_layout", "_line_bytes", "_locate", "_mapped", "_sums", "_unchecked", "_where"),
        *("__weakref__", "path", "used"),
    )

    def __init__(self, locate: Callable[[], Path], layout: ArrayLayout, sums: FileSum | None, where: str) -> None:
        self._locate, self._layout, self._sums, self._where = locate, layout, sums, where
        self._line_bytes = layout.line_bytes
        self.path: Path | None = None
        self.used = True
        self._file: tuple[int, int, int] | None = None
        self._mapped: tuple[Array, Array] | None = None
        self._unchecked: bytearray | None = None

    def lines(self, start: int, count: int) -> Array:
        mapped = self._mapped
        if mapped is None:
            mapped = self._map()
        self.used = True
        if self._unchecked is not None:
            first = start * self._line_bytes // BLOCK_BYTES
            last = max(first, ((start + count) * self._line_bytes - 1) // BLOCK_BYTES)
            if 1 in self._unchecked[first : last + 1]:
                self._check(mapped[0], self._unchecked, first, last)
        return mapped[1][start : start + count]

    def unmap(self) -> None:
        self._mapped = None

    def _map(self) -> tuple[Array, Array]:
        """The file's bytes and the array over them, of a file that is another one than last time unchecked again."""
        path = self._locate()
        status = path.stat()
        file = (status.st_dev, status.st_ino, status.st_mtime_ns)
        if file != self._file:
            self._unchecked = bytearray(b"\1" * len(self._sums.blocks)) if self._sums is not None else None
        raw = patiently("read", str(path), lambda: MAPS.opening(self, lambda: _mapped_bytes(path)))
        self.path, self._file, self._mapped = path, file, (raw, view(raw, self._layout))
        return self._mapped

    def _check(self, raw: Array, unchecked: bytearray, first: int, last: int) -> None:
        assert self._sums is not None
        for block in range(first, last + 1):
            if unchecked[block]:
                data = raw[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
                check_block(data, self._sums.blocks[block], block, self._where)
                unchecked[block] = 0
        if 1 not in unchecked:
            self._unchecked = None


def _mapped_bytes(path: Path) -> Array:
    with pa.memory_map(str(path)) as file:  # keeps no file descriptor open, unlike mmap and numpy.memmap
        return np.frombuffer(file.read_buffer(), np.uint8)


class CompressedArray:
    """An array of zstd frames, one for each chunk, unpacked when read; ``path`` None: an array without lines.

    A frame is given just the room of a chunk, so whatever a stranger's file says, no more is unpacked.
    """

    def __init__(self, path: Path | None, layout: ArrayLayout, where: str) -> None:
        self.path, self._layout, self._where = path, layout, where
        if path is None:
            return
        with pa.memory_map(str(path)) as file:
            self._bytes = np.frombuffer(file.read_buffer(), np.uint8)
        size = 16 * layout.chunks + 4
        if len(self._bytes) < size:
            raise CacheError(f"{where}: {len(self._bytes):,} bytes, too few for {layout.chunks:,} chunks; {REPAIR}")
        self._index = self._bytes[-size:-4].tobytes()
        places = np.frombuffer(self._index, "<u8").reshape(-1, 2)
        if (places > len(self._bytes)).any() or (places.sum(-1) > len(self._bytes) - size).any():
            raise CacheError(f"{where}: a chunk beyond the end of the file; {REPAIR}")
        self._places = places.tolist()

    def lines(self, start: int, count: int) -> Array:
        layout = self._layout
        shape = (count, *layout.shape)
        wanted = count * layout.line_bytes
        if self.path is None or not count:
            return np.zeros((0, *layout.shape), layout.dtype)
        if wanted > _LARGE_READ and wanted > _MOST_RATIO * len(self._bytes):
            unpacked = f"{len(self._bytes):,} bytes that unpack to {wanted:,}"
            raise CacheError(f"{self._where}: {unpacked}: no cache of teacher-cache does; do not use it")
        first, last = start // layout.chunk_rows, (start + count - 1) // layout.chunk_rows
        data = b"".join(self._chunk(number) for number in range(first, last + 1))
        offset = (start - first * layout.chunk_rows) * layout.line_bytes
        flat = np.frombuffer(data, np.dtype(layout.dtype).newbyteorder("<"), math.prod(shape), offset)
        return flat.reshape(shape).astype(layout.dtype, copy=False)

    def _chunk(self, number: int) -> bytes:
        offset, length = self._places[number]
        size = self._layout.chunk_rows * self._layout.line_bytes
        try:
            data = pa.decompress(self._bytes[offset : offset + length].tobytes(), size, codec="zstd", asbytes=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CacheError(f"{self._where}: chunk {number} cannot be unpacked ({error}); {REPAIR}") from error
        if len(data) != size:
            raise CacheError(f"{self._where}: chunk {number} has {len(data):,} bytes, expected {size:,}; {REPAIR}")
        return bytes(data)


def check_whole(data: bytes, sums: FileSum, where: str) -> None:
    """Raises ``CacheError`` at the first block whose checksum does not fit."""
    if len(data) != sums.bytes:
        raise CacheError(f"{where}: expected {sums.bytes:,} bytes, found {len(data):,}; {REPAIR}")
    array = np.frombuffer(data, np.uint8)
    for block, expected in enumerate(sums.blocks):
        check_block(array[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES], expected, block, where)


def check_block(data: npt.NDArray[np.uint8], expected: int, block: int, where: str) -> None:
    found = google_crc32c.value(data)
    if found != expected:
        raise CacheError(
            f"{where}: bytes {block * BLOCK_BYTES:,}–{block * BLOCK_BYTES + len(data) - 1:,} were changed after they "
            f"were written (CRC-32C {found:08x}, expected {expected:08x}); {REPAIR}"
        )
