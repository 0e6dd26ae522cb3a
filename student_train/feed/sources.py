"""Samples for a student: from teacher caches, or from plain LLaVA data, read a batch at a time."""

from __future__ import annotations

import itertools
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from student_train.config import SourceConfig
from student_train.feed.features import image_key
from student_train.feed.skipped import check_share, usable
from student_train.feed.tokenizer import check_tokenizer
from teacher_cache.config import DataConfig
from teacher_cache.data.conversations import Conversation, Image, Skipped
from teacher_cache.data.rows import rows_among_text, text_positions
from teacher_cache.data.spool import SampleFile, lay_down, spool
from teacher_cache.data.tokenization import (
    assemble,
    template_by_name,
    tokenize_answer,
    tokenize_prompt,
)
from teacher_cache.errors import CacheError, DataError, ImageError
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.records import Array
from teacher_cache.store.storage import Storage

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RawBatch:
    """Samples as they lie in the source, before any tensor.

    ``arrays``: the teacher's signals, lines of all samples one after another (see ``teacher_cache.store.records``);
    ``row_index`` (R,) picks the answer rows out of signals that are stored for all text positions.
    """

    input_ids: list[Ints]
    loss_mask: list[npt.NDArray[np.bool_]]
    images: list[Image | None]
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
        """(M,) tokens of each sample, one for its image."""
        ...

    @property
    def has_image(self) -> npt.NDArray[np.bool_]: ...

    @property
    def shard_starts(self) -> Ints: ...

    def read(self, indices: Sequence[int]) -> RawBatch: ...

    def name_of(self, index: int) -> str:
        """The sample's id, for an error."""
        ...

    def images(self) -> Iterator[Image]:
        """The image of every sample that has one, in order; no array is read."""
        ...

    def prefetch(self, shards: Sequence[int]) -> None:
        """Begin to copy what :meth:`read` will need of these shards, in the order in which they are needed."""
        ...


