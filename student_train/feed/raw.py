"""What every source of samples gives, and how a cache and the images of its samples are opened."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from student_train.config import SourceConfig
from student_train.feed.tokenizer import check_tokenizer
from teacher_cache.config import DataConfig
from teacher_cache.data.conversations import Conversation, Image
from teacher_cache.data.spool import spool
from teacher_cache.models.chat import Chat
from teacher_cache.store.batches import SampleTexts
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.records import Array

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RawBatch:
    """Samples as they lie in the source, before any tensor.

    ``arrays``: the teacher's signals, lines of all samples one after another (see ``teacher_cache.store.records``);
    ``row_index`` (R,) picks the answer rows out of signals that are stored for all text positions. ``input_ids`` hold a
    placeholder where an image stands; ``placeholders`` (G,) say which of the sample's ``images`` that is.
    """

    input_ids: list[Ints]
    loss_mask: list[npt.NDArray[np.bool_]]
    images: list[list[Image]]
    placeholders: list[Ints]
    arrays: dict[str, Array]
    row_index: Ints
    visual: dict[str, Array]


class Source(Protocol):
    """Samples by number."""

    image_folder: str

    @property
    def leaves_out(self) -> bool:
        """Whether a sample with a damaged image may be left out: a cache's may not, because its teacher saw it."""

    def __len__(self) -> int: ...

    @property
    def rows(self) -> Ints:
        """(M,) answer tokens of each sample."""
        ...

    @property
    def positions(self) -> Ints:
        """(M,) text positions that predict a token."""
        ...

    @property
    def lengths(self) -> Ints:
        """(M,) tokens of each sample, one for each placeholder."""
        ...

    @property
    def image_counts(self) -> Ints:
        """(M,) how many images each sample shows."""
        ...

    @property
    def shard_starts(self) -> Ints: ...

    def read(self, indices: Sequence[int]) -> RawBatch: ...

    def conversations(self, indices: Sequence[int]) -> list[Conversation]:
        """What is asked in the samples, for a student that writes its own prompts."""
        ...

    def name_of(self, index: int) -> str:
        """The sample's id, for an error."""
        ...

    def images(self) -> Iterator[Image]:
        """The images of every sample, in order; no array is read."""
        ...

    def prefetch(self, shards: Sequence[int]) -> None:
        """Begin to copy what :meth:`read` will need of these shards, in the order in which they are needed."""
        ...


def open_cache(
    config: SourceConfig, tokenizer: Any, chat: Chat | None = None, reads: Sequence[str] = ()
) -> TeacherCache:
    """Refuses a cache whose ids mean something else to the student; ``chat``: it writes its own prompts; ``reads``: the
    arrays that will be read."""
    cache = TeacherCache.open(
        config.cache,
        prefetch_folder=config.prefetch_folder or None,
        prefetch_gigabytes=config.prefetch_gigabytes,
    )
    check_tokenizer(cache, tokenizer, config.tokenizer == "same_ids", chat, reads)
    return cache


def known_images(ids: Sequence[str], checksums: Sequence[str], embedded: Mapping[str, Image]) -> list[Image]:
    """The images that a cache names, each with the checksum of the bytes that its teacher saw."""
    found = zip(ids, checksums, strict=True)
    return [replace(embedded.get(name, Image(name, path=name)), checksum=checksum) for name, checksum in found]


def conversation_of(texts: SampleTexts, embedded: Mapping[str, Image], original: bool = False) -> Conversation:
    """A cached sample as the data had it, with its teacher's answers or its ``original`` ones."""
    images = tuple(known_images(texts.image_ids, texts.image_checksums, embedded))
    answers = tuple(texts.original_answers if original else texts.answers)
    return Conversation(texts.sample_id, tuple(texts.questions), answers, images, system=texts.system)


class EmbeddedImages(dict[str, Image]):
    """Images by their digest, whose bytes lie in a folder that goes with this object; other processes read the same."""

    def __init__(self, config: SourceConfig) -> None:
        super().__init__()
        folder = Path(tempfile.mkdtemp(prefix="images-", dir=config.prefetch_folder or None))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        samples = spool(DataConfig(path=config.image_data, duplicate_ids="number"), folder / "read").keep()
        images = (image for s in samples if isinstance(s, Conversation) for image in s.images)
        self.update((image.image_id, image) for image in images if image.embedded)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def embedded_images(config: SourceConfig) -> Mapping[str, Image]:
    return EmbeddedImages(config) if config.image_data else {}
