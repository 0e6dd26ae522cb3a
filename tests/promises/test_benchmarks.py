"""The GPU benchmark's script runs from end to end with tiny shapes, on a CPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu, liger, training


def test_gpu_benchmark_runs_dry(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--dry-run", "--profile"])
    lines = capsys.readouterr().out.splitlines()
    for name in (*training.CACHED, training.LIVE, training.ONLINE):
        rows = [line for line in lines if line.startswith(f"| {name} |")]
        assert len(rows) == len(gpu.tiny())
        assert not [row for row in rows if "nan" in row or "memory" in row]
    assert sum(line.startswith(f"| {training.BARE} |") for line in lines) == len(gpu.tiny())
    assert any(line.startswith("| answering (8 new tokens) |") for line in lines)
    assert any(line.startswith("waits of the host a step: ") for line in lines)
    assert lines[-1] == "left out, the time was up: nothing"


def test_gpu_benchmark_names_what_its_time_did_not_suffice_for(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--dry-run", "--minutes", "0"])
    assert capsys.readouterr().out.splitlines()[-1] == (
        "left out, the time was up: LLaVA: everything, Qwen2.5-VL: everything"
    )


def test_time_in_which_copies_run_beside_kernels() -> None:
    kernels, copies = gpu.merged([(5, 9), (0, 4), (3, 5)]), gpu.merged([(8, 12), (14, 15)])
    assert kernels == [(0, 9)]
    assert gpu.shared_length(copies, kernels) == 1


def test_gpu_benchmark_asks_for_a_gpu() -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main([])


def test_head_losses_are_measured_alone_where_liger_cannot_run() -> None:
    lines = list(liger.table("cuda", torch.bfloat16))
    assert lines[0] == "Without Liger Kernel, and at a small size: torch sees no CUDA device."
    assert [line.split(" | ")[2] for line in lines[4:]] == list(liger.LOSSES)
