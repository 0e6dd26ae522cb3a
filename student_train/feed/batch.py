"""From samples, as the student reads them, to one micro-batch of tensors.

A run of image positions is one placeholder until here; now it is expanded to the student's own length, and
``data.rows`` says which of the student's positions predict the answer tokens: row r of the cache belongs to answer
token r.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from student_train.feed.raw import RawBatch
from student_train.losses.catalogue import LossSpec
from student_train.losses.targets import RowTargets
from student_train.students.lines import Line
from teacher_cache.data.rows import Positions, expand, positions_of
from teacher_cache.models import collate as fields_of
from teacher_cache.store.records import Array


class ImageSpan(NamedTuple):
    """Where one image, its line's rows and its line's text positions stand in a batch: known to the host, so that
    nobody has to ask the device for it."""

    line: int
    start: int
    rows: slice
    text: slice


@dataclass(frozen=True)
class StudentBatch:
    """One micro-batch: B lines of S positions, R rows, P text positions, I runs of image positions.

    A line holds one sample, or several where they are packed: then ``position_ids`` begin anew with each of them, and
    no sample attends to another (Transformers makes the block-diagonal mask from them, where no other mask is given).
    ``row_weight`` (R,), ``position_weight`` (P,) and ``image_weight`` (I,) are what each row, text position and image
    counts in the global batch's loss, all divisions included: the loss is a plain weighted sum. ``per_sample`` holds
    the same weights by the same names where every sample, not every row, weighs the same.
    """

    fields: dict[str, Tensor]
    """What the student reads, by its processor's names: ``input_ids`` (B, S); ``attention_mask`` (B, S), or
    ``position_ids`` (B, S) of packed lines; token types (B, S); ``pixel_values`` and the like on their own axes."""
    image_features: Tensor | None  # (I, N, d_vision): cached features of a frozen tower
    row_sample: Tensor  # (R,) which line
    row_owner: Tensor  # (R,) which of the micro-batch's samples
    row_position: Tensor  # (R,) the student's position that predicts the answer token
    answer_ids: Tensor  # (R,)
    row_index: Tensor  # (R,) into teacher signals stored for all text positions
    text_sample: Tensor  # (P,)
    text_position: Tensor  # (P,)
    visual_sample: Tensor  # (I,)
    visual_start: Tensor  # (I,) first image position
    row_weight: Tensor
    position_weight: Tensor
    image_weight: Tensor
    text_token_weight: Tensor  # (P,) for terms over text and image positions together
    image_token_weight: Tensor  # (I,) likewise, of each of an image's positions
    arrays: dict[str, Tensor]  # the teacher's signals, as stored
    visual: dict[str, Tensor]  # per image with signals, as stored
    per_sample: dict[str, Tensor]
    spans: tuple[ImageSpan, ...]

    @property
    def input_ids(self) -> Tensor:
        """(B, S)"""
        return self.fields["input_ids"]

    def to(self, device: torch.device) -> StudentBatch:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> StudentBatch:
        return self.map(lambda tensor: tensor.pin_memory())

    def averaged(self, average: str) -> StudentBatch:
        """The same batch with the weights of a mean over rows (``row``), or over samples of each one's mean."""
        if average == "row":
            return self
        weights: dict[str, Any] = dict(self.per_sample)
        return dataclasses.replace(self, **weights)

    def map(self, change: Callable[[Tensor], Tensor]) -> StudentBatch:
        """The same batch with every tensor changed."""

        def changed(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: change(tensor) for name, tensor in value.items()}
            return change(value) if isinstance(value, Tensor) else value

        return StudentBatch(**{f.name: changed(getattr(self, f.name)) for f in dataclasses.fields(self)})


@dataclass(frozen=True)
class Weights:
    """What one sample's rows, text positions and image count in the global batch's loss, and all of it (``sample``)."""

    row: float
    position: float
    image: float
    token: float
    """Of one text or image position, where a term covers both."""
    sample: float
    """Of the sample's mean, where every sample weighs the same."""


NOTHING = Weights(0.0, 0.0, 0.0, 0.0, 0.0)


def collate(
    raw: RawBatch,
    lines: Sequence[Line],
    weights: Sequence[Weights],
    pad: int,
    image_features: Tensor | None = None,
    *,
    pack: bool = False,
) -> StudentBatch:
    """Right-padded tensors. ``weights``: one for each sample of ``raw``; ``pack`` fills lines with several samples."""
    found = [positions_of(line.input_ids, line.loss_mask, line.image_token, line.widths) for line in lines]
    places = pack_lines([p.length for p in found]) if pack else [(number, 0) for number in range(len(found))]
    counts = [(len(p.rows), len(p.text), len(p.images), len(p.visual)) for p in found]
    rows, texts, images, _ = zip(*counts, strict=True)
    samples = [line.sample for line in lines]
    shares = _shares(weights, samples, np.array(counts))
    owners = [line for line, _ in places]
    return StudentBatch(
        fields=_fields(lines, found, places if pack else None, pad),
        image_features=image_features,
        row_sample=_repeated(owners, rows),  # (R,)
        row_owner=_repeated(samples, rows),  # (R,)
        row_position=_joined([first + p.rows for (_, first), p in zip(places, found, strict=True)]),  # (R,)
        answer_ids=_joined([line.input_ids[line.loss_mask] for line in lines]),  # (R,)
        row_index=torch.from_numpy(raw.row_index),
        text_sample=_repeated(owners, texts),  # (P,)
        text_position=_joined([first + p.text for (_, first), p in zip(places, found, strict=True)]),  # (P,)
        visual_sample=_repeated(owners, images),  # (I,)
        visual_start=_joined([first + p.images for (_, first), p in zip(places, found, strict=True)]),  # (I,)
        arrays={name: _tensor(array) for name, array in raw.arrays.items()},
        visual={name: _tensor(array) for name, array in raw.visual.items()},
        **_weight_tensors([weights[sample] for sample in samples], rows, texts, images),
        per_sample=_weight_tensors(shares, rows, texts, images),
        spans=tuple(_spans(places, found)),
    )


