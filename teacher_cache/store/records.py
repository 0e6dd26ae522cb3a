"""What is cached for a sample, and for an image: the arrays, their axes and types. No torch here.

Letters: T tokens of the conversation (one placeholder for an image), R rows (answer tokens), P text positions that
predict a token (every text position but the last), N image positions, d hidden width, k kept ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from teacher_cache.config import SignalsConfig
from teacher_cache.data.rows import text_positions

Axis = Literal["token", "row", "position", "image"]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ArraySpec:
    """One array of a shard: (lines of ``axis``, *shape) of ``dtype``."""

    name: str
    axis: Axis
    dtype: str
    shape: tuple[int, ...] = ()

    @property
    def line_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * int(np.prod(self.shape, dtype=np.int64)))


@dataclass(frozen=True)
class TeacherRecord:
    """Everything cached for one sample: ``arrays`` by the names of :func:`record_arrays`, plus what was asked."""

    sample_id: str
    image_id: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    original_answers: tuple[str, ...]
    source: str
    arrays: Mapping[str, Array]
    image_checksum: str = ""
    """``image_files.image_checksum`` of the bytes that the teacher saw; empty without an image."""

    @property
    def rows(self) -> int:
        return int(np.count_nonzero(self.arrays["loss_mask"]))


@dataclass(frozen=True)
class TeacherShape:
    """The sizes of the teacher that the arrays depend on."""

    hidden_size: int
    vocabulary: int
    image_tokens: int

    @property
    def id_dtype(self) -> str:
        """Ids in as few bytes as the vocabulary needs."""
        return "uint16" if self.vocabulary <= 1 << 16 else "uint32"


STATS = ("mean", "std", "entropy")


def stats_names(signals: SignalsConfig) -> tuple[str, ...]:
    """The columns of ``stats``: log-sum-exp of logits / T for each T of the grid, then mean, std, entropy (nats)."""
    return (*(f"lse@{t:g}" for t in signals.temperatures), *STATS)


def record_arrays(signals: SignalsConfig, shape: TeacherShape) -> list[ArraySpec]:
    """The arrays of ``shards/00000``, in the order in which they are written."""
    ids = shape.id_dtype
    specs = [ArraySpec("input_ids", "token", ids), ArraySpec("loss_mask", "token", "bool")]
    if signals.top_k:
        k = min(signals.top_k, shape.vocabulary)
        specs.append(ArraySpec("topk_ids", "row", ids, (k,)))
        specs.append(ArraySpec("topk_logprobs", "row", "float16", (k,)))
    specs.append(ArraySpec("stats", "row", "float32", (len(stats_names(signals)),)))
    if signals.sampled:
        specs.append(ArraySpec("sampled_ids", "row", ids, (signals.sampled,)))
        specs.append(ArraySpec("sampled_counts", "row", "uint8", (signals.sampled,)))
    if signals.hidden != "none":
        axis: Axis = "row" if signals.hidden == "rows" else "position"
        specs += hidden_arrays("hidden", axis, signals, shape)
        if signals.second_last:
            specs += hidden_arrays("hidden_second_last", axis, signals, shape)
    if signals.attention:
        specs.append(ArraySpec("attention", "row", "float16", (shape.image_tokens,)))
    return specs


def image_arrays(signals: SignalsConfig, shape: TeacherShape) -> list[ArraySpec]:
    """The arrays of ``images/00000``: one line per distinct image."""
    n = shape.image_tokens
    if signals.visual == "states":
        return hidden_arrays("visual", "image", signals, shape, (n,))
    if signals.visual == "topk":
        k = min(signals.visual_top_k, shape.vocabulary)
        return [
            ArraySpec("visual_topk_ids", "image", shape.id_dtype, (n, k)),
            ArraySpec("visual_topk_logprobs", "image", "float16", (n, k)),
            ArraySpec("visual_stats", "image", "float32", (n, len(stats_names(signals)))),
        ]
    if signals.visual == "gram":
        return [
            ArraySpec("gram_hidden", "image", "float16", (n * (n + 1) // 2,)),
            ArraySpec("gram_logits", "image", "float16", (n * (n + 1) // 2,)),
            ArraySpec("gram_scale", "image", "float32", (2,)),
        ]
    return []


INT4_BLOCK = 32


def hidden_arrays(
    name: str, axis: Axis, signals: SignalsConfig, shape: TeacherShape, lead: tuple[int, ...] = ()
) -> list[ArraySpec]:
    """The arrays in which the codec keeps states of width d (or of ``signals.pca`` components)."""
    d = signals.pca or shape.hidden_size
    if signals.codec in ("float32", "float16"):
        return [ArraySpec(name, axis, signals.codec, (*lead, d))]
    if signals.codec == "bfloat16":  # Zarr v3 has no bfloat16; the two bytes are stored as they are
        return [ArraySpec(name, axis, "uint16", (*lead, d))]
    if signals.codec == "int8":
        return [ArraySpec(name, axis, "int8", (*lead, d)), ArraySpec(f"{name}_scale", axis, "float16", lead)]
    blocks = -(-d // INT4_BLOCK)
    return [
        ArraySpec(name, axis, "uint8", (*lead, blocks * INT4_BLOCK // 2)),
        ArraySpec(f"{name}_scale", axis, "float16", (*lead, blocks)),
    ]


def line_counts(input_ids: Array, loss_mask: Array, image_token: int) -> dict[Axis, int]:
    """Lines per axis of one sample: T, R and P = text positions but the last token's."""
    tokens = len(input_ids)
    images = int(np.count_nonzero(input_ids == image_token))
    return {"token": tokens, "row": int(np.count_nonzero(loss_mask)), "position": int(text_positions(tokens, images))}
