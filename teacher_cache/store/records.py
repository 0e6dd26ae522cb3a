"""What is cached for a sample, and for an image: the arrays, their axes and types. No torch here.

Letters: T tokens of the conversation (one placeholder a run of image positions), R rows (answer tokens), P text
positions that predict a token (every text position but the last), G runs, N positions of one image, d hidden width,
k kept ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from teacher_cache.config import SignalsConfig
from teacher_cache.data.rows import text_positions

Axis = Literal["token", "row", "position", "run", "cell", "image", "patch", "pair"]
"""``cell``: a row and an image position of its sample · ``patch``: a position of a distinct image, ``pair``: two of
them."""
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
    """Everything cached for one sample: ``arrays`` by the names of :func:`record_arrays`, plus what was asked.

    ``questions`` hold an ``<image>`` where an image stands; ``image_ids`` are those images in that order.
    """

    sample_id: str
    image_ids: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    original_answers: tuple[str, ...]
    source: str
    arrays: Mapping[str, Array]
    image_checksums: tuple[str, ...] = ()
    """``image_files.image_checksum`` of the bytes that the teacher saw, one an image."""
    system: str = ""

    @property
    def rows(self) -> int:
        return int(np.count_nonzero(self.arrays["loss_mask"]))


@dataclass(frozen=True)
class TeacherShape:
    """The sizes of the teacher that the arrays depend on."""

    hidden_size: int
    vocabulary: int

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
    specs.append(ArraySpec("runs", "run", "uint32", (2,)))
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
        specs.append(ArraySpec("attention", "cell", "float16"))
    if signals.advantage != "none":
        specs.append(ArraySpec("advantage", "row", "float16"))
    return specs


def image_arrays(signals: SignalsConfig, shape: TeacherShape) -> list[ArraySpec]:
    """The arrays of ``images/00000``, of distinct images."""
    if signals.visual == "states":
        return hidden_arrays("visual", "patch", signals, shape)
    if signals.visual == "topk":
        k = min(signals.visual_top_k, shape.vocabulary)
        return [
            ArraySpec("visual_topk_ids", "patch", shape.id_dtype, (k,)),
            ArraySpec("visual_topk_logprobs", "patch", "float16", (k,)),
            ArraySpec("visual_stats", "patch", "float32", (len(stats_names(signals)),)),
        ]
    if signals.visual == "gram":
        return [
            ArraySpec("gram_hidden", "pair", "float16"),
            ArraySpec("gram_logits", "pair", "float16"),
            ArraySpec("gram_scale", "image", "float32", (2,)),
        ]
    return []


INT4_BLOCK = 32


def hidden_arrays(name: str, axis: Axis, signals: SignalsConfig, shape: TeacherShape) -> list[ArraySpec]:
    """The arrays in which the codec keeps states of width d (or of ``signals.pca`` components)."""
    d = signals.pca or shape.hidden_size
    if signals.codec in ("float32", "float16"):
        return [ArraySpec(name, axis, signals.codec, (d,))]
    if signals.codec == "bfloat16":  # Zarr v3 has no bfloat16; the two bytes are stored as they are
        return [ArraySpec(name, axis, "uint16", (d,))]
    if signals.codec == "int8":
        return [ArraySpec(name, axis, "int8", (d,)), ArraySpec(f"{name}_scale", axis, "float16")]
    blocks = -(-d // INT4_BLOCK)
    return [
        ArraySpec(name, axis, "uint8", (blocks * INT4_BLOCK // 2,)),
        ArraySpec(f"{name}_scale", axis, "float16", (blocks,)),
    ]


def pairs(patches: Any) -> Any:
    """Entries of the upper triangle of a Gram of so many positions."""
    return patches * (patches + 1) // 2


def line_counts(arrays: Mapping[str, Array], image_token: int) -> dict[Axis, int]:
    """Lines of one sample on each axis that an index counts: T, R, P = text positions but the last token's, G."""
    tokens, runs = len(arrays["input_ids"]), len(arrays["runs"])
    assert runs == np.count_nonzero(arrays["input_ids"] == image_token), "a run for each placeholder"
    rows = int(np.count_nonzero(arrays["loss_mask"]))
    return {"token": tokens, "row": rows, "position": int(text_positions(tokens, runs)), "run": runs}
