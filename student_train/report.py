"""``student-train report``: one page for a set of runs. No script, no server, no network."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from student_train.report_costs import quality_against_cost, teacher_share
from student_train.report_data import Experiment, load_experiment
from student_train.report_disagreement import disagreement
from teacher_cache.charts import Point, Series, key, line_chart
from teacher_cache.page import Card, bytes_text, seconds_text, write_page

LOWER_IS_BETTER = ("kl", "loss", "hallucination", "missed", "perplexity", "chair")
UNDIRECTED = ("yes_ratio",)


class Cell(NamedTuple):
    """Of the table of results: a number ± its deviation, the difference to the baseline and how that is coloured."""

    text: str
    deviation: str = ""
    difference: str = ""
    css: str = ""


def write_report(runs: str | Path | Sequence[str | Path], output: str | Path, image_folder: str = "") -> Path:
    """Write the page of an ablation's folder, or of run folders, to ``output``.

    ``image_folder``: where the images of the predictions lie; by default that of the runs' own first source.

    Raises
    ------
    ReportError
        No run there, or a malformed file; missing optional files only leave their part out.
    """
    folders = [Path(runs)] if isinstance(runs, str | Path) else [Path(run) for run in runs]
    experiment = load_experiment(folders, image_folder)
    table = experiment.table
    return write_page(
        output,
        "report.html",
        "student_train.studies",
        title=f"{experiment.title} · report",
        experiment=experiment,
        numbers=_numbers(experiment),
        legend=_legend(table),
        heads=["arm", *(m.replace("_", " ") for m in table["metrics"]), "CPU s", "peak MB"],
        results=[(arm, _cells(table, arm)) for arm in table["arms"]],
        key=key(experiment.arms),
        curves=loss_curves(experiment),
        costs=quality_against_cost(experiment),
        share=teacher_share(experiment),
        questions=disagreement(experiment),
    )


def loss_curves(experiment: Experiment) -> list[Card]:
    """A chart per part of the loss: the mean over seeds, single seeds thin behind it."""
    parts = dict.fromkeys(part for run in experiment.runs for part in run.curves)
    if set(parts) == {"cross_entropy", "loss"}:  # one term: its sum would be the same chart again
        del parts["loss"]
    drawn = []
    for part in sorted(parts, key=lambda part: (part == "loss", part != "cross_entropy", part)):
        series = [s for style, arm in enumerate(experiment.arms) for s in _curves(experiment, arm, part, style)]
        name = part.replace("_", " ")
        note = "Arms with other terms have another sum: compare cross_entropy, not this." if part == "loss" else ""
        drawn.append(Card(name, line_chart(series, "step", name), note))
    return drawn


def _numbers(experiment: Experiment) -> list[tuple[str, str]]:
    """What stands in large letters at the top, with a word for each."""
    table, teacher = experiment.table, experiment.table["teacher"]
    numbers = [(str(len(table["arms"])), "arms"), (str(len(experiment.runs)), "runs")]
    if table["metrics"] and (best := _best(table, table["metrics"][0])):
        metric = table["metrics"][0]
        numbers.append((best["name"], f"best {metric.replace('_', ' ')}: {best['mean'][metric]:.3g}"))
    if teacher.get("bytes"):
        numbers.append((bytes_text(teacher["bytes"]), "of teacher cache, written once"))
    if "score_seconds" in teacher:
        numbers.append((seconds_text(teacher["answer_seconds"] + teacher["score_seconds"]), "of the teacher, once"))
    return numbers


def _legend(table: dict[str, Any]) -> str:
    seeds = len(table["seeds"])
    if seeds < 2:
        return "One run an arm: without several seeds a difference cannot be told from chance."
    return (
        f"{seeds} seeds: mean ± standard deviation. Below it the difference to {table['baseline']}, paired by seed, "
        "± its standard deviation; coloured where it is more than twice that."
    )


def _cells(table: dict[str, Any], arm: dict[str, Any]) -> list[Cell]:
    """Mean ± deviation over seeds and the paired difference to the baseline, then what the arm cost."""
    costs = (arm["cpu_seconds"], arm["peak_megabytes"])
    texts = ["–" if cost is None or math.isnan(cost) else f"{cost:,.0f}" for cost in costs]
    return [*(_score(table, arm, m) for m in table["metrics"]), *map(Cell, texts)]


def _score(table: dict[str, Any], arm: dict[str, Any], metric: str) -> Cell:
    mean, deviation, difference = (arm[part].get(metric) for part in ("mean", "deviation", "difference"))
    if mean is None:
        return Cell("–")
    if len(table["seeds"]) < 2:
        return Cell(f"{mean:.3g}")
    cell = Cell(f"{mean:.3g}", f"{deviation:.2g}")
    if arm["name"] == table["baseline"]:
        return cell._replace(difference="baseline")
    if difference is None:
        return cell
    return cell._replace(difference=f"{difference[0]:+.2g} ± {difference[1]:.2g}", css=_verdict(metric, *difference))


def _verdict(metric: str, difference: float, deviation: float) -> str:
    """``better`` or ``worse`` where the difference is clear and the metric has a good end."""
    if abs(difference) <= 2 * deviation or metric in UNDIRECTED or not difference:
        return ""
    return "better" if (difference < 0) == _lower_is_better(metric) else "worse"


def _lower_is_better(metric: str) -> bool:
    return any(word in metric.lower().split("_") for word in LOWER_IS_BETTER)


def _best(table: dict[str, Any], metric: str) -> dict[str, Any] | None:
    scored = [arm for arm in table["arms"] if arm["mean"].get(metric) is not None]
    sign = -1 if _lower_is_better(metric) else 1
    return max(scored, key=lambda arm: sign * arm["mean"][metric]) if len(scored) > 1 else None


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
