"""What was written is what is read: by number, in any batch and order, from several processes."""

import dataclasses
import multiprocessing
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.errors import CacheError
from teacher_cache.store.manifest import read_manifest, write_manifest
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.storage import Storage
from teacher_cache.store.writer import ImagePlace, committed_shards, finish, write_shard
from teacher_cache.trust.verify import verify_cache
from tests.fixtures.store import signals, synthetic_cache
from tests.fixtures.waiting import PATIENCE


@pytest.fixture(scope="module", params=["plain", "zstd", "full", "gram", "several"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "c"
    kinds = {
        "plain": {"config": signals()},
        "zstd": {"config": signals(), "layout": {"compression": "zstd", "chunk_kilobytes": 1}},
        "full": {
            "config": signals("full", second_last=True, attention=True, sampled=5),
            "layout": {"chunk_kilobytes": 1},
        },
        "gram": {"config": signals("llava_kd", codec="int4")},
        "several": {"config": signals(attention=True), "several": True},
    }
    return synthetic_cache(folder, 23, **kinds[request.param])


def _same(record, wanted):
    assert dataclasses.replace(record, arrays={}) == dataclasses.replace(wanted, arrays={})
    assert set(record.arrays) == set(wanted.arrays)
    for name, array in wanted.arrays.items():
        np.testing.assert_array_equal(record.arrays[name], array, err_msg=name)
        assert record.arrays[name].dtype == array.dtype


def test_every_sample_is_read_as_it_was_written(made):
    with TeacherCache(made.storage) as cache:
        assert len(cache) == 22
        for i, wanted in enumerate(made.records):
            _same(cache[i], wanted)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_batch_in_any_order_equals_its_samples_one_after_another(made, data):
    indices = data.draw(st.lists(st.integers(0, 21), max_size=9))
    with TeacherCache(made.storage) as cache:
        batch = cache.read(indices)
        for name, array in batch.arrays.items():
            parts = [made.records[i].arrays[name] for i in indices]
            wanted = np.concatenate(parts) if parts else made.records[0].arrays[name][:0]
            np.testing.assert_array_equal(array, wanted, err_msg=name)
            assert array.shape[1:] == wanted.shape[1:]
        assert batch.sample_ids == [made.records[i].sample_id for i in indices]
        assert batch.counts["row"].tolist() == [made.records[i].rows for i in indices]
        assert batch.counts["token"].tolist() == [len(made.records[i].arrays["input_ids"]) for i in indices]


def test_several_images_in_any_turn_come_back_with_their_runs(tmp_path):
    """Lists of images, runs of one image in two pieces, attention on all of them: the index counts what is there."""
    made = synthetic_cache(tmp_path / "c", 23, config=signals(attention=True), several=True)
    with TeacherCache(made.storage) as cache:
        batch = cache.read(range(len(cache)))
        assert batch.image_ids == [list(r.image_ids) for r in made.records]
        assert max(map(len, batch.image_ids)) == 3
        runs = batch.split("runs", "run")
        assert any(len(r) > len(set(r[:, 1].tolist())) for r in runs)
        assert batch.image_positions.tolist() == [int(r[:, 0].sum()) for r in runs]
        cells = [rows * seen for rows, seen in zip(batch.counts["row"], batch.image_positions, strict=True)]
        assert batch.counts["cell"].tolist() == cells
        assert cache.images().tolist() == [len(ids) for ids in batch.image_ids]
        assert cache.manifest.image_tokens == 0
    assert verify_cache(made.storage, deep=True).ok


def test_images_are_read_by_their_place(made):
    with TeacherCache(made.storage) as cache:
        if not made.manifest.image_arrays:
            with pytest.raises(CacheError, match=r"no visual states in this cache.*signals\.visual"):
                cache.read_images(np.zeros((1, 2), np.int64))
            return
        batch = cache.read([i for i, r in enumerate(made.records) if r.image_ids])
        images = cache.read_images(batch.image_places)
        for spec in made.manifest.image_arrays:
            found = images.split(spec.name, spec.axis)
            for (image_id,), lines in zip(batch.image_ids, found, strict=True):
                np.testing.assert_array_equal(lines, made.images[image_id][spec.name])
        with pytest.raises(IndexError, match="a sample without visual signals"):
            cache.read_images(np.array([[-1, -1]]))


def test_only_the_arrays_asked_for_are_read(made):
    with TeacherCache(made.storage) as cache:
        assert set(cache.read([1], names=["topk_ids", "stats"]).arrays) == {"topk_ids", "stats"}
        with pytest.raises(CacheError, match=r"no array 'hiden' in this cache; it has input_ids.*Build one"):
            cache.read([1], names=["hiden"])


def test_counts_ids_and_find_agree_with_the_samples(made):
    with TeacherCache(made.storage) as cache:
        assert cache.counts("row").tolist() == [r.rows for r in made.records]
        assert cache.counts("token").tolist() == [len(r.arrays["input_ids"]) for r in made.records]
        assert cache.images().tolist() == [len(r.image_ids) for r in made.records]
        assert list(cache.sample_ids()) == [r.sample_id for r in made.records]
        assert cache.find("sample-22") == 21
        assert cache.shard_starts.tolist() == [0, 4, 7, 11, 15, 19, 22]
        assert [cache.shard_of(i) for i in (0, 3, 4, 21)] == [0, 0, 1, 5]
        with pytest.raises(KeyError, match=r"sample-6.*skipped\.jsonl"):
            cache.find("sample-6")
        with pytest.raises(IndexError, match="sample 22, but there are 22"):
            cache.read([22])


def test_batches_own_their_memory(made):
    with TeacherCache(made.storage) as cache:
        batch = cache.read([3])
        before = cache.read([3]).arrays["topk_ids"].copy()
        batch.arrays["topk_ids"][:] = 0
        np.testing.assert_array_equal(cache.read([3]).arrays["topk_ids"], before)


def _read_in_a_worker(cache, queue):
    queue.put({k: v.tolist() for k, v in cache.read([9, 1]).arrays.items() if k != "stats"})


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_the_same(method, tmp_path):
    made = synthetic_cache(tmp_path / "c")
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    with TeacherCache(made.storage) as cache:
        worker = context.Process(target=_read_in_a_worker, args=(cache, queue))
        worker.start()
        found = queue.get(timeout=PATIENCE)
        worker.join()
        assert found == {k: v.tolist() for k, v in cache.read([9, 1]).arrays.items() if k != "stats"}
        again = pickle.loads(pickle.dumps(cache))
        assert again.read([2]).sample_ids == cache.read([2]).sample_ids


def test_no_file_stays_open_however_many_shards_are_read(tmp_path):
    made = synthetic_cache(tmp_path / "c", 12, shard_samples=1, skipped=())
    with TeacherCache(made.storage) as cache:
        cache.read([0])
        before = len(list(Path("/proc/self/fd").iterdir()))
        cache.read(list(range(12)))
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_an_unfinished_cache_is_refused(tmp_path):
    made = synthetic_cache(tmp_path / "c", complete=False)
    with pytest.raises(CacheError, match=r"not complete \(3 shards planned\)\. Finish it: run teacher-cache build"):
        TeacherCache.open(tmp_path / "c")
    finish(made.storage, made.manifest)
    assert len(TeacherCache.open(tmp_path / "c")) == 10


def test_finish_names_a_missing_shard(tmp_path):
    made = synthetic_cache(tmp_path / "c", complete=False)
    shutil.rmtree(tmp_path / "c/shards/00001")
    assert committed_shards(made.storage, made.manifest) == {0, 2}
    with pytest.raises(CacheError, match=r"1 of 3 shards are missing \(first: 00001\)\. Run teacher-cache build"):
        finish(made.storage, made.manifest)


def test_finish_refuses_a_shard_of_another_cache(tmp_path):
    made = synthetic_cache(tmp_path / "c", complete=False)
    other = synthetic_cache(tmp_path / "o", config=signals(top_k=9), complete=False)
    shutil.rmtree(tmp_path / "c/shards/00002")
    shutil.copytree(tmp_path / "o/shards/00002", tmp_path / "c/shards/00002")
    with pytest.raises(CacheError, match=rf"shards/00002: made with other settings.*{made.manifest.fingerprint[:12]}"):
        finish(made.storage, made.manifest)
    assert other.manifest.fingerprint != made.manifest.fingerprint


def test_finish_counts_every_sample(tmp_path):
    made = synthetic_cache(tmp_path / "c")
    assert made.manifest.counts["samples"] + made.manifest.counts["skipped"] == made.manifest.planned_samples == 11
    assert made.manifest.counts["rows"] == sum(r.rows for r in made.records)
    wrong = dataclasses.replace(made.manifest, planned_samples=12)
    write_manifest(made.storage, wrong)
    with pytest.raises(CacheError, match="made with other settings"):
        finish(made.storage, wrong)


def test_two_writes_of_the_same_records_give_the_same_bytes(tmp_path):
    for name in "ab":
        synthetic_cache(tmp_path / name, config=signals("full"))
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*") if p.is_file())
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_a_missing_shard_or_file_is_named(tmp_path):
    synthetic_cache(tmp_path / "c")
    (tmp_path / "c/shards/00001/hidden/c/0/0").unlink()
    cache = TeacherCache(Storage(tmp_path / "c"))
    with pytest.raises(
        CacheError, match=r"shards/00001/hidden/c/0/0: expected .* bytes, found no file; run teacher-cache"
    ):
        cache.read([5])
    shutil.rmtree(tmp_path / "c/shards/00000")
    with pytest.raises(CacheError, match=r"shards/00000: the folder or its index\.parquet is missing; run"):
        cache.read([0])


def test_a_shorter_file_is_named(tmp_path):
    synthetic_cache(tmp_path / "c")
    path = tmp_path / "c/shards/00000/topk_ids/c/0/0"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CacheError, match=r"topk_ids/c/0/0: expected [\d,]+ bytes, found [\d,]+ bytes"):
        TeacherCache(Storage(tmp_path / "c")).read([0])


@pytest.mark.parametrize("layout", [{}, {"compression": "zstd"}])
def test_a_changed_byte_is_never_returned_as_data(tmp_path, layout):
    samples = 5 if layout else 11
    made = synthetic_cache(tmp_path / "c", samples, skipped=(), config=signals("full"), layout=layout)
    random = np.random.default_rng(0)
    files = sorted(p for p in (tmp_path / "c").rglob("*") if p.is_file())
    for path in files:
        whole = path.read_bytes()
        if not whole:
            continue
        place = int(random.integers(len(whole)))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << random.integers(8))]) + whole[place + 1 :])
        try:
            cache = TeacherCache(Storage(tmp_path / "c"))
            for i, wanted in enumerate(made.records):
                _same(cache[i], wanted)
            batch = cache.read(range(len(cache)))
            places = batch.image_places[batch.image_places[:, 0] >= 0]
            images, shown = cache.read_images(places), [i for ids in batch.image_ids for i in ids]
            for spec in made.manifest.image_arrays:
                for image_id, lines in zip(shown, images.split(spec.name, spec.axis), strict=True):
                    np.testing.assert_array_equal(lines, made.images[image_id][spec.name])
            assert list(cache.sample_ids()) == [r.sample_id for r in made.records]
            assert cache.head is not None
            assert cache.scales
            unread = ("c/zarr.json", "s/zarr.json", "00/zarr.json", "01/zarr.json", "02/zarr.json", "skipped.jsonl")
            assert str(path).endswith(unread) or "images/00002" in str(path), f"{path}: change at {place} not noticed"
        except CacheError as error:
            assert str(path.relative_to(tmp_path / "c")) in str(error)  # noqa: PT017
        finally:
            path.write_bytes(whole)


