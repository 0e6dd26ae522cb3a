"""One cache, many students, one table: an ablation file, its runs in parallel, and what came out with its spread.

A run is done when its ``scores.json`` is there and was made with the same settings, from the same caches and after the
same runs of the arms it needs, so an ablation that was stopped goes on where it was, and a line added to the file adds
just its own runs.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from student_train.config import FitConfig
from student_train.origin import Origin, cache_fingerprint, changed, sources_origin
from student_train.stages import merge
from student_train.training.output import output_lock
from student_train.training.setup import check_tracker
from teacher_cache.config import ConfigError, as_plain, build_config
from teacher_cache.manifest import digest
from teacher_cache.progress import Style, silence_libraries, stage
from teacher_cache.stopping import Stop, Stopped, stopping

CPU_MARGIN = 1.25
"""Over the CPU seconds to match: the same run takes 10 to 20 % more or less from one time to the next."""


@dataclass(frozen=True)
class ArmConfig:
    """One row of the table. ``set`` lies over the file's ``base``; ``{seed}`` and ``{runs}`` in it are filled in.

    ``prepare`` calls ``module:function`` with its other keys before training (to make a cache of a student's answers,
    say). ``match_cpu``: so many steps more that this arm gets at least the CPU seconds of the named one, judged by what
    its ``steps_like`` arm took, and a quarter on top for the noise of such times. ``needs``: arms whose runs must be
    done before.
    """

    set: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    prepare: dict[str, Any] = field(default_factory=dict)
    match_cpu: str = ""
    steps_like: str = ""
    needs: tuple[str, ...] = ()
    table: str = ""


@dataclass(frozen=True)
class AblationConfig:
    """An ablation file."""

    output: str = ""
    title: str = ""
    base: dict[str, Any] = field(default_factory=dict)
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    baseline: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    score: str = ""
    """``module:function``; called with the model folder and ``score_options``, returns metric → value (and may write
    predictions.jsonl beside it)."""
    score_options: dict[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    """Columns of the table; empty: all that the score function returns."""
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


def ablate(config: AblationConfig, style: Style = "auto") -> dict[str, Any]:
    """Run what is missing and write ``table.json``, ``.csv``, ``.md`` and ``.svg`` into ``config.output``."""
    from student_train.table import write_table

    runs = plan_runs(config)
    with output_lock(config.output), stopping() as stop:
        with stage("ablation", len(runs), "runs", style) as progress:
            _run_all(config, runs, lambda run: progress.advance(1, last=run.name), stop)
        return write_table(config, {(r.arm, r.seed): load_result(r.folder) for r in runs})


def plan_runs(config: AblationConfig) -> list[RunSpec]:
    """Every (arm, seed), checked: unknown arms, settings that do not parse, an order that cannot be.

    Raises
    ------
    ConfigError
        before anything is trained.
    """
    if not config.output or not config.arms:
        raise ConfigError("an ablation file needs output and arms")
    if config.baseline and config.baseline not in config.arms:
        raise ConfigError(f"baseline: no arm {config.baseline!r}; there are {', '.join(config.arms)}")
    for name, arm in config.arms.items():
        for other in _needs(arm):
            if other not in config.arms:
                raise ConfigError(f"arms.{name}: needs arm {other!r}, which is not in the file")
    runs = []
    for name in _in_order(config):
        for seed in config.seeds:
            folder = Path(config.output) / "runs" / f"{name}-seed{seed}"
            tree = merge(config.base, config.arms[name].set)
            tree = _filled(tree, seed=seed, runs=str(Path(config.output) / "runs"))
            tree = merge(tree, {"output": str(folder), "train": {"seed": seed}})
            check_tracker(build_config(FitConfig, tree, f"arms.{name}").train.tracker)
            runs.append(RunSpec(name, seed, folder, tree))
    return runs


def load_result(folder: Path) -> dict[str, Any]:
    """summary.json and scores.json of a finished run."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    return {**summary, "scores": scores["scores"]}


