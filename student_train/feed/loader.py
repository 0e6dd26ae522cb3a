"""Which samples make step s, split over ranks and micro-batches, and the loader that prepares them in advance.

The plan is a pure function of (seed, step): it does not know ranks, workers or micro-batch size until it is split, so
the same samples with the same weights reach the gradient however many there are. A rank that has fewer micro-batches
than another repeats a sample with weight zero, because DDP and FSDP need every rank in every backward pass.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from student_train.config import TrainConfig
from student_train.feed.batch import NOTHING, StudentBatch, Weights, collate
from student_train.feed.features import ImageFeatures, image_key
from student_train.feed.order import BLOCK_SHARDS, epoch_batches, rank_part, shards_of
from student_train.feed.sources import CacheSource, Source
from student_train.students.preprocessor import Preprocessor
from teacher_cache.data.conversations import Image, Skipped
from teacher_cache.data.rows import expanded_length
from teacher_cache.errors import ConfigError, ImageError
from teacher_cache.stopping import left_to_parent

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
        self, sources: Sequence[Source], shares: Sequence[float], config: TrainConfig, image_tokens: int
    ) -> None:
        self._config, self._shares, self._image_tokens = config, list(shares), image_tokens
        self._sources = list(sources)
        self._sizes = [len(s) for s in sources]
        self._offsets = np.concatenate([[0], np.cumsum(self._sizes)])
        self._rows = np.concatenate([s.rows for s in sources])
        self._positions = np.concatenate([s.positions for s in sources])
        self._has_image = np.concatenate([s.has_image for s in sources])
        tokens, images = np.concatenate([s.lengths for s in sources]), self._has_image.astype(np.int64)
        self._lengths = expanded_length(tokens, images, images * image_tokens)
        starts = [s.shard_starts[:-1] + o for s, o in zip(sources, self._offsets[:-1], strict=True)]
        self._shard_starts = np.concatenate([*starts, self._offsets[-1:]])
        self._remote = any(isinstance(s, CacheSource) and s.cache.is_remote for s in sources)
        self._shard_sources = [n for n, s in enumerate(sources) for _ in s.shard_starts[1:]]
        self._first_shards = [self._shard_sources.index(n) for n in range(len(sources))]
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._shards = lru_cache(maxsize=2 * self._steps_ahead)(self._make_shards)

    def check_positions(self, limit: int | None) -> None:
        """Refuse samples that are longer than the student's ``limit`` positions: what it says there means nothing.

        Raises
        ------
        ConfigError
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
        return -(-samples // self._config.global_batch)

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
        rows, positions = self._rows[numbers], self._positions[numbers]
        images = self._has_image[numbers].astype(np.int64)
        tokens = positions + images * self._image_tokens
        row, position, image, token = (1.0 / max(int(c.sum()), 1) for c in (rows, positions, images, tokens))
        each = Weights(row, position, image, token, sample=1.0 / len(numbers))
        return {int(n): each for n in numbers}

    def _source_of(self, number: int) -> int:
        return int(np.searchsorted(self._offsets, number, side="right")) - 1

    def _make_epoch(self, epoch: int) -> list[Ints]:
        chosen = self._chosen(epoch)
        shuffle = self._config.shuffle
        if shuffle == "auto":
            shuffle = "shards" if self._remote else "full"
        batches = epoch_batches(
            lengths=self._lengths[chosen],
            has_image=self._has_image[chosen],
            shard_starts=np.searchsorted(chosen, self._shard_starts),
            seed=self._config.seed,
            epoch=epoch,
            global_batch=self._config.global_batch,
            shuffle=shuffle,
            group=self._config.group,
        )
        return [chosen[batch] for batch in batches]

    def _chosen(self, epoch: int) -> Ints:
        """Sorted numbers seen in this epoch: whole copies of each source, and a fresh part where a share asks."""
        parts = []
        for source, (size, share) in enumerate(zip(self._sizes, self._shares, strict=True)):
            whole, rest = divmod(int(share * size), size)
            generator = np.random.default_rng([self._config.seed, epoch, source])
            copies = [np.arange(size)] * whole + [generator.choice(size, rest, replace=False)]
            parts.append(np.concatenate(copies) + self._offsets[source])
        return np.sort(np.concatenate(parts)).astype(np.int64)


class MicroBatches(Dataset[StudentBatch]):
    """Micro-batches, made in loader processes: read, decode, preprocess, collate."""

    def __init__(
        self,
        sources: Sequence[Source],
        preprocessor: Preprocessor,
        features: ImageFeatures | None,
        pixel_cache: int,
        pack: bool = False,
    ) -> None:
        self.sources = self._sources = list(sources)
        self._preprocessor, self._features = preprocessor, features
        self._pack = pack
        self._limit = pixel_cache
        self._pixels: OrderedDict[str, torch.Tensor] = OrderedDict()

    def __getitem__(self, micro: MicroBatch) -> tuple[MicroBatch, StudentBatch]:  # type: ignore[override]
        self._prefetch(micro.coming)
        source = self._sources[micro.source]
        raw = source.read(micro.indices)
        shown = None
        if any(image is not None for image in raw.images):
            micro, shown = self._shown(micro, source, raw.images)
        batch = collate(
            raw,
            micro.weights,
            image_token=self._preprocessor.image_token,
            image_tokens=self._preprocessor.image_tokens,
            pad=self._preprocessor.pad,
            pixel_values=shown if self._features is None else None,
            image_features=shown if self._features is not None else None,
            pack=self._pack,
        )
        return micro, batch

    def names_of(self, micro: MicroBatch) -> list[str]:
        """The ids of a micro-batch's samples, for an error."""
        return [self._sources[micro.source].name_of(index) for index in micro.indices]

    def _prefetch(self, coming: Sequence[tuple[int, int]]) -> None:
        """In the process that reads, because it is the one that waits."""
        for number, source in enumerate(self._sources if coming else ()):
            source.prefetch([shard for of, shard in coming if of == number])

    def _shown(
        self, micro: MicroBatch, source: Source, images: Sequence[Image | None]
    ) -> tuple[MicroBatch, torch.Tensor]:
        """(I, 3, H, W), or a tower's (I, N, d_vision); a damaged image is blank and its sample's weights are zero,
        wherever and whenever it is read.

        A cache's image is not among the damaged ones: its teacher has seen it.
        """
        shown: list[torch.Tensor | None] = []
        weights, skipped = list(micro.weights), []
        for place, image in enumerate(images):
            if image is None:
                continue
            try:
                shown.append(self._values(image, source.image_folder))
            except ImageError as error:
                if not source.leaves_out:
                    raise
                shown.append(None)
                weights[place] = NOTHING
                skipped.append(Skipped(source.name_of(micro.indices[place]), str(error)))
        blank = next((values for values in shown if values is not None), None)
        if blank is None:
            blank = (self._features or self._preprocessor).blank()
        stacked = torch.stack([torch.zeros_like(blank) if values is None else values for values in shown])
        return replace(micro, weights=tuple(weights), skipped=tuple(skipped)), stacked

    def _values(self, image: Image, folder: str) -> torch.Tensor:
        """(3, H, W), or a tower's (N, d_vision)."""
        key = image_key(image, folder)
        if self._features is not None:
            return self._features.read([key])[0]
        found = self._pixels.get(key)
        if found is None:
            found = self._pixels[key] = self._preprocessor.pixels(image, folder)
            while len(self._pixels) > self._limit:
                self._pixels.popitem(last=False)
        return found


class _Micros(Sampler[MicroBatch]):
    def __init__(self, plan: StepPlan, steps: range, rank: int, ranks: int) -> None:
        self._arguments = (plan, steps, rank, ranks)

    def __iter__(self) -> Iterator[MicroBatch]:
        plan, steps, rank, ranks = self._arguments
        for step in steps:
            yield from plan.micro_batches(step, rank, ranks)


def make_loader(
    dataset: MicroBatches, plan: StepPlan, steps: range, rank: int, ranks: int, workers: int, pin: bool
) -> Iterable[tuple[MicroBatch, StudentBatch]]:
    """Micro-batches of ``steps`` in order; ``workers`` processes, or one thread, stay ahead of the training."""
    if not workers:
        return _threaded(dataset, _Micros(plan, steps, rank, ranks), pin)
    return DataLoader(
        dataset,
        sampler=_Micros(plan, steps, rank, ranks),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4,
        pin_memory=pin,
        multiprocessing_context="spawn",
        worker_init_fn=left_to_parent,
    )


def on_device(
    batches: Iterable[tuple[MicroBatch, StudentBatch]], device: torch.device
) -> Iterator[tuple[MicroBatch, StudentBatch]]:
    """The same batches on ``device``. On a GPU the next one is copied, by a stream of its own, during each step."""
    if device.type == "cpu":  # thirty calls that copy nothing would each wait for the loader's thread
        yield from batches
        return
    if device.type != "cuda":
        for micro, batch in batches:
            yield micro, batch.to(device)
        return
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ahead: tuple[MicroBatch, StudentBatch, torch.cuda.Event] | None = None
    for micro, batch in batches:
        with torch.cuda.stream(copies):
            following = micro, batch.to(device), copies.record_event()
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = following
    if ahead is not None:
        yield _arrived(*ahead)


def _arrived(micro: MicroBatch, batch: StudentBatch, copied: torch.cuda.Event) -> tuple[MicroBatch, StudentBatch]:
    """The batch for the current stream: it waits for the copy, and the memory is not given away before it is done."""
    stream = torch.cuda.current_stream()
    stream.wait_event(copied)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        tensor.record_stream(stream)
        return tensor

    return micro, batch.map(keep)


def _threaded(
    dataset: MicroBatches, micros: Iterable[MicroBatch], pin: bool
) -> Iterator[tuple[MicroBatch, StudentBatch]]:
    """A thread plans and makes ``_AHEAD`` micro-batches in advance; its errors surface where a batch is asked for."""
    waiting = iter(micros)

    def make() -> tuple[MicroBatch, StudentBatch] | None:
        micro = next(waiting, None)
        if micro is None:
            return None
        made, batch = dataset[micro]
        return made, batch.pin_memory() if pin else batch

    with ThreadPoolExecutor(1, thread_name_prefix="batch-loader") as thread:
        pending = deque(thread.submit(make) for _ in range(_AHEAD))
        try:
            while (made := pending.popleft().result()) is not None:
                pending.append(thread.submit(make))
                yield made
        finally:
            for future in pending:
                future.cancel()


_AHEAD = 4
