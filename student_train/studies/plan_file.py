"""``student-train plan`` of a file: one run, the stages, or the arms of an ablation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from student_train.config import FitConfig, StudentConfig
from student_train.studies.run_plan import ASSUMPTION, IN_FLOAT32, RunPlan, origin, output_model, plan_fit
from student_train.studies.runs import AblationConfig, plan_runs
from student_train.training.stages import StagesConfig, sections, stage_configs
from teacher_cache.config import build_config, load_config
from teacher_cache.data.units import bytes_text


def plan_file(path: Path, overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """What ``student-train plan`` prints: (fact, value) lines of a fit, a stages or an ablation file.

    Raises ``ConfigError``, ``CacheError``: settings that contradict each other, losses that the cache cannot serve, a
    model without configuration.
    """
    found = sections(path)
    if "arms" in found:
        return _ablation_lines(load_config(AblationConfig, path, overrides))
    if "stages" in found:
        return _stage_lines(load_config(StagesConfig, path, overrides))
    return [*plan_fit(load_config(FitConfig, path, overrides)).lines(), ASSUMPTION]


def plan_stages(config: StagesConfig) -> dict[str, RunPlan]:
    """Each stage by name; a stage whose model is another's output has that one's shape."""
    known: dict[str, StudentConfig] = {}
    plans = {}
    for name, fit in stage_configs(config):
        plans[name] = plan_fit(fit, known)
        known[output_model(fit)] = origin(fit.student, known)
    return plans


def plan_ablation(config: AblationConfig) -> dict[str, RunPlan]:
    """Each arm by name (its first seed; the others are the same)."""
    known: dict[str, StudentConfig] = {}
    plans = {}
    for run in plan_runs(config):
        fit = build_config(FitConfig, run.tree, f"arms.{run.arm}")
        known[output_model(fit)] = origin(fit.student, known)
        if run.arm not in plans:
            plans[run.arm] = plan_fit(fit, known)
    return plans


def _ablation_lines(config: AblationConfig) -> list[tuple[str, Any]]:
    plans, seeds = plan_ablation(config), len(config.seeds)
    lines: list[tuple[str, Any]] = [("runs", f"{len(plans) * seeds}: {len(plans)} arms × {seeds} seeds")]
    for name, plan in plans.items():
        arm = config.arms[name]
        prepared = f", {arm.prepare['call']} before it (not in the hours)" if arm.prepare else ""
        lines.append(
            (
                f"{arm.table}: {name}" if arm.table else name,
                f"{seeds} × {plan.steps:,} steps, {plan.trained:,} trained, {bytes_text(plan.memory_bytes)} a GPU "
                f"({bytes_text(plan.sharded_bytes)} sharded), reads {bytes_text(plan.cache_bytes)}, "
                f"{plan.gpu_hours:,.1f} GPU hours{'' if plan.half else IN_FLOAT32}{prepared}",
            )
        )
    lines.append(("steps, all", sum(p.steps for p in plans.values()) * seeds))
    lines.append(("most memory of one GPU", bytes_text(max(p.memory_bytes for p in plans.values()))))
    lines.append(("GPU hours, all", f"{sum(p.gpu_hours for p in plans.values()) * seeds:,.1f}"))
    lines.append(("  an online teacher would add", f"{sum(p.online_hours for p in plans.values()) * seeds:,.1f}"))
    return [*lines, ASSUMPTION]


def _stage_lines(config: StagesConfig) -> list[tuple[str, Any]]:
    plans = plan_stages(config)
    lines = [(f"{stage}: {name.strip()}", value) for stage, plan in plans.items() for name, value in plan.lines()]
    return [*lines, ("GPU hours, all", f"{sum(p.gpu_hours for p in plans.values()):,.1f}"), ASSUMPTION]
