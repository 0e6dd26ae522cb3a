"""The short form of ``make chaos``: a few killed runs, flipped bits and a full disk."""

import pytest
import torch

from benchmarks.chaos import Stage, flips, full_disk, kills, local_place, s3_place, s3_server


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    torch.set_num_threads(1)
    return Stage.make(tmp_path_factory.mktemp("chaos"), seed=1, images=12)


def test_local_runs_killed_at_random_give_the_uninterrupted_cache(stage):
    tally = kills(stage, local_place(stage), 6, "local")
    assert tally.killed == 6
    assert tally.caches >= 1


def test_s3_runs_killed_at_random_give_the_uninterrupted_cache(stage):
    with s3_server() as options:
        tally = kills(stage, s3_place(options), 3, "S3")
    assert tally.killed == 3


def test_flipped_bits_are_found_and_never_read(stage):
    assert flips(stage, 40).startswith("40 of 40 flipped bits found")


def test_a_real_full_disk_is_survived(stage):
    told = full_disk(stage)
    assert "No space left on device" in told or "cannot mount" in told
