"""The order of an epoch: every sample once, the same for any number of ranks, resumable by a step number."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_train.feed.order import Order, Samples, epoch_batches, rank_part, shards_of, steps_per_epoch

World = tuple[Samples, Order, int]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    shards = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
    count = sum(shards)
    kinds = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    lengths = draw(st.lists(st.integers(1, 50), min_size=count, max_size=count))
    samples = Samples(np.array(lengths, np.int64), np.array(kinds, np.bool_), np.cumsum([0, *shards]))
    order = Order(
        seed=draw(st.integers(0, 2**31)),
        global_batch=draw(st.integers(1, 7)),
        shuffle=draw(st.sampled_from(["full", "shards"])),
        group=draw(st.sampled_from(["none", "length", "modality"])),
        block_shards=draw(st.integers(1, 4)),
    )
    return samples, order, draw(st.integers(0, 5))


def alike(*shard_starts: int) -> Samples:
    """Samples that differ in nothing but their number."""
    count = shard_starts[-1]
    return Samples(np.ones(count, np.int64), np.zeros(count, np.bool_), np.array(shard_starts))


@given(worlds())
def test_order_visits_each_sample_once(world: World) -> None:
    samples, order, _ = world
    batches = epoch_batches(*world)
    count = int(samples.shard_starts[-1])
    assert sorted(np.concatenate(batches).tolist() if batches else []) == list(range(count))
    assert all(len(b) == order.global_batch for b in batches[:-1])
    assert len(batches) == steps_per_epoch(count, order.global_batch)


@given(worlds())
def test_order_is_a_function_of_seed_and_epoch_alone(world: World) -> None:
    once, again = epoch_batches(*world), epoch_batches(*world)
    assert [b.tolist() for b in once] == [b.tolist() for b in again]


@given(worlds(), st.integers(1, 5))
def test_ranks_together_read_the_global_batch(world: World, ranks: int) -> None:
    for batch in epoch_batches(*world):
        parts = [rank_part(batch, rank, ranks) for rank in range(ranks)]
        assert sorted(np.concatenate(parts)) == sorted(batch)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(worlds())
def test_modality_batches_are_of_one_kind_but_for_the_left_over(world: World) -> None:
    samples, order, epoch = world
    batches = epoch_batches(samples, replace(order, group="modality"), epoch)
    mixed = [n for n, b in enumerate(batches) if len(set(samples.has_image[b].tolist())) == 2]
    left = sum(int((samples.has_image == kind).sum()) % order.global_batch for kind in (True, False))
    assert all(n >= len(batches) - -(-left // order.global_batch) for n in mixed)


@given(worlds(), st.sampled_from(["length", "modality"]))
def test_grouped_batches_run_from_long_to_short(world: World, group: Literal["length", "modality"]) -> None:
    samples, order, epoch = world
    for batch in epoch_batches(samples, replace(order, group=group), epoch):
        assert (np.diff(samples.lengths[batch]) <= 0).all()


def test_length_grouping_does_not_change_which_samples_share_a_batch() -> None:
    samples = replace(alike(0, 30), lengths=np.arange(1, 31))
    plain, grouped = (epoch_batches(samples, Order(1, 4, group=g), epoch=0) for g in ("none", "length"))
    assert [set(b.tolist()) for b in plain] == [set(b.tolist()) for b in grouped]


@given(worlds())
def test_shard_block_shuffle_reads_one_block_at_a_time(world: World) -> None:
    samples, order, epoch = world
    batches = epoch_batches(samples, replace(order, shuffle="shards", group="none"), epoch)
    numbers = np.concatenate([np.zeros(0, np.int64), *batches])
    shards = np.searchsorted(samples.shard_starts, numbers, side="right") - 1
    seen = list(dict.fromkeys(shards.tolist()))
    last = {n: int(np.flatnonzero(shards == n)[-1]) for n in seen}
    first = {n: int(np.flatnonzero(shards == n)[0]) for n in seen}
    for i, number in enumerate(seen):
        for later in seen[i + order.block_shards :]:
            assert last[number] < first[later]


def test_epochs_and_seeds_differ() -> None:
    orders = {
        tuple(np.concatenate(epoch_batches(alike(0, 40, 80), Order(seed, 8, shuffle, block_shards=1), epoch)).tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
        for shuffle in ("full", "shards")
    }
    assert len(orders) == 8


@pytest.mark.parametrize(("count", "global_batch", "steps"), [(10, 4, 3), (8, 4, 2), (1, 4, 1), (0, 4, 0)])
def test_the_steps_of_an_epoch_are_its_batches(count: int, global_batch: int, steps: int) -> None:
    assert steps_per_epoch(count, global_batch) == steps
    assert len(epoch_batches(alike(0, count), Order(3, global_batch), epoch=1)) == steps


def test_shards_of_a_batch_are_those_to_prefetch() -> None:
    assert shards_of(np.array([9, 0, 4, 3]), np.array([0, 4, 8, 12])) == [0, 1, 2]
