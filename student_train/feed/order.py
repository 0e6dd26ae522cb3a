"""Which samples make which global batch: pure functions of (seed, epoch, global batch).

The number of ranks, workers and micro-batches does not enter, so a run gives the same batches on one GPU and on
sixteen, and resumes from a step number alone. A full shuffle suits a local cache; a shard-block shuffle, which reads
a few shards at a time, suits object stores and spinning disks. Grouping is that of LLaVA's ``LengthGroupedSampler``:
batches are drawn at random and sorted inside; with ``modality`` a batch holds samples with an image or without.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from teacher_cache.errors import ConfigError

Numbers = npt.NDArray[np.int64]
Shuffle = Literal["full", "shards"]
Group = Literal["none", "length", "modality"]

BLOCK_SHARDS = 8
"""Shards whose samples are shuffled among each other in a shard-block shuffle; a reader keeps about two blocks."""


def epoch_batches(
    *,
    lengths: npt.NDArray[np.integer] | None,
    has_image: npt.NDArray[np.bool_] | None,
    shard_starts: npt.NDArray[np.integer],
    seed: int,
    epoch: int,
    global_batch: int,
    shuffle: Shuffle = "full",
    group: Group = "none",
    drop_last: bool = False,
    block_shards: int = BLOCK_SHARDS,
) -> list[Numbers]:
    """The global batches of one epoch, each an array of sample numbers; every sample comes once.

    lengths: (M,) tokens a sample, for ``group`` length and modality · has_image: (M,) for modality · shard_starts:
    (shards + 1,) first sample of each shard, and M. Only the last batch is smaller, and ``drop_last`` leaves it out.

    ``length``: each batch sorted from long to short, so that micro-batches cut from it need little padding.
    ``modality``: as ``length``, and a batch holds either samples with an image or samples without; what does not
    fill a batch of its kind is put together in mixed batches at the end (LLaVA, ``llava_trainer.py``).
    """
    _check(lengths, has_image, shard_starts, global_batch, group)
    random = np.random.default_rng((seed, epoch))
    order = _shuffled(np.asarray(shard_starts, np.int64), shuffle, block_shards, random)
    if group == "modality":
        assert has_image is not None
        batches = _by_modality(order, np.asarray(has_image, np.bool_), global_batch, shuffle, random)
    else:
        batches = _cut(order, global_batch)
    if drop_last and batches and len(batches[-1]) < global_batch:
        batches.pop()
    if group == "none":
        return batches
    assert lengths is not None
    return [batch[np.argsort(-np.asarray(lengths)[batch], kind="stable")] for batch in batches]


def rank_part(batch: Numbers, rank: int, ranks: int) -> Numbers:
    """The samples of ``batch`` that ``rank`` of ``ranks`` takes: every ranks-th one, so that in a batch sorted by
    length all ranks get a like load. The parts of all ranks together are the batch."""
    return batch[rank::ranks]


def position(step: int, batches_per_epoch: int) -> tuple[int, int]:
    """(epoch, number of the batch in it) of global ``step``: all that a resume needs."""
    return divmod(step, batches_per_epoch)


def steps_per_epoch(samples: int, global_batch: int, drop_last: bool = False) -> int:
    """Batches of an epoch, the same for every shuffle and grouping."""
    return samples // global_batch if drop_last else -(-samples // global_batch)


def shards_of(batch: Numbers, shard_starts: npt.NDArray[np.integer]) -> list[int]:
    """The shards that hold ``batch``, each once, ascending: what to prefetch for it."""
    return [int(n) for n in np.unique(np.searchsorted(shard_starts, batch, side="right") - 1)]


def _shuffled(starts: Numbers, shuffle: Shuffle, block_shards: int, random: np.random.Generator) -> Numbers:
    """All samples in random order; with ``shards`` in blocks of ``block_shards`` random shards."""
    if shuffle == "full":
        return random.permutation(int(starts[-1]))
    shards = random.permutation(len(starts) - 1)
    blocks = [
        random.permutation(np.concatenate([np.arange(starts[n], starts[n + 1]) for n in shards[i : i + block_shards]]))
        for i in range(0, len(shards), block_shards)
    ]
    return np.concatenate(blocks) if blocks else np.zeros(0, np.int64)


def _by_modality(
    order: Numbers, has_image: npt.NDArray[np.bool_], size: int, shuffle: Shuffle, random: np.random.Generator
) -> list[Numbers]:
    """Full batches of one kind each, in random order (or, with ``shards``, in the order in which they can be read),
    then mixed ones of what is left."""
    full: list[Numbers] = []
    ends: list[int] = []
    left: list[Numbers] = []
    for kind in (True, False):
        places = np.flatnonzero(has_image[order] == kind)
        whole = len(places) - len(places) % size
        full += _cut(order[places[:whole]], size)
        ends += places[size - 1 : whole : size].tolist()
        left.append(places[whole:])
    turn = random.permutation(len(full)) if shuffle == "full" else np.argsort(np.asarray(ends, np.int64), kind="stable")
    return [full[i] for i in turn] + _cut(order[np.sort(np.concatenate(left))], size)


def _cut(order: Numbers, size: int) -> list[Numbers]:
    return [order[i : i + size] for i in range(0, len(order), size)]


def _check(
    lengths: npt.NDArray[np.integer] | None,
    has_image: npt.NDArray[np.bool_] | None,
    shard_starts: npt.NDArray[np.integer],
    global_batch: int,
    group: Group,
) -> None:
    if global_batch < 1:
        raise ConfigError(f"global_batch: expected at least 1, found {global_batch}")
    samples = int(shard_starts[-1])
    wanted = {"lengths": lengths} if group == "length" else {"lengths": lengths, "has_image": has_image}
    for name, array in wanted.items() if group != "none" else ():
        if array is None or len(array) != samples:
            found = "nothing" if array is None else f"{len(array):,} values"
            raise ConfigError(f"group={group} needs {name} of all {samples:,} samples, found {found}")