def _spans(places: Sequence[tuple[int, int]], found: Sequence[Positions]) -> Iterator[ImageSpan]:
    rows = text = 0
    for (line, first), positions in zip(places, found, strict=True):
        own = slice(rows, rows + len(positions.rows)), slice(text, text + len(positions.text))
        yield from (ImageSpan(line, first + int(start), *own) for start in positions.images)
        rows, text = own[0].stop, own[1].stop


def _fields(
    lines: Sequence[Line], found: Sequence[Positions], places: Sequence[tuple[int, int]] | None, pad: int
) -> dict[str, Tensor]:
    """What the model reads of all lines; ``places``: of packed ones (:func:`pack_lines`)."""
    each: list[Mapping[str, Tensor]] = [
        {"input_ids": torch.from_numpy(expand(line.input_ids, line.image_token, line.widths)), **line.fields}
        for line in lines
    ]
    if places is None:
        return fields_of.collate(each, pad, "right")
    packed: list[dict[str, Tensor]] = []
    for (number, _), fields, positions in zip(places, each, found, strict=True):
        own = {**fields, "position_ids": torch.arange(positions.length)}
        if number < len(packed):
            before = packed[number]
            both = {name: torch.cat([before[name], own[name]]) for name in before if name in own}
            own = {**before, **own, **both}
        packed[number:] = [own]
    batch = fields_of.collate(packed, pad, "right")
    del batch["attention_mask"]
    return batch


def pack_lines(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(line, first position) of each sample: lines as long as the longest sample, filled in order.

    In order, since images reach the model in the order of its lines.
    """
    places, line, filled = [], 0, 0
    for length in lengths:
        if filled and filled + length > max(lengths):
            line, filled = line + 1, 0
        places.append((line, filled))
        filled += length
    return places


def first_rows(row_sample: Tensor, row_position: Tensor) -> Tensor:
    """(R,) bool: rows of first answer tokens, where a row's position does not follow the one before it."""
    follows = (row_sample[1:] == row_sample[:-1]) & (row_position[1:] == row_position[:-1] + 1)
    return torch.cat([torch.ones_like(row_sample[:1], dtype=torch.bool), ~follows])


def weighed_by(spec: LossSpec) -> tuple[str, str, float]:
    """The settings that decide what a row counts."""
    return spec.rows, spec.average, spec.advantage_share


def row_weights(spec: LossSpec, batch: StudentBatch, targets: RowTargets) -> Tensor:
    """(R,) what each answer row counts: nothing, where the spec leaves out the first of each answer."""
    weight = batch.row_weight
    if spec.advantage_share:
        weight = weight * targets.advantage_factors(batch.row_owner, spec.advantage_share)
    return weight if spec.rows == "predicting" else weight * ~first_rows(batch.row_sample, batch.row_position)


def _tensor(array: Array) -> Tensor:
    """As stored, ids too: they become the int64 that torch gathers by where they are used, on the device."""
    return torch.from_numpy(np.ascontiguousarray(array))


def _shares(weights: Sequence[Weights], samples: Sequence[int], counts: Array) -> list[Weights]:
    """For each line the weight of its sample's mean, shared out over the sample's rows, text positions, images, and
    text and image positions: ``counts`` (lines, 4) of each line."""
    totals = np.zeros((len(weights), 4), np.int64)
    np.add.at(totals, list(samples), counts)
    shares = [
        Weights(
            row=weight.sample / max(rows, 1),
            position=weight.sample / max(texts, 1),
            image=weight.sample / max(images, 1),
            token=weight.sample / max(texts + image_positions, 1),
            sample=weight.sample,
        )
        for weight, (rows, texts, images, image_positions) in zip(weights, totals.tolist(), strict=True)
    ]
    return [shares[sample] for sample in samples]


def _weight_tensors(
    weights: Sequence[Weights], rows: Sequence[int], texts: Sequence[int], images: Sequence[int]
) -> dict[str, Tensor]:
    """By the fields of :class:`StudentBatch`, from the weights and counts of each sample."""
    return {
        "row_weight": _repeated([w.row for w in weights], rows),  # (R,)
        "position_weight": _repeated([w.position for w in weights], texts),  # (P,)
        "image_weight": _repeated([w.image for w in weights], images),  # (I,)
        "text_token_weight": _repeated([w.token for w in weights], texts),  # (P,)
        "image_token_weight": _repeated([w.token for w in weights], images),  # (I,)
    }


def _repeated(values: Sequence[float], counts: Sequence[int]) -> Tensor:
    """Each sample's value as often as it has rows (text positions, images): int64, or float32."""
    return torch.tensor(values).repeat_interleave(torch.tensor(counts))


def _joined(parts: Sequence[Array]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))
