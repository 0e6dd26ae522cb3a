"""Two gloo processes train what one does, under DDP and FSDP, also where a run goes on with another number of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from student_train.config import FitConfig
from student_train.training import trainer
from student_train.training.trainer import fit
from tests.fixtures.rounding import half_the_digits
from tests.fixtures.training import STEPS, kept, largest_difference, launch, tiny_fit, weights

TOLERANCE = half_the_digits(steps=STEPS)
"""Of a weight, as a share of its tensor's root mean square: Adam steps on sums taken in another order."""


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def alone(folder: Path, cache_folder: Path, world: Path) -> FitConfig:
    """The uninterrupted run of one process."""
    config = tiny_fit(folder, cache_folder, world, "alone")
    fit(config, "quiet")
    return config


def stopped_alone(config: FitConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process that stops in the middle of step 12; its last checkpoint is that of step 10."""
    backward = trainer.Run._backward

    def stop(run: trainer.Run, *arguments: object) -> object:
        if run.step == 12:
            raise Stopped
        return backward(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Run, "_backward", stop)
        with pytest.raises(Stopped):
            fit(config, "quiet")
    assert kept(config) == ["step-00000005", "step-00000010"]


def test_two_processes_give_the_weights_of_one_and_go_on_from_one(
    folder: Path, alone: FitConfig, cache_folder: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = tiny_fit(folder, cache_folder, world, "two")
    resumed = tiny_fit(folder, cache_folder, world, "one-then-two")
    stopped_alone(resumed, monkeypatch)
    assert launch(2, two, resumed) == 0
    assert largest_difference(alone, two) < TOLERANCE
    assert largest_difference(alone, resumed) < TOLERANCE
    logged = [json.loads(line) for line in (Path(two.output) / "log.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (Path(alone.output) / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [5, 10, 15, STEPS]
    for mine, other in zip(logged, expected, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=TOLERANCE)


def test_one_process_goes_on_where_two_were_killed(
    folder: Path, alone: FitConfig, cache_folder: Path, world: Path
) -> None:
    config = tiny_fit(folder, cache_folder, world, "two-then-one")
    assert launch(2, config, options=("--die-in", "12")) != 0
    assert kept(config) == ["step-00000005", "step-00000010"]
    fit(config, "quiet")
    assert largest_difference(alone, config) < TOLERANCE


def test_fsdp_goes_on_from_one_process_and_gives_its_weights(
    folder: Path, alone: FitConfig, cache_folder: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_fit(folder, cache_folder, world, "one-then-fsdp")
    stopped_alone(config, monkeypatch)
    assert launch(2, config, options=("--fsdp",)) == 0
    assert largest_difference(alone, config) < TOLERANCE
    assert all(tensor.isfinite().all() for tensor in weights(config).values())
