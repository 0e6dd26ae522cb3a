"""Promise: a step asks the device for its numbers once, when all ranks agree on it; whatever the losses are."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from student_train.losses.catalogue import LossSpec
from student_train.training import exchange
from student_train.training.trainer import Run
from tests.fixtures.host_reads import host_reads
from tests.fixtures.online import EXACT, build, fit_config
from tests.promises.test_offline_online import PER_SAMPLE, TERMS, name_of

STEPS = 2
OURS = ("student_train.", "teacher_cache.")


IN_FEW_BYTES = [LossSpec("forward_kl", source="exact"), LossSpec("hidden_mse", tokens="text"), LossSpec("visual_kl")]
CASES = [*([LossSpec("cross_entropy", weight=0.5), spec] for spec in (*TERMS, *PER_SAMPLE)), IN_FEW_BYTES]


@functools.cache
def cache_in_few_bytes() -> str:
    return build(replace(EXACT, codec="int8"))


@pytest.mark.gpu
@pytest.mark.parametrize("specs", CASES, ids=[" + ".join(map(name_of, specs)) for specs in CASES])
def test_a_step_waits_for_the_device_once(specs: list[LossSpec], device: str, tmp_path: Path) -> None:
    config = fit_config(specs, tmp_path, cache=cache_in_few_bytes() if specs is IN_FEW_BYTES else "")
    run = Run.prepare(replace(config, train=replace(config.train, max_steps=STEPS, checkpoint_every=0)))
    with host_reads(device) as places:
        run.train("quiet")
    found = {place: times for place, times in places.items() if place.startswith(OURS)}
    assert {place.partition(":")[0] for place in found} == {exchange.__name__}
    assert sum(found.values()) == STEPS


def test_what_waits_is_noticed_on_a_cpu() -> None:
    values = torch.arange(4)
    with host_reads("cpu") as places:
        values[values > 1]
        values[values[1]]
        values[: values[1]]
        values.tolist()
        bool(values.sum())
        torch.tensor(1.0, device="cpu")
        values.repeat_interleave(values)
    first = test_what_waits_is_noticed_on_a_cpu.__code__.co_firstlineno + 3
    assert sorted(places) == [f"{__name__}:{line}" for line in range(first, first + 7)]
