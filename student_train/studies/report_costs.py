"""What students cost: quality against seconds, memory and bytes, and the teacher's single run shared among them."""

from __future__ import annotations

import statistics

from student_train.studies.report_data import Experiment
from teacher_cache.data.units import bytes_text, seconds_text
from teacher_cache.pages.charts import Dot, Series, key, line_chart, scatter_chart
from teacher_cache.pages.page import Card

STUDENTS = 32
"""How far the chart of the shared teacher goes."""


def quality_against_cost(experiment: Experiment) -> list[Card]:
    """The first metric against seconds, memory and bytes of the cache; nothing where no run was measured."""
    table = experiment.table
    if not table["metrics"]:
        return []
    metric = table["metrics"][0]
    read = [[r.bytes_read / 1e6 for r in experiment.of(a) if r.bytes_read is not None] for a in experiment.arms]
    axes = {
        "CPU seconds of a student": [arm["cpu_seconds"] for arm in table["arms"]],
        "peak memory of a student (MB)": [arm["peak_megabytes"] for arm in table["arms"]],
        "cache read in one pass (MB)": [statistics.fmean(of_arm) if of_arm else None for of_arm in read],
    }
    note = "Arrays that the arm’s losses need; whiskers in all three charts are one standard deviation over seeds."
    drawn = []
    for label, values in axes.items():
        dots = [
            Dot(arm["name"], x, arm["mean"][metric], arm["deviation"][metric] or 0.0, style)
            for style, (arm, x) in enumerate(zip(table["arms"], values, strict=True))
            if x is not None and arm["mean"].get(metric) is not None
        ]
        chart = scatter_chart(dots, label, metric)
        drawn.append(Card(f"{metric.replace('_', ' ')} against {label}", chart, note if "cache" in label else ""))
    return drawn


def teacher_share(experiment: Experiment) -> Card | None:
    """What a student costs when the teacher's single run is shared by n of them, beside running it in every one."""
    teacher = experiment.table["teacher"]
    if "answer_seconds" not in teacher or "score_seconds" not in teacher:
        return None
    answering, scoring = float(teacher["answer_seconds"]), float(teacher["score_seconds"])
    seconds = [a["seconds"] for a in experiment.table["arms"] if a["seconds"] is not None]
    if not seconds:
        return None
    student = statistics.fmean(seconds)
    known = [run.passes for run in experiment.runs if run.passes]
    passes = statistics.fmean(known) if known else 1.0
    counts = range(1, STUDENTS + 1)
    lines = [
        Series("teacher once, from the cache", [(n, (answering + scoring) / n + student) for n in counts], 0),
        Series("teacher in every run", [(n, answering / n + passes * scoring + student) for n in counts], 1),
        Series("student alone", [(n, student) for n in counts], 2),
    ]
    top = max(y for line in lines for _, y in line.points)
    chart = line_chart(lines, "students", "seconds a student", log_x=True, y_range=(0.0, top * 1.05))
    words = (
        f"Measured: {seconds_text(answering)} of answering and {seconds_text(scoring)} of scoring for "
        f"{bytes_text(teacher.get('bytes', 0))} of cache; a student trains for {seconds_text(student)} on average. "
        f"A run that keeps the teacher in memory would score its {passes:,.1f} passes over the data again; that line "
        "is computed from these times, not measured."
    )
    return Card("Seconds a student, teacher included", key([line.name for line in lines]) + chart, words)
