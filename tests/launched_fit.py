"""What the multi-process tests launch: ``fit`` of each YAML, one after another.

    torchrun --nproc-per-node 2 tests/launched_fit.py [--fsdp] [--die-in STEP] [--not-finite-in STEP] CONFIG…

``--die-in``: the last rank kills itself with SIGKILL in the middle of that step; ``--not-finite-in``: its loss is NaN
there. ``--fsdp``: Accelerate knows FSDP on
accelerators only, so it is told here that it has one; sharding, collectives (gloo) and checkpoints are the real ones.
"""

from __future__ import annotations

import argparse
import os
import signal
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from student_train import trainer
from student_train.config import FitConfig
from teacher_cache.config import load_config


def shard(config: FitConfig) -> Accelerator:
    accelerator = make_accelerator(config)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    assert accelerator.is_fsdp2
    return accelerator


def die_in(step: int) -> None:
    backward = trainer.Run._backward

    def killed(run: trainer.Run, *arguments: Any) -> Any:
        if run.step == step and run.accelerator.is_last_process:
            os.kill(os.getpid(), signal.SIGKILL)
        return backward(run, *arguments)

    trainer.Run._backward = killed


def not_finite_in(step: int) -> None:
    backward = trainer.Run._backward

    def poisoned(run: trainer.Run, *arguments: Any) -> Any:
        parts = backward(run, *arguments)
        if run.step == step and run.accelerator.is_last_process:
            parts["loss"] = parts["loss"] * float("nan")
        return parts

    trainer.Run._backward = poisoned


make_accelerator = trainer.make_accelerator

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--die-in", type=int, default=-1)
    parser.add_argument("--not-finite-in", type=int, default=-1)
    parser.add_argument("configs", nargs="+")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    die_in(arguments.die_in)
    not_finite_in(arguments.not_finite_in)
    if arguments.fsdp:
        trainer.make_accelerator = shard
    for path in arguments.configs:
        trainer.fit(load_config(FitConfig, path), "quiet")
