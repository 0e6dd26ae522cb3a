"""The table of an ablation: mean ± deviation over seeds, paired differences; text, CSV, Markdown, JSON, picture."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from student_train.losses.catalogue import CATALOGUE, Answers
from student_train.studies.runs import AblationConfig, ArmConfig
from student_train.training.stages import merge
from teacher_cache.errors import CacheError
from teacher_cache.pages.charts import GREY, Interval, picture
from teacher_cache.store.manifest import read_manifest
from teacher_cache.store.storage import Storage

Results = Mapping[tuple[str, int], Mapping[str, Any]]
COSTS = ("cpu_seconds", "seconds", "peak_megabytes", "steps")


def write_table(config: AblationConfig, results: Results) -> dict[str, Any]:
    """``table.json``, ``table.csv``, ``table.md``, ``table.svg`` in ``config.output``; returns what the first holds."""
    table = make_table(config, results)
    folder = Path(config.output)
    (folder / "table.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
    (folder / "table.csv").write_text(as_csv(table), encoding="utf-8")
    (folder / "table.md").write_text(as_markdown(table), encoding="utf-8")
    draw(table, folder / "table.svg")
    return table


def make_table(config: AblationConfig, results: Results) -> dict[str, Any]:
    """Plain data: arms with every seed's metrics and costs, mean, deviation, paired difference to the baseline."""
    metrics = list(config.metrics) or sorted({m for r in results.values() for m in r["metrics"]})
    baseline = config.baseline or next(iter(config.arms))
    arms = []
    for name, arm in config.arms.items():
        seeds = {seed: results[name, seed] for seed in config.seeds}
        values = {s: {m: r["metrics"].get(m) for m in metrics} for s, r in seeds.items()}
        base = {s: results[baseline, s]["metrics"] for s in config.seeds}
        arms.append(
            {
                "name": name,
                "note": arm.note,
                "table": arm.table,
                "distilled": _is_distilled(config, arm),
                "seeds": {str(s): v for s, v in values.items()},
                "mean": {m: _mean([v[m] for v in values.values()]) for m in metrics},
                "deviation": {m: _deviation([v[m] for v in values.values()]) for m in metrics},
                "difference": {m: _difference([(v[m], base[s].get(m)) for s, v in values.items()]) for m in metrics},
                **{cost: _mean([r[cost] for r in seeds.values()]) for cost in COSTS},
            }
        )
    return {
        "title": config.title,
        "metrics": metrics,
        "baseline": baseline,
        "seeds": list(config.seeds),
        "arms": arms,
        "teacher": teacher_cost(config),
        "global_batch": config.base.get("train", {}).get("global_batch", 0),
    }


def _is_distilled(config: AblationConfig, arm: ArmConfig) -> bool:
    """Whether a loss of the arm asks the teacher for more than its answers, which lie in the data."""
    losses = merge(config.base, arm.set).get("losses", [])
    return any(not isinstance(CATALOGUE[loss["name"]], Answers) for loss in losses)


def teacher_cost(config: AblationConfig) -> dict[str, Any]:
    """What the cache cost once: seconds of answering and scoring (cost.json beside the manifest) and its bytes."""
    url = config.teacher or next((s.get("cache", "") for s in config.base.get("sources", [])), "")
    if not url:
        return {}
    storage = Storage(url)
    try:
        counts = read_manifest(storage).counts
    except CacheError:
        return {}
    cost = json.loads(storage.read("cost.json")) if storage.exists("cost.json") else {}
    return {**{name: counts.get(name, 0) for name in ("bytes", "rows", "samples")}, **cost}


def teacher_text(table: Mapping[str, Any]) -> str:
    """What the teacher costs each student as more of them share the cache, beside running it online.

    Online it would score every batch of a distilled student again: a scoring pass over the data for each epoch of the
    longest of them. Cross-entropy needs no live teacher, and answers are regenerated beforehand in both cases.
    """
    teacher = table["teacher"]
    if not teacher.get("score_seconds"):
        return ""
    once = teacher["answer_seconds"] + teacher["score_seconds"]
    students = len(table["arms"]) * len(table["seeds"])
    shares = ", ".join(f"{once / n:.1f} s for {n}" for n in sorted({1, len(table["seeds"]), students}))
    text = (
        f"The teacher: {teacher['answer_seconds']:.1f} s of answering and {teacher['score_seconds']:.1f} s of scoring "
        f"and writing, once. A student's share as more use the cache: {shares}."
    )
    steps = max((arm["steps"] for arm in table["arms"] if arm["distilled"]), default=0)
    epochs = steps * table.get("global_batch", 0) / max(teacher["samples"], 1)
    online = epochs * teacher["score_seconds"]
    if online:
        text += (
            f" Online it would score again at every step: {epochs:.0f} epochs × {teacher['score_seconds']:.1f} s = "
            f"{online:.0f} s for each distilled student, so scoring ahead pays from student {math.ceil(1 / epochs)} on."
        )
    return text