def run_one(config: AblationConfig, run: RunSpec, stop: Stop | None = None) -> None:
    """Prepare, train and score one student, in this process."""
    from student_train.trainer import fit

    arm = config.arms[run.arm]
    if arm.prepare:
        options = _filled(arm.prepare, seed=run.seed, runs=str(run.folder.parent))
        _function(options.pop("call"))(**options)
    fit_config = build_config(FitConfig, run.tree, f"arms.{run.arm}")
    summary = fit(fit_config, "quiet", stop)
    options = _filled(config.score_options, seed=run.seed, runs=str(run.folder.parent))
    scores = _function(config.score)(summary.model, **options) if config.score else {}
    text = json.dumps({"scores": scores, "origin": run_origin(config, run)}, indent=1)
    temporary = run.folder / ".scores.json.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(run.folder / "scores.json")


class Children:
    """The processes of the runs in progress. What ends this command ends them, and then no other one begins."""

    def __init__(self) -> None:
        self._lock, self._live, self._ended = threading.Lock(), set[subprocess.Popen[bytes]](), 0

    def call(self, command: Sequence[str], **options: Any) -> int:
        """The exit status of ``command``; that of the signal where one came before it began."""
        with self._lock:
            if self._ended:
                return 128 + self._ended
            process = subprocess.Popen(command, **options)
            self._live.add(process)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._live.discard(process)

    def end(self, number: int) -> None:
        with self._lock:
            self._ended = self._ended or number
            for process in self._live:
                process.send_signal(number)


