"""A cache in an object store: the same bytes, read through a bounded folder, whatever the network does."""

import itertools
import multiprocessing
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from teacher_cache.build.build import build_cache
from teacher_cache.errors import CacheError, StorageError
from teacher_cache.store.checksums import file_sum
from teacher_cache.store.prefetch import LocalCopy
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.storage import Storage
from teacher_cache.store.writer import committed_shards, finish
from tests.fixtures.s3_server import S3Server
from tests.fixtures.store import signals, synthetic_cache
from tests.fixtures.waiting import PATIENCE


@pytest.fixture(scope="module")
def server():
    server = S3Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr("teacher_cache.files.FIRST_WAIT_SECONDS", 0.01)
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)


_names = (f"bucket-{i}" for i in itertools.count())


@pytest.fixture(params=["s3", "memory"])
def remote(request, server):
    """(url, options) of an empty place in each kind of store."""
    if request.param == "memory":
        return f"memory://{next(_names)}/cache", {}
    return f"{server.bucket(next(_names))}/cache", server.options


@pytest.fixture
def s3(server):
    return f"{server.bucket(next(_names))}/cache", server.options


def _open(made, **arguments):
    return TeacherCache(made.storage, **arguments)


def _check_all(cache, made):
    batch = cache.read(range(len(cache)))
    for name, array in batch.arrays.items():
        np.testing.assert_array_equal(array, np.concatenate([r.arrays[name] for r in made.records]))
    assert cache[1].questions == made.records[1].questions


def _tree(storage: Storage) -> dict[str, bytes]:
    if storage.local is not None:
        return {str(p.relative_to(storage.local)): p.read_bytes() for p in storage.local.rglob("*") if p.is_file()}
    root = storage.path("").rstrip("/") + "/"
    return {p.removeprefix(root): storage._fs.cat_file(p) for p in storage._fs.find(root)}


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_a_remote_cache_has_the_bytes_of_a_local_one_and_reads_the_same(remote, tmp_path):
    url, options = remote
    local = synthetic_cache(tmp_path / "c", config=signals("full"))
    made = synthetic_cache(url, config=signals("full"), options=options)
    assert _tree(made.storage) == _tree(local.storage)
    with TeacherCache.open(url, options=options) as cache:
        _check_all(cache, made)
        batch = cache.read([i for i, r in enumerate(made.records) if r.image_ids], names=["stats"])
        images = cache.read_images(batch.image_places)
        np.testing.assert_array_equal(images.split("visual", "patch")[0], made.images[batch.image_ids[0][0]]["visual"])


def test_only_the_files_of_the_arrays_asked_for_are_fetched(server, s3, tmp_path):
    made = synthetic_cache(s3[0], options=s3[1])
    with _open(made, prefetch_folder=tmp_path) as cache:
        server.requests.clear()
        cache.read([0, 1], names=["topk_ids"])
        fetched = {path for method, path in server.requests if method == "GET"}
    assert any("topk_ids/c/0/0" in path for path in fetched)
    assert not any("hidden" in path or "00001/" in path for path in fetched)


def test_a_second_read_asks_the_store_for_nothing(server, s3, tmp_path):
    made = synthetic_cache(s3[0], options=s3[1])
    with _open(made, prefetch_folder=tmp_path) as cache:
        cache.read(range(10))
        server.requests.clear()
        cache.read(range(10))
        assert server.requests == []
    with _open(made, prefetch_folder=tmp_path) as cache:  # a later process finds the copies
        server.requests.clear()
        cache.read(range(10))
        assert not any("/c/0" in path for _, path in server.requests)


def test_the_prefetch_folder_never_outgrows_its_limit(remote, tmp_path):
    made = synthetic_cache(remote[0], 40, options=remote[1], config=signals(top_k=32))
    limit = 20_000
    assert made.manifest.counts["bytes"] > 3 * limit
    with _open(made, prefetch_folder=tmp_path, prefetch_gigabytes=limit / 2**30) as cache:
        for index in np.random.default_rng(0).permutation(len(cache)).tolist():
            record = made.records[index]
            np.testing.assert_array_equal(cache.read([index]).arrays["hidden"], record.arrays["hidden"])
            assert _size(tmp_path) <= limit
        deleted = cache._source.deletions
    assert deleted > 0


