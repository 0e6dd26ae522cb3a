"""The sources that a configuration names: teacher caches, and plain data beside them."""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from student_train.config import FitConfig, SourceConfig
from student_train.feed.features import image_key
from student_train.feed.plain import PlainSource
from student_train.feed.raw import Ints, RawBatch, Source, conversation_of, embedded_images, known_images, open_cache
from student_train.feed.skipped import check_share
from student_train.losses.needs import check_losses, needed_arrays
from student_train.students.chat_reader import ChatReader
from student_train.students.reader import Reader
from teacher_cache.data.conversations import Conversation, Image
from teacher_cache.data.rows import rows_among_text
from teacher_cache.errors import CacheError, ConfigError, DataError, ImageError
from teacher_cache.models.chat import Chat
from teacher_cache.store.batches import RecordBatch
from teacher_cache.store.manifest import read_manifest
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.records import Array
from teacher_cache.store.storage import Storage


class CacheSource:
    """A teacher cache; ``names`` are the arrays that the losses need, others are not read. ``chat``: of a student that
    writes its own prompts; None for one that reads a LLaVA teacher's."""

    def __init__(
        self,
        config: SourceConfig,
        tokenizer: Any,
        names: Sequence[str],
        visual: Sequence[str],
        chat: Chat | None = None,
    ) -> None:
        self.cache = open_cache(self._with_folder(config), tokenizer, chat, names)
        weakref.finalize(self, self.cache.close)  # before the folder goes: the last finalizer is called first
        self.image_folder = config.image_folder
        self._embedded = embedded_images(config)
        self._check_names(names, [s.name for s in self.cache.manifest.arrays])
        self._check_names(visual, [s.name for s in self.cache.manifest.image_arrays])
        self._names, self._visual = list(names), list(visual)
        self._image_tokens = self._check_images([*visual, *({"attention"} & set(names))])
        named = [name for name in ("before", "onto") if getattr(config, name)]
        self.others = {name: self._other(config, name, tokenizer, chat) for name in named}
        """Over the same answers, for a teacher's shift."""
        self.shift = config.shift
        self._size = min(config.max_samples or len(self.cache), len(self.cache))
        self._room = _shards_in(config.prefetch_gigabytes, self.cache)
        self._begun: frozenset[int] = frozenset()

    def _other(self, config: SourceConfig, name: str, tokenizer: Any, chat: Chat | None) -> TeacherCache:
        """The cache ``config.before`` or ``onto``; refused where it has other samples, or no states of their rows."""
        url = str(getattr(config, name))
        cache = open_cache(self._with_folder(replace(config, cache=url)), tokenizer, chat, ["hidden"])
        weakref.finalize(self, cache.close)
        signals = cache.manifest.signals_config
        if signals.hidden != "rows" or signals.pca or signals.codec == "int4":
            found = f"hidden={signals.hidden}, codec={signals.codec}, pca={signals.pca}"
            raise CacheError(
                f"sources[…].{name}: {url} has signals {found}; expected hidden=rows in int8 or floats, whose logits "
                "can be subtracted. Build it so"
            )
        both = zip(self.cache.sample_ids(), cache.sample_ids(), strict=False)
        differing = next((pair for pair in both if pair[0] != pair[1]), None)
        if differing or len(cache) != len(self.cache):
            found = f"sample {differing[1]} where that has {differing[0]}" if differing else f"{len(cache):,} samples"
            raise CacheError(f"sources[…].{name}: {url} is not over the samples of {config.cache}: {found}. {_SAME}")
        return cache

    @property
    def caches(self) -> tuple[TeacherCache, ...]:
        """All that it reads."""
        return self.cache, *self.others.values()

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
    def image_counts(self) -> Ints:
        return self.cache.images()[: self._size]

    @property
    def shard_starts(self) -> Ints:
        return np.minimum(self.cache.shard_starts, self._size)

    def read(self, indices: Sequence[int]) -> RawBatch:
        batch = self.cache.read(indices, [*_ALWAYS, *self._names])
        input_ids = [ids.astype(np.int64) for ids in batch.split("input_ids", "token")]
        loss_mask = batch.split("loss_mask", "token")
        offsets = np.cumsum(batch.counts["position"]) - batch.counts["position"]
        token = self.cache.manifest.image_token
        row_index = [
            offset + rows_among_text(ids, mask, token)
            for ids, mask, offset in zip(input_ids, loss_mask, offsets, strict=True)
        ]
        return RawBatch(
            input_ids=input_ids,
            loss_mask=loss_mask,
            images=[known_images(*i, self._embedded) for i in zip(batch.image_ids, batch.image_checksums, strict=True)],
            placeholders=[runs[:, 1].astype(np.int64) for runs in batch.split("runs", "run")],
            arrays={name: self._signal(name, batch) for name in self._names} | self._of_others(indices, batch),
            row_index=np.concatenate(row_index) if row_index else np.zeros(0, np.int64),
            visual=self._visual_signals(batch),
        )

    def _signal(self, name: str, batch: RecordBatch) -> Array:
        """As stored; attention as (R, N), zero for rows without an image."""
        stored = batch.arrays[name]
        if name != "attention":
            return stored
        shown = np.repeat(batch.image_positions > 0, batch.counts["row"])  # (R,)
        grid = np.zeros((len(shown), self._image_tokens), stored.dtype)
        grid[shown] = stored.reshape(-1, self._image_tokens)
        return grid

    def _of_others(self, indices: Sequence[int], batch: RecordBatch) -> dict[str, Array]:
        """States of the same rows, the cache's name before theirs."""
        arrays: dict[str, Array] = {}
        for name, cache in self.others.items():
            stored = {spec.name for spec in cache.manifest.arrays} & {"hidden", "hidden_scale"}
            found = cache.read(indices, ["input_ids", "loss_mask", *stored])
            answers, theirs = (b.arrays["input_ids"][b.arrays["loss_mask"]] for b in (batch, found))
            if not np.array_equal(batch.counts["row"], found.counts["row"]) or not np.array_equal(answers, theirs):
                raise CacheError(
                    f"sources[…].{name}: {cache.storage.url} holds other answers than {self.cache.storage.url} for a "
                    f"sample among {', '.join(batch.sample_ids[:3])}, … {_SAME}"
                )
            arrays |= {f"{name}/{array}": found.arrays[array] for array in stored}
        return arrays

    def _visual_signals(self, batch: RecordBatch) -> dict[str, Array]:
        """(I, N, …) or (I, …) of the batch's images."""
        if not self._visual:
            return {}
        images = self.cache.read_images(batch.image_places[batch.image_places[:, 0] >= 0], self._visual)
        count = len(images.counts["image"])
        return {
            name: array if name == "gram_scale" else array.reshape(count, len(array) // max(count, 1), *array.shape[1:])
            for name, array in images.arrays.items()
        }

    def conversations(self, indices: Sequence[int]) -> list[Conversation]:
        return [conversation_of(texts, self._embedded) for texts in self.cache.texts_of(indices)]

    def name_of(self, index: int) -> str:
        return self.cache.read([index], []).sample_ids[0]

    def images(self) -> Iterator[Image]:
        for start in range(0, self._size, 1024):
            batch = self.cache.read(range(start, min(start + 1024, self._size)), [])
            for named in zip(batch.image_ids, batch.image_checksums, strict=True):
                yield from known_images(*named, self._embedded)

    def prefetch(self, shards: Sequence[int]) -> None:
        """No more shards than the prefetch folder holds: a later one would take the place of one still in use."""
        wanted = shards[: self._room]
        self.cache.prefetch([n for n in wanted if n not in self._begun], [*_ALWAYS, *self._names, *self._visual])
        self._begun = frozenset(wanted)

    def _with_folder(self, config: SourceConfig) -> SourceConfig:
        """With a temporary folder for a remote cache, if none is named: this process's loader processes share it, and
        it goes with this object."""
        if config.prefetch_folder or Storage(config.cache).local is not None:
            return config
        folder = tempfile.mkdtemp(prefix="teacher-cache-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return replace(config, prefetch_folder=folder)

    def _check_names(self, needed: Sequence[str], stored: Sequence[str]) -> None:
        missing = [name for name in needed if name not in stored]
        if missing:
            raise CacheError(
                f"{self.cache.storage.url}: the losses need {', '.join(missing)}, which this cache does not hold "
                f"(it has {', '.join(stored) or 'nothing of that kind'}). Choose a loss source it has, or build a "
                "cache with those signals (teacher-cache plan prices them)"
            )

    def _check_images(self, needed: Sequence[str]) -> int:
        """N: signals that are compared image position by image position need images of one length."""
        counts, n = self.cache.manifest.counts, self.cache.manifest.image_tokens
        if needed and not n and counts["image_positions"]:
            raise CacheError(
                f"{self.cache.storage.url}: the losses need {', '.join(needed)}, but its images have "
                f"{counts['least_image']} to {counts['most_image']} positions, expected as many for each. Drop the "
                "losses on image positions, or cache images of one size"
            )
        return n


_SAME = (
    "Its model must score this cache's answers: build it from the same data and generation settings, with "
    "teacher.answerer naming the model that wrote them"
)
_ALWAYS = ("input_ids", "loss_mask", "runs")


def open_source(config: SourceConfig, reader: Reader, names: Sequence[str], visual: Sequence[str]) -> Source:
    """The source a config names; refuses a cache of another tokenizer or without the needed signals."""
    if config.data:
        return PlainSource.from_data(config, reader.chat)
    if config.answers == "original":
        return PlainSource.from_cache(config, reader)
    chat = reader.chat if isinstance(reader, ChatReader) else None
    return CacheSource(config, reader.tokenizer, names, visual, chat)


def open_sources(config: FitConfig, reader: Reader) -> list[Source]:
    """All of them, looked at.

    Raises ``ConfigError``: samples with images for a student that reads text only.
    """
    sources = []
    for source in config.sources:
        names: list[str] = []
        visual: list[str] = []
        if source.cache and source.answers == "cached":
            manifest = read_manifest(Storage(source.cache))
            check_losses(config.losses, manifest, source.cache)
            names, visual = needed_arrays(config.losses, manifest)
        opened = open_source(source, reader, names, visual)
        shown = int(np.count_nonzero(opened.image_counts))
        if shown and reader.image_token < 0:
            raise ConfigError(
                f"sources: {shown:,} of {len(opened):,} samples of {source.cache or source.data} show images, and the "
                "student reads text only. Take a student with a vision tower, or data without images"
            )
        check_images(opened)
        sources.append(opened)
    return sources


def _shards_in(gigabytes: float, cache: TeacherCache) -> int:
    """How many shards of mean size fit; at least one."""
    shards = len(cache.shard_starts) - 1
    return max(int(gigabytes * 2**30 * shards / max(cache.manifest.counts["bytes"], 1)), 1)


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
