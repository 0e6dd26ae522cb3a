"""Reading a cache: any sample by number, any batch, in any order, from any number of processes.

Local uncompressed shards are mapped and sliced; everything else goes through zarr. Files of a remote cache are copied
into a bounded local folder (``prefetch.py``). Opening costs the same for a thousand and a million samples: the ledger
has a line per shard, and a shard's index is read when one of its samples is. With ``checked`` (the default) every
block of 1 MiB is compared with its checksum the first time it is touched, so a changed byte is never returned as data.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from teacher_cache.data.vocabulary import Comparison, compare, describe_vocabulary
from teacher_cache.errors import CacheError
from teacher_cache.store.arrays import load_safetensors_array as load_safetensors_array
from teacher_cache.store.batches import ImageBatch, RecordBatch, SampleTexts, image_batch, record_batch, sample_texts
from teacher_cache.store.checksums import INDEX, sha256
from teacher_cache.store.codecs import ChannelScales
from teacher_cache.store.codecs import scales_from_bytes as scales_from_bytes
from teacher_cache.store.folder import REPAIR, Files, ShardFolder
from teacher_cache.store.index import AXES, TEXT_LISTS
from teacher_cache.store.manifest import Manifest, read_manifest
from teacher_cache.store.maps import Kept
from teacher_cache.store.prefetch import LocalCopy, LocalFiles
from teacher_cache.store.records import Array, ArraySpec, Axis, TeacherRecord
from teacher_cache.store.side_files import SAMPLE_COLUMNS, head_array, ledger_table, scale_arrays
from teacher_cache.store.storage import Storage
from teacher_cache.store.tables import HEAD_BYTES, INDEX_BYTES, read_table
from teacher_cache.store.writer import HEAD, LEDGER, SAMPLES, SCALES, images_name, shard_name

_INDEX_BYTES = 1 << 30
"""Indexes kept in memory, some 50 kB a shard of 512 samples: all of them up to ten million samples."""


class TeacherCache:
    """A complete, readable cache; ``teacher_cache.open`` gives it with a way into PyTorch (``door.py``)."""

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
        table = ledger_table(self._side_file(LEDGER), f"{storage.url}/{LEDGER}", self.manifest)
        samples = table["samples"].to_numpy()
        self._starts = np.concatenate([[0], np.cumsum(samples)]).astype(np.int64)
        self._digests = {shard_name: table["index_sha256"], images_name: table["images_sha256"]}
        self._specs: dict[str, ArraySpec] = {spec.name: spec for spec in self.manifest.arrays}
        self._image_specs: dict[str, ArraySpec] = {spec.name: spec for spec in self.manifest.image_arrays}
        self._folders: Kept[ShardFolder] = Kept(2 * len(self._digests[shard_name]), _INDEX_BYTES)
        self._lock = threading.Lock()
        self._source: LocalFiles | LocalCopy = self._open_source()

    @classmethod
    def open(
        cls,
        url: str | Path,
        *,
        tokenizer: Any = None,
        checked: bool = True,
        options: Mapping[str, Any] | None = None,
        prefetch_folder: str | Path | None = None,
        prefetch_gigabytes: float = 20.0,
    ) -> Self:
        """Open the cache at ``url`` (a folder, or ``s3://``, ``gs://``, ``memory://`` with fsspec ``options``).

        A remote cache is read through ``prefetch_folder`` (default: a temporary one of this process's own), which
        never holds more than ``prefetch_gigabytes``.

        Raises
        ------
        CacheError
            No cache, not complete, another format version, changed files, or a ``tokenizer`` of other ids.
        """
        cache = cls(
            Storage(url, options),
            checked=checked,
            prefetch_folder=prefetch_folder,
            prefetch_gigabytes=prefetch_gigabytes,
        )
        if tokenizer is not None:
            cache.compare_tokenizer(tokenizer)
        return cache

    def compare_tokenizer(self, tokenizer: Any, begins: bool = False) -> Comparison:
        """How a student's differs, in what cached ids may not depend on; ``begins``: its texts open with a begin token.

        Raises ``CacheError``: its ids mean other text than the teacher's.
        """
        teacher = self.manifest.teacher
        found = compare(teacher["vocabulary"], describe_vocabulary(tokenizer), "the student", begins)
        if found.never:
            raise CacheError(
                f"{self.storage.url}: the cache was made with the tokenizer of {teacher['model']}, the student's is "
                f"another: {found.never}. Use a student with the teacher's, or cache a teacher that has the student's "
                "(states of aligned text spans could cross over, arXiv:2606.06021: docs/decisions.md)"
            )
        return found

    def __enter__(self) -> TeacherCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._folders.clear()
        self._source.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"arguments": self._arguments}

    def __setstate__(self, state: dict[str, Any]) -> None:
        storage, checked, folder, gigabytes = state["arguments"]
        given = {"checked": checked, "prefetch_folder": folder, "prefetch_gigabytes": gigabytes}
        self.__init__(storage, **given)  # type: ignore[misc]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> TeacherRecord:
        """One sample, whole."""
        (texts,), batch = self.texts_of([index]), self.read([index])
        return TeacherRecord(
            sample_id=batch.sample_ids[0],
            image_ids=tuple(batch.image_ids[0]),
            image_checksums=tuple(batch.image_checksums[0]),
            arrays=batch.arrays,
            system=texts.system,
            source=texts.source,
            **{name: tuple(getattr(texts, name)) for name in TEXT_LISTS},
        )

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64], names: Sequence[str] | None = None) -> RecordBatch:
        """The samples ``indices``, with all arrays or just ``names``, each array gathered in one go.

        Of a remote cache only the files of the arrays asked for are fetched.

        Raises
        ------
        CacheError
            A checksum does not fit: names the shard, the file and what to run. Or the cache has no such array.
        IndexError
            An index outside 0 … len − 1.
        """
        specs = [self._spec(name) for name in (self._specs if names is None else names)]
        places = self._places(np.asarray(indices, np.int64))
        batch = record_batch(np.array(indices, np.int64), places, specs)
        batch.check_runs(lambda index: f"{self.storage.url}/{shard_name(self.shard_of(index))}")
        return batch

    def read_images(self, places: npt.NDArray[np.int64], names: Sequence[str] | None = None) -> ImageBatch:
        """Arrays of the images at ``places`` (I, 2), which come from :attr:`RecordBatch.image_places`.

        Raises ``CacheError`` when the cache holds no visual signal, ``IndexError`` for a place of −1.
        """
        if not self._image_specs:
            raise CacheError(
                f"{self.storage.url}: no visual states in this cache (signals.visual is none). "
                "Build one with signals.visual set to states, topk or gram"
            )
        lines = [(int(shard), int(row)) for shard, row in places]
        if any(shard < 0 for shard, _ in lines):
            raise IndexError("a sample without visual signals")
        for shard, _ in lines:
            if shard >= self.manifest.planned_shards:
                raise CacheError(
                    f"{self.storage.url}/{images_name(shard)}: a sample's image at a shard that is none; {REPAIR}"
                )
        with self._lock:
            self._fresh_source()
        found = [(self._folder(images_name, shard), row) for shard, row in lines]
        for (folder, row), (shard, _) in zip(found, lines, strict=True):
            if not 0 <= row < len(folder.images.present) or not folder.images.present[row]:
                raise CacheError(f"{self.storage.url}/{images_name(shard)}: line {row} holds no image; {REPAIR}")
        return image_batch(found, [s for s in self._image_specs.values() if names is None or s.name in names])

    def counts(self, axis: Axis) -> npt.NDArray[np.int64]:
        """(M,) lines of every sample on ``axis``: token, row, position or run."""
        return np.asarray(self._samples[AXES[axis]], np.int64)

    def images(self) -> npt.NDArray[np.int64]:
        """(M,) how many images each sample shows."""
        return np.asarray(self._samples["images"], np.int64)

    def sample_ids(self) -> Iterator[str]:
        """Every sample_id in order."""
        for chunk in self._samples["sample_id"].iterchunks():
            yield from chunk.to_pylist()

    def texts(self) -> Iterator[SampleTexts]:
        """Questions and answers of every sample in order; each index is read once, no array is."""
        for number in range(self.manifest.planned_shards):
            folder = self._open_folder(shard_name(number), self._digests[shard_name][number].as_py(), True)
            yield from (sample_texts(folder, line) for line in range(len(folder.texts)))

    def texts_of(self, indices: Sequence[int]) -> Iterator[SampleTexts]:
        """Questions and answers of some samples, in the order of ``indices``."""
        return (sample_texts(folder, line) for folder, line in self._places(np.asarray(indices, np.int64)))

    def shard_texts(self, number: int) -> pa.Table:
        """questions, answers, original_answers (lists) and source, a line each sample of one shard."""
        return self._folder(shard_name, number).texts

    def find(self, sample_id: str) -> int:
        """The number of ``sample_id``; raises ``KeyError`` when the cache does not hold it."""
        index = pc.index(self._samples["sample_id"], sample_id).as_py()
        if index < 0:
            raise KeyError(f"{self.storage.url}: no sample {sample_id!r} (skipped ones are listed in skipped.jsonl)")
        return int(index)

    def shard_of(self, index: int) -> int:
        """Which shard holds sample ``index``."""
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    @property
    def shard_starts(self) -> npt.NDArray[np.int64]:
        """(shards + 1,) number of the first sample of each shard, and the number of samples."""
        return self._starts.copy()

    @cached_property
    def head(self) -> Array:
        """(V, d) the teacher's output projection: ``hidden @ head.T`` are its logits. bfloat16 comes as float32."""
        if HEAD not in self.manifest.files:
            raise CacheError(
                f"{self.storage.url}: no output head in this cache (signals.hidden is none), so no exact logits. "
                "Build one with signals.hidden=rows, or use a top-k loss"
            )
        return head_array(self._side_file(HEAD), f"{self.storage.url}/{HEAD}", self.manifest)

    @cached_property
    def scales(self) -> dict[str, ChannelScales]:
        """What the codec needs beside the rows, by array name (``hidden``, ``hidden_second_last``, ``visual``)."""
        if SCALES not in self.manifest.files:
            return {}
        return scale_arrays(self._side_file(SCALES), f"{self.storage.url}/{SCALES}", self.manifest)

    def scales_of(self, name: str) -> ChannelScales:
        """The scales of array ``name``; ones where its codec needs none."""
        return self.scales.get(name) or ChannelScales(np.ones(self.manifest.shape.hidden_size, np.float32))

    @property
    def is_remote(self) -> bool:
        """Whether shards are copied before they are read, so that a shard-block order and prefetch pay off."""
        return self.storage.local is None

    def prefetch(self, shards: Sequence[int], names: Sequence[str] | None = None) -> None:
        """Begin to copy these shards of a remote cache, all arrays or just ``names``; a local one has nothing to do.

        Errors surface when the shard is read.
        """
        if not self.is_remote:
            return
        with self._lock:
            self._fresh_source()
        for shard in shards:
            for name, specs in ((shard_name, self._specs), (images_name, self._image_specs)):
                wanted = [n for n in specs if names is None or n in names]
                if wanted:
                    self._folder(name, shard).begin(wanted)

    def _spec(self, name: str) -> ArraySpec:
        if name not in self._specs:
            raise CacheError(
                f"{self.storage.url}: no array {name!r} in this cache; it has {', '.join(self._specs)}. "
                "Build one with the signal that stores it (docs/cache-format.md)"
            )
        return self._specs[name]

    @cached_property
    def _samples(self) -> pa.Table:
        """A line a sample: read, and its digest compared, once."""
        return read_table(self._side_file(SAMPLES), f"{self.storage.url}/{SAMPLES}", SAMPLE_COLUMNS, len(self))

    def _places(self, indices: npt.NDArray[np.int64]) -> list[tuple[ShardFolder, int]]:
        """(folder, line in it) of each sample."""
        with self._lock:
            self._fresh_source()
        if len(outside := indices[(indices < 0) | (indices >= len(self))]):
            raise IndexError(f"{self.storage.url}: sample {outside[0]}, but there are {len(self)}")
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        lines = (indices - self._starts[shards]).tolist()
        return [(self._folder(shard_name, n), line) for n, line in zip(shards.tolist(), lines, strict=True)]

    def _folder(self, name: Any, number: int) -> ShardFolder:
        key = 2 * number + (name is images_name)
        folder = self._folders.get(key)
        if folder is None:
            folder = self._open_folder(name(number), self._digests[name][number].as_py(), self._checked)
            with self._lock:
                self._folders.keep(key, folder)
        return folder

    def _open_folder(self, name: str, digest: str, checked: bool) -> ShardFolder:
        folder = ShardFolder(self._fresh_source(), name, digest, checked, self.storage.url, self.manifest)
        if name.startswith("shards/"):
            number = int(name.rpartition("/")[2])
            expected = int(self._starts[number + 1] - self._starts[number])
            if len(folder.samples.sample_ids) != expected:
                found = f"{len(folder.samples.sample_ids):,} samples, but the ledger counts {expected:,}"
                raise CacheError(f"{self.storage.url}/{name}/{INDEX}: {found}; {REPAIR}")
        return folder

    def _open_source(self) -> LocalFiles | LocalCopy:
        self._process, self._deletions = os.getpid(), 0
        if self.storage.local is not None:
            return LocalFiles(self.storage)
        _, _, folder, gigabytes = self._arguments
        return LocalCopy(self.storage, folder, gigabytes, self.manifest.files[LEDGER])

    def _fresh_source(self) -> Files:
        """The source, anew in a forked worker (threads do not survive a fork); deleted copies are let go of."""
        if isinstance(self._source, LocalCopy):
            if self._process != os.getpid():
                self._source = self._open_source()
                self._folders.clear()
            elif self._deletions != self._source.deletions:
                self._deletions = self._source.deletions
                for folder in self._folders:
                    folder.close_vanished()
        return self._source

    def _side_file(self, name: str) -> bytes:
        try:
            data = self.storage.read(name, HEAD_BYTES if name == HEAD else INDEX_BYTES)
        except FileNotFoundError:
            raise CacheError(f"{self.storage.url}/{name}: missing; {REPAIR}") from None
        if sha256(data) != self.manifest.files.get(name):
            raise CacheError(f"{self.storage.url}/{name}: changed after it was written; {REPAIR}")
        return data
