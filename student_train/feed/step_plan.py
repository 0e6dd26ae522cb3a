"""Which samples make step s, split over ranks and micro-batches.

The plan is a pure function of (seed, step): it does not know ranks, workers or micro-batch size until it is split, so
the same samples with the same weights reach the gradient however many there are. A rank that has fewer micro-batches
than another repeats a sample with weight zero, because DDP and FSDP need every rank in every backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from student_train.config import SourceConfig, TrainConfig
from student_train.feed.batch import NOTHING, Weights
from student_train.feed.order import BLOCK_SHARDS, Order, Samples, epoch_batches, rank_part, shards_of, steps_per_epoch
from student_train.feed.raw import Source
from student_train.feed.sources import CacheSource
from teacher_cache.data.conversations import Skipped
from teacher_cache.data.rows import expanded_length
from teacher_cache.errors import ConfigError

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one source, by number, with their weights in the global loss."""

    step: int
    source: int
    indices: tuple[int, ...]
    weights: tuple[Weights, ...]
    last: bool
    """The last micro-batch of its step on this rank: gradients are exchanged here."""
    skipped: tuple[Skipped, ...] = ()
    """Samples whose image turned out damaged when it was read: their weights are zero."""
    coming: tuple[tuple[int, int], ...] = ()
    """(source, shard) that this step and those after it need, in the order of need: what to copy of remote caches."""


