"""One committed folder of a cache (a shard's, or its images'), open for reading."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zarr

from teacher_cache.arrays import ArrayLayout, data_file, layout_from_metadata, view
from teacher_cache.checksums import BLOCK_BYTES, INDEX, FileSum, read_file_sums, sha256
from teacher_cache.manifest import CacheError, Manifest
from teacher_cache.records import Array, Axis
from teacher_cache.store import parquet
from teacher_cache.store.maps import MAPS
from teacher_cache.store.names import array_files, known_names

REPAIR = "run teacher-cache verify --repair with the cache's configuration"
COUNTS: dict[Axis, tuple[str, str]] = {
    "token": ("token_start", "tokens"),
    "row": ("row_start", "rows"),
    "position": ("position_start", "positions"),
}
_PLACES = ("image_shard", "image_row")
_FIXED_BYTES = 8192


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
    ``manifest`` says which arrays, and so which files, there can be.
    """

    def __init__(
        self, files: Files, name: str, digest: str | None, checked: bool, url: str, manifest: Manifest
    ) -> None:
        self._files, self._name, self._checked, self._url = files, name, checked, url
        self._digest = digest
        index = self._read_index()
        self._sums, self.extra = read_file_sums(index)
        known_names(self._sums, folder_files(manifest, name), f"{url}/{name}/{INDEX}")
        self._arrays: dict[str, MappedArray | ZarrArray] = {}
        #: (images,) of an images folder: which lines hold an image that could be read
        self.present: npt.NDArray[np.bool_] | None = None
        if "position_start" in (columns := parquet.column_names(index)):
            columns = ["sample_id", "image_id", *_PLACES, *(c for pair in COUNTS.values() for c in pair)]
            self._read_lines(parquet.read_table(index, columns))
        elif "present" in columns:
            self.present = parquet.read_table(index, ["present"])["present"].to_numpy()

    def _read_lines(self, table: pa.Table) -> None:
        self.sample_ids: pa.Array = table["sample_id"].combine_chunks()
        self.image_ids: pa.Array = table["image_id"].combine_chunks()
        names = [*(c for pair in COUNTS.values() for c in pair), *_PLACES]
        #: (samples, 8) starts and counts of the axes in turn, then the image's shard and line
        numbers = np.stack([table[n].to_numpy() for n in names], -1).astype(np.int64)
        fits = bool(np.all(np.abs(numbers) < 1 << 31))
        self.numbers: npt.NDArray[np.signedinteger[Any]] = numbers.astype(np.int32) if fits else numbers

    @property
    def texts(self) -> pa.Table:
        """Questions and answers, read again each time: they are looked at, not trained on."""
        columns = ["questions", "answers", "original_answers", "source"]
        return parquet.read_table(self._read_index(), columns)

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
        metadata = self._files.path(f"{self._name}/{name}/zarr.json", self._sums[f"{name}/zarr.json"]).read_bytes()
        return str(json.loads(metadata)["dimension_names"][0])

    def begin(self, names: Sequence[str]) -> None:
        """Start to fetch the files of these arrays."""
        for file, sums in self._sums.items():
            if file.partition("/")[0] in names:
                self._files.begin(f"{self._name}/{file}", sums)

    def lengths(self) -> dict[str, int]:
        """Lines of every array, from its metadata."""
        names = [n.removesuffix("/zarr.json") for n in self._sums if n.endswith("/zarr.json")]
        return {name: self._layout(name).rows for name in names}

    @property
    def sums(self) -> dict[str, FileSum]:
        """Size and checksums of every file but the index."""
        return self._sums

    @property
    def memory_bytes(self) -> int:
        """About what the index takes in memory."""
        blocks = 36 * sum(len(sums.blocks) for sums in self._sums.values())
        lines = self.numbers.nbytes + self.sample_ids.nbytes + self.image_ids.nbytes if self.present is None else 0
        return _FIXED_BYTES + blocks + lines

    def close_vanished(self) -> None:
        """Let go of mapped files that were deleted, so that their space comes free."""
        self._arrays = {n: a for n, a in self._arrays.items() if a.path is None or a.path.exists()}

    def _read_index(self) -> bytes:
        where = f"{self._url}/{self._name}/{INDEX}"
        try:
            index = self._files.index(f"{self._name}/{INDEX}")
        except FileNotFoundError:
            raise CacheError(f"{self._url}/{self._name}: the folder or its {INDEX} is missing; {REPAIR}") from None
        if self._digest is not None and sha256(index) != self._digest:
            raise CacheError(f"{where}: changed after it was written; {REPAIR}")
        return index

    def _layout(self, name: str) -> ArrayLayout:
        where = f"{self._url}/{self._name}/{name}/zarr.json"
        sums = self._sums.get(f"{name}/zarr.json")
        if sums is None:
            raise CacheError(f"{where}: no such array in this folder; {REPAIR}")
        path = self._checked_path(f"{name}/zarr.json", sums)
        metadata = path.read_bytes()
        if self._checked:
            check_whole(metadata, sums, where)
        try:
            return layout_from_metadata(metadata)
        except ValueError as error:
            raise CacheError(f"{where}: {error}; {REPAIR}") from error

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

    def _open(self, name: str) -> MappedArray | ZarrArray:
        layout = self._layout(name)
        file = f"{name}/{data_file(layout)}"
        sums = self._sums.get(file)
        if sums is None:  # an array without lines has no file
            return ZarrArray(None, layout)
        if layout.compressed or layout.file_bytes != sums.bytes:
            path = self._checked_path(file, sums)
            if self._checked:
                check_whole(path.read_bytes(), sums, f"{self._url}/{self._name}/{file}")
            return ZarrArray(path, layout)
        where = f"{self._url}/{self._name}/{file}"
        return MappedArray(partial(self._checked_path, file, sums), layout, sums if self._checked else None, where)


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
        raw = MAPS.opening(self, lambda: _mapped_bytes(path))
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


class ZarrArray:
    """An array that cannot be mapped (compressed, or laid out by another writer), read by zarr."""

    def __init__(self, path: Path | None, layout: ArrayLayout) -> None:
        self.path = path
        folder = None if path is None else path.parents[len(layout.shape) + 1]
        self._array: Any = None if folder is None else zarr.open_array(str(folder), mode="r")
        self._empty = np.zeros((0, *layout.shape), layout.dtype)

    def lines(self, start: int, count: int) -> Array:
        if self._array is None:
            return self._empty
        return np.asarray(self._array[start : start + count])


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
