"""Phase one on many machines, by Ray; the only file that imports it. ``--workers 1`` needs none of this.

The plan of a cache is fixed (shard n covers samples n·size … (n+1)·size), so a shard comes out the same whoever makes
it and whenever. The driver hands free workers one shard at a time and holds no weights, so it may sit on a node
without a GPU. A worker is a Ray actor with one GPU, or with a tensor-parallel group of them, or with a CPU. Where a
worker or its node dies, its shard goes to another and a new worker is asked for; workers that find no room yet wait
for a node and join when it comes. All nodes see the configuration's paths: on a shared disk, or in an object store.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from teacher_cache.build.build import (
    BuildSummary,
    check_config,
    finish_build,
    missing_shards,
    open_teacher,
    prepare,
    read_samples,
)
from teacher_cache.build.context import Build, Tally, shard_size
from teacher_cache.build.shards import build_shards
from teacher_cache.build.skips import check_share
from teacher_cache.config import CacheConfig
from teacher_cache.data.spool import SampleFile, spool
from teacher_cache.errors import CacheError, ConfigError, TeacherError
from teacher_cache.progress import Style, note, stage
from teacher_cache.stopping import handlers_kept
from teacher_cache.store.locks import locked
from teacher_cache.store.storage import Storage
from teacher_cache.teachers.teacher import Teacher

try:
    import ray
except ImportError as missing:
    raise ConfigError("--workers: more than one needs Ray. Install it: pip install 'teacher-cache[ray]'") from missing

TRIES = 3
"""How often a shard is begun before the build gives up; also how often in a row a worker may die while it starts."""

Result = Any
PREPARE = -1
"""The job before all shards: manifest, head and channel scales."""


def build_on_ray(
    config: CacheConfig,
    *,
    workers: int,
    style: Style = "auto",
    options: dict[str, Any] | None = None,
    break_lock: bool = False,
    redo_skipped: bool = False,
) -> BuildSummary:
    """Make the cache ``config.output`` with ``workers`` actors; the same bytes as :func:`score.build_cache` makes.

    Joins the Ray cluster that is there (``RAY_ADDRESS``, or the one started on this machine), else starts one here.

    Raises ``CacheError``: a shard failed :data:`TRIES` times; names it and the last fault. Committed shards stand.
    ``ConfigError``, ``DataError``, ``TeacherError``, ``StorageError``: as the single process does; these are not tried
    again.
    """
    begin = time.monotonic()
    check_config(config)
    storage, tally = Storage(config.output, options), Tally()
    with (
        locked(storage, break_lock=break_lock),
        read_samples(config, storage, style, redo_skipped=redo_skipped) as read,
        _cluster(),
    ):
        planned = -(-len(read) // config.layout.shard_samples)
        start = _starter(config, options, read.folder)
        with Fleet(start, min(workers, max(planned, 1)), config.output, style) as fleet:
            (manifest,) = [result for _, result in fleet.run([PREPARE])]
            numbers = missing_shards(storage, manifest)
            samples = sum(shard_size(manifest, n) for n in numbers)
            with stage("caching", samples, "samples", style) as progress:
                for number, made in fleet.run(numbers):
                    tally.add(made)
                    check_share(config, manifest.planned_samples, tally.skips)
                    progress.advance(shard_size(manifest, number), workers=fleet.ready, lost=fleet.lost)
    return finish_build(config, storage, manifest, tally, time.monotonic() - begin, len(numbers))


class ShardWorker:
    """What an actor runs: one teacher, opened once, and any shard when asked for."""

    def __init__(self, config: CacheConfig, options: dict[str, Any] | None, folder: str, samples: Path) -> None:
        """``folder``: where the driver stands, so that relative paths mean the same here. ``samples``: where it laid
        down the samples; a worker on another machine, which does not see that folder, reads the data itself."""
        self._config, self._options, self._folder, self._laid = config, options, folder, samples
        self._teacher: Teacher | None = None
        self._build: Build | None = None

    def open(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.chdir(self._folder)
        self._samples = SampleFile(self._laid) if self._laid.is_dir() else spool(self._config.data, None)
        self._storage = Storage(self._config.output, self._options)
        self._teacher = open_teacher(self._config, self._samples, "quiet")

    def run(self, job: int) -> Result:
        """``PREPARE`` gives the manifest; a shard's number makes that shard and gives the time it took
        (:class:`Tally`). Every worker compares its own teacher and data with the manifest before its first shard."""
        assert self._teacher is not None
        if self._build is None:
            self._build = prepare(self._config, self._storage, self._samples, self._teacher, "quiet")
        if job == PREPARE:
            return self._build.manifest
        build = replace(self._build, tally=Tally())
        build_shards(build, [job])
        return build.tally


class Fleet:
    """A number of workers that is kept up while jobs are left. ``start`` makes an actor with ``open`` and ``run``."""

    def __init__(self, start: Callable[[], Any], workers: int, where: str, style: Style = "auto") -> None:
        self._start, self._where, self._style = start, where, style
        self._idle: list[Any] = []
        self._begun: dict[Any, tuple[Any, int | None]] = {}
        """What runs: its reference → (worker, job), with no job while the worker opens its teacher."""
        self._failed: Counter[int | None] = Counter()
        self.lost = 0
        for _ in range(workers):
            self._add()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in [*self._idle, *(worker for worker, _ in self._begun.values())]:
            ray.kill(worker)

    @property
    def ready(self) -> int:
        """Workers whose teacher is open."""
        return len(self._idle) + sum(job is not None for _, job in self._begun.values())

    def run(self, jobs: Sequence[int]) -> Iterator[tuple[int, Result]]:
        """Each job and its result, as they end; the next free worker takes the next job."""
        waiting, left = deque(jobs), len(jobs)
        while left:
            while waiting and self._idle:
                worker, job = self._idle.pop(), waiting.popleft()
                self._begun[worker.run.remote(job)] = worker, job
            (ended, *_), _ = ray.wait(list(self._begun))
            worker, done = self._begun.pop(ended)
            try:
                result = ray.get(ended)
            except ray.exceptions.RayError as error:
                self._replace(worker, done, getattr(error, "cause", None) or error)
                waiting.extendleft([] if done is None else [done])
                continue
            self._idle.append(worker)
            if done is None:
                self._failed[None] = 0
                continue
            left -= 1
            yield done, result

    def _add(self) -> None:
        worker = self._start()
        self._begun[worker.open.remote()] = worker, None

    def _replace(self, worker: Any, job: int | None, error: Exception) -> None:
        """Give up a worker that died or failed (its device may be in any state) and ask for a new one.

        Errors in the configuration or in the data are final: they would come back.
        """
        ray.kill(worker)
        if isinstance(error, ValueError) or (job is None and isinstance(error, TeacherError)):
            raise error
        self._failed[job] += 1
        if self._failed[job] >= TRIES:
            raise CacheError(
                f"{self._where}: {TRIES} workers failed {_doing(job)}, the last one with {_summary(error)}. Committed "
                "shards stand. Look into the workers' logs (ray logs), then run the same command again to go on"
            ) from error
        self.lost += 1
        note(f"a worker failed {_doing(job)} and is replaced: {_summary(error)}", self._style)
        self._add()


def _doing(job: int | None) -> str:
    if job is None:
        return "while opening the teacher"
    return "while preparing the cache" if job == PREPARE else f"on shard {job:05d}"


def _summary(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _starter(config: CacheConfig, options: dict[str, Any] | None, samples: Path) -> Callable[[], Any]:
    """How a worker is started: with the GPUs that the configuration asks for, never restarted behind our back."""
    gpus = config.speed.tensor_parallel if _uses_gpus(config) else 0
    actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(ShardWorker)
    return lambda: actor.remote(config, options, str(Path.cwd()), samples.absolute())


def _uses_gpus(config: CacheConfig) -> bool:
    if config.speed.device == "auto":
        return float(ray.cluster_resources().get("GPU", 0)) > 0
    return config.speed.device == "cuda"


@contextlib.contextmanager
def _cluster() -> Iterator[None]:
    """The Ray cluster that is there, or one of this machine that ends with the block."""
    if ray.is_initialized():
        yield
        return
    with handlers_kept():
        ray.init(log_to_driver=False, logging_level="WARNING")
    try:
        yield
    finally:
        ray.shutdown()
