"""Reading a cache: any sample by number, any batch, in any order, from any number of processes.

Local uncompressed shards are mapped and sliced; everything else goes through zarr. A remote cache is read shard by
shard through a bounded local folder. Opening costs the same for a thousand and a million samples: the ledger has a
line per shard, and a shard's index is read when one of its samples is. With ``checked`` (the default) every block of
1 MiB is compared with its checksum the first time it is touched, so a changed byte is never returned as data.
"""

from __future__ import annotations

import bisect
import dataclasses
import io
import mmap
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from safetensors.numpy import load as load_safetensors

from teacher_cache.arrays import ArrayLayout, data_file, layout_from_metadata, view
from teacher_cache.codecs import ChannelScales
from teacher_cache.manifest import CacheError, Manifest, read_manifest
from teacher_cache.records import Array, Axis, TeacherRecord
from teacher_cache.storage import Storage
from teacher_cache.writer import (
    BLOCK_BYTES,
    HEAD,
    INDEX,
    LEDGER,
    SCALES,
    FileSum,
    images_name,
    read_file_sums,
    sha256,
    shard_name,
)

_COUNTS: dict[Axis, tuple[str, str]] = {
    "token": ("token_start", "tokens"),
    "row": ("row_start", "rows"),
    "position": ("position_start", "positions"),
}


@dataclass(frozen=True)
class RecordBatch:
    """Several samples, their lines one after another.

    ``arrays[name]`` (Σ lines, …) in the order of ``indices`` · ``counts[axis]`` (B,) lines of each sample on the axes
    token, row, position · ``image_places`` (B, 2) shard and line of each sample's image, −1 where there is none.
    """

    indices: npt.NDArray[np.int64]
    sample_ids: list[str]
    image_ids: list[str]
    arrays: dict[str, Array]
    counts: dict[Axis, npt.NDArray[np.int64]]
    image_places: npt.NDArray[np.int64]


