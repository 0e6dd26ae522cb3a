"""Half precision says what is computed in; what is trained is kept in float32, or nothing would be learnt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from student_train.config import FitConfig, LossSpec, check_fit_config
from student_train.students.student import load_student
from student_train.training.trainer import Run, fit
from teacher_cache.errors import ConfigError
from tests.fixtures.training import tiny_fit, weights

LOSSES = (LossSpec("cross_entropy"), LossSpec("forward_kl"))


def student(config: FitConfig, **settings: Any) -> FitConfig:
    return replace(config, student=replace(config.student, **settings), losses=LOSSES)


def moved(config: FitConfig) -> float:
    """The share of the trained weights that 60 steps at LLaVA's rate change."""
    before = {n: p.clone() for n, p in load_student(config.student, 0)[0].named_parameters() if p.requires_grad}
    run = Run.prepare(config)
    run.train("quiet")
    after = dict(run.student.model.named_parameters())
    changed = sum(int((after[name].cpu() != tensor).sum()) for name, tensor in before.items())
    return changed / sum(tensor.numel() for tensor in before.values())


@pytest.mark.gpu
def test_as_many_weights_move_as_in_float32(tmp_path: Path, cache_folder: Path, world: Path) -> None:
    """Kept in bfloat16, a twentieth did."""
    settings: dict[str, Any] = {"max_steps": 60, "learning_rate": 2e-5, "checkpoint_every": 0, "global_batch": 4}
    shares = [
        moved(student(tiny_fit(tmp_path, cache_folder, world, dtype, **settings), dtype=dtype))
        for dtype in ("float32", "bfloat16")
    ]
    assert shares[0] > 0.9
    assert shares[1] == pytest.approx(shares[0], abs=0.02)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("train", ["full", "projector", "lora"])
def test_what_is_trained_is_float32_and_what_is_frozen_is_not(
    tmp_path: Path, cache_folder: Path, world: Path, dtype: Any, train: Any
) -> None:
    config = student(tiny_fit(tmp_path, cache_folder, world), dtype=dtype, train=train)
    model, _ = load_student(config.student, 0)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else getattr(torch, dtype)), name
    if train == "full":  # as the folder has them: nothing was rounded on the way
        stored = load_file(Path(config.student.model) / "model.safetensors")
        (head,) = [tensor for name, tensor in stored.items() if name.endswith("lm_head.weight")]
        assert torch.equal(model.lm_head.weight, head)


@pytest.mark.gpu
@pytest.mark.parametrize("train", ["full", "lora", "projector"])
def test_a_bfloat16_student_has_the_losses_of_a_float32_one_and_is_exported_in_bfloat16(
    tmp_path: Path, cache_folder: Path, world: Path, train: Any
) -> None:
    losses = (*LOSSES, LossSpec("hidden_mse", tokens="all"), LossSpec("visual_kl"))
    found = []
    for dtype in ("float32", "bfloat16"):
        config = student(tiny_fit(tmp_path, cache_folder, world, dtype, max_steps=3), dtype=dtype, train=train)
        found.append(fit(replace(config, losses=losses), "quiet").parts)
        assert {tensor.dtype for tensor in weights(config).values()} == {getattr(torch, dtype)}
    assert found[0] != found[1]
    assert found[0] == pytest.approx(found[1], rel=0.05, abs=1e-2)


def test_float16_without_a_gpu_and_two_precisions_are_refused(tmp_path: Path, cache_folder: Path, world: Path) -> None:
    config = tiny_fit(tmp_path, cache_folder, world)
    if not torch.accelerator.is_available():
        with pytest.raises(ConfigError, match=r"float16 products need a GPU .* Set student\.dtype=bfloat16 or float32"):
            Run.prepare(student(config, dtype="float16"))
    with pytest.raises(ConfigError, match=r"student\.dtype=bfloat16 says .* train\.mixed_precision=no says others"):
        check_fit_config(replace(student(config, dtype="bfloat16"), train=replace(config.train, mixed_precision="no")))