def test_a_copy_under_way_is_never_deleted_to_make_room(tmp_path):
    """Four files of 3 MB begun at once under a limit of 8 MiB."""
    storage, data = Storage("memory://under-way"), os.urandom(3_000_000)
    for number in range(4):
        storage.write(f"{number}/file", [data])
    copies = LocalCopy(storage, tmp_path, 8 / 2**10, "generation-of-the-cache")
    sums = file_sum([data])
    for number in range(4):
        copies.begin(f"{number}/file", sums)
    for number in range(4):
        assert copies.path(f"{number}/file", sums).stat().st_size == len(data)
    copies.close()


def test_prefetched_shards_are_read_without_waiting(server, s3, tmp_path):
    made = synthetic_cache(s3[0], options=s3[1])
    with _open(made, prefetch_folder=tmp_path) as cache:
        cache.prefetch([0, 1])
        cache._source._threads.shutdown(wait=True)
        server.requests.clear()
        cache.read(range(7))
        assert not any("/c/0" in path for _, path in server.requests)
    assert any(tmp_path.rglob("topk_ids/c/0/0"))


def test_a_temporary_prefetch_folder_goes_with_the_reader(remote):
    made = synthetic_cache(remote[0], options=remote[1])
    with _open(made) as cache:
        cache.read([0])
        folder = cache._source._folder
        assert _size(folder) > 0
    assert not folder.exists()


def test_copies_of_an_earlier_build_are_not_taken_for_this_one(remote, tmp_path):
    url, options = remote
    made = synthetic_cache(url, options=options, seed=0)
    with _open(made, prefetch_folder=tmp_path) as cache:
        _check_all(cache, made)
    made.storage._fs.rm(made.storage.path(""), recursive=True)
    again = synthetic_cache(url, options=options, seed=1)
    with _open(again, prefetch_folder=tmp_path) as cache:
        _check_all(cache, again)


def _read(cache, queue):
    queue.put(cache.read([9, 1]).arrays["topk_ids"].tolist())


@pytest.mark.parametrize("shared", [True, False])
def test_forked_workers_read_a_remote_cache(s3, tmp_path, shared):
    made = synthetic_cache(s3[0], options=s3[1])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with _open(made, prefetch_folder=tmp_path if shared else None, prefetch_gigabytes=9_000 / 2**30) as cache:
        wanted = cache.read([9, 1]).arrays["topk_ids"].tolist()
        workers = [context.Process(target=_read, args=(cache, queue)) for _ in range(2)]
        for worker in workers:
            worker.start()
        assert [queue.get(timeout=PATIENCE) for _ in workers] == [wanted, wanted]
        for worker in workers:
            worker.join()
        assert pickle.loads(pickle.dumps(cache)).read([9, 1]).arrays["topk_ids"].tolist() == wanted


@pytest.mark.parametrize("kind", ["500", "503", "reset", "cut"])
def test_a_store_that_fails_every_third_time_gives_the_same_cache(server, s3, tmp_path, kind):
    local = synthetic_cache(tmp_path / "c")
    count = itertools.count(1)

    def faults(environ):
        may_fail = kind != "cut" or environ["REQUEST_METHOD"] == "GET"
        return kind if may_fail and next(count) % 3 == 0 else None

    with server.failing(faults):
        made = synthetic_cache(s3[0], options=s3[1])
        with _open(made) as cache:
            _check_all(cache, made)
    assert _tree(made.storage) == _tree(local.storage)


