"""The order of an epoch: every sample once, the same for any number of ranks, resumable by a step number."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_train.feed.order import epoch_batches, position, rank_part, shards_of, steps_per_epoch

SHUFFLES, GROUPS = ["full", "shards"], ["none", "length", "modality"]


@st.composite
def worlds(draw):
    shards = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
    samples = sum(shards)
    kinds = draw(st.lists(st.booleans(), min_size=samples, max_size=samples))
    lengths = draw(st.lists(st.integers(1, 50), min_size=samples, max_size=samples))
    return {
        "lengths": np.array(lengths, np.int64),
        "has_image": np.array(kinds, np.bool_),
        "shard_starts": np.cumsum([0, *shards]),
        "seed": draw(st.integers(0, 2**31)),
        "epoch": draw(st.integers(0, 5)),
        "global_batch": draw(st.integers(1, 7)),
        "shuffle": draw(st.sampled_from(SHUFFLES)),
        "group": draw(st.sampled_from(GROUPS)),
        "block_shards": draw(st.integers(1, 4)),
    }


@given(worlds())
def test_order_visits_each_sample_once(world):
    batches = epoch_batches(**world)
    samples, size = world["shard_starts"][-1], world["global_batch"]
    assert sorted(np.concatenate(batches).tolist() if batches else []) == list(range(samples))
    assert all(len(b) == size for b in batches[:-1])
    assert len(batches) == steps_per_epoch(samples, size)
    whole = epoch_batches(**world, drop_last=True)
    assert all(len(b) == size for b in whole)
    assert len(whole) == steps_per_epoch(samples, size, drop_last=True)


@given(worlds())
def test_order_is_a_function_of_seed_and_epoch_alone(world):
    once, again = epoch_batches(**world), epoch_batches(**world)
    assert [b.tolist() for b in once] == [b.tolist() for b in again]


@given(worlds(), st.integers(1, 5))
def test_ranks_together_read_the_global_batch(world, ranks):
    for batch in epoch_batches(**world):
        parts = [rank_part(batch, rank, ranks) for rank in range(ranks)]
        assert sorted(np.concatenate(parts)) == sorted(batch)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(worlds())
def test_modality_batches_are_of_one_kind_but_for_the_left_over(world):
    batches = epoch_batches(**world | {"group": "modality"})
    mixed = [n for n, b in enumerate(batches) if len(set(world["has_image"][b].tolist())) == 2]
    size = world["global_batch"]
    left = sum(int((world["has_image"] == kind).sum()) % size for kind in (True, False))
    assert all(n >= len(batches) - -(-left // size) for n in mixed)


@given(worlds(), st.sampled_from(["length", "modality"]))
def test_grouped_batches_run_from_long_to_short(world, group):
    for batch in epoch_batches(**world | {"group": group}):
        assert (np.diff(world["lengths"][batch]) <= 0).all()


def test_length_grouping_does_not_change_which_samples_share_a_batch():
    world = {"lengths": np.arange(1, 31), "has_image": None, "shard_starts": np.array([0, 30]), "seed": 1, "epoch": 0}
    plain, grouped = (epoch_batches(**world, global_batch=4, group=g) for g in ("none", "length"))
    assert [set(b.tolist()) for b in plain] == [set(b.tolist()) for b in grouped]


@given(worlds())
def test_shard_block_shuffle_reads_one_block_at_a_time(world):
    world |= {"shuffle": "shards", "group": "none"}
    order = np.concatenate([np.zeros(0, np.int64), *epoch_batches(**world)])
    shards = np.searchsorted(world["shard_starts"], order, side="right") - 1
    seen = list(dict.fromkeys(shards.tolist()))
    last = {n: int(np.flatnonzero(shards == n)[-1]) for n in seen}
    first = {n: int(np.flatnonzero(shards == n)[0]) for n in seen}
    for i, number in enumerate(seen):
        for later in seen[i + world["block_shards"] :]:
            assert last[number] < first[later]


def test_epochs_and_seeds_differ():
    world = {"lengths": None, "has_image": None, "shard_starts": np.array([0, 40, 80]), "global_batch": 8}
    orders = {
        tuple(np.concatenate(epoch_batches(**world, seed=s, epoch=e, shuffle=h, block_shards=1)).tolist())
        for s in (0, 1)
        for e in (0, 1)
        for h in SHUFFLES
    }
    assert len(orders) == 8


def test_a_step_number_resumes_the_run():
    world = {"lengths": None, "has_image": None, "shard_starts": np.array([0, 10]), "seed": 3, "global_batch": 4}
    run = [(e, b.tolist()) for e in range(3) for b in epoch_batches(**world, epoch=e)]
    for step, (epoch, batch) in enumerate(run):
        at, number = position(step, steps_per_epoch(10, 4))
        assert (at, epoch_batches(**world, epoch=at)[number].tolist()) == (epoch, batch)


def test_shards_of_a_batch_are_those_to_prefetch():
    assert shards_of(np.array([9, 0, 4, 3]), np.array([0, 4, 8, 12])) == [0, 1, 2]


def test_grouping_without_lengths_says_what_is_missing():
    with pytest.raises(ValueError, match="group=modality needs has_image of all 5 samples, found nothing"):
        epoch_batches(
            lengths=np.ones(5, int),
            has_image=None,
            shard_starts=np.array([0, 5]),
            seed=0,
            epoch=0,
            global_batch=2,
            group="modality",
        )
