"""Two commands on one output at one time: one goes on as if it were alone, the other ends with 1 and says who writes.

Both are processes of their own that run the command line, and start together. The one that has the output waits in the
middle of its work until the other has ended, so that the two are there at the same time in every try.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.chaos_builds import Stage, content, local_files
from benchmarks.chaos_fits import FitStage, weights_of
from student_train import cli as student_cli
from student_train.training import trainer
from teacher_cache import cli as teacher_cli
from teacher_cache.build import build as build_module
from teacher_cache.config import as_plain

PATIENCE = 300.0
"""Seconds after which both are taken for hung."""


@dataclass
class Side:
    """One of the two: its process, what tells that it is at work and lets it go on, and what it printed."""

    process: BaseProcess
    line: Connection
    printed: Path


def two_builds(stage: Stage, tries: int) -> str:
    """``tries`` times two ``teacher-cache build``; raises ``AssertionError`` at the first broken promise."""
    output = stage.folder / "two"
    config = replace(stage.config, output=str(output))
    for _ in range(tries):
        shutil.rmtree(output, ignore_errors=True)
        _two(stage.folder, as_plain(config), _build)
        assert content(local_files(output)) == stage.reference, "the cache is not that of a build by itself"
    return f"two builds on one output: {tries} tries, one refused with the other's name, the cache as of one alone"


def two_fits(stage: FitStage, tries: int) -> str:
    """``tries`` times two ``student-train fit``."""
    config = stage.named("two")
    for _ in range(tries):
        shutil.rmtree(Path(config.output).parent, ignore_errors=True)
        _two(stage.folder, as_plain(config), _fit)
        assert weights_of(config) == stage.weights, "the weights are not those of a fit by itself"
    return f"two fits on one output: {tries} tries, one refused with the other's name, the weights as of one alone"


def _build(path: str, at_work: Callable[[Any], Any]) -> None:
    build_module.build_shards = at_work(build_module.build_shards)
    teacher_cli.app(["build", path, "--json"])


def _fit(path: str, at_work: Callable[[Any], Any]) -> None:
    trainer.Run.restore = at_work(trainer.Run.restore)  # type: ignore[method-assign]
    student_cli.app(["fit", path, "--json"])


def _two(folder: Path, settings: Any, command: Callable[[str, Callable[[Any], Any]], None]) -> None:
    path = folder / "two.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    with _sides(folder, str(path), command) as sides:
        open_ends: list[Any] = [part for side in sides for part in (side.line, side.process.sentinel)]
        working: list[Side] = []
        ended: list[Side] = []
        while len(working) + len(ended) < 2:
            ready = wait(open_ends, PATIENCE)
            assert ready, "neither works nor ends"
            for side in sides:
                if side.line in ready and side.line.poll() and _heard(side):
                    working.append(side)
                elif side.process.sentinel in ready and side not in working:
                    ended.append(side)
                else:
                    continue
                open_ends = [p for p in open_ends if p not in (side.line, side.process.sentinel)]
        texts = [side.printed.read_text(encoding="utf-8") for side in sides]
        assert (len(working), len(ended)) == (1, 1), f"{len(working)} of two write into one output: {texts}"
        (holder,), (refused,) = working, ended
        refused.process.join()
        said = refused.printed.read_text(encoding="utf-8")
        assert refused.process.exitcode == 1, f"status {refused.process.exitcode}: {said}"
        assert f"process {holder.process.pid}, since " in said, f"it does not say who writes: {said}"
        assert "Traceback" not in said, said
        holder.line.send("go on")
        holder.process.join(PATIENCE)
        assert holder.process.exitcode == 0, holder.printed.read_text(encoding="utf-8")


def _heard(side: Side) -> bool:
    try:
        return bool(side.line.recv() == "at work")
    except EOFError:  # it ended
        return False


@contextmanager
def _sides(folder: Path, path: str, command: Callable[[str, Callable[[Any], Any]], None]) -> Iterator[list[Side]]:
    context = multiprocessing.get_context("spawn")  # a forked torch can find its pool of threads broken
    together, sides = context.Barrier(2), []
    for number in range(2):
        mine, theirs = context.Pipe()
        printed = folder / f"printed-{number}.txt"
        process = context.Process(target=_side, args=(together, theirs, printed, path, command))
        process.start()
        theirs.close()
        sides.append(Side(process, mine, printed))
    try:
        yield sides
    finally:
        for side in sides:
            if side.process.is_alive() and side.process.pid is not None:
                os.kill(side.process.pid, signal.SIGKILL)
            side.process.join()
            side.line.close()


def _side(
    together: Barrier, line: Connection, printed: Path, path: str, command: Callable[[str, Callable[[Any], Any]], None]
) -> None:
    """What a process does: print into a file, begin with the other, and stop where the work begins until told."""
    descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1, encoding="utf-8")

    def at_work(function: Any) -> Any:
        def told(*arguments: Any, **options: Any) -> Any:
            line.send("at work")
            line.recv()
            return function(*arguments, **options)

        return told

    torch.set_num_threads(1)  # as the run by itself
    together.wait(PATIENCE)
    command(path, at_work)
