"""Samples laid down in a file: a run holds none of them in memory, and its other processes open the same file."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

import pyarrow as pa

from teacher_cache.config import DataConfig
from teacher_cache.data.conversations import Conversation, Image, SampleReader, SkipCount, Skipped, StoredBytes

Sample = Conversation | Skipped
ROWS = 256
"""Samples in a batch of the file: what one sample costs to find, about 400 kB of LLaVA's mix."""
_TEXTS, _IMAGES, _FACTS = "samples.arrow", "images.bin", "facts.json"
_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("questions", pa.list_(pa.string())),
        ("answers", pa.list_(pa.string())),
        ("image_id", pa.string()),
        ("image_path", pa.string()),
        ("image_checksum", pa.string()),
        ("image_file", pa.string()),
        ("image_start", pa.int64()),
        ("image_bytes", pa.int64()),
        ("regenerate", pa.bool_()),
        ("reason", pa.string()),
    ]
)


class SampleFile(Sequence[Sample]):
    """Samples by number, read when they are asked for. Pickled as its place: other processes open the file."""

    def __init__(self, folder: Path, owner: bool = False) -> None:
        self.folder = folder
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        self.files: list[dict[str, Any]] = facts["files"]
        """sha256 and size of each data file, of the bytes that were parsed."""
        self._count: int = facts["count"]
        self.skips = SkipCount(**facts["skips"])
        """What reading alone skipped."""
        self._reader = pa.ipc.open_file(pa.OSFile(str(folder / _TEXTS)))
        self._last: tuple[int, pa.RecordBatch | None] = (-1, None)
        self._lock = threading.Lock()
        self._gone = weakref.finalize(self, _remove, folder, os.getpid()) if owner else None

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleFile, (self.folder,)

    def __enter__(self) -> SampleFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def keep(self) -> SampleFile:
        """Leave the folder to whoever named it."""
        if self._gone is not None:
            self._gone.detach()
        return self

    def close(self) -> None:
        """The process that made the file removes it."""
        if self._gone is not None:
            self._gone()

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index}, but there are {len(self)}")
        batch, row = divmod(index % len(self), ROWS)
        return self._sample(*(column[row].as_py() for column in self._batch(batch).columns))

    def __iter__(self) -> Iterator[Sample]:
        for number in range(self._reader.num_record_batches):
            batch = self._reader.get_batch(number)
            for line in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield self._sample(*line)

    def image_ids(self) -> Iterator[str]:
        """The image of every sample in order, '' without one; no text is made."""
        for batch in range(self._reader.num_record_batches):
            yield from self._reader.get_batch(batch)["image_id"].to_pylist()

    def _batch(self, number: int) -> pa.RecordBatch:
        with self._lock:
            if self._last[0] != number:
                self._last = (number, self._reader.get_batch(number))
            return self._last[1]

    def _sample(self, sample_id: str, questions: list[str], answers: list[str], *rest: Any) -> Sample:
        image_id, path, checksum, file, start, count, regenerate, reason = rest
        if reason is not None:
            return Skipped(sample_id, reason)
        stored = StoredBytes(file or str(self.folder / _IMAGES), start, count) if count else None
        image = Image(image_id, path=path, stored=stored, checksum=checksum) if image_id else None
        return Conversation(sample_id, tuple(questions), tuple(answers), image, regenerate)


def lay_down(samples: Iterable[Sample], folder: Path | None = None) -> SampleFile:
    """``samples`` in a file of their own; as :func:`spool`, but for samples that came from elsewhere."""
    folder = folder or Path(tempfile.mkdtemp(prefix="teacher-cache-"))
    try:
        with _Writer(folder) as writer:
            for sample in samples:
                writer.add(sample)
        reader = samples if isinstance(samples, SampleReader) else None
        facts = {
            "files": reader.files if reader is not None else [],
            "count": writer.count,
            "skips": vars(reader.skips) if reader is not None else {},
        }
        (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
        return SampleFile(folder, owner=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def spool(data: DataConfig, folder: Path | None, advance: Callable[[int], None] = lambda count: None) -> SampleFile:
    """Read ``data`` into ``folder`` (a temporary one where there is none); it is removed when the samples are closed.

    Raises as :class:`SampleReader`.
    """
    reader = SampleReader(data, advance)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left: the output has one writer
        folder.mkdir(parents=True)
    return lay_down(reader, folder)


class _Writer:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = pa.OSFile(str(folder / _TEXTS), "wb")
        self._table = pa.ipc.new_file(self._file, _SCHEMA)
        self._images: BinaryIO | None = None
        self._places: dict[str, tuple[str, int, int]] = {}
        self._lines: list[tuple[Any, ...]] = []
        self.count = 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._table.close()
        self._file.close()
        if self._images is not None:
            self._images.close()

    def add(self, sample: Sample) -> None:
        self.count += 1
        if isinstance(sample, Skipped):
            self._lines.append((sample.sample_id, [], [], "", "", "", "", 0, 0, False, sample.reason))
        else:
            image = sample.image
            place = self._place(image)
            named = (image.image_id, image.path, image.checksum) if image is not None else ("", "", "")
            texts = (sample.sample_id, list(sample.questions), list(sample.answers))
            self._lines.append((*texts, *named, *place, sample.regenerate, None))
        if len(self._lines) == ROWS:
            self._flush()

    def _place(self, image: Image | None) -> tuple[str, int, int]:
        """File, start and size of the image's bytes, each distinct image once; no file: the samples' own."""
        if image is not None and image.stored is not None:
            return image.stored.file, image.stored.start, image.stored.count
        if image is None or not image.data:
            return "", 0, 0
        place = self._places.get(image.image_id)
        if place is None:
            if self._images is None:
                self._images = (self._folder / _IMAGES).open("wb")
            place = self._places[image.image_id] = ("", self._images.tell(), len(image.data))
            self._images.write(image.data)
        return place

    def _flush(self) -> None:
        if self._lines:
            columns = zip(*self._lines, strict=True)
            arrays = [pa.array(c, field.type) for c, field in zip(columns, _SCHEMA, strict=True)]
            self._table.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
            self._lines = []


def _remove(folder: Path, process: int) -> None:
    """In the process that made it, not in one forked from it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
