"""The paper's benchmarks as the measuring function of ablations, by lmms-eval in its own environment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from student_train.evaluation.lmms import LmmsSettings, run_lmms_eval


def measure_student(model: str, tasks: Sequence[str], device: str = "cuda", offline: bool = False) -> dict[str, float]:
    """``task.metric`` → value of an exported student; answers and logs lie beside the model folder."""
    folder = Path(model)
    results = run_lmms_eval(folder, tasks, folder.parent / "lmms-eval", LmmsSettings(device=device, offline=offline))
    return {f"{task}.{metric}": value for task, found in results.metrics.items() for metric, value in found.items()}
