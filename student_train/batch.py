"""From samples to one micro-batch of tensors, in the student's own image-token count.

The cache keeps one placeholder for an image; here it is expanded to the student's N. The row rule was applied when
the cache was made: row r of the cache belongs to answer token r, and the student's position that predicts that token
is the one before it (``row_position``). Nothing is shifted anywhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from student_train.dataset import RawBatch
from teacher_cache.records import Array


@dataclass(frozen=True)
class StudentBatch:
    """One micro-batch: B samples, S positions, R rows, P text positions, I images, N image tokens of the student.

    ``row_weight`` (R,), ``position_weight`` (P,) and ``image_weight`` (I,) are what each row, text position and image
    counts in the global batch's loss, all divisions included: the loss is a plain weighted sum.
    """

    input_ids: Tensor  # (B, S) int64
    attention_mask: Tensor  # (B, S) int64
    pixel_values: Tensor | None  # (I, 3, H, W)
    image_features: Tensor | None  # (I, N, d_vision): cached features of a frozen tower
    row_sample: Tensor  # (R,) which sample
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

    def to(self, device: torch.device) -> StudentBatch:
        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            if isinstance(value, dict):
                return {k: move(v) for k, v in value.items()}
            return value

        return StudentBatch(**{f.name: move(getattr(self, f.name)) for f in dataclasses.fields(self)})

    def pin_memory(self) -> StudentBatch:
        def pin(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.pin_memory()
            if isinstance(value, dict):
                return {k: pin(v) for k, v in value.items()}
            return value

        return StudentBatch(**{f.name: pin(getattr(self, f.name)) for f in dataclasses.fields(self)})


@dataclass(frozen=True)
class Weights:
    """What one sample's rows, text positions and image count in the global batch's loss."""

    row: float
    position: float
    image: float
    token: float
    """Of one text or image position, where a term covers both."""


def collate(
    raw: RawBatch,
    weights: Sequence[Weights],
    *,
    image_token: int,
    image_tokens: int,
    pad: int,
    pixel_values: Tensor | None = None,
    image_features: Tensor | None = None,
) -> StudentBatch:
    """Right-padded tensors; ``image_tokens`` is the student's N."""
    lengths = [len(ids) + int((ids == image_token).sum()) * (image_tokens - 1) for ids in raw.input_ids]
    input_ids = torch.full((len(lengths), max(lengths)), pad, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    places: dict[str, list[Any]] = {name: [] for name in _PLACES}
    for b, (ids, mask, weight) in enumerate(zip(raw.input_ids, raw.loss_mask, weights, strict=True)):
        is_image = ids == image_token
        width = np.where(is_image, image_tokens, 1)
        start = np.cumsum(width) - width
        input_ids[b, : lengths[b]] = torch.from_numpy(np.repeat(ids, width))
        attention_mask[b, : lengths[b]] = 1
        text = start[~is_image]
        text = text[text < lengths[b] - 1]
        places["row_sample"].append(np.full(int(mask.sum()), b))
        places["row_position"].append(start[mask] - 1)
        places["answer_ids"].append(ids[mask])
        places["row_weight"].append(np.full(int(mask.sum()), weight.row, np.float32))
        places["text_sample"].append(np.full(len(text), b))
        places["text_position"].append(text)
        places["position_weight"].append(np.full(len(text), weight.position, np.float32))
        places["visual_sample"].append(np.full(int(is_image.sum()), b))
        places["visual_start"].append(start[is_image])
        places["image_weight"].append(np.full(int(is_image.sum()), weight.image, np.float32))
        places["text_token_weight"].append(np.full(len(text), weight.token, np.float32))
        places["image_token_weight"].append(np.full(int(is_image.sum()), weight.token, np.float32))
    return StudentBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        pixel_values=pixel_values,
        image_features=image_features,
        row_index=torch.from_numpy(raw.row_index),
        arrays={name: _tensor(name, a) for name, a in raw.arrays.items()},
        visual={name: _tensor(name, a) for name, a in raw.visual.items()},
        **{name: torch.from_numpy(np.concatenate(parts)) for name, parts in places.items()},
    )


def _tensor(name: str, array: Array) -> Tensor:
    """As stored; only ids become int32, since torch's uint16 can do next to nothing."""
    return torch.from_numpy(array.astype(np.int32) if name.endswith("ids") else np.ascontiguousarray(array))


_PLACES = (
    "row_sample",
    "row_position",
    "answer_ids",
    "row_weight",
    "text_sample",
    "text_position",
    "position_weight",
    "visual_sample",
    "visual_start",
    "image_weight",
    "text_token_weight",
    "image_token_weight",
)