class StepPlan:
    """The order of training: which (source, sample) make each global batch, for all epochs."""

    def __init__(
        self, sources: Sequence[Source], settings: Sequence[SourceConfig], config: TrainConfig, image_tokens: int
    ) -> None:
        self._config, self._shares, self._image_tokens = config, [s.share for s in settings], image_tokens
        self._sources = list(sources)
        self._sizes = [len(s) for s in sources]
        self._offsets = np.concatenate([[0], np.cumsum(self._sizes)])
        self._source_weights = np.repeat([s.weight for s in settings], self._sizes)  # (samples,)
        self._rows = np.concatenate([s.rows for s in sources])
        self._positions = np.concatenate([s.positions for s in sources])
        self._images = np.concatenate([s.image_counts for s in sources])
        tokens = np.concatenate([s.lengths for s in sources])
        self._lengths = expanded_length(tokens, self._images, self._images * image_tokens)
        starts = [s.shard_starts[:-1] + o for s, o in zip(sources, self._offsets[:-1], strict=True)]
        self._shard_starts = np.concatenate([*starts, self._offsets[-1:]])
        self._remote = any(isinstance(s, CacheSource) and s.cache.is_remote for s in sources)
        self._shard_sources = [n for n, s in enumerate(sources) for _ in s.shard_starts[1:]]
        self._first_shards = [self._shard_sources.index(n) for n in range(len(sources))]
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._shards = lru_cache(maxsize=2 * self._steps_ahead)(self._make_shards)

    def check_positions(self, limit: int | None) -> None:
        """Refuse samples that are longer than the student's ``limit`` positions: what it says there means nothing.

        Raises ``ConfigError``.
        """
        over: Ints = np.flatnonzero(self._lengths > limit) if limit is not None else np.zeros(0, np.int64)
        if len(over):
            first, longest = int(over[0]), int(self._lengths.argmax())
            source = self._source_of(first)
            name, worst = (
                self._sources[self._source_of(n)].name_of(int(n - self._offsets[self._source_of(n)]))
                for n in (first, longest)
            )
            raise ConfigError(
                f"student: it has {limit} positions, but {len(over)} of {len(self._lengths)} samples are longer with "
                f"its {self._image_tokens} image tokens (first: {name} of sources[{source}]; longest: {worst} with "
                f"{self._lengths[longest]}). Take a student with more positions, or make the cache with a smaller "
                "teacher.max_length, which skips longer samples"
            )

    @property
    def steps_per_epoch(self) -> int:
        samples = sum(int(share * size) for share, size in zip(self._shares, self._sizes, strict=True))
        return steps_per_epoch(samples, self._config.global_batch)

    @property
    def steps(self) -> int:
        return self._config.max_steps or max(round(self._config.epochs * self.steps_per_epoch), 1)

    def global_batch(self, step: int) -> Ints:
        """Numbers (over all sources, one after another) of the samples of ``step``, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[place]

    def micro_batches(self, step: int, rank: int, ranks: int) -> list[MicroBatch]:
        """This rank's part of ``step``; every rank has as many."""
        numbers = self.global_batch(step)
        weights = self._weights(numbers)
        parts = [self._split(rank_part(numbers, r, ranks)) for r in range(ranks)]
        count = max(len(part) for part in parts)
        mine = parts[rank] + [numbers[:1]] * (count - len(parts[rank]))
        real = len(parts[rank])
        coming = self.coming_shards(step, rank, ranks)
        return [
            self._micro(step, chunk, weights if place < real else {}, place == count - 1, coming)
            for place, chunk in enumerate(mine)
        ]

    def batches_of(self, steps: range, rank: int, ranks: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches of ``steps``, in order."""
        return (micro for step in steps for micro in self.micro_batches(step, rank, ranks))

    def coming_shards(self, step: int, rank: int, ranks: int) -> tuple[tuple[int, int], ...]:
        """(source, shard) of this rank's part of ``step`` and of the steps after it, in the order of need: as far ahead
        as a block of shards lasts, so that the next block is copied while this one is used. Nothing if all is local."""
        if not self._remote:
            return ()
        steps = range(step, min(step + self._steps_ahead, self.steps - 1) + 1)
        return tuple(dict.fromkeys(place for s in steps for place in self._shards(s, rank, ranks)))

    @property
    def _steps_ahead(self) -> int:
        samples_per_shard = len(self._rows) / max(len(self._shard_sources), 1)
        return math.ceil(BLOCK_SHARDS * samples_per_shard / self._config.global_batch)

    def _make_shards(self, step: int, rank: int, ranks: int) -> list[tuple[int, int]]:
        numbers = shards_of(rank_part(self.global_batch(step), rank, ranks), self._shard_starts)
        sources = self._shard_sources
        return [(sources[n], n - self._first_shards[sources[n]]) for n in numbers]

    def _micro(
        self, step: int, chunk: Ints, weights: dict[int, Weights], last: bool, coming: tuple[tuple[int, int], ...]
    ) -> MicroBatch:
        source = self._source_of(int(chunk[0]))
        return MicroBatch(
            step,
            source,
            tuple(int(n - self._offsets[source]) for n in chunk),
            tuple(weights.get(int(n), NOTHING) for n in chunk),
            last,
            coming=coming,
        )

    def _split(self, numbers: Ints) -> list[Ints]:
        """Chunks of at most ``micro_batch`` samples of one source, longest first so that little is padded."""
        order = numbers[np.lexsort((numbers, -self._lengths[numbers]))]
        chunks = []
        for source in range(len(self._sizes)):
            own = order[(order >= self._offsets[source]) & (order < self._offsets[source + 1])]
            chunks += [own[i : i + self._config.micro_batch] for i in range(0, len(own), self._config.micro_batch)]
        return chunks

    def _weights(self, numbers: Ints) -> dict[int, Weights]:
        """Of each sample of a global batch: its source's weight, over what all that is counted in the batch weighs."""
        own = self._source_weights[numbers]  # (samples,)
        rows, positions, images = self._rows[numbers], self._positions[numbers], self._images[numbers]
        counts = (rows, positions, images, positions + images * self._image_tokens, np.ones_like(rows))
        each = [1.0 / total if (total := float(own @ count)) else 1.0 for count in counts]
        return {int(n): Weights(*(weight * x for x in each)) for n, weight in zip(numbers, own.tolist(), strict=True)}

    def _source_of(self, number: int) -> int:
        return int(np.searchsorted(self._offsets, number, side="right")) - 1

    def _make_epoch(self, epoch: int) -> list[Ints]:
        chosen = self._chosen(epoch)
        shuffle = self._config.shuffle
        if shuffle == "auto":
            shuffle = "shards" if self._remote else "full"
        starts = np.searchsorted(chosen, self._shard_starts)
        samples = Samples(self._lengths[chosen], self._images[chosen] > 0, starts)
        order = Order(self._config.seed, self._config.global_batch, shuffle, self._config.group)
        return [chosen[batch] for batch in epoch_batches(samples, order, epoch)]

    def _chosen(self, epoch: int) -> Ints:
        """Sorted numbers seen in this epoch: whole copies of each source, and a fresh part where a share asks."""
        parts = []
        for source, (size, share) in enumerate(zip(self._sizes, self._shares, strict=True)):
            whole, rest = divmod(int(share * size), size)
            generator = np.random.default_rng([self._config.seed, epoch, source])
            copies = [np.arange(size)] * whole + [generator.choice(size, rest, replace=False)]
            parts.append(np.concatenate(copies) + self._offsets[source])
        return np.sort(np.concatenate(parts)).astype(np.int64)