class TeacherCache:
    """A complete, readable cache.

    >>> with TeacherCache.open("runs/tiny/cache") as cache:          # doctest: +SKIP
    ...     batch = cache.read([5, 0, 17])
    """

    def __init__(
        self,
        storage: Storage,
        *,
        checked: bool = True,
        prefetch_folder: str | Path | None = None,
        prefetch_gigabytes: float = 20.0,
    ) -> None:
        self._arguments = (storage, checked, prefetch_folder, prefetch_gigabytes)
        self.storage, self._checked = storage, checked
        self.manifest: Manifest = read_manifest(storage)
        if not self.manifest.complete:
            raise CacheError(
                f"{storage.url}: the cache is not complete ({self.manifest.planned_shards} shards planned). "
                "Finish it: run teacher-cache build with the same configuration"
            )
        ledger = self._side_file(LEDGER)
        table = pq.read_table(io.BytesIO(ledger), columns=["samples", "index_sha256", "images_sha256"])
        self._first = np.concatenate([[0], np.cumsum(table["samples"].to_numpy())])
        self._index_digests = table["index_sha256"]
        self._images_digests = table["images_sha256"]
        self._local = None if storage.local is not None else _LocalCopy(storage, prefetch_folder, prefetch_gigabytes)
        self._shards: OrderedDict[tuple[str, int], _Folder] = OrderedDict()
        self._axes: dict[str, Axis] = {spec.name: spec.axis for spec in self.manifest.arrays}

    @classmethod
    def open(
        cls,
        url: str | Path,
        *,
        tokenizer_fingerprint: str | None = None,
        checked: bool = True,
        options: Mapping[str, Any] | None = None,
        prefetch_folder: str | Path | None = None,
        prefetch_gigabytes: float = 20.0,
    ) -> TeacherCache:
        """Open the cache at ``url`` (a folder, or ``s3://``, ``gs://``, ``memory://`` with fsspec ``options``).

        Raises
        ------
        CacheError
            No cache, not complete, another format version, changed files, or a tokenizer (given by its
            ``tokenization.tokenizer_fingerprint``) other than the teacher's.
        """
        cache = cls(
            Storage(url, options),
            checked=checked,
            prefetch_folder=prefetch_folder,
            prefetch_gigabytes=prefetch_gigabytes,
        )
        if tokenizer_fingerprint is not None:
            cache.check_tokenizer(tokenizer_fingerprint)
        return cache

    def check_tokenizer(self, fingerprint: str) -> None:
        """Refuse a student whose token ids mean other text than the teacher's."""
        if fingerprint != self.manifest.teacher["tokenizer"]:
            raise CacheError(
                f"{self.storage.url}: the cache was made with the tokenizer of {self.manifest.teacher['model']} "
                f"(fingerprint {self.manifest.teacher['tokenizer'][:12]}), the student's is another "
                f"({fingerprint[:12]}). Logits can be distilled only between models of one tokenizer: use a student "
                "with the teacher's tokenizer, or cache a teacher that has the student's"
            )

    def __enter__(self) -> TeacherCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._shards.clear()
        if self._local is not None:
            self._local.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"arguments": self._arguments}

    def __setstate__(self, state: dict[str, Any]) -> None:
        storage, checked, folder, gigabytes = state["arguments"]
        self.__init__(  # type: ignore[misc]
            storage, checked=checked, prefetch_folder=folder, prefetch_gigabytes=gigabytes
        )

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> TeacherRecord:
        """One sample, whole."""
        folder, line = self._locate(index)
        batch = self.read([index])
        texts = folder.texts.slice(line, 1).to_pylist()[0]
        return TeacherRecord(
            sample_id=batch.sample_ids[0],
            image_id=batch.image_ids[0],
            questions=tuple(texts["questions"]),
            answers=tuple(texts["answers"]),
            original_answers=tuple(texts["original_answers"]),
            source=texts["source"],
            arrays=batch.arrays,
        )

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64], names: Sequence[str] | None = None) -> RecordBatch:
        """The samples ``indices``, with all arrays or just ``names``, each array gathered in one go.

        Raises
        ------
        CacheError
            A checksum does not fit: names the shard, the file and what to run.
        IndexError
            An index outside 0 … len − 1.
        """
        wanted = list(self._axes) if names is None else list(names)
        places = [self._locate(int(i)) for i in indices]
        counts: dict[Axis, npt.NDArray[np.int64]] = {}
        starts: dict[Axis, npt.NDArray[np.int64]] = {}
        for axis in _COUNTS:
            starts[axis] = np.array([f.starts[axis][line] for f, line in places], np.int64)
            counts[axis] = np.array([f.counts[axis][line] for f, line in places], np.int64)
        arrays = {
            name: self._gather(name, places, starts[self._axes[name]], counts[self._axes[name]]) for name in wanted
        }
        return RecordBatch(
            indices=np.asarray(indices, np.int64),
            sample_ids=[f.sample_ids[line].as_py() for f, line in places],
            image_ids=[f.image_ids[line].as_py() for f, line in places],
            arrays=arrays,
            counts=counts,
            image_places=np.array([f.image_places[line] for f, line in places], np.int64).reshape(-1, 2),
        )

    def read_images(self, places: npt.NDArray[np.int64], names: Sequence[str] | None = None) -> dict[str, Array]:
        """Arrays of images at ``places`` (B, 2), (B, …) each; the places come from :attr:`RecordBatch.image_places`.

        Raises ``CacheError`` when the cache holds no visual signal, ``IndexError`` for a place of −1.
        """
        specs = self.manifest.image_arrays
        if not specs:
            raise CacheError(
                f"{self.storage.url}: no visual states in this cache (signals.visual is none). "
                "Build one with signals.visual set to states, topk or gram"
            )
        out = {}
        for spec in specs:
            if names is not None and spec.name not in names:
                continue
            out[spec.name] = np.empty((len(places), *spec.shape), spec.dtype)
            for line, (shard, row) in enumerate(places):
                if shard < 0:
                    raise IndexError("a text-only sample has no image states")
                out[spec.name][line] = self._folder(images_name, int(shard)).lines(spec.name, int(row), 1)[0]
        return out

    def counts(self, axis: Axis) -> npt.NDArray[np.int64]:
        """(M,) lines of every sample on ``axis``; reads the index of every shard."""
        parts = [self._folder(shard_name, n).counts[axis] for n in range(len(self._first) - 1)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def has_image(self) -> npt.NDArray[np.bool_]:
        """(M,) which samples have an image; reads the index of every shard."""
        parts = [
            np.array([bool(i.as_py()) for i in self._folder(shard_name, n).image_ids], np.bool_) for n in self._numbers
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.bool_)

    def sample_ids(self) -> Iterator[str]:
        """Every sample_id in order."""
        for number in self._numbers:
            yield from (i.as_py() for i in self._folder(shard_name, number).sample_ids)

    def find(self, sample_id: str) -> int:
        """The number of ``sample_id``; raises ``KeyError`` when the cache does not hold it."""
        for index, found in enumerate(self.sample_ids()):
            if found == sample_id:
                return index
        raise KeyError(f"{self.storage.url}: no sample {sample_id!r} (skipped ones are listed in skipped.jsonl)")

    def shard_of(self, index: int) -> int:
        """Which shard holds sample ``index``."""
        return bisect.bisect_right(self._first, index) - 1

    @property
    def shard_starts(self) -> npt.NDArray[np.int64]:
        """(shards + 1,) number of the first sample of each shard, and the number of samples."""
        return self._first.astype(np.int64)

    @cached_property
    def head(self) -> Array:
        """(V, d) the teacher's output projection: ``hidden @ head.T`` are its logits. bfloat16 comes as float32."""
        return load_safetensors_array(self._side_file(HEAD), "head")

    @cached_property
    def scales(self) -> dict[str, ChannelScales]:
        """What the codec needs beside the rows, by array name (``hidden``, ``hidden_second_last``, ``visual``)."""
        return scales_from_bytes(self._side_file(SCALES)) if SCALES in self.manifest.files else {}

    def prefetch(self, shards: Sequence[int]) -> None:
        """Begin to copy these shards of a remote cache; a local one has nothing to do."""
        if self._local is not None:
            for shard in shards:
                self._local.begin(shard_name(shard))

    @property
    def _numbers(self) -> range:
        return range(len(self._first) - 1)

    def _locate(self, index: int) -> tuple[_Folder, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.storage.url}: sample {index}, but there are {len(self)}")
        number = bisect.bisect_right(self._first, index) - 1
        return self._folder(shard_name, number), int(index - self._first[number])

    def _folder(self, name: Any, number: int) -> _Folder:
        key = (name.__name__, number)
        folder = self._shards.get(key)
        if folder is not None:
            self._shards.move_to_end(key)
            return folder
        digests = self._index_digests if name is shard_name else self._images_digests
        where = name(number)
        storage = self.storage if self._local is None else self._local.fetch(where)
        folder = _Folder(storage, where, digests[number].as_py(), self._checked, self.storage.url)
        self._shards[key] = folder
        while len(self._shards) > _OPEN_FOLDERS:
            self._shards.popitem(last=False)
        return folder

    def _gather(
        self, name: str, places: list[tuple[_Folder, int]], starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
    ) -> Array:
        spec = next(s for s in self.manifest.arrays if s.name == name)
        out = np.empty((int(counts.sum()), *spec.shape), spec.dtype)
        end = 0
        for (folder, _), start, count in zip(places, starts.tolist(), counts.tolist(), strict=True):
            begin, end = end, end + count
            if count:
                out[begin:end] = folder.lines(name, start, count)
        return out

    def _side_file(self, name: str) -> bytes:
        try:
            data = self.storage.read(name)
        except FileNotFoundError:
            raise CacheError(f"{self.storage.url}/{name}: missing; {_REPAIR}") from None
        if sha256(data) != self.manifest.files.get(name):
            raise CacheError(f"{self.storage.url}/{name}: changed after it was written; {_REPAIR}")
        return data


_OPEN_FOLDERS = 2048
_REPAIR = "run teacher-cache verify --repair with the cache's configuration"


class _Folder:
    """One committed shard (or images) folder, open: its index in memory, its arrays mapped on first use."""

    def __init__(self, storage: Storage, name: str, digest: str, checked: bool, url: str) -> None:
        self._storage, self._name, self._checked, self._url = storage, name, checked, url
        try:
            index = storage.read(f"{name}/{INDEX}")
        except FileNotFoundError:
            raise CacheError(f"{url}/{name}: the shard is missing; {_REPAIR}") from None
        if sha256(index) != digest:
            raise CacheError(f"{url}/{name}/{INDEX}: changed after it was written; {_REPAIR}")
        self._sums, _ = read_file_sums(index)
        self._index = index
        self._arrays: dict[str, _MappedArray | _ZarrArray] = {}

    @cached_property
    def _table(self) -> pa.Table:
        columns = ["sample_id", "image_id", "image_shard", "image_row", *(c for pair in _COUNTS.values() for c in pair)]
        return pq.read_table(io.BytesIO(self._index), columns=columns)

    @cached_property
    def texts(self) -> pa.Table:
        return pq.read_table(io.BytesIO(self._index), columns=["questions", "answers", "original_answers", "source"])

    @cached_property
    def starts(self) -> dict[Axis, npt.NDArray[np.int64]]:
        return {axis: self._table[start].to_numpy() for axis, (start, _) in _COUNTS.items()}

    @cached_property
    def counts(self) -> dict[Axis, npt.NDArray[np.int64]]:
        return {axis: self._table[count].to_numpy() for axis, (_, count) in _COUNTS.items()}

    @cached_property
    def sample_ids(self) -> pa.Array:
        return self._table["sample_id"].combine_chunks()

    @cached_property
    def image_ids(self) -> pa.Array:
        return self._table["image_id"].combine_chunks()

    @cached_property
    def image_places(self) -> npt.NDArray[np.int64]:
        return np.stack([self._table["image_shard"].to_numpy(), self._table["image_row"].to_numpy()], -1).astype(
            np.int64
        )

    def lines(self, name: str, start: int, count: int) -> Array:
        """``count`` lines of array ``name``; a view where it is mapped."""
        array = self._arrays.get(name)
        if array is None:
            array = self._arrays[name] = self._open(name)
        return array.lines(start, count)

    def _open(self, name: str) -> _MappedArray | _ZarrArray:
        metadata = self._storage.read(f"{self._name}/{name}/zarr.json")
        if self._checked:
            _check_whole(metadata, self._sums[f"{name}/zarr.json"], f"{self._url}/{self._name}/{name}/zarr.json")
        layout = layout_from_metadata(metadata)
        file = f"{name}/{data_file(layout)}"
        assert self._storage.local is not None
        path = self._storage.local / self._name / file
        sums = self._sums.get(file)
        if sums is None:  # an array without lines has no file
            return _ZarrArray(path.parents[len(layout.shape) + 1], layout)
        where = f"{self._url}/{self._name}/{file}"
        if not path.is_file() or path.stat().st_size != sums.bytes:
            found = f"{path.stat().st_size:,} bytes" if path.is_file() else "no file"
            raise CacheError(f"{where}: expected {sums.bytes:,} bytes, found {found}; {_REPAIR}")
        if layout.compressed or layout.file_bytes != sums.bytes:
            if self._checked:
                _check_whole(path.read_bytes(), sums, where)
            return _ZarrArray(path.parents[len(layout.shape) + 1], layout)
        return _MappedArray(path, layout, sums if self._checked else None, where)


class _MappedArray:
    """An uncompressed array over its mapped file; blocks are checked when first touched."""

    def __init__(self, path: Path, layout: ArrayLayout, sums: FileSum | None, where: str) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._array = view(self._map, layout)
        self._line_bytes, self._sums, self._where = layout.line_bytes, sums, where
        self._unchecked = bytearray(b"\1" * len(sums.blocks)) if sums is not None else None

    def lines(self, start: int, count: int) -> Array:
        if self._unchecked is not None:
            first = start * self._line_bytes // BLOCK_BYTES
            last = ((start + count) * self._line_bytes - 1) // BLOCK_BYTES
            if 1 in self._unchecked[first : last + 1]:
                self._check(first, last)
        return self._array[start : start + count]

    def _check(self, first: int, last: int) -> None:
        assert self._sums is not None
        assert self._unchecked is not None
        for block in range(first, last + 1):
            if self._unchecked[block]:
                data = self._map[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
                _check_block(data, self._sums.blocks[block], block, self._where)
                self._unchecked[block] = 0


class _ZarrArray:
    """An array that cannot be mapped (compressed, or laid out by another writer), read by zarr."""

    def __init__(self, folder: Path, layout: ArrayLayout) -> None:
        self._array: Any = zarr.open_array(str(folder), mode="r") if layout.rows else None
        self._empty = np.zeros((0, *layout.shape), layout.dtype)

    def lines(self, start: int, count: int) -> Array:
        if self._array is None:
            return self._empty
        return np.asarray(self._array[start : start + count])


class _LocalCopy:
    """Shards of a remote cache, copied whole into a bounded local folder; the least recently used goes first."""

    def __init__(self, storage: Storage, folder: str | Path | None, gigabytes: float) -> None:
        self._remote, self._limit = storage, int(gigabytes * 2**30)
        self._own = folder is None
        self._folder = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="teacher-cache-"))
        self._local = Storage(self._folder)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="shard-prefetch")
        self._copies: OrderedDict[str, Future[int]] = OrderedDict()

    def begin(self, name: str) -> Future[int]:
        if name not in self._copies:
            self._copies[name] = self._threads.submit(self._copy, name)
            self._make_room(name)
        self._copies.move_to_end(name)
        return self._copies[name]

    def fetch(self, name: str) -> Storage:
        """The local storage that now holds ``name``; errors of the copying thread surface here."""
        copy = self.begin(name)
        try:
            copy.result()
        except BaseException:
            self._copies.pop(name, None)  # so that the next try copies again
            raise
        return self._local

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._own:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _copy(self, name: str) -> int:
        try:
            index = self._remote.read(f"{name}/{INDEX}")
        except FileNotFoundError:
            raise CacheError(f"{self._remote.url}/{name}: the shard is missing; {_REPAIR}") from None
        sums, _ = read_file_sums(index)
        for file, expected in sums.items():
            target = self._folder / name / file
            if not target.is_file() or target.stat().st_size != expected.bytes:
                self._remote.download(f"{name}/{file}", target)
        (self._folder / name / INDEX).write_bytes(index)
        return sum(s.bytes for s in sums.values())

    def _make_room(self, newest: str) -> None:
        done = {n: c.result() for n, c in self._copies.items() if c.done() and c.exception() is None}
        total = sum(done.values())
        for name, size in done.items():
            if total <= self._limit or name == newest:
                return
            # Mapped pages of an unlinked file stay valid until the reader lets go of them.
            shutil.rmtree(self._folder / name, ignore_errors=True)
            self._copies.pop(name)
            total -= size