class CacheSource:
    """A teacher cache; ``names`` are the arrays that the losses need, others are not read."""

    def __init__(self, config: SourceConfig, tokenizer: Any, names: Sequence[str], visual: Sequence[str]) -> None:
        self.cache = _open_cache(self._with_folder(config), tokenizer)
        weakref.finalize(self, self.cache.close)  # before the folder goes: the last finalizer is called first
        self.image_folder = config.image_folder
        self._embedded = _embedded_images(config)
        self._check_names(names, [s.name for s in self.cache.manifest.arrays])
        self._check_names(visual, [s.name for s in self.cache.manifest.image_arrays])
        self._names, self._visual = list(names), list(visual)
        self._size = min(config.max_samples or len(self.cache), len(self.cache))
        self._room = _shards_in(config.prefetch_gigabytes, self.cache)
        self._begun: frozenset[int] = frozenset()

    @property
    def leaves_out(self) -> bool:
        return False

    def __len__(self) -> int:
        return self._size

    @property
    def rows(self) -> Ints:
        return self.cache.counts("row")[: self._size]

    @property
    def positions(self) -> Ints:
        return self.cache.counts("position")[: self._size]

    @property
    def lengths(self) -> Ints:
        return self.cache.counts("token")[: self._size]

    @property
    def has_image(self) -> npt.NDArray[np.bool_]:
        return self.cache.has_image()[: self._size]

    @property
    def shard_starts(self) -> Ints:
        return np.minimum(self.cache.shard_starts, self._size)

    def read(self, indices: Sequence[int]) -> RawBatch:
        batch = self.cache.read(indices, ["input_ids", "loss_mask", *self._names])
        ends = np.cumsum(batch.counts["token"])[:-1]
        input_ids = [a.astype(np.int64) for a in np.split(batch.arrays.pop("input_ids"), ends)]
        loss_mask = np.split(batch.arrays.pop("loss_mask"), ends)
        offsets = np.cumsum(batch.counts["position"]) - batch.counts["position"]
        token = self.cache.manifest.image_token
        row_index = [
            offset + rows_among_text(ids, mask, token)
            for ids, mask, offset in zip(input_ids, loss_mask, offsets, strict=True)
        ]
        with_image = batch.image_places[:, 0] >= 0
        return RawBatch(
            input_ids=input_ids,
            loss_mask=loss_mask,
            images=[self._image(*i) for i in zip(batch.image_ids, batch.image_checksums, strict=True)],
            arrays=batch.arrays,
            row_index=np.concatenate(row_index) if row_index else np.zeros(0, np.int64),
            visual=self.cache.read_images(batch.image_places[with_image], self._visual) if self._visual else {},
        )

    def name_of(self, index: int) -> str:
        return self.cache.read([index], []).sample_ids[0]

    def images(self) -> Iterator[Image]:
        for start in range(0, self._size, 1024):
            batch = self.cache.read(range(start, min(start + 1024, self._size)), [])
            images = map(self._image, batch.image_ids, batch.image_checksums)
            yield from (image for image in images if image is not None)

    def prefetch(self, shards: Sequence[int]) -> None:
        """No more shards than the prefetch folder holds: a later one would take the place of one still in use."""
        wanted = shards[: self._room]
        self.cache.prefetch(
            [n for n in wanted if n not in self._begun], ["input_ids", "loss_mask", *self._names, *self._visual]
        )
        self._begun = frozenset(wanted)

    def _with_folder(self, config: SourceConfig) -> SourceConfig:
        """With a temporary folder for a remote cache, if none is named: this process's loader processes share it, and
        it goes with this object."""
        if config.prefetch_folder or Storage(config.cache).local is not None:
            return config
        folder = tempfile.mkdtemp(prefix="teacher-cache-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return replace(config, prefetch_folder=folder)

    def _image(self, image_id: str, checksum: str) -> Image | None:
        return _known_image(image_id, checksum, self._embedded)

    def _check_names(self, needed: Sequence[str], stored: Sequence[str]) -> None:
        missing = [name for name in needed if name not in stored]
        if missing:
            raise CacheError(
                f"{self.cache.storage.url}: the losses need {', '.join(missing)}, which this cache does not hold "
                f"(it has {', '.join(stored) or 'nothing of that kind'}). Choose a loss source it has, or build a "
                "cache with those signals (teacher-cache plan prices them)"
            )


class PlainSource:
    """Conversations with their own answers: supervised fine-tuning, no teacher anywhere.

    Ids and images lie in a temporary folder, which loader processes open instead of being sent a copy.
    """

    _embedded: SampleFile | None = None
    total = 0
    """Samples of the data file, those that are left out among them."""

    def __init__(self, conversations: Iterable[Conversation], template: str, tokenizer: Any, image_folder: str) -> None:
        self.image_folder = image_folder
        self._folder = Path(tempfile.mkdtemp(prefix="teacher-cache-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self.skipped: list[Skipped] = []
        form = template_by_name(template)
        lengths, rows, images = [], [], []

        def write() -> Iterator[Conversation]:
            with (self._folder / "ids").open("wb") as ids, (self._folder / "mask").open("wb") as mask:
                for c in conversations:
                    answers = [tokenize_answer(a, form, tokenizer) for a in c.answers]
                    sample = assemble(tokenize_prompt(c, form, tokenizer), answers)
                    ids.write(sample.input_ids.astype(np.int32).tobytes())
                    mask.write(sample.loss_mask.tobytes())
                    lengths.append(len(sample.input_ids))
                    rows.append(sample.rows)
                    images.append(c.image is not None)
                    yield replace(c, questions=(), answers=())

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
    def from_data(cls, config: SourceConfig, tokenizer: Any) -> PlainSource:
        data = DataConfig(path=config.data, duplicate_ids="number", max_samples=config.max_samples)
        samples = spool(data, Path(tempfile.mkdtemp(prefix="teacher-cache-")))
        skipped: list[Skipped] = []
        source = cls(usable(samples, config.image_folder, skipped), config.template, tokenizer, config.image_folder)
        source._embedded = samples  # its images' bytes lie in that folder, which goes with it
        check_share(config, len(samples), skipped)
        source.skipped, source.total = skipped, len(samples)
        return source

    @classmethod
    def from_cache(cls, config: SourceConfig, tokenizer: Any) -> PlainSource:
        """The original answers of the samples in a cache: the same questions and images, another teacher."""
        with _open_cache(config, tokenizer) as cache:
            embedded = _embedded_images(config)
            size = min(config.max_samples or len(cache), len(cache))
            conversations = [
                Conversation.with_image(
                    t.sample_id,
                    t.questions,
                    t.original_answers,
                    _known_image(t.image_id, t.image_checksum, embedded),
                )
                for t in itertools.islice(cache.texts(), size)
            ]
            return cls(conversations, cache.manifest.teacher["template"], tokenizer, config.image_folder)

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def rows(self) -> Ints:
        return self._counts[1]

    @property
    def positions(self) -> Ints:
        return np.asarray(text_positions(self.lengths, self.has_image))

    @property
    def lengths(self) -> Ints:
        return self._counts[0]

    @property
    def has_image(self) -> npt.NDArray[np.bool_]:
        return self._counts[2].astype(np.bool_)

    @property
    def shard_starts(self) -> Ints:
        return np.array([0, len(self)], np.int64)

    def read(self, indices: Sequence[int]) -> RawBatch:
        spans = [slice(int(self._ends[i] - self._counts[0][i]), int(self._ends[i])) for i in indices]
        return RawBatch(
            input_ids=[self._ids[span].astype(np.int64) for span in spans],
            loss_mask=[np.array(self._mask[span]) for span in spans],
            images=[self._image(self._samples[i]) for i in indices],
            arrays={},
            row_index=np.zeros(0, np.int64),
            visual={},
        )

    def name_of(self, index: int) -> str:
        return self._samples[index].sample_id

    def images(self) -> Iterator[Image]:
        images = map(self._image, self._samples)
        return (image for image in images if image is not None)

    @staticmethod
    def _image(sample: Conversation | Skipped) -> Image | None:
        assert isinstance(sample, Conversation)
        return sample.image

    @property
    def leaves_out(self) -> bool:
        return self.total > 0  # else they are a cache's, with its original answers

    def leave_out(self, damaged: Mapping[str, str]) -> None:
        """Note the samples whose image is ``damaged`` (its key → the reason)."""
        for sample in self._samples:
            image = self._image(sample)
            if image is not None and (reason := damaged.get(image_key(image, self.image_folder))):
                self.skipped.append(Skipped(sample.sample_id, reason))

    def prefetch(self, shards: Sequence[int]) -> None:
        """Everything lies on this machine."""


def open_source(config: SourceConfig, tokenizer: Any, names: Sequence[str], visual: Sequence[str]) -> Source:
    """The source a config names; refuses a cache of another tokenizer or without the needed signals."""
    if config.data:
        return PlainSource.from_data(config, tokenizer)
    if config.answers == "original":
        return PlainSource.from_cache(config, tokenizer)
    return CacheSource(config, tokenizer, names, visual)


def _open_cache(config: SourceConfig, tokenizer: Any) -> TeacherCache:
    cache = TeacherCache.open(
        config.cache,
        prefetch_folder=config.prefetch_folder or None,
        prefetch_gigabytes=config.prefetch_gigabytes,
    )
    check_tokenizer(cache, tokenizer, config.tokenizer == "same_ids")
    return cache


def _shards_in(gigabytes: float, cache: TeacherCache) -> int:
    """How many shards of mean size fit; at least one."""
    shards = len(cache.shard_starts) - 1
    return max(int(gigabytes * 2**30 * shards / max(cache.manifest.counts["bytes"], 1)), 1)


def _known_image(image_id: str, checksum: str, embedded: Mapping[str, Image]) -> Image | None:
    """The image that a cache names, with the checksum of the bytes that its teacher saw."""
    if not image_id:
        return None
    return replace(embedded.get(image_id, Image(image_id, path=image_id)), checksum=checksum)


class EmbeddedImages(dict[str, Image]):
    """Images by their digest, whose bytes lie in a folder that goes with this object; other processes read the same."""

    def __init__(self, config: SourceConfig) -> None:
        super().__init__()
        folder = Path(tempfile.mkdtemp(prefix="images-", dir=config.prefetch_folder or None))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        samples = spool(DataConfig(path=config.image_data, duplicate_ids="number"), folder / "read").keep()
        images = (s.image for s in samples if isinstance(s, Conversation) and s.image is not None)
        self.update((image.image_id, image) for image in images if image.embedded)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _embedded_images(config: SourceConfig) -> Mapping[str, Image]:
    return EmbeddedImages(config) if config.image_data else {}


def check_images(source: Source) -> None:
    """Fail before the first step, not in the middle, when the images are not those of the source."""
    folder, tried = source.image_folder, 0
    for image in source.images():
        if image.embedded:
            continue
        if re.fullmatch("[0-9a-f]{32}", image.path) and not (folder and Path(folder, image.path).is_file()):
            raise DataError(
                f"sources[…].image_data: no image of digest {image.path} in it, but the source names one: its images "
                "came inside its data. Set it to all of the Parquet files the cache was made from (files, a folder or "
                "a pattern)"
            )
        if not folder or not Path(folder, image.path).is_file():
            found = f"{folder} holds no {image.path}" if folder else f"not set, but the source names {image.path}"
            raise DataError(f"sources[…].image_folder: {found}. Set it to the folder that the images lie in")
        tried += 1
        if tried == _TRIED:
            return


_TRIED = 512
"""Image files that are looked for before a run; each costs a millisecond on a network disk."""


def leave_out_damaged(configs: Sequence[SourceConfig], sources: Sequence[Source], damaged: Mapping[str, str]) -> None:
    """Before the first step, the samples of plain data whose images (by key, with the reason) are damaged.

    Raises
    ------
    DataError
        Too many of them.
    ImageError
        A cache's image is damaged.
    """
    for settings, source in zip(configs, sources, strict=True):
        if isinstance(source, PlainSource) and source.leaves_out:
            source.leave_out(damaged)
            check_share(settings, source.total, source.skipped)
        else:
            for key in (image_key(image, source.image_folder) for image in source.images()):
                if key in damaged:
                    raise ImageError(damaged[key])
