"""One committed folder of a cache (a shard's, or its images'), open for reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from teacher_cache.errors import CacheError
from teacher_cache.store.arrays import (
    ArrayLayout,
    chunk_rows_for,
    data_file,
    dimension_names,
    layout_from_metadata,
)
from teacher_cache.store.checksums import INDEX, FileSum, read_file_sums, sha256
from teacher_cache.store.index import REPAIR as REPAIR
from teacher_cache.store.index import (
    TEXT_LISTS,
    TEXTS,
    ImageLines,
    Lines,
    SampleLines,
    read_image_lines,
    read_sample_lines,
)
from teacher_cache.store.manifest import Manifest
from teacher_cache.store.names import array_files, known_names
from teacher_cache.store.open_arrays import CompressedArray, MappedArray, check_whole
from teacher_cache.store.records import Array, ArraySpec
from teacher_cache.store.tables import JSON_BYTES, read_table

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
    """The index in memory (``samples`` of a shard, ``images`` of an images folder), the arrays mapped on first use.

    ``digest``: sha256 of the index from the ledger; None where there is no ledger to trust. ``url`` is for messages.
    ``manifest`` says which arrays, and so which files, there can be. After construction every start, count and place
    in the index lies within its arrays' lines.

    Raises
    ------
    CacheError
        The index is missing, changed, of another cache, or says what cannot be; the message names it.
    """

    samples: SampleLines
    images: ImageLines

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
        self._lines: Lines
        if is_images:
            self.images = self._lines = read_image_lines(index, self._where)
        else:
            self.samples = self._lines = read_sample_lines(index, self._where, manifest)

    @property
    def texts(self) -> pa.Table:
        """Questions and answers, read again each time: they are looked at, not trained on."""
        table = read_table(self._read_index(), self._where, TEXTS)
        lengths = [pc.list_value_length(table[name]) for name in ("questions", "answers")]
        if any(pc.list_flatten(table[name]).null_count for name in TEXT_LISTS) or not lengths[0].equals(lengths[1]):
            raise CacheError(f"{self._where}: a sample without an answer to each of its questions; {REPAIR}")
        return table

    def lines(self, name: str, start: int, count: int) -> Array:
        """``count`` lines of array ``name``; a view where it is mapped."""
        array = self._arrays.get(name)
        if array is None:
            array = self._arrays[name] = self._open(name)
        return array.lines(start, count)

    def of(self, name: str, line: int) -> Array:
        """The lines of array ``name`` that sample (or image) ``line`` has; a view where it is mapped."""
        axis = self._specs[name].axis
        return self.lines(name, int(self._lines.starts[axis][line]), int(self._lines.counts[axis][line]))

    def total(self, name: str) -> int:
        """Lines of array ``name``, as the index counts them."""
        return self._lines.totals[self._specs[name].axis]

    def owner(self, name: str, line: int) -> int:
        """The sample (or image) that line ``line`` of array ``name`` is of."""
        axis = self._specs[name].axis
        return int(np.searchsorted(self._lines.starts[axis] + self._lines.counts[axis], line, side="right"))

    def line_bytes(self, name: str) -> int:
        """Bytes of one line of array ``name``."""
        return self._layout(name).line_bytes

    def begin(self, names: Sequence[str]) -> None:
        """Start to fetch the files of these arrays."""
        for file, sums in self._sums.items():
            if file.partition("/")[0] in names:
                self._files.begin(f"{self._name}/{file}", sums)

    @property
    def sums(self) -> dict[str, FileSum]:
        """Size and checksums of every file but the index."""
        return self._sums

    @property
    def memory_bytes(self) -> int:
        """About what the index takes in memory."""
        blocks = 36 * sum(len(sums.blocks) for sums in self._sums.values())
        return _FIXED_BYTES + blocks + self._lines.memory_bytes

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
        rows, chunk_bytes = self.total(name), self._manifest.layout["chunk_kilobytes"] * 1024
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


def gathered(spec: ArraySpec, places: Sequence[tuple[ShardFolder, int]]) -> Array:
    """The lines of an array that samples (or images) have, one after another; ``places``: folder and line in it."""
    parts = [folder.of(spec.name, line) for folder, line in places]
    return np.concatenate(parts) if parts else np.zeros((0, *spec.shape), spec.dtype)


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
