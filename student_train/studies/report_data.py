"""What a report is made from: the table of an ablation, or single runs, with curves and predictions of each run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from student_train.config import SourceConfig
from student_train.losses.catalogue import DEFAULT_LOSS, LossSpec
from student_train.losses.needs import needed_arrays
from student_train.studies.runs import AblationConfig, ArmConfig
from student_train.studies.table import COSTS, make_table
from teacher_cache.config import build_config
from teacher_cache.errors import CacheError, ReportError
from teacher_cache.pages.charts import Point
from teacher_cache.store.index import AXES
from teacher_cache.store.manifest import Manifest, read_manifest
from teacher_cache.store.names import read_inside
from teacher_cache.store.storage import Storage
from teacher_cache.store.tables import JSON_BYTES

_RUN = re.compile(r"(?P<arm>.+)-seed(?P<seed>\d+)")
_NOT_PARTS = {"step", "seconds", "cpu_seconds", "learning_rate"}


@dataclass(frozen=True)
class RunData:
    """One run as it lies on disk. ``curves``: part of the loss → (step, value) · ``predictions`` by question id ·
    ``bytes_read``: of the cache, in one pass over it (None: the cache is not there) · ``passes`` over the cache."""

    arm: str
    seed: int
    curves: dict[str, list[Point]]
    predictions: dict[str, dict[str, Any]]
    summary: dict[str, Any] = field(default_factory=dict)
    image_folder: str = ""
    bytes_read: int | None = None
    passes: float | None = None


@dataclass(frozen=True)
class Experiment:
    """``table`` as ``student_train.studies.table.make_table`` makes it, and the runs behind it."""

    title: str
    table: dict[str, Any]
    runs: list[RunData]

    @property
    def arms(self) -> list[str]:
        return [arm["name"] for arm in self.table["arms"]]

    def of(self, arm: str) -> list[RunData]:
        return [run for run in self.runs if run.arm == arm]


def load_experiment(folders: Sequence[Path], image_folder: str = "", cache: str = "") -> Experiment:
    """An ablation's folder (with ``table.json``), or run folders (with ``log.jsonl``).

    Raises ``ReportError``: nothing to report on, or a file that is malformed; which one and where.
    """
    if len(folders) == 1 and (folders[0] / "table.json").is_file():
        return _ablation(folders[0], image_folder, cache)
    paths = [run for folder in folders for run in _runs_in(folder)]
    runs = [load_run(p, arm, seed, image_folder, cache) for p, (arm, seed) in zip(paths, _places(paths), strict=True)]
    title = ", ".join(f.resolve().name for f in folders) if len(folders) < 4 else f"{len(runs)} runs"
    return Experiment(title, _table_of(paths, runs), runs)


def load_run(folder: Path, arm: str, seed: int, image_folder: str = "", cache: str = "") -> RunData:
    """``log.jsonl``, and where they are ``summary.json``, ``predictions.jsonl`` and ``job.json``.

    A run folder may be a stranger's: the cache and the images that it names are neither fetched nor shown. Only
    ``image_folder`` and ``cache``, which the user names, are.
    """
    job = read_json(folder / "job.json") if (folder / "job.json").is_file() else {}
    tree = job.get("tree")
    tree = tree if isinstance(tree, dict) else {}
    summary = read_json(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    manifest = _manifest(cache)
    return RunData(
        arm=arm,
        seed=seed,
        curves=read_curves(folder / "log.jsonl"),
        predictions=read_predictions(folder / "predictions.jsonl"),
        summary=summary,
        image_folder=image_folder,
        bytes_read=bytes_read(tree, manifest) if manifest and tree.get("sources") else None,
        passes=summary["samples"] / manifest.counts["samples"] if manifest and summary else None,
    )


def read_curves(path: Path) -> dict[str, list[Point]]:
    """part → (step, value); where a resumed run wrote a step twice, the later line counts."""
    lines: dict[float, dict[str, Any]] = {}
    for number, line in read_lines(path):
        if not isinstance(line.get("step"), int):
            raise ReportError(f"{path}: line {number}: expected a step, found {str(line)[:80]}. {_LOG}")
        lines[line["step"]] = line
    parts = dict.fromkeys(n for line in lines.values() for n in line if n not in _NOT_PARTS)
    return {n: [(s, float(line[n])) for s, line in sorted(lines.items()) if n in line] for n in parts}


def read_predictions(path: Path) -> dict[str, dict[str, Any]]:
    """Lines of ``predictions.jsonl`` by id; none when there is no file."""
    found: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return found
    for number, line in read_lines(path):
        missing = {"id", "question", "reference", "answer"} - line.keys()
        if missing:
            raise ReportError(
                f"{path}: line {number}: without {', '.join(sorted(missing))}. Expected id, question, reference and "
                "answer in every line; write it with student_train.evaluation.evaluate.write_predictions"
            )
        found[str(line["id"])] = line
    return found


def bytes_read(tree: Mapping[str, Any], manifest: Manifest) -> int:
    """Bytes of the cache that one pass over it reads: the ids, and the arrays that the run's losses need.

    Where images have unequal numbers of positions, signals of images count with the mean of the fewest and the most.
    """
    if build_config(SourceConfig, tree["sources"][0], "sources").answers == "original":
        return 0
    specs = [build_config(LossSpec, loss, "losses") for loss in tree.get("losses", [DEFAULT_LOSS.as_plain()])]
    names, visual = needed_arrays(specs, manifest)
    wanted = {"input_ids", "loss_mask", "runs", *names, *visual}
    counts = manifest.counts
    wide = (counts["least_image"] + counts["most_image"]) // 2
    lines = {axis: counts[plural] for axis, plural in AXES.items() if plural in counts} | {
        "image": counts["images"],
        "patch": counts["images"] * wide,
        "pair": counts["images"] * wide * (wide + 1) // 2,
        "cell": counts["rows"] * wide,
    }
    arrays = [*manifest.arrays, *manifest.image_arrays]
    return sum(a.line_bytes * lines[a.axis] for a in arrays if a.name in wanted)


def read_json(path: Path) -> dict[str, Any]:
    """One object; ReportError with the place when it is not."""
    try:
        plain = json.loads(read_inside(path.parent, path.name, JSON_BYTES).decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: not JSON ({error}). Run what wrote it again, or delete the file") from error
    if not isinstance(plain, dict):
        raise ReportError(f"{path}: expected an object, found {type(plain).__name__}. Run what wrote it again")
    return plain


def read_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(number, object) of every line. A last line without its end is what a killed run was just writing: left out."""
    lines = []
    text = read_inside(path.parent, path.name).decode("utf-8", "replace")
    for number, line in enumerate(text[: text.rfind("\n") + 1].split("\n")[:-1], 1):
        if not line.strip():
            continue
        try:
            plain = json.loads(line)
        except json.JSONDecodeError as error:
            raise ReportError(f"{path}: line {number}: not JSON ({error.msg}). Mend or delete the line") from error
        if not isinstance(plain, dict):
            raise ReportError(f"{path}: line {number}: expected an object, found {type(plain).__name__}")
        lines.append((number, plain))
    return lines


