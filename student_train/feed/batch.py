"""From samples to one micro-batch of tensors, in the student's own image-token count.

The cache keeps one placeholder for an image; here it is expanded to the student's N, and ``data.rows`` says which
of the student's positions predict the answer tokens: row r of the cache belongs to answer token r.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from student_train.feed.raw import RawBatch
from student_train.students.preprocessor import Preprocessor
from teacher_cache.data.rows import expand, positions_of
from teacher_cache.store.records import Array


@dataclass(frozen=True)
class StudentBatch:
    """One micro-batch: B lines of S positions, R rows, P text positions, I images, N image tokens of the student.

    A line holds one sample, or several where they are packed: then ``position_ids`` begin anew with each of them, and
    no sample attends to another (Transformers makes the block-diagonal mask from them, where no other mask is given).
    ``row_weight`` (R,), ``position_weight`` (P,) and ``image_weight`` (I,) are what each row, text position and image
    counts in the global batch's loss, all divisions included: the loss is a plain weighted sum. ``per_sample`` holds
    the same weights by the same names where every sample, not every row, weighs the same.
    """

    input_ids: Tensor  # (B, S) int64
    attention_mask: Tensor  # (B, S) int64
    pixel_values: Tensor | None  # (I, 3, H, W)
    image_features: Tensor | None  # (I, N, d_vision): cached features of a frozen tower
    row_sample: Tensor  # (R,) which line
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
    position_ids: Tensor | None = None  # (B, S) int64, of packed lines only

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
            return None if value is None else change(value)

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
    weights: Sequence[Weights],
    student: Preprocessor,
    pixel_values: Tensor | None = None,
    image_features: Tensor | None = None,
    *,
    pack: bool = False,
) -> StudentBatch:
    """Right-padded tensors, an image as many positions as the student gives it. ``pack`` fills lines with several
    samples."""
    samples = list(zip(raw.input_ids, raw.loss_mask, strict=True))  # (T,) and (T,) each
    widths = [student.widths(placeholders) for placeholders in raw.placeholders]  # (G,) each
    found = [positions_of(*sample, student.image_token, w) for sample, w in zip(samples, widths, strict=True)]
    lines = pack_lines([p.length for p in found]) if pack else [(line, 0) for line in range(len(found))]
    input_ids = torch.full((1 + lines[-1][0], max(p.length for p in found)), student.pad)  # (B, S)
    attention_mask, position_ids = torch.zeros_like(input_ids), torch.zeros_like(input_ids)  # (B, S)
    for (line, first), ids, width, positions in zip(lines, raw.input_ids, widths, found, strict=True):
        taken = slice(first, first + positions.length)
        input_ids[line, taken] = torch.from_numpy(expand(ids, student.image_token, width))
        attention_mask[line, taken] = 1
        position_ids[line, taken] = torch.arange(positions.length)
    placed = list(zip(lines, found, strict=True))
    counts = [(len(p.rows), len(p.text), len(p.images)) for p in found]  # of rows, text positions, placeholders
    rows, texts, images = zip(*counts, strict=True)
    owners = [line for line, _ in lines]
    seen = [len(p.visual) for p in found]
    shares = [_shares(w.sample, *count, n) for w, count, n in zip(weights, counts, seen, strict=True)]
    return StudentBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        pixel_values=pixel_values,
        image_features=image_features,
        row_sample=_repeated(owners, rows),  # (R,)
        row_position=_joined([first + p.rows for (_, first), p in placed]),  # (R,)
        answer_ids=_joined([ids[mask] for ids, mask in samples]),  # (R,)
        row_index=torch.from_numpy(raw.row_index),
        text_sample=_repeated(owners, texts),  # (P,)
        text_position=_joined([first + p.text for (_, first), p in placed]),  # (P,)
        visual_sample=_repeated(owners, images),  # (I,)
        visual_start=_joined([first + p.images for (_, first), p in placed]),  # (I,)
        arrays={name: _tensor(array) for name, array in raw.arrays.items()},
        visual={name: _tensor(array) for name, array in raw.visual.items()},
        position_ids=position_ids if pack else None,
        **_weight_tensors(weights, rows, texts, images),
        per_sample=_weight_tensors(shares, rows, texts, images),
    )


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


def _tensor(array: Array) -> Tensor:
    """As stored, ids too: they become the int64 that torch gathers by where they are used, on the device."""
    return torch.from_numpy(np.ascontiguousarray(array))


def _shares(sample: float, rows: int, texts: int, images: int, image_positions: int) -> Weights:
    """The weight of a sample's mean, shared out over its rows, text positions, image, and text and image positions."""
    return Weights(
        row=sample / max(rows, 1),
        position=sample / max(texts, 1),
        image=sample / max(images, 1),
        token=sample / max(texts + image_positions, 1),
        sample=sample,
    )


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
