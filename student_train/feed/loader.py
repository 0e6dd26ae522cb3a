"""Micro-batches of tensors, read and put together ahead of the training, and brought to its device."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from student_train.feed.batch import NOTHING, StudentBatch, collate
from student_train.feed.features import ImageFeatures, image_key
from student_train.feed.raw import RawBatch, Source
from student_train.feed.step_plan import MicroBatch, StepPlan
from student_train.students.preprocessor import Preprocessor
from teacher_cache.data.conversations import Image, Skipped
from teacher_cache.errors import CacheError, ImageError
from teacher_cache.stopping import left_to_parent


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
        self.sources = list(sources)
        self._preprocessor, self._features = preprocessor, features
        self._pack = pack
        self._limit = pixel_cache
        self._pixels: OrderedDict[str, torch.Tensor] = OrderedDict()

    def __getitem__(self, micro: MicroBatch) -> tuple[MicroBatch, StudentBatch]:  # type: ignore[override]
        self._prefetch(micro.coming)
        source = self.sources[micro.source]
        raw = source.read(micro.indices)
        shown = None
        self._check_runs(micro, raw)
        if any(raw.images):
            micro, shown = self._shown(micro, source, raw.images)
        pixels, features = (shown, None) if self._features is None else (None, shown)
        batch = collate(raw, micro.weights, self._preprocessor, pixels, features, pack=self._pack)
        return micro, batch

    def names_of(self, micro: MicroBatch) -> list[str]:
        """The ids of a micro-batch's samples, for an error."""
        return [self.sources[micro.source].name_of(index) for index in micro.indices]

    def _prefetch(self, coming: Sequence[tuple[int, int]]) -> None:
        """In the process that reads, because it is the one that waits."""
        for number, source in enumerate(self.sources if coming else ()):
            source.prefetch([shard for of, shard in coming if of == number])

    def _check_runs(self, micro: MicroBatch, raw: RawBatch) -> None:
        """Cached ids are expanded for a student that reads each image as one run, in the order of a sample's images."""
        for place, (shown, images) in enumerate(zip(raw.placeholders, raw.images, strict=True)):
            if not np.array_equal(shown, np.arange(len(images))):
                raise CacheError(
                    f"sample {self.names_of(micro)[place]}: its teacher read {len(images)} images in {len(shown)} runs "
                    "of positions, and this student reads an image in one. Take a student with the teacher's processor"
                )

    def _shown(
        self, micro: MicroBatch, source: Source, images: Sequence[Sequence[Image]]
    ) -> tuple[MicroBatch, torch.Tensor]:
        """(I, 3, H, W), or a tower's (I, N, d_vision); a damaged image is blank and its sample's weights are zero,
        wherever and whenever it is read.

        A cache's image is not among the damaged ones: its teacher has seen it.
        """
        shown: list[torch.Tensor | None] = []
        weights, skipped = list(micro.weights), []
        for place, image in ((place, image) for place, shows in enumerate(images) for image in shows):
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


def make_loader(
    dataset: MicroBatches, plan: StepPlan, steps: range, rank: int, ranks: int, workers: int, pin: bool
) -> Iterable[tuple[MicroBatch, StudentBatch]]:
    """Micro-batches of ``steps`` in order; ``workers`` processes, or one thread, stay ahead of the training."""
    micros = plan.batches_of(steps, rank, ranks)
    if not workers:
        return _threaded(dataset, micros, pin)
    return DataLoader(
        dataset,
        sampler=micros,
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
    dataset: MicroBatches, micros: Iterator[MicroBatch], pin: bool
) -> Iterator[tuple[MicroBatch, StudentBatch]]:
    """A thread plans and makes ``_AHEAD`` micro-batches in advance; its errors surface where a batch is asked for."""

    def make() -> tuple[MicroBatch, StudentBatch] | None:
        micro = next(micros, None)
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
