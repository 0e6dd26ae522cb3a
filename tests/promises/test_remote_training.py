"""Training from a cache in an object store: shards are copied before they are needed, into a bounded folder."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from student_train.config import FitConfig, LossSpec
from student_train.feed.loader import make_loader
from student_train.training.settings import run_settings
from student_train.training.trainer import Run
from teacher_cache.build.build import build_cache
from teacher_cache.config import CacheConfig, DataConfig, LayoutConfig, SignalsConfig
from teacher_cache.store.reader import TeacherCache
from teacher_cache.teachers.torch_teacher import TorchTeacher
from tests.fixtures.s3_server import S3Server
from tests.fixtures.training import tiny_fit
from tests.fixtures.waiting import until

SHARDS = 24


@pytest.fixture(scope="module")
def local(cache_config: CacheConfig, teacher: TorchTeacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 samples in 24 shards: three blocks."""
    folder = tmp_path_factory.mktemp("small-shards") / "cache"
    config = replace(
        cache_config,
        output=str(folder),
        data=replace(cache_config.data, max_samples=2 * SHARDS),
        signals=SignalsConfig(top_k=4, hidden="none", visual="none"),
        layout=LayoutConfig(shard_samples=2),
    )
    assert isinstance(config.data, DataConfig)
    build_cache(config, teacher=teacher, style="quiet")
    return folder


@pytest.fixture
def remote(local: Path) -> Iterator[str]:
    memory = fsspec.filesystem("memory")
    memory.put(str(local), "/training/cache", recursive=True)
    yield "memory://training/cache"
    memory.rm("/training", recursive=True)


@pytest.fixture
def config(tmp_path: Path, remote: str, world: Path) -> Callable[..., FitConfig]:
    def make(cache: str = remote, **source: Any) -> FitConfig:
        plain = tiny_fit(tmp_path, Path("cache"), world, max_steps=12, global_batch=4, micro_batch=2)
        sources = (replace(plain.sources[0], cache=cache, **source),)
        return replace(plain, sources=sources, losses=(LossSpec("cross_entropy"), LossSpec("forward_kl")))

    return make


def copied(folder: Path) -> set[int]:
    """The shards of which a copy of every array is complete."""
    files = [p for p in folder.rglob("shards/*/topk_ids/c/0/0") if ".tmp-" not in p.name]
    return {int(p.parents[3].name) for p in files}


def loader(run: Run, workers: int = 0) -> Any:
    return iter(make_loader(run.dataset, run.plan, range(run.plan.steps), 0, 1, workers, False))


def test_the_shards_of_coming_steps_are_copied_while_the_first_is_trained_on(
    config: Callable[..., FitConfig], tmp_path: Path
) -> None:
    run = Run.prepare(config(prefetch_folder=str(tmp_path / "copies")))
    first = run.plan.micro_batches(0, 0, 1)[0]
    coming = {shard for _, shard in first.coming}
    assert 8 < len(coming) <= 12  # the block in use, and of the next one what the last step in sight needs
    before = copied(tmp_path / "copies")  # where it was looked for an image
    run.dataset[first]  # reads at most two shards
    until(lambda: copied(tmp_path / "copies") == coming | before)


def test_no_shard_is_waited_for_once_training_runs(
    config: Callable[..., FitConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.prepare(config(prefetch_folder=str(tmp_path / "copies")))
    begun: set[int] = set()
    prefetch, read = TeacherCache.prefetch, TeacherCache.read

    def noted(cache: TeacherCache, shards: Any, names: Any = None) -> None:
        begun.update(shards)
        prefetch(cache, shards, names)

    def checked(cache: TeacherCache, indices: Any, names: Any = None) -> Any:
        assert {cache.shard_of(int(i)) for i in indices} <= begun
        return read(cache, indices, names)

    monkeypatch.setattr(TeacherCache, "prefetch", noted)
    monkeypatch.setattr(TeacherCache, "read", checked)
    assert sum(len(micro.indices) for micro, _ in loader(run)) == 2 * SHARDS
    assert begun == set(range(SHARDS))


def test_no_more_is_begun_than_the_folder_holds(
    config: Callable[..., FitConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard_bytes = TeacherCache.open(config().sources[0].cache).manifest.counts["bytes"] / SHARDS
    room = 9.5 * shard_bytes / 2**30
    run = Run.prepare(config(prefetch_folder=str(tmp_path / "copies"), prefetch_gigabytes=room))
    begun: list[list[int]] = []
    monkeypatch.setattr(TeacherCache, "prefetch", lambda cache, shards, names=None: begun.append(shards))
    first, again = (run.plan.micro_batches(0, 0, 1)[n] for n in (0, 1))
    assert len(first.coming) > 9
    run.dataset[first]
    run.dataset[again]
    assert begun == [[shard for _, shard in first.coming[:9]], []]


def test_a_remote_cache_gives_the_batches_of_a_local_one(
    config: Callable[..., FitConfig], local: Path, tmp_path: Path
) -> None:
    here = Run.prepare(config(cache=str(local)))
    assert here.plan.micro_batches(0, 0, 1)[0].coming == ()
    there = Run.prepare(replace(config(), train=replace(config().train, shuffle="full")))
    for (micro, one), (other_micro, other) in zip(loader(here), loader(there), strict=True):
        assert micro == replace(other_micro, coming=())
        assert one.input_ids.equal(other.input_ids)
        assert all(one.arrays[name].equal(other.arrays[name]) for name in one.arrays)
    for run in (here, there):
        source = run.dataset.sources[0]
        assert run_settings(config(), [source]) == run_settings(config(prefetch_folder="elsewhere"), [source])


def test_a_temporary_folder_goes_with_its_source(config: Callable[..., FitConfig]) -> None:
    run = Run.prepare(config())
    folder = Path(run.dataset.sources[0].cache._source._folder)  # type: ignore[attr-defined]
    next(loader(run))
    assert copied(folder)
    del run
    gc.collect()
    assert not folder.exists()


@pytest.mark.slow
def test_loader_processes_copy_ahead_into_one_folder(
    config: Callable[..., FitConfig], local: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = S3Server()
    server.by_environment(monkeypatch)
    url = f"{server.bucket('training')}/cache"
    fsspec.filesystem("s3", **server.options).put(str(local), url, recursive=True)
    run = Run.prepare(config(cache=url, prefetch_folder=str(tmp_path / "copies")))
    server.requests.clear()
    batches = list(itertools.islice(loader(run, workers=1), 2))
    assert {micro.step for micro, _ in batches} == {0}
    coming = {shard for _, shard in batches[0][0].coming}
    until(lambda: coming <= copied(tmp_path / "copies"))
    server.close()
