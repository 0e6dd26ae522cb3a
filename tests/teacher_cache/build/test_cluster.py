"""A cache made by a real local Ray cluster, workers killed with SIGKILL in it, equals the single process's."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.build.build import COST, build_cache
from teacher_cache.config import CacheConfig
from teacher_cache.errors import CacheError, ConfigError

ray = pytest.importorskip("ray")
from teacher_cache.build.cluster import TRIES, Fleet, ShardWorker, build_on_ray  # noqa: E402


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
        def run(self, job: int) -> Any:
            mark, teacher = folder / str(job), self._teacher
            if job in deadly and not mark.exists():
                mark.touch()
                score = teacher.score

                def scored(*arguments: Any) -> Iterator[Any]:
                    for _ in score(*arguments):
                        os.kill(os.getpid(), signal.SIGKILL)
                        yield

                teacher.score = scored
            return super().run(job)

    return Mortal


def test_four_workers_two_of_them_killed_make_the_single_process_cache(
    cluster: None,
    config: CacheConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone, many = tmp_path / "alone", tmp_path / "many"
    single = build_cache(replace(config, output=str(alone)), style="quiet")
    marks = tmp_path / "killed"
    marks.mkdir()
    monkeypatch.setattr("teacher_cache.build.cluster.ShardWorker", mortal(marks, (1, 4)))
    summary = build_on_ray(replace(config, output=str(many)), workers=4, style="lines")
    assert {mark.name for mark in marks.iterdir()} == {"1", "4"}
    assert capsys.readouterr().err.count("is replaced") == 2
    assert content(many) == content(alone)
    assert (summary.rows, summary.samples, summary.shards_made) == (single.rows, single.samples, single.shards_made)


def fragile() -> type:
    """Defined here and not above, so that Ray sends the class itself: its workers cannot import the tests."""

    class Fragile:
        """Job 1 kills its process, job 2 fails, job 3 finds fault with the settings; others give their number back."""

        def open(self) -> None:
            pass

        def run(self, job: int) -> int:
            if job == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if job == 2:
                raise RuntimeError("the device is gone")
            if job == 3:
                raise ConfigError("data.path: not here")
            return job

    return Fragile


@pytest.mark.parametrize(
    ("job", "error", "text"),
    [
        (1, CacheError, rf"{TRIES} workers failed on shard 00001, the last one with ActorDiedError"),
        (2, CacheError, rf"{TRIES} workers failed on shard 00002, the last one with RuntimeError: the device is gone"),
        (3, ConfigError, r"data\.path: not here"),
    ],
)
def test_a_shard_that_always_fails_ends_the_build_with_its_number_and_the_last_fault(
    cluster: None, job: int, error: type[Exception], text: str
) -> None:
    actor = ray.remote(num_cpus=0.1, max_restarts=0)(fragile())
    with Fleet(actor.remote, 2, "cache", "quiet") as fleet, pytest.raises(error, match=text):
        list(fleet.run([0, job, 4, 5]))
    assert fleet.lost == (TRIES - 1 if error is CacheError else 0)


def test_workers_that_find_no_room_do_not_hold_up_the_others(cluster: None) -> None:
    roomy, endless = ray.remote(num_cpus=0.1)(fragile()), ray.remote(num_cpus=1000)(fragile())
    starts = iter([roomy.remote, endless.remote])
    with Fleet(lambda: next(starts)(), 2, "cache", "quiet") as fleet:
        assert sorted(number for number, _ in fleet.run([4, 5, 6])) == [4, 5, 6]
        assert fleet.ready == 1
