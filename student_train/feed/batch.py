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

from student_train.feed.sources import RawBatch
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
    *,
    image_token: int,
    image_tokens: int,
    pad: int,
    pixel_values: Tensor | None = None,
    image_features: Tensor | None = None,
    pack: bool = False,
) -> StudentBatch:
    """Right-padded tensors; ``image_tokens`` is the student's N. ``pack`` fills lines with several samples."""
    samples = list(zip(raw.input_ids, raw.loss_mask, strict=True))
    found = [positions_of(ids, mask, image_token, image_tokens) for ids, mask in samples]
    lengths = [positions.length for positions in found]
    lines = pack_lines(lengths) if pack else [(line, 0) for line in range(len(lengths))]
    input_ids = torch.full((1 + lines[-1][0], max(lengths)), pad, dtype=torch.int64)
    attention_mask, position_ids = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    places: dict[str, list[Array]] = {name: [] for name in _PLACES}
    for (b, offset), (ids, mask), positions in zip(lines, samples, found, strict=True):
        taken = slice(offset, offset + positions.length)
        input_ids[b, taken] = torch.from_numpy(expand(ids, image_token, image_tokens))
        attention_mask[b, taken] = 1
        position_ids[b, taken] = torch.arange(positions.length)
        places["row_position"].append(offset + positions.rows)
        places["answer_ids"].append(ids[mask])
        places["text_position"].append(offset + positions.text)
        places["visual_start"].append(offset + positions.images)
    rows, texts, images = ([len(a) for a in places[n]] for n in ("row_position", "text_position", "visual_start"))
    line = [b for b, _ in lines]
    owners = {
        "row_sample": np.repeat(line, rows),
        "text_sample": np.repeat(line, texts),
        "visual_sample": np.repeat(line, images),
    }
    per_row = _weight_arrays(weights, rows, texts, images)
    shares = [_shares(w.sample, r, t, i, image_tokens) for w, r, t, i in zip(weights, rows, texts, images, strict=True)]
    per_sample = _weight_arrays(shares, rows, texts, images)
    return StudentBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        pixel_values=pixel_values,
        image_features=image_features,
        row_index=torch.from_numpy(raw.row_index),
        arrays={name: _tensor(name, a) for name, a in raw.arrays.items()},
        visual={name: _tensor(name, a) for name, a in raw.visual.items()},
        position_ids=position_ids if pack else None,
        **{name: torch.from_numpy(np.concatenate(parts)) for name, parts in places.items()},
        **{name: torch.from_numpy(array) for name, array in (owners | per_row).items()},
        per_sample={name: torch.from_numpy(array) for name, array in per_sample.items()},
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


def _tensor(name: str, array: Array) -> Tensor:
    """As stored; only ids become int32, since torch's uint16 can do next to nothing."""
    return torch.from_numpy(array.astype(np.int32) if name.endswith("ids") else np.ascontiguousarray(array))


_PLACES = ("row_position", "answer_ids", "text_position", "visual_start")


def _shares(sample: float, rows: int, texts: int, images: int, image_tokens: int) -> Weights:
    """The weight of a sample's mean, shared out over its rows, text positions, image, and text and image positions."""
    return Weights(
        row=sample / max(rows, 1),
        position=sample / max(texts, 1),
        image=sample / max(images, 1),
        token=sample / max(texts + images * image_tokens, 1),
        sample=sample,
    )


def _weight_arrays(
    weights: Sequence[Weights], rows: list[int], texts: list[int], images: list[int]
) -> dict[str, Array]:
    return {
        "row_weight": _repeated([w.row for w in weights], rows),
        "position_weight": _repeated([w.position for w in weights], texts),
        "image_weight": _repeated([w.image for w in weights], images),
        "text_token_weight": _repeated([w.token for w in weights], texts),
        "image_token_weight": _repeated([w.token for w in weights], images),
    }


def _repeated(values: list[float], counts: list[int]) -> Array:
    return np.repeat(np.array(values, np.float32), counts)
