"""The short form of ``make chaos``: a few killed runs, flipped bits and a full disk."""

import pytest
import torch

from benchmarks.chaos_builds import Stage, flips, full_disk, kills, local_place, s3_place, s3_server
from benchmarks.chaos_fits import FitStage, flipped_checkpoints, flipped_features, killed_fits


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    torch.set_num_threads(1)
    return Stage.make(tmp_path_factory.mktemp("chaos"), seed=1, images=12)


@pytest.fixture(scope="module")
def fits(stage):
    return FitStage.make(stage)


def test_local_runs_killed_at_random_give_the_uninterrupted_cache(stage):
    tally = kills(stage, local_place(stage), 6, "local")
    assert tally.killed == 6
    assert tally.caches >= 1
    assert stage.skipped > 1  # broken images are left out in the same way


def test_s3_runs_killed_at_random_give_the_uninterrupted_cache(stage):
    with s3_server() as options:
        tally = kills(stage, s3_place(options), 3, "S3")
    assert tally.killed == 3


def test_flipped_bits_are_found_and_never_read(stage):
    assert flips(stage, 40).startswith("40 of 40 flipped bits found")


def test_a_real_full_disk_is_survived(stage):
    told = full_disk(stage)
    assert "No space left on device" in told or "cannot mount" in told


def test_fits_killed_at_random_give_the_uninterrupted_weights(fits):
    assert killed_fits(fits, 4).startswith("fits: 4 killed")


def test_a_flipped_bit_of_a_checkpoint_is_found_and_the_one_before_is_used(fits):
    assert flipped_checkpoints(fits, 200).startswith("checkpoints: 200 of 200")


def test_a_flipped_bit_of_kept_features_is_never_read(fits):
    assert flipped_features(fits, 400).startswith("features: ")