_LOG = "A log.jsonl of student-train fit has one in every line"


def _ablation(folder: Path, image_folder: str, cache: str) -> Experiment:
    path = folder / "table.json"
    table = read_json(path)
    wanted = {"arms", "metrics", "baseline", "seeds", "teacher"}
    if wanted - table.keys():
        raise ReportError(f"{path}: without {', '.join(sorted(wanted - table.keys()))}; {_TABLE}")
    for arm in table["arms"]:
        missing = {"name", "seeds", "mean", "deviation", "difference", *COSTS} - arm.keys()
        if missing:
            raise ReportError(f"{path}: arm {arm.get('name', '?')} without {', '.join(sorted(missing))}; {_TABLE}")
    runs = []
    for arm in table["arms"]:
        for seed in table["seeds"]:
            run = folder / "runs" / f"{arm['name']}-seed{seed}"
            if not run.resolve().is_relative_to(folder.resolve()):
                raise ReportError(f"{path}: arm {ascii(arm['name'])[:80]} is a place outside {folder}; {_TABLE}")
            if (run / "log.jsonl").is_file():
                runs.append(load_run(run, arm["name"], int(seed), image_folder, cache))
    return Experiment(table.get("title") or folder.resolve().name, table, runs)


_TABLE = "write it anew: student-train ablate with the same file (finished runs stand)"


def _runs_in(folder: Path) -> list[Path]:
    if (folder / "log.jsonl").is_file():
        return [folder]
    found = sorted(p.parent for p in folder.glob("runs/*/log.jsonl"))
    if not found:
        raise ReportError(
            f"{folder}: no run here (neither table.json nor log.jsonl). Name the output folder of student-train "
            "ablate, or those of student-train fit"
        )
    return found


def _places(paths: Sequence[Path]) -> list[tuple[str, int]]:
    """(arm, seed) of run folders: by their names where those make a full grid of arm-seedN, else every run an arm."""
    names = [p.resolve().name for p in paths]
    parsed = [_RUN.fullmatch(name) for name in names]
    places = [(m["arm"], int(m["seed"])) for m in parsed if m]
    arms, seeds = {a for a, _ in places}, {s for _, s in places}
    if len(set(places)) == len(names) == len(arms) * len(seeds):
        return places
    return [(str(p) if names.count(n) > 1 else n, 0) for p, n in zip(paths, names, strict=True)]


def _table_of(paths: Sequence[Path], runs: Sequence[RunData]) -> dict[str, Any]:
    """The table of runs that no ablation file put together; the first arm is the baseline."""
    results: dict[tuple[str, int], dict[str, Any]] = {}
    for path, run in zip(paths, runs, strict=True):
        file = path / "metrics.json"
        found = read_json(file) if file.is_file() else {}
        costs = {cost: float(run.summary.get(cost, math.nan)) for cost in COSTS}
        results[run.arm, run.seed] = {"metrics": found.get("metrics", found), **costs}
    config = AblationConfig(
        arms={run.arm: ArmConfig() for run in runs},
        seeds=tuple(sorted({run.seed for run in runs})),
        metrics=tuple(dict.fromkeys(m for r in results.values() for m in r["metrics"])),
    )
    return make_table(config, results)


def _manifest(url: str) -> Manifest | None:
    """The cache's manifest, if the cache is (still) there."""
    try:
        return read_manifest(Storage(url)) if url else None
    except (CacheError, OSError):
        return None
