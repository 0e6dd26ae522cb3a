"""Samples as a model reads them, put together to a batch: one function for teacher and student and all families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_with

Fields = Mapping[str, Tensor]
"""What a model reads of one sample: ``input_ids`` (S,), each image written out as its positions; other fields with a
number a token (``mm_token_type_ids``) likewise; and whatever else its processor makes, by the processor's names and
axes (``pixel_values``, ``image_grid_thw``, ``image_sizes``)."""


def per_token(name: str) -> bool:
    """Whether a field has a number for each token. Without its token types a model runs on, and is wrong: M-RoPE
    positions and the attention inside an image are made from them (Qwen2.5-VL, Gemma 3)."""
    return name in ("input_ids", "position_ids") or name.endswith("token_type_ids")


def collate(samples: Sequence[Fields], pad: int, side: Literal["left", "right"]) -> dict[str, Tensor]:
    """B samples → ``input_ids``, ``attention_mask`` and token types (B, S), and every other field joined.

    A token's fields are padded on ``side`` to the longest sample, ids with ``pad``, types with 0, which is text in all
    families. Any other field is padded with 0 to one shape and joined on its first axis, that of images, patches or
    samples, over the samples that have it.
    """
    lengths = [len(sample["input_ids"]) for sample in samples]
    longest = max(lengths)
    batch = {"attention_mask": _lines([torch.ones(n, dtype=torch.int64) for n in lengths], longest, 0, side)}
    for name in dict.fromkeys(name for sample in samples for name in sample if name != "attention_mask"):
        if per_token(name):
            lines = [
                sample.get(name, torch.zeros(n, dtype=torch.int64)) for sample, n in zip(samples, lengths, strict=True)
            ]
            batch[name] = _lines(lines, longest, pad if name == "input_ids" else 0, side)
        else:
            batch[name] = _joined([sample[name] for sample in samples if name in sample])
    return batch


def to_model(batch: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """``batch`` on the device of ``model``; pixels, and all else with a point, in its dtype."""
    return {
        name: field.to(model.device, model.dtype) if field.is_floating_point() else field.to(model.device)
        for name, field in batch.items()
    }


def _lines(lines: Sequence[Tensor], longest: int, fill: int, side: str) -> Tensor:
    """(B, longest) from B lines."""
    out = torch.full((len(lines), longest), fill, dtype=torch.int64)
    for row, line in enumerate(lines):
        start = longest - len(line) if side == "left" else 0
        out[row, start : start + len(line)] = line
    return out


def _joined(parts: Sequence[Tensor]) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    grown = []
    for part in parts:
        more = [n for size, whole in zip(part.shape[:0:-1], shape[::-1], strict=True) for n in (0, whole - size)]
        grown.append(pad_with(part, more) if any(more) else part)
    return torch.cat(grown)