def test_an_answer_that_never_comes_is_asked_for_again(server, s3):
    made = synthetic_cache(s3[0], options=s3[1])
    hung = []

    def once(environ):
        if "topk_ids/c" in environ["PATH_INFO"] and not hung:
            hung.append(1)
            return "hang"
        return None

    with server.failing(once), TeacherCache(Storage(s3[0], server.impatient)) as cache:
        np.testing.assert_array_equal(cache.read([0]).arrays["topk_ids"], made.records[0].arrays["topk_ids"])
    assert hung


def test_a_broken_transfer_is_repeated_and_a_broken_object_named(server, s3):
    made = synthetic_cache(s3[0], options=s3[1])
    flips = iter(["flip", "flip"])
    faults = lambda environ: next(flips, None) if "hidden/c" in environ["PATH_INFO"] else None  # noqa: E731
    with server.failing(faults), _open(made) as cache:
        np.testing.assert_array_equal(cache.read([0]).arrays["hidden"], made.records[0].arrays["hidden"])
    name = "shards/00001/hidden/c/0/0"
    data = bytearray(made.storage.read(name))
    data[7] ^= 4
    made.storage.write(name, [bytes(data)])
    with _open(made) as cache:
        cache.read([0])
        with pytest.raises(
            CacheError, match=rf"{name}: copied 3 times .* was changed after it was written; run teacher"
        ):
            cache.read([4])


def test_an_outage_while_writing_leaves_committed_shards_and_a_run_that_can_go_on(server, s3, tmp_path):
    url, options = s3
    whole = synthetic_cache(tmp_path / "c", complete=True)

    def outage(environ):
        return "503" if "shards/00001/topk_ids" in environ["PATH_INFO"] else None

    with (
        server.failing(outage),
        pytest.raises(StorageError, match=r"could not write it in 5 tries.*same command again"),
    ):
        synthetic_cache(url, options=options)
    storage = Storage(url, options)
    assert committed_shards(storage, whole.manifest) == {0}
    assert storage.names("shards") == ["00000", "00001"]
    made = synthetic_cache(url, options=options, complete=False)
    finish(made.storage, made.manifest)
    assert _tree(made.storage) == _tree(whole.storage)


@pytest.mark.parametrize("kind", ["500", "reset"])
def test_an_outage_stops_a_build_and_costs_no_sample(server, s3, cache_config, cache_folder, teacher, kind):
    """From the second shard on the server fails: for some requests, which is survived, then for good."""
    url, options = s3
    config, passing = replace(cache_config, output=url), itertools.count()

    def fault(environ, lasting=True):
        if "shards/00001" not in environ["PATH_INFO"] or (not lasting and next(passing) % 3):
            return None
        return kind

    with (
        server.failing(fault),
        pytest.raises(StorageError, match=r"could not \w+( \w+)? it in 5 tries .*Committed shards stand"),
    ):
        build_cache(config, teacher=teacher, style="quiet", options=options)
    assert not Storage(url, options).exists("skipped.jsonl")
    with server.failing(lambda environ: fault(environ, lasting=False)):
        assert build_cache(config, teacher=teacher, style="quiet", options=options).skipped == 0
    local = _tree(Storage(cache_folder))
    assert {n: data for n, data in _tree(Storage(url, options)).items() if n not in ("cost.json", "manifest.json")} == {
        n: data for n, data in local.items() if n not in ("cost.json", "manifest.json")
    }
    assert next(passing) > 3


def test_a_store_that_denies_access_says_so_at_once(server, s3):
    with server.failing(lambda environ: "403" if environ["REQUEST_METHOD"] == "PUT" else None):
        server.requests.clear()
        with pytest.raises(StorageError, match=r"no permission to write it .*Check the credentials"):
            Storage(s3[0], s3[1]).write("x", [b"data"])
        assert len([1 for method, _ in server.requests if method == "PUT"]) == 1


def test_a_missing_shard_of_a_remote_cache_is_named(remote):
    made = synthetic_cache(remote[0], options=remote[1])
    made.storage.remove("shards/00001", "index.parquet")
    with (
        _open(made) as cache,
        pytest.raises(CacheError, match=r"shards/00001: the folder or its index\.parquet is missing"),
    ):
        cache.read([4])
