"""Samples laid down in a file: a run holds none of them in memory, and its other processes open the same file."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, overload

import pyarrow as pa

from teacher_cache.config import DataConfig
from teacher_cache.data.conversations import Conversation, Image, Skipped, StoredBytes
from teacher_cache.data.sample_reader import SampleReader, SkipCount

Sample = Conversation | Skipped
Place = tuple[str, int, int]
"""File (empty: our own), start and count of an image's bytes."""
ROWS = 256
"""Samples in a batch of the file: what one sample costs to find, about 400 kB of LLaVA's mix."""
_TEXTS, _IMAGES, _FACTS = "samples.arrow", "images.bin", "facts.json"
_IMAGE = pa.struct(
    [
        ("image_id", pa.string()),
        ("path", pa.string()),
        ("checksum", pa.string()),
        ("file", pa.string()),
        ("start", pa.int64()),
        ("count", pa.int64()),
    ]
)
_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("questions", pa.list_(pa.string())),
        ("answers", pa.list_(pa.string())),
        ("system", pa.string()),
        ("images", pa.list_(_IMAGE)),
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
        """The first image of every sample in order, '' without one; no text is made."""
        for batch in range(self._reader.num_record_batches):
            for images in self._reader.get_batch(batch)["images"].to_pylist():
                yield images[0]["image_id"] if images else ""

    def _batch(self, number: int) -> pa.RecordBatch:
        with self._lock:
            if self._last[0] != number:
                self._last = (number, self._reader.get_batch(number))
            return self._last[1]

    def _sample(self, sample_id: str, questions: list[str], answers: list[str], *rest: Any) -> Sample:
        system, images, regenerate, reason = rest
        if reason is not None:
            return Skipped(sample_id, reason)
        found = tuple(self._image(**image) for image in images)
        return Conversation(sample_id, tuple(questions), tuple(answers), found, regenerate, system=system)

    def _image(self, image_id: str, path: str, checksum: str, file: str, start: int, count: int) -> Image:
        stored = StoredBytes(file or str(self.folder / _IMAGES), start, count) if count else None
        return Image(image_id, path=path, stored=stored, checksum=checksum)


def lay_down(samples: Iterable[Sample], folder: Path | None = None) -> SampleFile:
    """``samples`` in a file of their own; as :func:`spool`, but for samples that came from elsewhere."""
    folder = folder or Path(tempfile.mkdtemp(prefix="teacher-cache-"))
    try:
        count = _write(samples, folder)
        reader = samples if isinstance(samples, SampleReader) else None
        facts = {
            "files": reader.files if reader is not None else [],
            "count": count,
            "skips": vars(reader.skips) if reader is not None else {},
        }
        (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
        return SampleFile(folder, owner=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def spool(
    data: DataConfig,
    folder: Path | None,
    advance: Callable[[int], None] = lambda count: None,
    by_turn: bool = False,
) -> SampleFile:
    """Read ``data`` into ``folder`` (a temporary one where there is none); it is removed when the samples are closed.

    Raises as :class:`SampleReader`.
    """
    reader = SampleReader(data, advance, by_turn)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left: the output has one writer
        folder.mkdir(parents=True)
    return lay_down(reader, folder)


def _write(samples: Iterable[Sample], folder: Path) -> int:
    """The file's batches, and beside them the images that lie in no file of their own; how many samples it were."""
    count, places, rest = 0, dict[str, Place](), iter(samples)
    with (
        pa.OSFile(str(folder / _TEXTS), "wb") as file,
        pa.ipc.new_file(file, _SCHEMA) as table,
        (folder / _IMAGES).open("wb") as images,
    ):
        while batch := list(islice(rest, ROWS)):
            columns = zip(*(_line(sample, images, places) for sample in batch), strict=True)
            arrays = [pa.array(c, field.type) for c, field in zip(columns, _SCHEMA, strict=True)]
            table.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
            count += len(batch)
    return count


def _line(sample: Sample, images: BinaryIO, places: dict[str, Place]) -> tuple[Any, ...]:
    if isinstance(sample, Skipped):
        return (sample.sample_id, [], [], "", [], False, sample.reason)
    names = [field.name for field in _IMAGE]
    shown = [
        dict(zip(names, (i.image_id, i.path, i.checksum, *_place(i, images, places)), strict=True))
        for i in sample.images
    ]
    texts = (sample.sample_id, list(sample.questions), list(sample.answers), sample.system)
    return (*texts, shown, sample.regenerate, None)


def _place(image: Image, images: BinaryIO, places: dict[str, Place]) -> Place:
    """Where the image's bytes lie, each distinct image once; no bytes for an image in the image folder."""
    if image.stored is not None:
        return image.stored.file, image.stored.start, image.stored.count
    if not image.data:
        return "", 0, 0
    if image.image_id not in places:
        places[image.image_id] = ("", images.tell(), len(image.data))
        images.write(image.data)
    return places[image.image_id]


def _remove(folder: Path, process: int) -> None:
    """In the process that made it, not in one forked from it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
