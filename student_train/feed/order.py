"""Which samples make which global batch: pure functions of (seed, epoch, global batch).

The number of ranks, workers and micro-batches does not enter, so a run gives the same batches on one GPU and on
sixteen, and resumes from a step number alone. A full shuffle suits a local cache; a shard-block shuffle, which reads
a few shards at a time, suits object stores and spinning disks. Grouping is that of LLaVA's ``LengthGroupedSampler``:
batches are drawn at random and sorted inside; with ``modality`` a batch holds samples with an image or without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
Shuffle = Literal["full", "shards"]
Group = Literal["none", "length", "modality"]

BLOCK_SHARDS = 8
"""Shards whose samples are shuffled among each other in a shard-block shuffle; a reader keeps about two blocks."""


@dataclass(frozen=True)
class Samples:
    """What the order of M samples depends on: lengths (M,) tokens, image positions counted · has_image (M,) ·
    shard_starts (shards + 1,) first sample of each shard, and M."""

    lengths: npt.NDArray[np.integer]
    has_image: npt.NDArray[np.bool_]
    shard_starts: npt.NDArray[np.integer]


@dataclass(frozen=True)
class Order:
    """How samples are ordered.

    ``group`` ``length``: each batch sorted from long to short, so that micro-batches cut from it need little padding.
    ``modality``: as ``length``, and a batch holds either samples with an image or samples without; what does not
    fill a batch of its kind is put together in mixed batches at the end (LLaVA, ``llava_trainer.py``).
    """

    seed: int
    global_batch: int
    shuffle: Shuffle = "full"
    group: Group = "none"
    block_shards: int = BLOCK_SHARDS


def epoch_batches(samples: Samples, order: Order, epoch: int) -> list[Numbers]:
    """The global batches of one epoch, each an array of sample numbers; every sample comes once, and only the last
    batch is smaller."""
    random = np.random.default_rng((order.seed, epoch))
    numbers = _shuffled(np.asarray(samples.shard_starts, np.int64), order, random)  # (M,)
    if order.group == "modality":
        batches = _by_modality(numbers, samples.has_image, order, random)
    else:
        batches = _cut(numbers, order.global_batch)
    if order.group == "none":
        return batches
    return [batch[np.argsort(-samples.lengths[batch], kind="stable")] for batch in batches]


def rank_part(batch: Numbers, rank: int, ranks: int) -> Numbers:
    """The samples of ``batch`` that ``rank`` of ``ranks`` takes: every ranks-th one, so that in a batch sorted by
    length all ranks get a like load. The parts of all ranks together are the batch."""
    return batch[rank::ranks]


def steps_per_epoch(samples: int, global_batch: int) -> int:
    """Batches of an epoch, the same for every shuffle and grouping: ``divmod`` of a step by it is (epoch, its batch),
    which is all that a resume needs."""
    return -(-samples // global_batch)


def shards_of(batch: Numbers, shard_starts: npt.NDArray[np.integer]) -> list[int]:
    """The shards that hold ``batch``, each once, ascending: what to prefetch for it."""
    return [int(n) for n in np.unique(np.searchsorted(shard_starts, batch, side="right") - 1)]


def _shuffled(starts: Numbers, order: Order, random: np.random.Generator) -> Numbers:
    """(M,) all samples in random order; with ``shards`` in blocks of ``block_shards`` random shards."""
    if order.shuffle == "full":
        return random.permutation(int(starts[-1]))
    shards, size = random.permutation(len(starts) - 1), order.block_shards
    blocks = [
        random.permutation(np.concatenate([np.arange(starts[n], starts[n + 1]) for n in shards[i : i + size]]))
        for i in range(0, len(shards), size)
    ]
    return np.concatenate(blocks) if blocks else np.zeros(0, np.int64)


def _by_modality(
    numbers: Numbers, has_image: npt.NDArray[np.bool_], order: Order, random: np.random.Generator
) -> list[Numbers]:
    """Full batches of one kind each, in random order (or, with ``shards``, in the order in which they can be read),
    then mixed ones of what is left."""
    full: list[Numbers] = []
    ends: list[int] = []
    left: list[Numbers] = []
    size = order.global_batch
    for kind in (True, False):
        places = np.flatnonzero(has_image[numbers] == kind)  # where the epoch has this kind
        whole = len(places) - len(places) % size
        full += _cut(numbers[places[:whole]], size)
        ends += places[size - 1 : whole : size].tolist()
        left.append(places[whole:])
    by_end = np.argsort(np.asarray(ends, np.int64), kind="stable")
    turn = random.permutation(len(full)) if order.shuffle == "full" else by_end
    return [full[i] for i in turn] + _cut(numbers[np.sort(np.concatenate(left))], size)


def _cut(numbers: Numbers, size: int) -> list[Numbers]:
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]