def test_unchecked_reading_is_a_choice(tmp_path):
    made = synthetic_cache(tmp_path / "c")
    path = tmp_path / "c/shards/00000/topk_ids/c/0/0"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CacheError, match=r"were changed after they were written \(CRC-32C"):
        TeacherCache(made.storage).read([0])
    assert (
        TeacherCache(made.storage, checked=False).read([0]).arrays["topk_ids"][0, 0]
        != made.records[0].arrays["topk_ids"][0, 0]
    )


def test_a_shard_that_lost_a_sample_is_refused(tmp_path: Path) -> None:
    """Cached + skipped = input is counted again when a build ends, shard by shard."""
    made = synthetic_cache(tmp_path / "c")
    manifest = dataclasses.replace(read_manifest(made.storage), complete=False, files={}, counts={})
    write_shard(made.storage, manifest, 0, made.records[:3], [ImagePlace()] * 3, [])
    with pytest.raises(CacheError, match=r"shards/00000: 3 cached \+ 0 skipped samples, expected 4"):
        finish(made.storage, manifest)


def test_the_list_of_samples_is_read_once_however_much_is_asked_of_it(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, read = [], Storage.read
    monkeypatch.setattr(Storage, "read", lambda self, name, *a, **k: asked.append(name) or read(self, name, *a, **k))
    with TeacherCache.open(cache_folder) as cache:
        assert "samples.parquet" not in asked  # opening costs the same for any number of samples
        names = list(cache.sample_ids())
        for axis in ("token", "row", "position", "run"):
            assert len(cache.counts(axis)) == len(cache.images()) == len(names)
        assert cache.find(names[-1]) == len(cache) - 1
    assert asked.count("samples.parquet") == 1
