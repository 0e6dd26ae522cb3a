"""What depends on the step alone: the learning rate, and the seed of what a model draws."""

from __future__ import annotations

import math

import numpy as np

from student_train.config import TrainConfig


def step_seed(seed: int, rank: int, step: int) -> int:
    """63 bits that no two (seed, rank, step) share but by chance, however large they are."""
    return int(np.random.SeedSequence((seed, rank, step)).generate_state(1, np.uint64)[0] >> 1)


def learning_rate_factor(step: int, steps: int, train: TrainConfig) -> float:
    """Share of the base rate at ``step`` (from 0): linear warm-up, then the schedule down to zero."""
    warmup = math.ceil(train.warmup_share * steps)
    if step < warmup:
        return (step + 1) / warmup
    if train.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(steps - warmup, 1)
    return 1 - done if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