def load_safetensors_array(data: bytes, name: str) -> Array:
    """One tensor of a safetensors file as numpy; bfloat16, which numpy lacks, as float32."""
    import json
    import struct

    (length,) = struct.unpack("<Q", data[:8])
    entry = json.loads(data[8 : 8 + length])[name]
    if entry["dtype"] != "BF16":
        return np.asarray(load_safetensors(data)[name])
    begin, end = entry["data_offsets"]
    raw = np.frombuffer(data, np.uint16, count=(end - begin) // 2, offset=8 + length + begin)
    return (raw.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])


def scales_from_bytes(data: bytes) -> dict[str, ChannelScales]:
    """``scales.safetensors``: ``{array}.channel_scale`` and, with PCA, ``{array}.mean`` and ``{array}.basis``."""
    tensors = load_safetensors(data)
    fields = {f.name for f in dataclasses.fields(ChannelScales)}
    out: dict[str, dict[str, Array]] = {}
    for key, value in tensors.items():
        name, _, part = key.rpartition(".")
        assert part in fields, key
        out.setdefault(name, {})[part] = value
    return {name: ChannelScales(**parts) for name, parts in out.items()}


def _check_whole(data: bytes, sums: FileSum, where: str) -> None:
    if len(data) != sums.bytes:
        raise CacheError(f"{where}: expected {sums.bytes:,} bytes, found {len(data):,}; {_REPAIR}")
    for block, expected in enumerate(sums.blocks):
        _check_block(data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES], expected, block, where)


def _check_block(data: bytes, expected: int, block: int, where: str) -> None:
    found = google_crc32c.value(data)
    if found != expected:
        raise CacheError(
            f"{where}: bytes {block * BLOCK_BYTES:,}–{block * BLOCK_BYTES + len(data) - 1:,} were changed after they "
            f"were written (CRC-32C {found:08x}, expected {expected:08x}); {_REPAIR}"
        )
