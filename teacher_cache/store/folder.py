"""One committed folder of a cache (a shard's, or its images'), open for reading."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from teacher_cache.errors import CacheError
from teacher_cache.store.arrays import (
    ArrayLayout,
    chunk_rows_for,
    data_file,
    dimension_names,
    layout_from_metadata,
    view,
)
from teacher_cache.store.checksums import BLOCK_BYTES, INDEX, FileSum, read_file_sums, sha256
from teacher_cache.store.faults import patiently
from teacher_cache.store.manifest import Manifest
from teacher_cache.store.maps import MAPS
from teacher_cache.store.names import array_files, known_names
from teacher_cache.store.records import Array, ArraySpec, Axis
from teacher_cache.store.tables import JSON_BYTES, parquet_file, read_table

REPAIR = "run teacher-cache verify --repair with the cache's configuration"
COUNTS: dict[Axis, tuple[str, str]] = {
    "token": ("token_start", "tokens"),
    "row": ("row_start", "rows"),
    "position": ("position_start", "positions"),
}
_PLACES = ("image_shard", "image_row")
_FIXED_BYTES = 8192
_LINES = {
    "sample_id": pa.string(),
    "image_id": pa.string(),
    **dict.fromkeys(_PLACES, pa.int32()),
    **{name: pa.int64() for pair in COUNTS.values() for name in pair},
}
_TEXTS = {
    **dict.fromkeys(("questions", "answers", "original_answers"), pa.list_(pa.string())),
    "source": pa.string(),
}
MOST_LINES = 1 << 24
"""Tokens, rows or positions of one sample: as many as ``teacher.max_length`` may be."""
_LARGE_READ, _MOST_RATIO = 256 << 20, 1000
"""More lines than this of a compressed array at once must come out of a file at least a thousandth as large."""


class Files(Protocol):
    """Where the files of a folder come from: the cache itself, or a local copy of a remote one."""

    def path(self, name: str, expected: FileSum) -> Path:
        """A local file with the content of ``name``, of the expected size."""
        ...

    def begin(self, name: str, expected: FileSum) -> object:
        """Start to fetch ``name``, where there is anything to fetch."""
        ...

    def index(self, name: str) -> bytes:
        """The bytes of an index; ``FileNotFoundError`` when there is none."""
        ...


class ShardFolder:
    """The index in memory, the arrays mapped on first use.

    ``digest``: sha256 of the index from the ledger; None where there is no ledger to trust. ``url`` is for messages.
    ``manifest`` says which arrays, and so which files, there can be. After construction every start, count and place
    in the index lies within its arrays' lines.

    Raises
    ------
    CacheError
        The index is missing, changed, of another cache, or says what cannot be; the message names it.
    """

    def __init__(
        self, files: Files, name: str, digest: str | None, checked: bool, url: str, manifest: Manifest
    ) -> None:
        self._files, self._name, self._checked, self._url = files, name, checked, url
        self._digest, self._manifest = digest, manifest
        self._where = f"{url}/{name}/{INDEX}"
        index = self._read_index()
        self._sums, self.extra = read_file_sums(index, self._where)
        check_owner(self._where, name, self.extra, manifest)
        is_images = name.startswith("images/")
        specs = manifest.image_arrays if is_images else manifest.arrays
        self._specs: dict[str, ArraySpec] = {spec.name: spec for spec in specs}
        known_names(self._sums, folder_files(manifest, name), self._where)
        self._arrays: dict[str, MappedArray | CompressedArray] = {}
        #: (images,) of an images folder: which lines hold an image that could be read
        self.present: npt.NDArray[np.bool_] | None = None
        self._totals: dict[str, int] = {}
        if is_images:
            columns = {"image_id": pa.string(), "present": pa.bool_()}
            self.present = read_table(index, self._where, columns)["present"].to_numpy()
            self._totals["image"] = len(self.present)
        else:
            known = "image_checksum" in parquet_file(index, self._where).schema_arrow.names
            self._read_lines(
                read_table(index, self._where, _LINES | ({"image_checksum": pa.string()} if known else {}))
            )

    def _read_lines(self, table: pa.Table) -> None:
        self.sample_ids: pa.Array = table["sample_id"].combine_chunks()
        self.image_ids: pa.Array = table["image_id"].combine_chunks()
        #: of the images' bytes; None in a cache of 0.1, which has none
        self.image_checksums: pa.Array | None = None
        if "image_checksum" in table.column_names:
            self.image_checksums = table["image_checksum"].combine_chunks()
        names = [*(c for pair in COUNTS.values() for c in pair), *_PLACES]
        #: (samples, 8) starts and counts of the axes in turn, then the image's shard and line
        numbers = np.stack([table[n].to_numpy() for n in names], -1).astype(np.int64)
        for number, axis in enumerate(COUNTS):
            starts, counts = numbers[:, 2 * number], numbers[:, 2 * number + 1]
            if (counts < 0).any() or (counts > MOST_LINES).any() or (starts != np.cumsum(counts) - counts).any():
                raise CacheError(f"{self._where}: the starts on axis {axis} do not follow from the counts; {REPAIR}")
            self._totals[axis] = int(counts.sum())
        planned = self._manifest.layout["shard_samples"]
        if len(table) > planned:
            raise CacheError(f"{self._where}: {len(table):,} samples, but a shard of this cache has {planned:,}")
        fits = bool(np.all(np.abs(numbers) < 1 << 31))
        self.numbers: npt.NDArray[np.signedinteger[Any]] = numbers.astype(np.int32) if fits else numbers

    @property
    def texts(self) -> pa.Table:
        """Questions and answers, read again each time: they are looked at, not trained on."""
        table = read_table(self._read_index(), self._where, _TEXTS)
        lengths = [pc.list_value_length(table[name]) for name in ("questions", "answers")]
        empty = any(pc.list_flatten(table[name]).null_count for name in ("questions", "answers", "original_answers"))
        if empty or not lengths[0].equals(lengths[1]):
            raise CacheError(f"{self._where}: a sample without an answer to each of its questions; {REPAIR}")
        return table

    def image_checksum(self, line: int) -> str:
        """Of the bytes of the sample's image as the teacher saw them; empty where nobody knows it."""
        return self.image_checksums[line].as_py() or "" if self.image_checksums is not None else ""

    def lines(self, name: str, start: int, count: int) -> Array:
        """``count`` lines of array ``name``; a view where it is mapped."""
        array = self._arrays.get(name)
        if array is None:
            array = self._arrays[name] = self._open(name)
        return array.lines(start, count)

    def line_bytes(self, name: str) -> int:
        """Bytes of one line of array ``name``."""
        return self._layout(name).line_bytes

    def axis(self, name: str) -> str:
        """What the lines of array ``name`` are: token, row, position or image."""
        return self._specs[name].axis

    def begin(self, names: Sequence[str]) -> None:
        """Start to fetch the files of these arrays."""
        for file, sums in self._sums.items():
            if file.partition("/")[0] in names:
                self._files.begin(f"{self._name}/{file}", sums)

    def lengths(self) -> dict[str, int]:
        """Lines of every array, from its metadata."""
        return {name: self._layout(name).rows for name in self._specs}

    @property
    def sums(self) -> dict[str, FileSum]:
        """Size and checksums of every file but the index."""
        return self._sums

    @property
    def memory_bytes(self) -> int:
        """About what the index takes in memory."""
        blocks = 36 * sum(len(sums.blocks) for sums in self._sums.values())
        if self.present is not None:
            return _FIXED_BYTES + blocks
        checksums = self.image_checksums.nbytes if self.image_checksums is not None else 0
        return int(
            _FIXED_BYTES + blocks + self.numbers.nbytes + self.sample_ids.nbytes + self.image_ids.nbytes + checksums
        )

    def close_vanished(self) -> None:
        """Let go of mapped files that were deleted, so that their space comes free."""
        self._arrays = {n: a for n, a in self._arrays.items() if a.path is None or a.path.exists()}

    def _read_index(self) -> bytes:
        try:
            index = self._files.index(f"{self._name}/{INDEX}")
        except FileNotFoundError:
            raise CacheError(f"{self._url}/{self._name}: the folder or its {INDEX} is missing; {REPAIR}") from None
        if self._digest is not None and sha256(index) != self._digest:
            raise CacheError(f"{self._where}: changed after it was written; {REPAIR}")
        return index

    def _layout(self, name: str) -> ArrayLayout:
        where = f"{self._url}/{self._name}/{name}/zarr.json"
        sums = self._sums.get(f"{name}/zarr.json")
        if sums is None:
            raise CacheError(f"{where}: no such array in this folder; {REPAIR}")
        if sums.bytes > JSON_BYTES:
            raise CacheError(f"{where}: {sums.bytes:,} bytes of JSON, expected at most {JSON_BYTES:,}")
        path = self._checked_path(f"{name}/zarr.json", sums)
        metadata = path.read_bytes()
        if self._checked:
            check_whole(metadata, sums, where)
        spec = self._specs[name]
        layout = layout_from_metadata(metadata, dimension_names(spec), where)
        if (layout.dtype, layout.shape) != (spec.dtype, spec.shape):
            raise CacheError(f"{where}: {layout.dtype} {layout.shape}, expected {spec.dtype} {spec.shape}; {REPAIR}")
        rows, chunk_bytes = self._totals[spec.axis], self._manifest.layout["chunk_kilobytes"] * 1024
        if layout.rows != rows or layout.chunk_rows != chunk_rows_for(spec.line_bytes, rows, chunk_bytes):
            raise CacheError(f"{where}: {layout.rows:,} lines, but the index counts {rows:,}; {REPAIR}")
        return layout

    def _checked_path(self, file: str, sums: FileSum) -> Path:
        where = f"{self._url}/{self._name}/{file}"
        try:
            path = self._files.path(f"{self._name}/{file}", sums)
            size = path.stat().st_size
        except FileNotFoundError:
            raise CacheError(f"{where}: expected {sums.bytes:,} bytes, found no file; {REPAIR}") from None
        if size != sums.bytes:
            raise CacheError(f"{where}: expected {sums.bytes:,} bytes, found {size:,} bytes; {REPAIR}")
        return path

    def _open(self, name: str) -> MappedArray | CompressedArray:
        layout = self._layout(name)
        file = f"{name}/{data_file(layout)}"
        where = f"{self._url}/{self._name}/{file}"
        sums = self._sums.get(file)
        if sums is None and layout.rows:
            raise CacheError(f"{where}: {layout.rows:,} lines, but its index knows no such file; {REPAIR}")
        if sums is None:  # an array without lines has no file
            return CompressedArray(None, layout, where)
        if layout.compressed:
            path = self._checked_path(file, sums)
            if self._checked:
                check_whole(path.read_bytes(), sums, where)
            return CompressedArray(path, layout, where)
        if layout.file_bytes != sums.bytes:
            raise CacheError(f"{where}: {sums.bytes:,} bytes, but its lines take {layout.file_bytes:,}; {REPAIR}")
        return MappedArray(partial(self._checked_path, file, sums), layout, sums if self._checked else None, where)


def check_owner(where: str, name: str, facts: Mapping[str, Any], manifest: Manifest) -> None:
    """Refuse the index (``facts`` are its metadata) of another cache, or of another folder of this one."""
    if facts["fingerprint"] != manifest.fingerprint:
        raise CacheError(
            f"{where}: made with other settings (fingerprint {facts['fingerprint'][:12]}, expected "
            f"{manifest.fingerprint[:12]}); {REPAIR}"
        )
    if facts["shard"] != int(name.rpartition("/")[2]):
        raise CacheError(f"{where}: the index of shard {facts['shard']}; {REPAIR}")
    if name.startswith("shards/") and "skipped" not in facts:
        raise CacheError(f"{where}: skipped is missing; {REPAIR}")


def folder_files(manifest: Manifest, name: str) -> set[str]:
    """Every file, but the index, that the folder ``shards/00000`` or ``images/00000`` of this cache may hold."""
    specs = manifest.image_arrays if name.startswith("images/") else manifest.arrays
    return {"zarr.json"}.union(*(array_files(spec.name, 1 + len(spec.shape)) for spec in specs))


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
