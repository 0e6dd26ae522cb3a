"""Offline equals online through every door: an example's loop, in under 40 lines, ends with the weights of ``fit``."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from student_train.losses.catalogue import LossSpec
from student_train.training.trainer import Run
from teacher_cache.config import SignalsConfig
from tests.fixtures.online import build, fit_config, student_folder, world
from tests.fixtures.rounding import EXACT, half_the_digits

EXAMPLES = Path(__file__).parents[2] / "pipelines" / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("[a-z]*.py"))
BATCH, STEPS, SAMPLES = 8, 20, 24


@dataclass(frozen=True)
class Fitted:
    """What ``fit`` made in float64: the weights, how far they moved, and the order of the samples."""

    cache: str
    weights: dict[str, torch.Tensor]
    moved: float
    order: list[int]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    cache = build(SignalsConfig(top_k=8, hidden="none", visual="none"))
    losses = [LossSpec("cross_entropy"), LossSpec("forward_kl", weight=2.0)]
    settings = {"max_steps": STEPS, "global_batch": BATCH, "micro_batch": BATCH}
    plain = {"schedule": "constant", "warmup_share": 0.0, "clip_norm": 0.0}
    config = fit_config(losses, tmp_path_factory.mktemp("fit"), cache=cache, attention="sdpa", **settings, **plain)
    run = Run.prepare(replace(config, sources=(replace(config.sources[0], max_samples=SAMPLES),)))
    run.student.double()
    before = {name: weight.clone() for name, weight in run.student.model.state_dict().items()}
    torch.set_default_dtype(EXACT)  # the weights of rows
    try:
        run.train("quiet")
    finally:
        torch.set_default_dtype(torch.float32)
    after = {name: weight.clone() for name, weight in run.student.model.state_dict().items()}
    order = [int(number) for step in range(STEPS) for number in run.plan.global_batch(step)]
    return Fitted(cache, after, _apart(after, before), order)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_ends_with_the_weights_of_fit(
    name: str, fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    example = importlib.import_module(f"pipelines.examples.{name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries' own
        student = example.train(student_folder(), fitted.cache, str(world() / "images"), fitted.order, "float64")
    weights = student.state_dict()
    assert weights.keys() == fitted.weights.keys()
    assert all(weight.dtype == EXACT for weight in weights.values() if weight.is_floating_point())
    assert fitted.moved > 0.1
    assert _apart(weights, fitted.weights) / fitted.moved < half_the_digits(EXACT, STEPS)


def _apart(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of all weights."""
    return float(sum((some[name] - other).double().square().sum() for name, other in others.items()) ** 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_fits_on_a_screen(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 40
    assert "student_train" not in text.replace("student_train fit", "")


def test_these_are_the_examples() -> None:
    assert NAMES == ["accelerate_loop", "hf_trainer", "plain_loop", "trl_sft"]
