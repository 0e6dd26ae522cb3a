"""What a batch size may change: last bits, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from student_train.losses.topk import topk_at_temperature
from teacher_cache.build.build import build_cache
from teacher_cache.build.signals import row_signals
from teacher_cache.config import CacheConfig, SpeedConfig
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.records import TeacherRecord


@pytest.fixture(scope="module")
def built(cache_config: CacheConfig, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def build(name: str, **speed: Any) -> Path:
        folder = tmp_path_factory.mktemp("batch") / name
        config = replace(
            cache_config,
            output=str(folder),
            data=replace(cache_config.data, max_samples=12),
            signals=replace(cache_config.signals, codec="float32"),
            speed=SpeedConfig(device="cpu", **speed),
        )
        build_cache(config, style="quiet")
        return folder

    return build


def records(folder: Path) -> list[TeacherRecord]:
    with TeacherCache.open(folder) as cache:
        return [cache[i] for i in range(len(cache))]


def test_other_batch_sizes_change_last_bits_and_nothing_else(built: Callable[..., Path]) -> None:
    """Float32 sums of at most 384 products in another order, through four layers: 1e-4 of a number of size 1 to 100."""
    large, small = built("large"), built("small", answer_batch=3, score_batch_tokens=64, head_rows=5)
    with TeacherCache.open(large) as one, TeacherCache.open(small) as other:
        assert one.manifest.fingerprint == other.manifest.fingerprint
    for one_record, other_record in zip(records(large), records(small), strict=True):
        assert one_record.answers == other_record.answers
        for name, array in one_record.arrays.items():
            given = other_record.arrays[name]
            if not np.issubdtype(array.dtype, np.floating):
                exact = name in ("input_ids", "loss_mask", "runs")
                assert np.array_equal(array, given) if exact else np.mean(array == given) > 0.99, name
            elif name == "topk_logprobs":
                np.testing.assert_allclose(given.astype(np.float64), array.astype(np.float64), rtol=2**-9, atol=1e-4)
            else:
                np.testing.assert_allclose(given, array, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_a_top_k_is_off_by_float16s_rounding_over_the_temperature(temperature: float) -> None:
    logits = 12 * torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    grid = (temperature, 1.0)
    made = row_signals(logits, 64, grid)
    names = [f"lse@{t:g}" for t in grid] + ["mean", "std", "entropy"]
    stats = dict(zip(names, made["stats"].unbind(-1), strict=True))
    found = topk_at_temperature(made["topk_logprobs"], stats, temperature)
    exact = (logits.double() / temperature).log_softmax(-1).gather(-1, made["topk_ids"])
    at_one = logits.double().log_softmax(-1).gather(-1, made["topk_ids"]).abs()
    allowed = at_one * 2**-11 / temperature + 2e-4 / temperature  # float32's share of stats and logits
    assert ((found - exact).abs() <= allowed).all()
    if temperature < 1:
        assert ((found - exact).abs() > allowed / 4).any(), "the rounding is there, and of this size"
