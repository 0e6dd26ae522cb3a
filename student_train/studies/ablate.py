"""One cache, many students, one table: an ablation file, its runs in parallel, and what came out with its spread.

An ablation that was stopped goes on where it was, and a line added to the file adds just its own runs (``runs`` says
which are done).
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from student_train.config import FitConfig
from student_train.studies.runs import (
    AblationConfig,
    RunSpec,
    filled,
    is_done,
    load_result,
    matched,
    needs,
    plan_runs,
    run_origin,
)
from student_train.studies.table import write_table
from student_train.training.output import output_lock, write_json
from teacher_cache.config import as_plain, build_config
from teacher_cache.errors import ConfigError
from teacher_cache.progress import Style, silence_libraries, stage
from teacher_cache.stopping import Stop, Stopped, stopping
from teacher_cache.terminal import without_secrets, without_secrets_in


def ablate(config: AblationConfig, style: Style = "auto") -> dict[str, Any]:
    """Run what is missing and write ``table.json``, ``.csv``, ``.md`` and ``.svg`` into ``config.output``."""
    runs = plan_runs(config)
    with output_lock(config.output), stopping() as stop:
        with stage("ablation", len(runs), "runs", style) as progress:
            _run_all(config, runs, lambda run: progress.advance(1, last=run.name), stop)
        return write_table(config, {(r.arm, r.seed): load_result(r.folder) for r in runs})


def run_one(config: AblationConfig, run: RunSpec, stop: Stop | None = None) -> None:
    """Prepare, train and measure one student, in this process."""
    from student_train.training.trainer import fit

    arm = config.arms[run.arm]
    if arm.prepare:
        options = filled(arm.prepare, seed=run.seed, runs=str(run.folder.parent))
        _function(options.pop("call"))(**options)
    fit_config = build_config(FitConfig, run.tree, f"arms.{run.arm}")
    summary = fit(fit_config, "quiet", stop)
    options = filled(config.measure_options, seed=run.seed, runs=str(run.folder.parent))
    metrics = _function(config.measure)(summary.model, **options) if config.measure else {}
    write_json(run.folder / "metrics.json", {"metrics": metrics, "origin": run_origin(config, run)})


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
            for other in needs(config.arms[run.arm]):
                finished[f"{other}-seed{run.seed}"].wait()
            if failed.is_set():
                return
            run = matched(config, run)
            if not is_done(config, run):
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
    job.write_text(json.dumps(without_secrets_in(plain), indent=1), encoding="utf-8")
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
    if gpu:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with (run.folder / "output.txt").open("w", encoding="utf-8") as output, tempfile.TemporaryFile("w+") as whole:
        json.dump(plain, whole)  # with the addresses as they were given, in a file without a name
        whole.seek(0)
        code = children.call(
            [sys.executable, "-m", "student_train.studies.ablate", str(run.folder)],
            env=environment,
            stdin=whole,
            stdout=output,
            stderr=output,
        )
    if code:
        tail = (run.folder / "output.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise ConfigError(
            f"{run.name}: the run failed with exit code {code} ({''.join(tail)}). The whole output is in "
            f"{run.folder / 'output.txt'}; mend it and run the same command again, finished runs stand"
        )


def _gpus() -> list[str]:
    """The GPUs that this process may use, each as CUDA_VISIBLE_DEVICES is to name it for a run."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(n) for n in range(count)]
    return [name.strip() for name in names[:count]]


def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{name}: no such function ({error}); expected module:function") from error
    return found


def _main(folder: str) -> None:
    silence_libraries()
    plain = json.load(sys.stdin)
    config = build_config(AblationConfig, plain["ablation"], folder)
    try:
        with stopping() as stop:
            stop.follow_parent()
            run_one(config, RunSpec(plain["arm"], plain["seed"], Path(folder), plain["tree"]), stop)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.status)
    except Exception:  # its text stays in output.txt, and may hold an address
        print(without_secrets(traceback.format_exc()), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    _main(sys.argv[1])
