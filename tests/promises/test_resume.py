"""A training run that is killed goes on to the very weights of one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from student_train.training.trainer import fit
from teacher_cache.errors import CacheError
from tests.fixtures.training import kept, launch, tiny_fit, weights


def test_killed_run_gives_bit_identical_weights(tmp_path: Path, cache_folder: Path, world: Path) -> None:
    whole = tiny_fit(tmp_path, cache_folder, world, "whole")
    killed = tiny_fit(tmp_path, cache_folder, world, "killed")
    fit(whole, "quiet")
    assert launch(1, killed, options=("--die-in", "13")) < 0
    assert kept(killed) == ["step-00000005", "step-00000010"]
    summary = fit(killed, "quiet")
    assert summary.steps == 20
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(killed)[name]), name


def test_checkpoint_of_other_settings_is_refused(tmp_path: Path, cache_folder: Path, world: Path) -> None:
    fit(tiny_fit(tmp_path, cache_folder, world, max_steps=2), "quiet")
    with pytest.raises(CacheError, match=r"other settings or another cache: train\.max_steps was 2, is now 3\."):
        fit(tiny_fit(tmp_path, cache_folder, world, max_steps=3), "quiet")


def test_finished_run_is_finished_again_without_a_step(tmp_path: Path, cache_folder: Path, world: Path) -> None:
    config = tiny_fit(tmp_path, cache_folder, world, max_steps=2)
    fit(config, "quiet")
    before = weights(config)
    assert fit(config, "quiet").steps == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(config).items())
