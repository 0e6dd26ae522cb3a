"""Small training runs on the tiny world, and how two of them are compared."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from pipelines.tiny.prepare import TEACHER
from pipelines.tiny.student import write_student
from student_train.config import FitConfig, LossSpec, SourceConfig, StudentConfig, TrainConfig
from teacher_cache.config import as_plain
from tests.threads import THREADS
from tests.waiting import PATIENCE

STEPS = 20
TRAIN = TrainConfig(
    max_steps=STEPS, global_batch=8, micro_batch=2, learning_rate=1e-3, log_every=5, checkpoint_every=5, threads=THREADS
)
LOSSES = (LossSpec("cross_entropy"), LossSpec("forward_kl"), LossSpec("hidden_mse"))


def tiny_fit(folder: Path, cache: Path, world: Path, name: str = "run", **train: Any) -> FitConfig:
    """20 steps of a tiny student (made once in ``folder``) with three losses; output ``folder/name``."""
    student = folder / "student"
    if not student.is_dir():
        write_student(student, teacher=TEACHER, seed=0)
    return FitConfig(
        output=str(folder / name),
        sources=(SourceConfig(cache=str(cache), image_folder=str(world / "images")),),
        student=StudentConfig(model=str(student)),
        losses=LOSSES,
        train=replace(TRAIN, **train),
    )


def launch(ranks: int, *configs: FitConfig, options: tuple[str, ...] = ()) -> int:
    """``fit`` of ``configs`` in ``ranks`` processes that torchrun starts; returns its exit status."""
    paths = []
    for config in configs:
        path = Path(f"{config.output}.yaml")
        path.write_text(yaml.safe_dump(as_plain(config)), encoding="utf-8")
        paths.append(str(path))
    script = str(Path(__file__).with_name("launched_fit.py"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = torchrun if ranks > 1 else [sys.executable]
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    return subprocess.run([*command, script, *options, *paths], env=environment, timeout=PATIENCE).returncode


def kept(config: FitConfig) -> list[str]:
    """The names of a run's checkpoints, and of whatever else lies beside them."""
    return sorted(path.name for path in (Path(config.output) / "checkpoints").iterdir())


def weights(config: FitConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output) / "model" / "model.safetensors")


def largest_difference(one: FitConfig, other: FitConfig) -> float:
    """Of all weights, the largest |a − b| over the root mean square of its tensor."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max() / a[n].square().mean().sqrt().clamp(min=1e-6)) for n in a)
