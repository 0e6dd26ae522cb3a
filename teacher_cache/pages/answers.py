"""A cache's answers as an instruction set for trainers that know nothing of caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from teacher_cache.config import DataConfig
from teacher_cache.data.conversations import Conversation, Format, Image
from teacher_cache.data.formats import to_line, write_lines
from teacher_cache.data.image_files import read_image
from teacher_cache.data.spool import spool
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.storage import Storage


def export_answers(storage: Storage, output: Path, form: Format = "llava", image_folder: Sequence[str] = ()) -> int:
    """Write the cached answers in the place of the original ones, in the data's order; the number of samples. One
    shard's texts and few images are in memory at a time.

    image_folder: a folder, or the data files that the images are embedded in; then the Parquet file holds the images,
    byte for byte as the teacher saw them.

    Raises ``DataError``: a name that is none of ``formats.write_lines``, an image that is not there or another one.
    """
    with ExitStack() as opened:
        cache = opened.enter_context(TeacherCache(storage))
        read = _images(image_folder, opened) if image_folder else None
        return write_lines(_lines(cache, form, read), output, form, embedded=read is not None)


def _lines(cache: TeacherCache, form: Format, read: Callable[[Image], bytes] | None) -> Iterator[dict[str, Any]]:
    for text in cache.texts():
        pairs = zip(text.image_ids, text.image_checksums, strict=True)
        images = tuple(Image(name, path=name, checksum=checksum) for name, checksum in pairs)
        questions, answers = tuple(text.questions), tuple(text.answers)
        sample = Conversation(text.sample_id, questions, answers, images, system=text.system)
        bodies = None if read is None else [{"bytes": read(i), "path": Path(i.path).name} for i in images]
        yield to_line(sample, form, bodies)


def _images(places: Sequence[str], opened: ExitStack) -> Callable[[Image], bytes]:
    """The bytes of an image by its name: from one folder, or from data files, which are laid down while ``opened``."""
    if len(places) == 1 and Path(places[0]).is_dir() and not any(Path(places[0]).glob("*.parquet")):
        return lambda image: read_image(image, places[0])
    samples = opened.enter_context(spool(DataConfig(path=tuple(places), duplicate_ids="number"), None))
    found = {i.image_id: i.stored for s in samples if isinstance(s, Conversation) for i in s.images}
    return lambda image: read_image(
        Image(image.image_id, stored=found.get(image.image_id), checksum=image.checksum), ""
    )
