"""The runs of an ablation: its file, which arms and seeds it makes, and whether one is done already.

A run is done when its ``metrics.json`` is there and was made with the same settings, from the same caches and after the
same runs of the arms it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from student_train.config import FitConfig, FitTree
from student_train.training.origin import Origin, cache_fingerprint, changed, sources_origin
from student_train.training.output import read_json, write_json
from student_train.training.setup import check_tracker
from student_train.training.stages import merge
from teacher_cache.config import CHECKED, as_plain, build_config
from teacher_cache.errors import ConfigError
from teacher_cache.store.manifest import digest
from teacher_cache.terminal import without_secrets, without_secrets_in

CPU_MARGIN = 1.25
"""Over the CPU seconds to match: the same run takes 10 to 20 % more or less from one time to the next."""


@dataclass(frozen=True)
class ArmConfig:
    """One row of the table."""

    set: FitTree = field(default_factory=dict)
    """Lies over the file's ``base``; ``{seed}`` and ``{runs}`` in it are filled in."""
    note: str = ""
    """What the table says beside it."""
    prepare: dict[str, Any] = field(default_factory=dict)
    """``call: module:function`` and its arguments: called before training (a cache of a student's answers)."""
    match_cpu: str = ""
    """So many steps more that it gets at least this arm's CPU seconds, by what a step of ``steps_like`` took, and a
    quarter on top for the noise of such times."""
    steps_like: str = ""
    """The arm that says what a step costs."""
    needs: tuple[str, ...] = ()
    """Arms that are trained before."""
    table: str = ""
    """Heading of the part of the table that it stands in."""


@dataclass(frozen=True)
class AblationConfig:
    """An ablation file."""

    __pydantic_config__ = CHECKED
    output: str = ""
    """Folder of the runs, the table and the picture."""
    title: str = ""
    """Heading of the table."""
    base: FitTree = field(default_factory=dict)
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    """Rows of the table, by name."""
    baseline: str = ""
    """The arm that the others are compared with, seed by seed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every arm is trained with each."""
    measure: str = ""
    """``module:function``; called with the model folder and ``measure_options``, returns metric → value (and may write
    predictions.jsonl beside it)."""
    measure_options: dict[str, Any] = field(default_factory=dict)
    """What ``measure`` is given."""
    metrics: tuple[str, ...] = ()
    """Columns of the table; empty: all that the measuring function returns."""
    teacher: str = ""
    """The cache whose cost is shown; found from the first source when empty."""
    workers: int = 0
    """Runs at a time: 0 takes the GPUs that there are, or the CPU cores."""


@dataclass(frozen=True)
class RunSpec:
    arm: str
    seed: int
    folder: Path
    tree: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"


def plan_runs(config: AblationConfig) -> list[RunSpec]:
    """Every (arm, seed), checked: unknown arms, settings that do not parse, an order that cannot be.

    Raises ``ConfigError``: before anything is trained.
    """
    if not config.output or not config.arms:
        raise ConfigError("an ablation file needs output and arms")
    if config.baseline and config.baseline not in config.arms:
        raise ConfigError(f"baseline: no arm {config.baseline!r}; there are {', '.join(config.arms)}")
    for name, arm in config.arms.items():
        for other in needs(arm):
            if other not in config.arms:
                raise ConfigError(f"arms.{name}: needs arm {other!r}, which is not in the file")
    runs = []
    for name in in_order(config):
        for seed in config.seeds:
            folder = Path(config.output) / "runs" / f"{name}-seed{seed}"
            tree = merge(config.base, config.arms[name].set)
            tree = filled(tree, seed=seed, runs=str(Path(config.output) / "runs"))
            tree = merge(tree, {"output": str(folder), "train": {"seed": seed}})
            check_tracker(build_config(FitConfig, tree, f"arms.{name}").train.tracker)
            runs.append(RunSpec(name, seed, folder, tree))
    return runs


def load_result(folder: Path) -> dict[str, Any]:
    """summary.json and metrics.json of a finished run."""
    return {**read_json(folder / "summary.json"), "metrics": read_json(folder / "metrics.json")["metrics"]}


def is_done(config: AblationConfig, run: RunSpec) -> bool:
    path = run.folder / "metrics.json"
    if not path.is_file():
        return False
    other = changed(recorded(run.folder), run_origin(config, run))
    if not other:
        return True
    prepared = filled(config.arms[run.arm].prepare, seed=run.seed, runs=str(run.folder.parent)).get("output", "")
    folders = [str(run.folder), *([prepared] if prepared else [])]
    raise ConfigError(
        f"{run.folder}: a finished run of this name has other {', '.join(other)}, or that was not recorded. Delete "
        f"{' and '.join(folders)} to run it anew, or give the arm another name"
    )


def matched(config: AblationConfig, run: RunSpec) -> RunSpec:
    """With ``match_cpu``: the steps that make this arm at least as long, in CPU seconds, as the named one."""
    arm = config.arms[run.arm]
    if not arm.match_cpu:
        return run
    folder = run.folder.parent
    target = load_result(folder / f"{arm.match_cpu}-seed{run.seed}")
    like = load_result(folder / f"{arm.steps_like}-seed{run.seed}")
    steps = round(CPU_MARGIN * like["steps"] * max(target["cpu_seconds"] / like["cpu_seconds"], 1.0))
    known = run.folder / "steps.json"
    if known.is_file():  # a resumed run keeps the number it began with
        steps = read_json(known)["max_steps"]
    else:
        write_json(known, {"max_steps": steps})
    return RunSpec(run.arm, run.seed, run.folder, merge(run.tree, {"train": {"max_steps": steps}}))


def run_origin(config: AblationConfig, run: RunSpec) -> Origin:
    """What decides the metrics of a run: settings, caches (the held-out one, too), and the runs that it needs, by what
    those were made from."""
    runs = run.folder.parent
    arm = config.arms[run.arm]
    options = filled(config.measure_options, seed=run.seed, runs=str(runs))
    held_out = options.get("cache", "")
    decides = [run.tree, config.measure, config.measure_options, as_plain(arm)["prepare"]]
    needed = {f"run {other}-seed{run.seed}": recorded(runs / f"{other}-seed{run.seed}") for other in needs(arm)}
    return {
        "settings": digest(without_secrets_in(decides)),
        **sources_origin(build_config(FitConfig, run.tree, f"arms.{run.arm}").sources),
        **({f"measure_options.cache ({without_secrets(held_out)})": cache_fingerprint(held_out)} if held_out else {}),
        **{name: digest(origin) for name, origin in needed.items()},
    }


def recorded(folder: Path) -> Origin:
    """The origin of the finished run in ``folder``; empty where none is recorded."""
    origin: Origin = read_json(folder / "metrics.json").get("origin", {})
    return origin


def needs(arm: ArmConfig) -> list[str]:
    return [n for n in (*arm.needs, arm.match_cpu, arm.steps_like) if n]


def in_order(config: AblationConfig) -> list[str]:
    order: list[str] = []
    waiting = list(config.arms)
    while waiting:
        ready = [n for n in waiting if all(o in order for o in needs(config.arms[n]))]
        if not ready:
            raise ConfigError(f"arms: {', '.join(waiting)} need each other in a circle")
        order += ready
        waiting = [n for n in waiting if n not in ready]
    return order


def filled(tree: Any, **names: Any) -> Any:
    if isinstance(tree, Mapping):
        return {k: filled(v, **names) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [filled(v, **names) for v in tree]
    if isinstance(tree, str):
        for name, value in names.items():
            tree = tree.replace(f"{{{name}}}", str(value))
    return tree
