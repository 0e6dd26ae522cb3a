"""A run whose numbers are no numbers any more stops at that step, names its samples and exports nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from student_train.config import FitConfig
from student_train.feed.batch import StudentBatch
from student_train.feed.loader import MicroBatches
from student_train.feed.step_plan import MicroBatch
from student_train.training import trainer
from student_train.training.trainer import Run, fit
from teacher_cache.errors import TrainingError
from tests.fixtures.training import kept, launch, tiny_fit

SMALL = {"max_steps": 6, "global_batch": 8, "micro_batch": 2, "checkpoint_every": 1, "log_every": 1, "warmup_share": 0}


def poison(monkeypatch: pytest.MonkeyPatch, step: int, sample: int, change: Callable[[StudentBatch], Any]) -> None:
    """From ``step`` on, the micro-batch that holds ``sample`` is changed after it was read."""
    read = MicroBatches.__getitem__

    def poisoned(dataset: MicroBatches, micro: MicroBatch) -> tuple[MicroBatch, StudentBatch]:
        micro, batch = read(dataset, micro)
        if micro.step >= step and sample in micro.indices:
            change(batch)
        return micro, batch

    monkeypatch.setattr(MicroBatches, "__getitem__", poisoned)


def overflow(batch: StudentBatch) -> None:
    batch.row_weight.fill_(torch.nan)


def refused(config: FitConfig) -> str:
    with pytest.raises(TrainingError) as error:
        fit(config, "quiet")
    assert not (Path(config.output) / "model").exists()
    assert not (Path(config.output) / "summary.json").exists()
    for line in (Path(config.output) / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in the log"))
    return str(error.value)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step_and_the_samples(
    tmp_path: Path, cache_folder: Path, world: Path, monkeypatch: pytest.MonkeyPatch, clip: float
) -> None:
    config = tiny_fit(tmp_path, cache_folder, world, **SMALL, clip_norm=clip)
    run = Run.prepare(config)
    micro = run.plan.micro_batches(3, 0, 1)[1]
    names = sorted(run.dataset.names_of(micro))
    poison(monkeypatch, 3, micro.indices[0], overflow)
    error = refused(config)
    assert error.startswith("step 4: ")
    assert "loss nan" in error
    assert f"The samples: {', '.join(names)}. " in error
    assert kept(config) == ["step-00000002", "step-00000003"]


def test_a_gradient_that_is_not_finite_stops_the_run_before_a_weight_is_changed(
    tmp_path: Path, cache_folder: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_fit(tmp_path, cache_folder, world, **SMALL, clip_norm=0.0)
    backward = Run._backward

    def infinite(run: Run, *arguments: Any) -> dict[str, torch.Tensor]:
        parts = backward(run, *arguments)
        if run.step == 2:
            next(p for p in run.student.parameters() if p.grad is not None).grad.view(-1)[0] = torch.inf
        return parts

    monkeypatch.setattr(trainer.Run, "_backward", infinite)
    error = refused(config)
    assert error.startswith("step 3: gradient norm inf")
    assert error.count(", ") >= SMALL["global_batch"] - 1  # any of the step's samples may be the one
    assert kept(config) == ["step-00000001", "step-00000002"]


def test_weights_that_are_not_finite_are_in_no_checkpoint(
    tmp_path: Path, cache_folder: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss and the gradient of the step are finite; what the optimiser made of them is not."""
    config = tiny_fit(tmp_path, cache_folder, world, **SMALL)
    update = Run._update

    def overflowing(run: Run, *arguments: Any) -> Any:
        agreed = update(run, *arguments)
        if run.step == 2:
            next(p for p in run.student.parameters() if p.requires_grad).data.view(-1)[0] = torch.inf
        return agreed

    monkeypatch.setattr(trainer.Run, "_update", overflowing)
    assert "step 3: weights that are not finite" in refused(config)
    assert kept(config) == ["step-00000001", "step-00000002"]


def test_all_ranks_stop_where_one_has_such_a_sample(tmp_path: Path, cache_folder: Path, world: Path) -> None:
    config = tiny_fit(tmp_path, cache_folder, world, **SMALL)
    assert launch(2, config, options=("--not-finite-in", "2")) == 1
    assert kept(config) == ["step-00000001", "step-00000002"]
    assert not (Path(config.output) / "model").exists()
