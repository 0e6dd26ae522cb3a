"""Samples of plain LLaVA data, or of a cache with its original answers: no teacher anywhere."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from student_train.config import SourceConfig
from student_train.feed.features import image_key
from student_train.feed.raw import Ints, RawBatch, conversation_of, embedded_images, open_cache
from student_train.feed.skipped import check_share, usable
from student_train.students.chat_reader import ChatReader
from student_train.students.reader import Reader
from teacher_cache.config import DataConfig
from teacher_cache.data.conversations import Conversation, Image, Skipped
from teacher_cache.data.rows import text_positions
from teacher_cache.data.spool import SampleFile, lay_down, spool
from teacher_cache.errors import ConversationError
from teacher_cache.models.chat import Chat


class PlainSource:
    """Conversations with their own answers: supervised fine-tuning, no teacher anywhere.

    Ids and images lie in a temporary folder, which loader processes open instead of being sent a copy.
    """

    _embedded: SampleFile | None = None
    total = 0
    """Samples of the data file, those that are left out among them."""

    def __init__(self, conversations: Iterable[Conversation], chat: Chat, image_folder: str) -> None:
        self.image_folder = image_folder
        self._folder = Path(tempfile.mkdtemp(prefix="teacher-cache-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self.skipped: list[Skipped] = []
        lengths, rows, images = [], [], []

        def write() -> Iterator[Conversation]:
            with (self._folder / "ids").open("wb") as ids, (self._folder / "mask").open("wb") as mask:
                for c in conversations:
                    try:
                        own_ids, own_mask = _written(c, chat)
                    except ConversationError as error:
                        self.skipped.append(Skipped(c.sample_id, str(error)))
                        continue
                    ids.write(own_ids.astype(np.int32).tobytes())
                    mask.write(own_mask.tobytes())
                    lengths.append(len(own_ids))
                    rows.append(np.count_nonzero(own_mask))
                    images.append(len(c.images))
                    yield replace(c, answers=())

        (self._folder / "samples").mkdir()
        self._samples = lay_down(write(), self._folder / "samples").keep()
        self._counts = np.array([lengths, rows, images], np.int64).reshape(3, -1)
        self._open()

    def _open(self) -> None:
        self._ends = np.cumsum(self.lengths)
        size = int(self._counts[0].sum())
        self._ids = np.memmap(self._folder / "ids", np.int32, "r") if size else np.zeros(0, np.int32)
        self._mask = np.memmap(self._folder / "mask", np.bool_, "r") if size else np.zeros(0, np.bool_)

    def __getstate__(self) -> dict[str, Any]:
        names = ("image_folder", "_folder", "_samples", "_counts", "total")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    @classmethod
    def from_data(cls, config: SourceConfig, chat: Chat) -> PlainSource:
        data = DataConfig(path=config.data, duplicate_ids="number", max_samples=config.max_samples)
        samples = spool(data, Path(tempfile.mkdtemp(prefix="teacher-cache-")))
        skipped: list[Skipped] = []
        source = cls(usable(samples, config.image_folder, skipped), chat, config.image_folder)
        source._embedded = samples  # its images' bytes lie in that folder, which goes with it
        source.skipped, source.total = [*skipped, *source.skipped], len(samples)
        check_share(config, len(samples), source.skipped)
        return source

    @classmethod
    def from_cache(cls, config: SourceConfig, reader: Reader) -> PlainSource:
        """The original answers of the samples in a cache: the same questions and images, another teacher."""
        own = reader.chat if isinstance(reader, ChatReader) else None
        with open_cache(config, reader.tokenizer, own) as cache:
            embedded = embedded_images(config)
            size = min(config.max_samples or len(cache), len(cache))
            texts = itertools.islice(cache.texts(), size)
            conversations = [conversation_of(t, embedded, original=True) for t in texts]
            chat = own or reader.chat.in_template(cache.manifest.teacher["template"])
            return cls(conversations, chat, config.image_folder)

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def rows(self) -> Ints:
        return self._counts[1]

    @property
    def positions(self) -> Ints:
        return np.asarray(text_positions(self.lengths, self.image_counts))

    @property
    def lengths(self) -> Ints:
        return self._counts[0]

    @property
    def image_counts(self) -> Ints:
        return self._counts[2]

    @property
    def shard_starts(self) -> Ints:
        return np.array([0, len(self)], np.int64)

    def read(self, indices: Sequence[int]) -> RawBatch:
        spans = [slice(int(self._ends[i] - self._counts[0][i]), int(self._ends[i])) for i in indices]
        images = [self._images(self._samples[i]) for i in indices]
        return RawBatch(
            input_ids=[self._ids[span].astype(np.int64) for span in spans],
            loss_mask=[np.array(self._mask[span]) for span in spans],
            images=images,
            placeholders=[np.arange(len(shown)) for shown in images],
            arrays={},
            row_index=np.zeros(0, np.int64),
            visual={},
        )

    def conversations(self, indices: Sequence[int]) -> list[Conversation]:
        found = [self._samples[index] for index in indices]
        return [sample for sample in found if isinstance(sample, Conversation)]

    def name_of(self, index: int) -> str:
        return self._samples[index].sample_id

    def images(self) -> Iterator[Image]:
        return (image for sample in self._samples for image in self._images(sample))

    @staticmethod
    def _images(sample: Conversation | Skipped) -> list[Image]:
        assert isinstance(sample, Conversation)
        return list(sample.images)

    @property
    def leaves_out(self) -> bool:
        return self.total > 0  # else they are a cache's, with its original answers

    def leave_out(self, damaged: Mapping[str, str]) -> None:
        """Note the samples whose image is ``damaged`` (its key → the reason)."""
        for sample in self._samples:
            keys = (image_key(image, self.image_folder) for image in self._images(sample))
            if reason := next((damaged[key] for key in keys if key in damaged), ""):
                self.skipped.append(Skipped(sample.sample_id, reason))

    def prefetch(self, shards: Sequence[int]) -> None:
        """Everything lies on this machine."""


def _written(asked: Conversation, chat: Chat) -> tuple[Ints, Any]:
    """(T,) ids, an image as one placeholder, and which of them are answers'. Turn after turn, each behind all that
    comes before it, where the template rewrites earlier turns."""
    answers = [chat.original(answer) for answer in asked.answers]
    ends = [len(answers)] if chat.one_sequence else range(1, len(answers) + 1)
    parts = [chat.unexpanded(asked, answers[:end]) for end in ends]
    ids = [np.asarray(ids, np.int64) for ids, _ in parts]
    return np.concatenate(ids), np.concatenate([mask for _, mask in parts])
