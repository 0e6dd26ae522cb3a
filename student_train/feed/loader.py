"""Micro-batches of tensors, read and put together ahead of the training, and brought to its device."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Generic, TypeVar

import numpy as np
import torch
from PIL import Image as PillowImage
from torch.utils.data import DataLoader, Dataset

from student_train.config import FitConfig
from student_train.feed.batch import NOTHING, StudentBatch, collate
from student_train.feed.features import ImageFeatures, image_key
from student_train.feed.raw import RawBatch, Source
from student_train.feed.sources import CacheSource
from student_train.feed.step_plan import MicroBatch, StepPlan
from student_train.students.chat_reader import ChatReader
from student_train.students.lines import Line
from student_train.students.preprocessor import Preprocessor
from student_train.students.reader import Reader
from teacher_cache.data.conversations import Image, Skipped
from teacher_cache.data.images import load_image
from teacher_cache.errors import CacheError, ConfigError, ImageError
from teacher_cache.models.chat import CAPTIONS
from teacher_cache.stopping import left_to_parent

Key = TypeVar("Key")
Value = TypeVar("Value")


class MicroBatches(Dataset[StudentBatch]):
    """Micro-batches, made in loader processes: read, decode, preprocess, collate."""

    def __init__(
        self,
        sources: Sequence[Source],
        reader: Reader,
        features: ImageFeatures | None,
        pixel_cache: int,
        pack: bool = False,
    ) -> None:
        self.sources = list(sources)
        self.reader, self._features = reader, features
        self._pack = pack
        self._pixels: Kept[str, torch.Tensor] = Kept(pixel_cache)
        self._lines: Kept[tuple[int, int], list[Line]] = Kept(pixel_cache * IMAGE_VALUES)

    def __getitem__(self, micro: MicroBatch) -> tuple[MicroBatch, StudentBatch]:  # type: ignore[override]
        self._prefetch(micro.coming)
        source = self.sources[micro.source]
        raw = source.read(micro.indices)
        features = None
        if isinstance(self.reader, ChatReader):
            micro, lines = self._rendered(micro, source, raw, self.reader)
        else:
            micro, lines, features = self._expanded(micro, source, raw, self.reader)
        return micro, collate(raw, lines, micro.weights, self.reader.pad, features, pack=self._pack)

    def batch(self, indices: Sequence[int], source: int = 0) -> StudentBatch:
        """Samples of one source without weights in a global loss: to be looked at, or weighed by somebody else."""
        return self[MicroBatch(0, source, tuple(indices), (NOTHING,) * len(indices), last=True)][1]

    def _rendered(
        self, micro: MicroBatch, source: Source, raw: RawBatch, reader: ChatReader
    ) -> tuple[MicroBatch, list[Line]]:
        """By the student's own chat template and processor, which is called once for a sample: what it makes of an
        image may depend on the others, so that lines are kept, not images."""
        lines: list[Line] = []
        weights, skipped = list(micro.weights), []
        for place, asked in enumerate(source.conversations(micro.indices)):
            key = (micro.source, micro.indices[place])
            if (own := self._lines.get(key)) is None:
                try:
                    pictures, damaged = [load_image(image, source.image_folder) for image in asked.images], False
                except ImageError as error:
                    if not source.leaves_out:
                        raise
                    pictures, damaged = [_BLANK] * len(asked.images), True
                    weights[place] = NOTHING
                    skipped.append(Skipped(asked.sample_id, str(error)))
                own = reader.lines(asked, raw.input_ids[place], raw.loss_mask[place], pictures)
                if not damaged:
                    self._lines.keep(key, own, sum(f.numel() for line in own for f in line.fields.values()))
            lines += [replace(line, sample=place) for line in own]
        return replace(micro, weights=tuple(weights), skipped=tuple(skipped)), lines

    def _expanded(
        self, micro: MicroBatch, source: Source, raw: RawBatch, reader: Preprocessor
    ) -> tuple[MicroBatch, list[Line], torch.Tensor | None]:
        """The cached ids, and each image's pixels, or (I, N, d_vision) a tower's features of all."""
        self._check_runs(micro, raw)
        shown: list[list[torch.Tensor]] = [[] for _ in raw.images]
        if any(raw.images):
            micro, shown = self._shown(micro, source, raw.images, reader)
        fields = [_pixels(values) if self._features is None else {} for values in shown]
        read = zip(raw.input_ids, raw.loss_mask, fields, strict=True)
        lines = [reader.line(place, *of_sample) for place, of_sample in enumerate(read)]
        of_images = [values for sample in shown for values in sample]
        return micro, lines, torch.stack(of_images) if of_images and self._features is not None else None

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
        self, micro: MicroBatch, source: Source, images: Sequence[Sequence[Image]], reader: Preprocessor
    ) -> tuple[MicroBatch, list[list[torch.Tensor]]]:
        """(3, H, W), or a tower's (N, d_vision), of each sample's images; a damaged one is blank and its sample's
        weights are zero, wherever and whenever it is read.

        A cache's image is not among the damaged ones: its teacher has seen it.
        """
        shown: list[list[torch.Tensor]] = [[] for _ in images]
        weights, skipped = list(micro.weights), []
        for place, image in ((place, image) for place, shows in enumerate(images) for image in shows):
            try:
                shown[place].append(self._values(image, source.image_folder, reader))
            except ImageError as error:
                if not source.leaves_out:
                    raise
                shown[place].append((self._features or reader).blank())
                weights[place] = NOTHING
                skipped.append(Skipped(source.name_of(micro.indices[place]), str(error)))
        return replace(micro, weights=tuple(weights), skipped=tuple(skipped)), shown

    def _values(self, image: Image, folder: str, reader: Preprocessor) -> torch.Tensor:
        """(3, H, W), or a tower's (N, d_vision)."""
        key = image_key(image, folder)
        if self._features is not None:
            return self._features.read([key])[0]
        found = self._pixels.get(key)
        if found is None:
            found = reader.pixels(image, folder)
            self._pixels.keep(key, found)
        return found


