"""``student-train report``: one page for a set of runs. No script, no server, no network."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from student_train.report_costs import quality_against_cost, teacher_share
from student_train.report_data import Experiment, load_experiment
from student_train.report_disagreement import disagreement
from teacher_cache.charts import Point, Series, key, line_chart
from teacher_cache.page import bytes_text, card, escape, render_page, seconds_text, tiles, write_page

LOWER_IS_BETTER = ("kl", "loss", "hallucination", "missed", "perplexity", "chair")
UNDIRECTED = ("yes_ratio",)


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
    body = [
        _header(experiment),
        "<h2>Results</h2>",
        card("Scores", results_table(experiment.table), _legend(experiment.table)),
        "<h2>Loss</h2>",
        loss_curves(experiment),
        "<h2>Quality against cost</h2>",
        quality_against_cost(experiment),
        teacher_share(experiment),
        disagreement(experiment),
    ]
    return write_page(output, render_page(f"{experiment.title} · report", f"<main>{''.join(body)}</main>"))


def results_table(table: dict[str, Any]) -> str:
    """Mean ± deviation over seeds and the paired difference to the baseline, one line an arm."""
    metrics = table["metrics"]
    head = "".join(f"<th scope='col'>{escape(m.replace('_', ' '))}</th>" for m in [*metrics, "CPU s", "peak MB"])
    rows = []
    for arm in table["arms"]:
        cells = "".join(f"<td>{_score(table, arm, m)}</td>" for m in metrics)
        cells += "".join(f"<td>{_number(arm[cost], ',.0f')}</td>" for cost in ("cpu_seconds", "peak_megabytes"))
        note = f"<small>{escape(arm['note'])}</small>" if arm.get("note") else ""
        rows.append(f'<tr><th scope="row">{escape(arm["name"])}{note}</th>{cells}</tr>')
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Scores"><table class="results"><thead><tr>'
        f'<th scope="col">arm</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def loss_curves(experiment: Experiment) -> str:
    """A chart per part of the loss: the mean over seeds, single seeds thin behind it."""
    parts = dict.fromkeys(part for run in experiment.runs for part in run.curves)
    if set(parts) == {"cross_entropy", "loss"}:  # one term: its sum would be the same chart again
        del parts["loss"]
    names = sorted(parts, key=lambda part: (part == "loss", part != "cross_entropy", part))
    drawn = []
    for part in names:
        series = [s for style, arm in enumerate(experiment.arms) for s in _curves(experiment, arm, part, style)]
        note = "Arms with other terms have another sum: compare cross_entropy, not this." if part == "loss" else ""
        drawn.append(card(part.replace("_", " "), line_chart(series, "step", part.replace("_", " ")), note))
    return f'{key(experiment.arms)}<div class="grid">{"".join(drawn)}</div>'


def _header(experiment: Experiment) -> str:
    table, teacher = experiment.table, experiment.table["teacher"]
    numbers = [(str(len(table["arms"])), "arms"), (str(len(experiment.runs)), "runs")]
    if table["metrics"] and (best := _best(table, table["metrics"][0])):
        numbers.append(
            (best["name"], f"best {table['metrics'][0].replace('_', ' ')}: {best['mean'][table['metrics'][0]]:.3g}")
        )
    if teacher.get("bytes"):
        numbers.append((bytes_text(teacher["bytes"]), "of teacher cache, written once"))
    if "score_seconds" in teacher:
        numbers.append((seconds_text(teacher["answer_seconds"] + teacher["score_seconds"]), "of the teacher, once"))
    return (
        f'<header><p class="eyebrow">Students from one teacher cache</p><h1>{escape(experiment.title)}</h1></header>'
        f"{tiles(numbers)}"
    )


def _legend(table: dict[str, Any]) -> str:
    seeds = len(table["seeds"])
    if seeds < 2:
        return "One run an arm: without several seeds a difference cannot be told from chance."
    return (
        f"{seeds} seeds: mean ± standard deviation. Below it the difference to {table['baseline']}, paired by seed, "
        "± its standard deviation; coloured where it is more than twice that."
    )


def _score(table: dict[str, Any], arm: dict[str, Any], metric: str) -> str:
    mean, deviation, difference = (arm[part].get(metric) for part in ("mean", "deviation", "difference"))
    if mean is None:
        return "–"
    if len(table["seeds"]) < 2:
        return f"{mean:.3g}"
    text = f'{mean:.3g} <span class="pm">± {deviation:.2g}</span>'
    if arm["name"] == table["baseline"]:
        return f"{text}<small>baseline</small>"
    if difference is None:
        return text
    css = _verdict(metric, *difference)
    return f'{text}<small class="{css}">{difference[0]:+.2g} ± {difference[1]:.2g}</small>'


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


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or math.isnan(value) else format(value, form)
