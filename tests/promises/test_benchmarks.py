"""The GPU benchmark's script runs from end to end with tiny shapes, on a CPU."""

from __future__ import annotations

import pytest

from benchmarks import gpu, training


def test_gpu_benchmark_runs_dry(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    for name in training.ARMS:
        (line,) = [line for line in lines if line.startswith(f"| {name} |")]
        assert "nan" not in line.split("|")[5]
    assert any(line.startswith("| scoring, capturing and writing |") for line in lines)
    assert any(line.startswith("| answering (12 new tokens) |") for line in lines)


def test_gpu_benchmark_asks_for_a_gpu() -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main([])