def with_own_images(config: FitConfig, sources: Sequence[Source], reader: Reader) -> Reader:
    """The ``reader``, once it has read the first sample and the first one with an image: how long the student makes an
    image, and whether samples may be packed; and once it has read each sample that might be too long for it.

    Raises ``ConfigError``, ``CacheError``: they cannot, or one is.
    """
    if not isinstance(reader, ChatReader):
        return reader
    probe = MicroBatches(sources, replace(reader, compares_text=False, compares_images=False), None, 0)
    for number, source in enumerate(sources):
        counts = source.image_counts
        for index in sorted({0, int(np.argmax(counts > 0))}):
            batch = probe.batch([index], number)
            if config.train.pack and any(name.endswith("token_type_ids") for name in batch.fields):
                raise ConfigError(
                    "train.pack: this student reads token types, from which it makes positions and attention for one "
                    "sample a line. Set train.pack=false"
                )
            if counts[index] and not reader.image_tokens:
                shown = int((batch.input_ids == reader.image_token).sum())
                reader = replace(reader, image_tokens=shown // int(counts[index]))
    for number, source in enumerate(sources):
        unasked = isinstance(source, CacheSource) and source.cache.manifest.teacher["template"] in CAPTIONS
        most = reader.most_positions(source.lengths, source.rows, source.image_counts)
        too_long = most > (np.inf if reader.positions is None else -1 if unasked else reader.positions)
        for index in np.flatnonzero(too_long).tolist():
            probe.batch([index], number)
    return reader


IMAGE_VALUES = 3 * 336 * 336
"""What counts as an image in ``train.pixel_cache`` where whole samples are kept: one of LLaVA-1.5's."""
_BLANK = PillowImage.new("RGB", (64, 64))


class Kept(Generic[Key, Value]):
    """The last values that fit into ``room``; those that came first go first."""

    def __init__(self, room: int) -> None:
        self._room, self._values = room, OrderedDict[Key, tuple[Value, int]]()

    def get(self, key: Key) -> Value | None:
        found = self._values.get(key)
        return None if found is None else found[0]

    def keep(self, key: Key, value: Value, size: int = 1) -> None:
        self._values[key] = (value, size)
        self._room -= size
        while self._room < 0:
            self._room += self._values.popitem(last=False)[1][1]


def _pixels(values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of one sample's images, each (3, H, W); nothing where there is none."""
    if not values:
        return {}
    return {"pixel_values": values[0][None] if len(values) == 1 else torch.stack(list(values))}


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
