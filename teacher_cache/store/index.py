"""The columns of ``index.parquet``: how the lines of samples, or of images, lie in a folder's arrays.

Counts and starts of a stranger's file are checked here, once: after :func:`read_sample_lines` every start and count
lies within its arrays' lines, and an image has its name, its checksum and at least one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from teacher_cache.errors import CacheError
from teacher_cache.store.manifest import Manifest
from teacher_cache.store.records import Array, Axis, TeacherRecord, line_counts, pairs
from teacher_cache.store.tables import read_table

Ints = npt.NDArray[np.signedinteger[Any]]

AXES: dict[Axis, str] = {"token": "tokens", "row": "rows", "position": "positions", "run": "runs"}
"""The axes of a sample whose lines an index counts, and the column that does; ``{axis}_start`` is where they begin."""
COUNTED = (*AXES.values(), "image_positions")
"""What is counted of a sample in an index, in ``samples.parquet`` and, summed, in the ledger."""
PLACE = ("image_shard", "image_row")
TEXT_LISTS = ("questions", "answers", "original_answers")
TEXTS = dict.fromkeys(TEXT_LISTS, pa.list_(pa.string())) | dict.fromkeys(("system", "source"), pa.string())
_IMAGES = ("image_ids", "image_checksums")
_LINES = {
    "sample_id": pa.string(),
    **dict.fromkeys(_IMAGES, pa.list_(pa.string())),
    **{name: pa.int64() for axis in AXES for name in (f"{axis}_start", AXES[axis])},
    "image_positions": pa.int64(),
    **dict.fromkeys(PLACE, pa.int32()),
}
_IMAGE_LINES = {"image_id": pa.string(), "present": pa.bool_(), "patch_start": pa.int64(), "patches": pa.int64()}
MOST_LINES = 1 << 24
"""Tokens, rows, positions or runs of one sample: as many as ``teacher.max_length`` may be."""


class ImagePlace(NamedTuple):
    """Where an image's line stands: ``images/{shard:05d}``, line ``row``; (−1, −1) where there is none."""

    shard: int = -1
    row: int = -1


@dataclass(frozen=True)
class Lines:
    """For every sample (or image) of a folder: where its lines begin on each axis, and how many there are."""

    starts: dict[Axis, Ints]
    counts: dict[Axis, Ints]
    totals: dict[Axis, int]

    @property
    def memory_bytes(self) -> int:
        return sum(a.nbytes for a in (*self.starts.values(), *self.counts.values()))


@dataclass(frozen=True)
class SampleLines(Lines):
    """The index of a shard. ``image_ids``, ``image_checksums``: lists, an entry an image · ``image_positions``
    (samples,) · ``places`` (samples, 2): shard and line of the visual signals, −1 without."""

    sample_ids: pa.Array
    image_ids: pa.ListArray
    image_checksums: pa.ListArray
    image_positions: Ints
    places: Ints

    @property
    def images(self) -> Ints:
        """(samples,) how many images each shows."""
        return np.asarray(self.image_ids.value_lengths().to_numpy(zero_copy_only=False))

    @property
    def counted(self) -> dict[str, Ints]:
        """The numbers that ``samples.parquet`` repeats."""
        own = {"image_positions": self.image_positions, "images": self.images}
        return {plural: self.counts[axis] for axis, plural in AXES.items()} | own

    @property
    def memory_bytes(self) -> int:
        texts = sum(a.nbytes for a in (self.sample_ids, self.image_ids, self.image_checksums))
        return int(super().memory_bytes + texts + self.image_positions.nbytes + self.places.nbytes)


@dataclass(frozen=True)
class ImageLines(Lines):
    """The index of an images folder. ``present`` (images,): which could be read when they were shown."""

    present: npt.NDArray[np.bool_]


def sample_table(records: Sequence[TeacherRecord], places: Sequence[ImagePlace], image_token: int) -> pa.Table:
    """The index of a shard."""
    counts = [line_counts(record.arrays, image_token) for record in records]
    columns: dict[str, Any] = {"sample_id": [r.sample_id for r in records]}
    for name in _IMAGES:
        columns[name] = [list(getattr(r, name)) for r in records]
    for axis, plural in AXES.items():
        lines = np.array([c[axis] for c in counts], np.int64)
        columns[f"{axis}_start"], columns[plural] = np.cumsum(lines) - lines, lines
    columns["image_positions"] = [int(r.arrays["runs"][:, 0].sum()) for r in records]
    columns["image_shard"], columns["image_row"] = [p.shard for p in places], [p.row for p in places]
    for name in TEXTS:
        values = [getattr(r, name) for r in records]
        columns[name] = list(map(list, values)) if name in TEXT_LISTS else values
    return pa.table({name: pa.array(columns[name], kind) for name, kind in (_LINES | TEXTS).items()})


def image_table(images: Sequence[tuple[str, int | None]]) -> pa.Table:
    """The index of an images folder: each image's id and positions, None where it could not be read."""
    patches = np.array([count or 0 for _, count in images], np.int64)
    columns = {
        "image_id": [image_id for image_id, _ in images],
        "present": [count is not None for _, count in images],
        "patch_start": np.cumsum(patches) - patches,
        "patches": patches,
    }
    return pa.table({name: pa.array(columns[name], kind) for name, kind in _IMAGE_LINES.items()})


