"""``student-train report``: one page for a set of runs. No script, no server, no network."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from student_train.losses.catalogue import DEFAULT_LOSS
from student_train.studies.report_costs import quality_against_cost, teacher_share
from student_train.studies.report_data import Experiment, load_experiment
from student_train.studies.report_disagreement import disagreement
from teacher_cache.pages.charts import Point, Series, key, line_chart
from teacher_cache.pages.page import Card, write_page

LOWER_IS_BETTER = ("kl", "loss", "hallucination", "missed", "perplexity", "chair")
UNDIRECTED = ("yes_ratio",)


def write_report(
    runs: str | Path | Sequence[str | Path], output: str | Path, image_folder: str = "", cache: str = ""
) -> Path:
    """Write the page of an ablation's folder, or of run folders, to ``output``.

    ``image_folder``: where the images of the predictions lie; without it the page shows none. ``cache``: what the
    runs read, for the bytes of one pass. Neither is taken from a run folder, which may be a stranger's.

    Raises ``ReportError``: no run there, or a malformed file; missing optional files only leave their part out.
    """
    folders = [Path(runs)] if isinstance(runs, str | Path) else [Path(run) for run in runs]
    experiment = load_experiment(folders, image_folder, cache)
    table = experiment.table
    return write_page(
        output,
        "report.html",
        "student_train.studies",
        experiment=experiment,
        table=table,
        best=_best(table, table["metrics"][0]) if table["metrics"] else None,
        verdict=_verdict,
        key=key(experiment.arms),
        curves=loss_curves(experiment),
        costs=quality_against_cost(experiment),
        share=teacher_share(experiment),
        questions=disagreement(experiment),
    )


def loss_curves(experiment: Experiment) -> list[Card]:
    """A chart per part of the loss: the mean over seeds, single seeds thin behind it."""
    parts = dict.fromkeys(part for run in experiment.runs for part in run.curves)
    if set(parts) == {DEFAULT_LOSS.name, "loss"}:  # one term: its sum would be the same chart again
        del parts["loss"]
    drawn = []
    for part in sorted(parts, key=lambda part: (part == "loss", part != DEFAULT_LOSS.name, part)):
        series = [s for style, arm in enumerate(experiment.arms) for s in _curves(experiment, arm, part, style)]
        name = part.replace("_", " ")
        other_sum = f"Arms with other terms have another sum: compare {DEFAULT_LOSS.name}, not this."
        drawn.append(Card(name, line_chart(series, "step", name), other_sum if part == "loss" else ""))
    return drawn


def _verdict(metric: str, difference: float, deviation: float) -> str:
    """``better`` or ``worse`` where the difference is clear and the metric has a good end."""
    if abs(difference) <= 2 * deviation or metric in UNDIRECTED or not difference:
        return ""
    return "better" if (difference < 0) == _lower_is_better(metric) else "worse"


def _lower_is_better(metric: str) -> bool:
    return any(word in metric.lower().split("_") for word in LOWER_IS_BETTER)


def _best(table: dict[str, Any], metric: str) -> dict[str, Any] | None:
    measured = [arm for arm in table["arms"] if arm["mean"].get(metric) is not None]
    sign = -1 if _lower_is_better(metric) else 1
    return max(measured, key=lambda arm: sign * arm["mean"][metric]) if len(measured) > 1 else None


def _curves(experiment: Experiment, arm: str, part: str, style: int) -> list[Series]:
    """The arm's mean curve (at the steps that all its seeds logged) and, behind it, those of the seeds."""
    curves = [run.curves[part] for run in experiment.of(arm) if part in run.curves]
    if not curves:
        return []
    by_step = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(b) for b in by_step)))
    mean: list[Point] = [(s, statistics.fmean(b[s] for b in by_step)) for s in steps]
    thin = [Series(arm, curve, style, thin=True) for curve in curves] if len(curves) > 1 else []
    return [*thin, Series(arm, mean, style)]
