"""What a reader gives: samples together, visual signals together, texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from teacher_cache.errors import CacheError
from teacher_cache.store.folder import ShardFolder, gathered
from teacher_cache.store.index import AXES, REPAIR, run_fault
from teacher_cache.store.records import Array, ArraySpec, Axis


@dataclass(frozen=True)
class RecordBatch:
    """Several samples, their lines one after another.

    ``arrays[name]`` (Σ lines, …) in the order of ``indices`` · ``counts[axis]`` (B,) lines of each sample on an axis ·
    ``image_ids``, ``image_checksums``: of each sample's images, as it shows them · ``image_positions`` (B,) the sum of
    their lengths · ``image_places`` (B, 2) shard and line of visual signals, −1 where there are none.
    """

    indices: npt.NDArray[np.int64]
    sample_ids: list[str]
    image_ids: list[list[str]]
    image_checksums: list[list[str]]
    arrays: dict[str, Array]
    counts: dict[Axis, npt.NDArray[np.int64]]
    image_positions: npt.NDArray[np.int64]
    image_places: npt.NDArray[np.int64]

    def split(self, name: str, axis: Axis) -> list[Array]:
        """Array ``name``, whose lines are of ``axis``, a sample each."""
        return np.split(self.arrays[name], np.cumsum(self.counts[axis])[:-1])

    def check_runs(self, where: Callable[[int], str]) -> None:
        """Where ``runs`` are read they are looked at: they say how far a sample is to be expanded.

        ``where``: the folder of a sample by its number. Raises ``CacheError``, which names it.
        """
        if (runs := self.arrays.get("runs")) is None:
            return
        images = np.array([len(ids) for ids in self.image_ids], np.int64)
        if fault := run_fault(runs, self.counts["run"], images, self.image_positions):
            sample, what = fault
            name = f"{where(int(self.indices[sample]))}/runs"
            raise CacheError(f"{name}: sample {self.sample_ids[sample]}: {what}; {REPAIR}")


@dataclass(frozen=True)
class ImageBatch:
    """Visual signals of several images: ``arrays[name]`` (Σ lines, …), ``counts[axis]`` (I,) lines of each image."""

    arrays: dict[str, Array]
    counts: dict[Axis, npt.NDArray[np.int64]]

    def split(self, name: str, axis: Axis) -> list[Array]:
        """Array ``name``, whose lines are of ``axis``, an image each."""
        return np.split(self.arrays[name], np.cumsum(self.counts[axis])[:-1])


@dataclass(frozen=True)
class SampleTexts:
    """What was asked and said in one sample. ``source`` of the answers: teacher, student or original."""

    sample_id: str
    image_ids: list[str]
    image_checksums: list[str]
    system: str
    questions: list[str]
    answers: list[str]
    original_answers: list[str]
    source: str


def sample_texts(folder: ShardFolder, line: int) -> SampleTexts:
    """Of the sample in this ``line`` of a folder."""
    names = (folder.samples.sample_ids, folder.samples.image_ids, folder.samples.image_checksums)
    (texts,) = folder.texts.slice(line, 1).to_pylist()
    return SampleTexts(*(column[line].as_py() for column in names), **texts)


def record_batch(
    indices: npt.NDArray[np.int64], places: Sequence[tuple[ShardFolder, int]], specs: Sequence[ArraySpec]
) -> RecordBatch:
    """The samples at ``places`` (folder and line in it), each array gathered in one go."""
    lines = [(folder.samples, line) for folder, line in places]
    axes: list[Axis] = list(dict.fromkeys([*AXES, *(spec.axis for spec in specs)]))
    return RecordBatch(
        indices=indices,
        sample_ids=[samples.sample_ids[line].as_py() for samples, line in lines],
        image_ids=[samples.image_ids[line].as_py() for samples, line in lines],
        image_checksums=[samples.image_checksums[line].as_py() for samples, line in lines],
        arrays={spec.name: gathered(spec, places) for spec in specs},
        counts={axis: np.array([samples.counts[axis][line] for samples, line in lines], np.int64) for axis in axes},
        image_positions=np.array([samples.image_positions[line] for samples, line in lines], np.int64),
        image_places=np.array([samples.places[line] for samples, line in lines], np.int64).reshape(-1, 2),
    )


def image_batch(places: Sequence[tuple[ShardFolder, int]], specs: Sequence[ArraySpec]) -> ImageBatch:
    """The images at ``places``."""
    axes: tuple[Axis, ...] = ("image", "patch", "pair")
    lines = [(folder.images, line) for folder, line in places]
    counts = {axis: np.array([images.counts[axis][line] for images, line in lines], np.int64) for axis in axes}
    return ImageBatch({spec.name: gathered(spec, places) for spec in specs}, counts)