def read_sample_lines(index: bytes, where: str, manifest: Manifest) -> SampleLines:
    """Raises ``CacheError`` where the index says what cannot be; ``where`` names it."""
    table = read_table(index, where, _LINES)
    starts, counts, totals = _spans(table, AXES, where)
    seen = _count(table, "image_positions", where)
    ids, checksums = (table[name].combine_chunks() for name in _IMAGES)
    images = pc.list_value_length(ids).to_numpy(zero_copy_only=False)
    wrong = (images > counts["run"]) | ((images > 0) != (counts["run"] > 0)) | (counts["run"] > seen)
    wrong |= images != pc.list_value_length(checksums).to_numpy(zero_copy_only=False)
    if wrong.any() or pc.list_flatten(ids).null_count or pc.list_flatten(checksums).null_count:
        line = int(np.argmax(wrong))
        found = f"{images[line]} images, {counts['run'][line]} runs of {seen[line]} positions" if len(images) else ""
        raise CacheError(f"{where}: sample {table['sample_id'][line]}: {found} and their checksums do not fit")
    if manifest.signals.get("attention"):
        counts["cell"] = counts["row"] * seen
        starts["cell"] = np.cumsum(counts["cell"]) - counts["cell"]
        totals["cell"] = _total(counts["cell"], where)
    if len(table) > (planned := manifest.layout["shard_samples"]):
        raise CacheError(f"{where}: {len(table):,} samples, but a shard of this cache has {planned:,}")
    places = np.stack([table[name].to_numpy() for name in PLACE], -1)
    small = max(totals.values(), default=0) < 1 << 31
    kind: type[np.signedinteger[Any]] = np.int32 if small else np.int64
    return SampleLines(
        starts={axis: array.astype(kind) for axis, array in starts.items()},
        counts={axis: array.astype(kind) for axis, array in counts.items()},
        totals=totals,
        sample_ids=table["sample_id"].combine_chunks(),
        image_ids=ids,
        image_checksums=checksums,
        image_positions=seen.astype(kind),
        places=places,
    )


def read_image_lines(index: bytes, where: str) -> ImageLines:
    table = read_table(index, where, _IMAGE_LINES)
    starts, counts, totals = _spans(table, {"patch": "patches"}, where)
    one = np.ones(len(table), np.int64)
    counts |= {"image": one, "pair": pairs(counts["patch"])}
    starts |= {"image": np.arange(len(table)), "pair": np.cumsum(counts["pair"]) - counts["pair"]}
    totals |= {"image": len(table), "pair": _total(counts["pair"], where)}
    present = table["present"].to_numpy()
    if (wrong := present != (counts["patch"] > 0)).any():
        raise CacheError(f"{where}: line {int(np.argmax(wrong))}: an image is present where it has positions; {REPAIR}")
    return ImageLines(starts, counts, totals, present)


def run_fault(runs: Array, counts: Ints, images: Ints, image_positions: Ints) -> tuple[int, str] | None:
    """(sample, what is wrong) of the first whose ``runs`` (ΣG, 2) cannot be.

    counts (B,) runs of each sample · images (B,) how many it shows · image_positions (B,) Σ lengths.
    """
    owner = np.repeat(np.arange(len(counts)), counts)
    lengths, numbers = runs[:, 0].astype(np.int64), runs[:, 1].astype(np.int64)
    for bad, what in (
        (owner[lengths < 1], "a run of no position"),
        (owner[numbers >= images[owner]], "a run of an image beyond its list"),
    ):
        if len(bad):
            return int(bad[0]), what
    found = np.bincount(owner, lengths, len(counts)).astype(np.int64)
    if len(bad := np.flatnonzero(found != image_positions)):
        sample = int(bad[0])
        return sample, f"runs of {found[sample]:,} positions, but its index counts {image_positions[sample]:,}"
    return None


def _spans(table: pa.Table, axes: dict[Axis, str], where: str) -> Any:
    """Starts, counts and totals by axis."""
    counts = {axis: _count(table, plural, where) for axis, plural in axes.items()}
    starts = {axis: np.cumsum(count) - count for axis, count in counts.items()}
    for axis, start in starts.items():
        if (table[f"{axis}_start"].to_numpy() != start).any():
            raise CacheError(f"{where}: the starts on axis {axis} do not follow from the counts; {REPAIR}")
    return starts, counts, {axis: int(count.sum()) for axis, count in counts.items()}


def _count(table: pa.Table, name: str, where: str) -> npt.NDArray[np.int64]:
    count = table[name].to_numpy()
    if ((count < 0) | (count > MOST_LINES)).any():
        raise CacheError(
            f"{where}: {name} of {count.min():,} to {count.max():,}, expected 0 to {MOST_LINES:,}; {REPAIR}"
        )
    return np.asarray(count, np.int64)


def _total(counts: npt.NDArray[np.int64], where: str) -> int:
    if counts.sum(dtype=np.float64) > 1 << 62:
        raise CacheError(f"{where}: more lines than any array has; {REPAIR}")
    return int(counts.sum())


REPAIR = "run teacher-cache verify --repair with the cache's configuration"
