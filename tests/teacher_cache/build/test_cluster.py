"""A cache made by a real local Ray cluster, workers killed with SIGKILL in it, equals the single process's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from teacher_cache.build.build import COST, build_cache
from teacher_cache.config import CacheConfig
from teacher_cache.errors import CacheError, ConfigError
from tests.fixtures.waiting import until

ray = pytest.importorskip("ray")
from teacher_cache.build.cluster import RESTARTS, TRIES, ShardWorker, build_on_ray, fleet, spread  # noqa: E402


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=4, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def config(cache_config: CacheConfig) -> CacheConfig:
    signals = replace(cache_config.signals, codec="int8", sampled=8)
    return replace(cache_config, signals=signals, layout=replace(cache_config.layout, shard_samples=4))


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the one that tells time; the manifest without what differs between any two runs."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    files.pop(COST)
    manifest = json.loads(files.pop("manifest.json"))
    changing = {name: manifest.pop(name) for name in ("created_at", "digest")}
    assert all(changing.values())
    return {**files, "manifest.json": json.dumps(manifest).encode()}


def mortal(folder: Path, deadly: tuple[int, ...]) -> type:
    """A worker that is killed in the middle of each of the ``deadly`` shards, the first time that one is made.

    A class made here, not imported, so that Ray sends the class itself: its workers cannot import the tests.
    """

    class Mortal(ShardWorker):
        def _make(self, job: int) -> Any:
            mark, teacher = folder / str(job), self._open().teacher
            if job in deadly and not mark.exists():
                mark.touch()
                score = teacher.score

                def scored(*arguments: Any) -> Iterator[Any]:
                    for _ in score(*arguments):
                        os.kill(os.getpid(), signal.SIGKILL)
                        yield

                teacher.score = scored
            return super()._make(job)

    return Mortal


def test_four_workers_two_of_them_killed_make_the_single_process_cache(
    cluster: None,
    config: CacheConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone, many = tmp_path / "alone", tmp_path / "many"
    single = build_cache(replace(config, output=str(alone)), style="quiet")
    marks = tmp_path / "killed"
    marks.mkdir()
    monkeypatch.setattr("teacher_cache.build.cluster.ShardWorker", mortal(marks, (1, 4)))
    summary = build_on_ray(replace(config, output=str(many)), workers=4, style="lines")
    assert {mark.name for mark in marks.iterdir()} == {"1", "4"}
    assert content(many) == content(alone)
    assert (summary.rows, summary.samples, summary.shards_made) == (single.rows, single.samples, single.shards_made)


def fragile() -> type:
    """Defined here and not above, so that Ray sends the class itself: its workers cannot import the tests."""

    class Fragile(ShardWorker):
        """Shard 1 kills its process, 2 fails, 3 finds fault with the settings; each leaves a line in ``folder``."""

        def __init__(self, folder: Path) -> None:
            self._marks = folder

        def _open(self) -> Any:
            return None

        def _make(self, number: int) -> Any:
            with (self._marks / str(number)).open("a") as file:
                print(os.getpid(), file=file)
            if number == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if number == 2:
                raise RuntimeError("the device is gone")
            if number == 3:
                raise ConfigError("data.path: not here")
            return number

    return Fragile


@pytest.mark.parametrize(
    ("number", "error", "text", "tries"),
    [
        (1, CacheError, rf"^cache: a worker died {TRIES} times on shard 00001 \(Actor.*\)\. Committed shards", TRIES),
        (2, CacheError, rf"^cache: a worker died {TRIES} times on shard 00002 \(Actor.*\)\. Committed shards", TRIES),
        (3, ConfigError, r"^data\.path: not here$", 1),
    ],
)
def test_a_shard_that_always_fails_ends_the_build_with_its_number(
    cluster: None, tmp_path: Path, number: int, error: type[Exception], text: str, tries: int
) -> None:
    """Each time in a process of its own, since a fault may leave a device in any state."""
    actor = ray.remote(num_cpus=0.1, **RESTARTS)(fragile())
    with fleet(lambda: actor.remote(tmp_path)) as start, pytest.raises(error, match=text):
        list(spread([start(), start()], [0, number, 4, 5], "cache"))
    processes = (tmp_path / str(number)).read_text().split()
    assert len(processes) == len(set(processes)) == tries


def test_workers_that_find_no_room_do_not_hold_up_the_others(cluster: None, tmp_path: Path) -> None:
    roomy, endless = ray.remote(num_cpus=0.1)(fragile()), ray.remote(num_cpus=1000)(fragile())
    with fleet(lambda: roomy.remote(tmp_path)) as near, fleet(lambda: endless.remote(tmp_path)) as far:
        made = list(spread([near(), far()], [4, 5, 6], "cache"))
    assert made == [(4, 4, 1), (5, 5, 1), (6, 6, 0)]


STOPPED = """
import os, signal, sys
from pathlib import Path
from teacher_cache.build import cluster
from teacher_cache.cli import app
def stuck(folder):
    class Stuck(cluster.ShardWorker):
        def run(self, job):
            if job == 2:
                Path(folder, f"stuck-{os.getpid()}").touch()
                signal.pause()
            return super().run(job)
    return Stuck
cluster.ShardWorker = stuck(sys.argv[2])
app(["build", sys.argv[1], "--workers", "2", "--json"])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_build_on_ray_that_is_stopped_ends_its_workers_keeps_its_shards_and_goes_on(
    number: int, config: CacheConfig, tmp_path: Path
) -> None:
    config = replace(config, output=str(tmp_path / "cache"))
    path = tmp_path / "cache.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STOPPED, str(path), str(tmp_path)]
    build = subprocess.Popen(command, text=True, env=environment, stderr=subprocess.PIPE)
    until(lambda: build.poll() is not None or any(tmp_path.glob("stuck-*")))
    (worker,) = (int(mark.name.partition("-")[2]) for mark in tmp_path.glob("stuck-*"))
    build.send_signal(number)
    _, said = build.communicate()
    assert build.returncode == 128 + number, said
    assert f"stopped by {signal.Signals(number).name}; committed shards stand" in said
    assert "Traceback" not in said
    until(lambda: not psutil.pid_exists(worker))
    assert not (tmp_path / "cache/.lock").exists()
    assert build_cache(config, style="quiet").skipped == 0
