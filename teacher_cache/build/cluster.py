"""Phase one on many machines, by Ray; the only file that imports it. ``--workers 1`` needs none of this.

The plan of a cache is fixed (shard n covers samples n·size … (n+1)·size), so a shard comes out the same whoever makes
it and whenever. The driver hands free workers one shard at a time and holds no weights, so it may sit on a node
without a GPU. A worker is a Ray actor with one GPU, or with a tensor-parallel group of them, or with a CPU. Where a
worker or its node dies, Ray starts it again and gives it the same shard; workers that find no room yet wait for a node
and join when it comes. All nodes see the configuration's paths: on a shared disk, or in an object store.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections import deque
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
from teacher_cache.errors import CacheError, ConfigError, TeacherCrashed, UserError
from teacher_cache.models.open_chat import open_chat
from teacher_cache.progress import Style, stage
from teacher_cache.stopping import handlers_kept
from teacher_cache.store.locks import locked
from teacher_cache.store.manifest import Manifest
from teacher_cache.store.storage import Storage

try:
    import ray
except ImportError as missing:
    raise ConfigError("--workers: more than one needs Ray. Install it: pip install 'teacher-cache[ray]'") from missing

TRIES = 3
"""How often a shard, or the opening of a teacher, is begun before the build gives up."""


def build_on_ray(
    config: CacheConfig,
    *,
    workers: int,
    style: Style = "auto",
    options: dict[str, Any] | None = None,
    break_lock: bool = False,
    redo_skipped: bool = False,
) -> BuildSummary:
    """Make the cache ``config.output`` with ``workers`` actors; the same bytes as ``build.build_cache`` makes.

    Joins the Ray cluster that is there (``RAY_ADDRESS``, or the one started on this machine), else starts one here.
    The first worker prepares the cache (manifest, head, scales); the others open their teachers after that.

    Raises
    ------
    CacheError
        A shard ended its worker :data:`TRIES` times; names it. Committed shards stand.
    ConfigError, DataError, TeacherError, StorageError
        As the single process does; these are not tried again.
    """
    begin = time.monotonic()
    check_config(config)
    storage, tally = Storage(config.output, options), Tally()
    with (
        locked(storage, break_lock=break_lock),
        read_samples(config, storage, style, redo_skipped=redo_skipped) as read,
        _cluster(),
        fleet(_starter(config, options, read.folder)) as start,
    ):
        first = start()
        manifest = outcome(first.prepare.remote(), "while preparing the cache", config.output)
        numbers = missing_shards(storage, manifest)
        others = [start() for _ in range(min(workers, len(numbers)) - 1)]
        total = sum(shard_size(manifest, n) for n in numbers)
        with stage("caching", total, "samples", style) as progress:
            for number, made, working in spread([first, *others], numbers, config.output):
                tally.add(made)
                check_share(config, manifest.planned_samples, tally.skips)
                progress.advance(shard_size(manifest, number), workers=working)
    return finish_build(config, storage, manifest, tally, time.monotonic() - begin, len(numbers))


class ShardWorker:
    """What an actor runs: one teacher, opened once, and any shard when asked for. Ray makes it again, unopened, where
    its process has died."""

    def __init__(self, config: CacheConfig, options: dict[str, Any] | None, folder: str, samples: Path) -> None:
        """``folder``: where the driver stands, so that relative paths mean the same here. ``samples``: where it laid
        down the samples; a worker on another machine, which does not see that folder, reads the data itself."""
        self._config, self._options, self._folder, self._laid = config, options, folder, samples
        self._build: Build | None = None

    def open(self) -> None:
        """The teacher. Every worker compares it and the data with the manifest before its first shard."""
        with _or_die():
            self._open()

    def prepare(self) -> Manifest:
        with _or_die():
            return self._open().manifest

    def run(self, number: int) -> Tally:
        """Make shard ``number``."""
        with _or_die():
            return self._make(number)

    def _open(self) -> Build:
        if self._build is None:
            with contextlib.suppress(FileNotFoundError):
                os.chdir(self._folder)
            if self._laid.is_dir():
                samples = SampleFile(self._laid)
            else:
                samples = spool(self._config.data, None, by_turn=not open_chat(self._config.teacher).one_sequence)
            teacher = open_teacher(self._config, samples, "quiet")
            self._build = prepare(self._config, Storage(self._config.output, self._options), samples, teacher, "quiet")
        return self._build

    def _make(self, number: int) -> Tally:
        build = replace(self._open(), tally=Tally())
        build_shards(build, [number])
        return build.tally


@contextlib.contextmanager
def _or_die() -> Iterator[None]:
    """End the process after a fault that no setting mends: its device may be in any state. Ray starts another one."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) and not isinstance(error, TeacherCrashed):
            raise
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


@contextlib.contextmanager
def fleet(start: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
    """``start``, whose workers end with the block: also where a signal or an error ends the build."""
    workers: list[Any] = []

    def started() -> Any:
        workers.append(start())
        return workers[-1]

    try:
        yield started
    finally:
        for worker in workers:
            ray.kill(worker)


def spread(workers: Sequence[Any], numbers: Sequence[int], where: str) -> Iterator[tuple[int, Tally, int]]:
    """Each shard with what its worker gives, as they end, and how many workers are at work.

    A worker gets its first shard once it stands somewhere and its teacher is open. One for which no shard is left gives
    its place back: another that died may be waiting for it.
    """
    waiting, left = deque(numbers), len(numbers)
    begun: dict[Any, tuple[Any, int | None]] = {worker.open.remote(): (worker, None) for worker in workers}
    while left:
        (ended, *_), _ = ray.wait(list(begun))
        worker, number = begun.pop(ended)
        doing = "while opening the teacher" if number is None else f"on shard {number:05d}"
        made = outcome(ended, doing, where)
        if waiting:
            following = waiting.popleft()
            begun[worker.run.remote(following)] = worker, following
        else:
            ray.kill(worker)
        if number is not None:
            left -= 1
            yield number, made, sum(n is not None for _, n in begun.values())


def outcome(reference: Any, doing: str, where: str) -> Any:
    """What a worker gives; its own error where that is one which the user can mend."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        if isinstance(cause := getattr(error, "cause", None), UserError):
            raise cause from None
        raise CacheError(
            f"{where}: a worker died {TRIES} times {doing} ({type(error).__name__}). Committed shards stand. The "
            "workers' logs say why (ray logs, or logs/ of the session in /tmp/ray); then run the same command again to "
            "go on"
        ) from error


def _starter(config: CacheConfig, options: dict[str, Any] | None, samples: Path) -> Callable[[], Any]:
    """How a worker is started: with the GPUs that the configuration asks for. One that dies is started again as often
    as it takes, and what it was at is begun :data:`TRIES` times."""
    gpus = config.speed.tensor_parallel if _uses_gpus(config) else 0
    actor = ray.remote(num_cpus=1, num_gpus=gpus, **RESTARTS)(ShardWorker)
    return lambda: actor.remote(config, options, str(Path.cwd()), samples.absolute())


RESTARTS = {"max_restarts": -1, "max_task_retries": TRIES - 1}


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