def _run_all(
    config: AblationConfig, runs: Sequence[RunSpec], done: Callable[[RunSpec], None], stop: Stop | None = None
) -> None:
    """Runs in parallel processes; one starts when those it needs are done. The first failure stops the rest, and so
    does a signal, which is sent on to the runs in progress: each writes its checkpoint."""
    gpus = _gpus()
    workers = config.workers or len(gpus) or os.cpu_count() or 1
    slots: queue.SimpleQueue[str] = queue.SimpleQueue()  # a run takes the place of one that ended, on its GPU
    for number in range(workers):
        slots.put(gpus[number % len(gpus)] if gpus else "")
    finished = {name: threading.Event() for name in (r.name for r in runs)}
    failed = threading.Event()
    children = Children()

    def work(run: RunSpec) -> None:
        try:
            for other in _needs(config.arms[run.arm]):
                finished[f"{other}-seed{run.seed}"].wait()
            if failed.is_set():
                return
            run = _matched(config, run)
            if not _is_done(config, run):
                gpu = slots.get()
                try:
                    _spawn(config, run, gpu, max((os.cpu_count() or 1) // workers, 1), children)
                finally:
                    slots.put(gpu)
            done(run)
        except BaseException:
            failed.set()
            raise
        finally:
            finished[run.name].set()

    if stop is not None:
        stop.at_once = lambda: children.end(signal.SIGKILL)
    with ThreadPoolExecutor(workers) as threads:
        futures = [threads.submit(work, run) for run in runs]
        try:
            for future in futures:
                future.result()
        except Stopped as stopped:
            failed.set()
            children.end(stopped.number)  # the pool waits for them when it is left
            raise Stopped(
                stopped.number,
                f"{sum(f.done() and not f.exception() for f in futures)} of {len(runs)} runs are done, those in "
                "progress keep a checkpoint; the same command goes on from there.",
            ) from None


def _spawn(config: AblationConfig, run: RunSpec, gpu: str, threads: int, children: Children) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    job = run.folder / "job.json"
    plain = {"ablation": as_plain(config), "arm": run.arm, "seed": run.seed, "tree": run.tree}
    job.write_text(json.dumps(plain, indent=1), encoding="utf-8")
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
    if gpu:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with (run.folder / "output.txt").open("w", encoding="utf-8") as output:
        code = children.call(
            [sys.executable, "-m", "student_train.ablate", str(job)], env=environment, stdout=output, stderr=output
        )
    if code:
        tail = (run.folder / "output.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise ConfigError(
            f"{run.name}: the run failed with exit code {code} ({''.join(tail)}). The whole output is in "
            f"{run.folder / 'output.txt'}; mend it and run the same command again, finished runs stand"
        )


def _is_done(config: AblationConfig, run: RunSpec) -> bool:
    path = run.folder / "scores.json"
    if not path.is_file():
        return False
    other = changed(_recorded(run.folder), run_origin(config, run))
    if not other:
        return True
    prepared = _filled(config.arms[run.arm].prepare, seed=run.seed, runs=str(run.folder.parent)).get("output", "")
    folders = [str(run.folder), *([prepared] if prepared else [])]
    raise ConfigError(
        f"{run.folder}: a finished run of this name has other {', '.join(other)}, or that was not recorded. Delete "
        f"{' and '.join(folders)} to run it anew, or give the arm another name"
    )


def _matched(config: AblationConfig, run: RunSpec) -> RunSpec:
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
        steps = json.loads(known.read_text(encoding="utf-8"))["max_steps"]
    else:
        run.folder.mkdir(parents=True, exist_ok=True)
        known.write_text(json.dumps({"max_steps": steps}), encoding="utf-8")
    return RunSpec(run.arm, run.seed, run.folder, merge(run.tree, {"train": {"max_steps": steps}}))


def run_origin(config: AblationConfig, run: RunSpec) -> Origin:
    """What decides the scores of a run: settings, caches (the one that scores, too), and the runs that it needs, each
    with what that was made from."""
    runs = run.folder.parent
    arm = config.arms[run.arm]
    options = _filled(config.score_options, seed=run.seed, runs=str(runs))
    score_cache = options.get("cache", "")
    needed = {f"run {other}-seed{run.seed}": _recorded(runs / f"{other}-seed{run.seed}") for other in _needs(arm)}
    return {
        "settings": digest([run.tree, config.score, config.score_options, as_plain(arm)["prepare"]]),
        **sources_origin(build_config(FitConfig, run.tree, f"arms.{run.arm}").sources),
        **({f"score_options.cache ({score_cache})": cache_fingerprint(score_cache)} if score_cache else {}),
        **{name: digest(origin) for name, origin in needed.items()},
    }


def _recorded(folder: Path) -> Origin:
    """The origin of the finished run in ``folder``; empty where none is recorded."""
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    origin: Origin = scores.get("origin", {})
    return origin


def _needs(arm: ArmConfig) -> list[str]:
    return [n for n in (*arm.needs, arm.match_cpu, arm.steps_like) if n]


def _in_order(config: AblationConfig) -> list[str]:
    order: list[str] = []
    waiting = list(config.arms)
    while waiting:
        ready = [n for n in waiting if all(o in order for o in _needs(config.arms[n]))]
        if not ready:
            raise ConfigError(f"arms: {', '.join(waiting)} need each other in a circle")
        order += ready
        waiting = [n for n in waiting if n not in ready]
    return order


def _gpus() -> list[str]:
    """The GPUs that this process may use, each as CUDA_VISIBLE_DEVICES is to name it for a run."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(n) for n in range(count)]
    return [name.strip() for name in names[:count]]


def _filled(tree: Any, **names: Any) -> Any:
    if isinstance(tree, Mapping):
        return {k: _filled(v, **names) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_filled(v, **names) for v in tree]
    if isinstance(tree, str):
        for name, value in names.items():
            tree = tree.replace(f"{{{name}}}", str(value))
    return tree


def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{name}: no such function ({error}); expected module:function") from error
    return found


def _main(job: str) -> None:
    silence_libraries()
    plain = json.loads(Path(job).read_text(encoding="utf-8"))
    config = build_config(AblationConfig, plain["ablation"], job)
    try:
        with stopping() as stop:
            stop.follow_parent()
            run_one(config, RunSpec(plain["arm"], plain["seed"], Path(job).parent, plain["tree"]), stop)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.status)


if __name__ == "__main__":
    _main(sys.argv[1])