def as_text(table: Mapping[str, Any]) -> str:
    """For the terminal: one table of all arms, columns padded."""
    lines = [_titles(table), *(_cells(table, arm) for arm in table["arms"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def as_markdown(table: Mapping[str, Any]) -> str:
    """mean ± deviation, and in brackets the paired difference to the baseline ± its deviation; * where the mean
    difference is more than twice that deviation. Arms that name a ``table`` stand in one of that title each, below the
    baseline."""
    titles = _titles(table)
    rule = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    lines: list[str] = []
    for title, arms in _groups(table):
        cells = [f"| {' | '.join(_cells(table, arm))} |" for arm in arms]
        lines += [*([f"## {title}", ""] if title else []), *rule, *cells, ""]
    lines = lines[:-1]
    notes = [f"- {arm['name']}: {arm['note']}" for arm in table["arms"] if arm["note"]]
    seeds = len(table["seeds"])
    legend = (
        f"{seeds} seeds, mean ± standard deviation; in brackets the difference to {table['baseline']}, paired by seed, "
        "± its standard deviation; * where it is more than twice that."
    )
    return "\n".join([*lines, "", legend, teacher_text(table), "", *notes]).rstrip() + "\n"


def _titles(table: Mapping[str, Any]) -> list[str]:
    return ["arm", *table["metrics"], "CPU s", "MB"]


def _cells(table: Mapping[str, Any], arm: Mapping[str, Any]) -> list[str]:
    cells = [_cell(arm, m, arm["name"] == table["baseline"]) for m in table["metrics"]]
    return [arm["name"], *cells, f"{arm['cpu_seconds']:.0f}", f"{arm['peak_megabytes']:.0f}"]


def _groups(table: Mapping[str, Any]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """(title, arms) in the file's order; the baseline opens each, and has none of its own unless it is all there is."""
    titles = list(dict.fromkeys(arm.get("table", "") for arm in table["arms"]))
    baseline = [arm for arm in table["arms"] if arm["name"] == table["baseline"]]
    if len(titles) == 1:
        return [("", table["arms"])]
    others = [arm for arm in table["arms"] if arm not in baseline]
    groups = [(title, [arm for arm in others if arm.get("table", "") == title]) for title in titles]
    return [(title, [*baseline, *arms]) for title, arms in groups if arms]


def as_csv(table: Mapping[str, Any]) -> str:
    """A line per arm and seed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["arm", "seed", *table["metrics"]])
    for arm in table["arms"]:
        for seed, values in arm["seeds"].items():
            writer.writerow([arm["name"], seed, *(values[m] for m in table["metrics"])])
    return out.getvalue()


def draw(table: Mapping[str, Any], path: Path) -> None:
    """One panel a metric: mean, deviation and every seed of each arm."""
    panels: dict[str, list[Interval]] = {m: [] for m in table["metrics"]}
    for line, arm in enumerate(table["arms"]):
        style = GREY if arm["name"] == table["baseline"] else 0
        for metric, intervals in panels.items():
            seeds = [v[metric] for v in arm["seeds"].values() if v[metric] is not None and math.isfinite(v[metric])]
            if seeds:
                intervals.append(Interval(line, arm["mean"][metric], arm["deviation"][metric], seeds, style))
    path.write_text(picture([arm["name"] for arm in table["arms"]], panels), encoding="utf-8")


def _cell(arm: Mapping[str, Any], metric: str, is_baseline: bool) -> str:
    mean, deviation, difference = arm["mean"][metric], arm["deviation"][metric], arm["difference"][metric]
    if mean is None:
        return "–"
    text = f"{mean:.3g} ± {deviation:.2g}"
    if is_baseline or difference is None:
        return text
    mark = "*" if 0 < 2 * difference[1] < abs(difference[0]) else ""  # one seed has no deviation to compare with
    return f"{text} ({difference[0]:+.2g} ± {difference[1]:.2g}{mark})"


def _difference(pairs: Sequence[tuple[float | None, float | None]]) -> tuple[float, float] | None:
    """(mean, deviation) of the differences paired by seed."""
    known = [a - b for a, b in pairs if a is not None and b is not None]
    return (statistics.fmean(known), _deviation(known) or 0.0) if known else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None and not math.isnan(v)]
    return statistics.fmean(known) if known else None


def _deviation(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None and not math.isnan(v)]
    return statistics.stdev(known) if len(known) > 1 else 0.0 if known else None
