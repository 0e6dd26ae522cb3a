"""Verify finds what is wrong, names it, and repair brings back the very same cache."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from teacher_cache.build.build import build_cache, prepare
from teacher_cache.build.shards import build_shards
from teacher_cache.cli import app
from teacher_cache.config import as_plain
from teacher_cache.data.logit_rule import LogitRule
from teacher_cache.data.spool import spool
from teacher_cache.errors import CacheError
from teacher_cache.store.manifest import read_manifest, write_manifest
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.records import TeacherRecord
from teacher_cache.store.storage import Storage
from teacher_cache.store.writer import ImagePlace, finish, write_shard
from teacher_cache.teachers.torch_teacher import TorchTeacher
from teacher_cache.trust.rescore import rescore_cache
from teacher_cache.trust.verify import DAMAGED_MANIFEST, Problem, repair_cache, verify_cache
from tests.fixtures.store import signals, synthetic_cache

CONFIGS = {
    "plain": signals(),
    "full": signals("full", second_last=True, attention=True, sampled=5),
    "int4": signals("llava_kd", codec="int4"),
    "bfloat16": signals(codec="bfloat16"),
    "pca": signals(pca=16),
    "compact": signals("compact"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sound_cache_is_sound(tmp_path, name):
    made = synthetic_cache(tmp_path / "c", config=CONFIGS[name])
    for deep in (False, True):
        report = verify_cache(made.storage, deep=deep)
        assert report.lines()[0].startswith("ok: 3 shards, 10 samples + 1 skipped; checked")
        assert report.ok


def test_a_remote_cache_is_verified_too():
    made = synthetic_cache("memory://verify/c", config=signals("full"))
    assert verify_cache(made.storage, deep=True).ok
    name = "shards/00001/hidden/c/0/0"
    data = bytearray(made.storage.read(name))
    data[0] ^= 1
    made.storage.write(name, [bytes(data)])
    assert [(p.shard, p.file) for p in verify_cache(made.storage, deep=True).problems] == [(1, name)]


def test_every_single_byte_flip_is_found_by_deep_verify(tmp_path):
    """150 of them here; ``make chaos`` does 1,000."""
    made = synthetic_cache(tmp_path / "c", config=signals("full"))
    random = np.random.default_rng(5)
    files = [p for p in sorted((tmp_path / "c").rglob("*")) if p.is_file() and p.stat().st_size]
    for path in random.choice(np.array(files, object), 60):
        whole = path.read_bytes()
        place = int(random.integers(len(whole)))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << int(random.integers(8)))]) + whole[place + 1 :])
        report = verify_cache(made.storage, deep=True)
        named = str(path.relative_to(tmp_path / "c"))
        assert [p for p in report.problems if p.file == named], (named, place, report.lines())
        path.write_bytes(whole)
    assert verify_cache(made.storage, deep=True).ok


def test_a_flip_in_a_sample_names_the_sample(tmp_path):
    made = synthetic_cache(tmp_path / "c", config=signals(), samples=300, shard_samples=300)
    name = "shards/00000/hidden/c/0/0"
    path = tmp_path / "c" / name
    data = bytearray(path.read_bytes())
    data[-100_000 if len(data) > 200_000 else 5] ^= 8
    path.write_bytes(bytes(data))
    (problem,) = verify_cache(made.storage, deep=True).problems
    assert (problem.shard, problem.file) == (0, name)
    assert problem.sample in {r.sample_id for r in made.records}
    assert "checksum of the 1 MiB block" in str(problem)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    "name",
    ["shards/00001/topk_ids/c/0/0", "shards/00002/index.parquet", "images/00000/visual/c/0/0", "head.safetensors"],
)
def test_a_missing_file_is_named(tmp_path, name, deep):
    made = synthetic_cache(tmp_path / "c", config=signals("full"))
    (tmp_path / "c" / name).unlink()
    assert name in [p.file for p in verify_cache(made.storage, deep=deep).problems]


def test_a_missing_shard_and_a_missing_cache_are_named(tmp_path):
    made = synthetic_cache(tmp_path / "c")
    shutil.rmtree(tmp_path / "c/shards/00001")
    assert verify_cache(made.storage).shards_at_fault == [1]
    report = verify_cache(Storage(tmp_path / "nowhere"))
    assert not report.ok
    assert "no teacher cache here" in report.lines()[0]


def test_an_unfinished_cache_is_not_ok(tmp_path):
    made = synthetic_cache(tmp_path / "c", complete=False)
    report = verify_cache(made.storage)
    assert "not complete" in report.lines()[0]


def _with(record: TeacherRecord, **arrays) -> TeacherRecord:
    return dataclasses.replace(record, arrays={**record.arrays, **arrays})


def _rewritten(made, change):
    """The cache with shard 0's records changed and written anew, checksums and all: a fault of the maker."""
    records = [r for r in made.records if r.sample_id in {f"sample-{i}" for i in range(4)}]
    changed = change(records)
    write_shard(made.storage, made.manifest, 0, changed, [ImagePlace()] * len(changed), [])
    finish(made.storage, made.manifest)
    return [p for p in verify_cache(made.storage, deep=True).problems if p.shard == 0]


def _edit(array, place, value):
    out = array.copy()
    out[place] = value
    return out


def _one_late(records):
    """Rows taken one position late, LLAVADI's error: row r says what row r + 1 should."""
    names = ("topk_ids", "topk_logprobs", "stats")
    return [_with(r, **{n: np.roll(r.arrays[n], -1, 0) for n in names}) for r in records]


FAULTS = {
    "a number that is not finite": lambda rs: [
        _with(r, stats=_edit(r.arrays["stats"], (0, 1), np.nan)) if r is rs[1] else r for r in rs
    ],
    "an id outside the vocabulary": lambda rs: [
        _with(r, topk_ids=_edit(r.arrays["topk_ids"], (0, 0), 60_000)) if r is rs[1] else r for r in rs
    ],
    "not in descending order": lambda rs: [
        _with(r, topk_logprobs=r.arrays["topk_logprobs"][:, ::-1].copy()) if r is rs[1] else r for r in rs
    ],
    "of more than mass 1": lambda rs: [
        _with(r, topk_logprobs=r.arrays["topk_logprobs"] * 0) if r is rs[1] else r for r in rs
    ],
    "impossible entropy": lambda rs: [
        _with(r, stats=_edit(r.arrays["stats"], (0, -1), 99.0)) if r is rs[1] else r for r in rs
    ],
    "the states give other log-probabilities": _one_late,
    "a sample_id comes twice": lambda rs: [rs[1] if r is rs[2] else r for r in rs],
    "the first token or an image is supervised": lambda rs: [
        _with(r, loss_mask=np.roll(r.arrays["loss_mask"], 1 + int(np.argmax(r.arrays["loss_mask"][::-1])))) for r in rs
    ],
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_broken_invariant_is_found_and_its_sample_named(tmp_path, what):
    made = synthetic_cache(tmp_path / "c", config=signals())
    problems = _rewritten(made, FAULTS[what])
    assert any(what in p.what for p in problems), problems
    if what not in ("the states give other log-probabilities", "a sample_id comes twice") and "first token" not in what:
        assert problems[0].sample == "sample-1"


@pytest.mark.parametrize("rule", [LogitRule(0.25, 0.0), LogitRule(1.0, 2.0)], ids=["scale", "cap"])
def test_states_give_their_log_probabilities_by_the_logit_rule_of_the_manifest(tmp_path, rule):
    made = synthetic_cache(tmp_path / "c", config=signals(), rule=rule)
    assert TeacherCache(made.storage).manifest.logit_rule == rule
    report = verify_cache(made.storage, deep=True)
    assert report.ok, report.lines()


def test_visual_signals_of_an_image_behind_other_ids_are_found(tmp_path):
    made = synthetic_cache(tmp_path / "c", 12, shard_samples=12, skipped=(), config=signals("full"))
    assert made.records[0].image_ids == made.records[6].image_ids
    places = [made.images[r.image_ids[0]]["place"] if r.image_ids else ImagePlace() for r in made.records]
    changed = [
        _with(r, input_ids=_edit(r.arrays["input_ids"], 0, 7)) if r is made.records[6] else r for r in made.records
    ]
    write_shard(made.storage, made.manifest, 0, changed, places, [])
    finish(made.storage, made.manifest)
    (problem,) = verify_cache(made.storage, deep=True).problems
    assert problem.sample == "sample-6"
    assert "not always behind the same ids" in problem.what


def test_greedy_answers_whose_rows_are_one_late_are_found(tmp_path):
    """The row rule without hidden states: the most likely id of row r must be answer token r."""
    made = synthetic_cache(tmp_path / "c", config=signals("compact"))

    def greedy(records, late):
        out = []
        for r in records:
            ids = r.arrays["topk_ids"].copy()
            ids[:, 0] = r.arrays["input_ids"][r.arrays["loss_mask"]]
            out.append(dataclasses.replace(_with(r, topk_ids=np.roll(ids, -late, 0)), source="teacher"))
        return out

    assert _rewritten(made, lambda rs: greedy(rs, 0)) == []
    (problem,) = _rewritten(made, lambda rs: greedy(rs, 1))
    assert "rows are misplaced" in problem.what


def test_a_problem_reads_as_a_sentence():
    assert str(Problem("broken", "shards/00001/x", 1, "coco-7")) == "shards/00001/x: sample coco-7: broken"


@pytest.fixture
def own_copy(cache_folder, tmp_path):
    shutil.copytree(cache_folder, tmp_path / "cache")
    return tmp_path / "cache"


def _contents(folder):
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    manifest = json.loads(files.pop("manifest.json"))
    for name in ("cost.json", DAMAGED_MANIFEST):
        files.pop(name, None)
    return files, {k: v for k, v in manifest.items() if k not in ("created_at", "digest")}


def test_the_tiny_worlds_cache_is_sound(cache_folder):
    report = verify_cache(Storage(cache_folder), deep=True)
    assert report.ok, report.lines()


@pytest.mark.parametrize(
    ("name", "removed"),
    [
        ("shards/00001/hidden/c/0/0", [1]),
        ("shards/00000/index.parquet", [0]),
        ("images/00002/visual/c/0/0", [2]),
        ("answers/part-00001.parquet", [1]),
        ("shards.parquet", []),
        ("samples.parquet", []),
        ("head.safetensors", []),
        ("manifest.json", []),
    ],
)
def test_repair_redoes_just_what_was_damaged(own_copy, cache_folder, cache_config, teacher, name, removed):
    path = own_copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    storage = Storage(own_copy)
    report = verify_cache(storage, deep=True)
    assert not report.ok
    assert repair_cache(storage, report) == removed
    with pytest.raises(CacheError):
        TeacherCache(storage)
    config = dataclasses.replace(cache_config, output=str(own_copy))
    assert build_cache(config, teacher=teacher, style="quiet").shards_made == len(removed)
    assert verify_cache(storage, deep=True).ok
    assert _contents(own_copy) == _contents(cache_folder)


def test_answers_that_are_not_those_of_the_rows_are_found(own_copy):
    storage = Storage(own_copy)
    path = own_copy / "answers/part-00001.parquet"
    table = pq.read_table(path)
    ids = table["token_ids"].to_pylist()
    ids[3] = [ids[3][0] ^ 1, *ids[3][1:]]
    field = table.schema.field("token_ids")
    changed = table.set_column(table.column_names.index("token_ids"), field, pa.array(ids, field.type))
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)
    finish(storage, dataclasses.replace(read_manifest(storage), complete=False))
    problems = verify_cache(storage, deep=True).problems
    assert problems
    assert problems[0].sample == table["sample_id"][3].as_py()
    assert "supervised tokens are not those of its answers" in problems[0].what


def test_rescoring_gives_what_is_stored(cache_config, cache_folder, teacher):
    config = dataclasses.replace(cache_config, output=str(cache_folder))
    report = rescore_cache(config, 6, teacher=teacher)
    assert report.ok
    assert len(report.differences) == 6
    assert max(d.logprob for d in report.differences) < 0.01
    assert "6 samples scored again" in str(report)


def test_rescoring_names_the_sample_that_another_teacher_sees_otherwise(cache_config, cache_folder, teacher, own_copy):
    storage = Storage(own_copy)
    with TeacherCache(storage) as cache:
        records = [cache[i] for i in range(*cache.shard_starts[:2].tolist())]
        manifest = cache.manifest
    changed = [_with(r, topk_ids=np.roll(r.arrays["topk_ids"], 1, 0)) if r.rows > 1 else r for r in records]
    write_manifest(storage, dataclasses.replace(manifest, complete=False))
    batch = TeacherCache(Storage(cache_folder)).read(range(len(records)))
    places = [ImagePlace(*map(int, p)) for p in batch.image_places]
    write_shard(storage, manifest, 0, changed, places, [])
    finish(storage, dataclasses.replace(manifest, complete=False, files={}, counts={}))
    report = rescore_cache(dataclasses.replace(cache_config, output=str(own_copy)), 40, teacher=teacher)
    assert not report.ok
    assert report.differences[0].sample_id in {r.sample_id for r in records}
    assert f"sample {report.differences[0].sample_id}: " in str(report)


def test_the_command_fails_where_the_teacher_disagrees(monkeypatch, cache_config, cache_folder, tmp_path):
    config = tmp_path / "cache.yaml"
    config.write_text(yaml.safe_dump(as_plain(dataclasses.replace(cache_config, output=str(cache_folder)))))
    arguments = ["verify", str(cache_folder), "--rescore", "2", "--config", str(config)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    head = TorchTeacher.head
    monkeypatch.setattr(TorchTeacher, "head", lambda self: head(self).flip(0))
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 1
    assert "nats apart (allowed 0.1)" in found.output


def test_rescoring_a_cache_without_top_k_says_what_to_do(tmp_path, cache_config, teacher):
    config = dataclasses.replace(
        cache_config,
        output=str(tmp_path / "c"),
        data=dataclasses.replace(cache_config.data, max_samples=3),
        signals=dataclasses.replace(cache_config.signals, top_k=0, visual="none"),
    )
    build_cache(config, teacher=teacher, style="quiet")
    with pytest.raises(CacheError, match=r"no top-k to compare with.*fidelity"):
        rescore_cache(config, 2, teacher=teacher)


def test_a_cache_of_another_version_is_not_repaired(own_copy):
    manifest = own_copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 2', '"format_version": 1'))
    before = manifest.read_bytes()
    storage = Storage(own_copy)
    with pytest.raises(CacheError, match=r"cache format 1, this package reads format 2\. Build"):
        repair_cache(storage, verify_cache(storage, deep=True))
    assert manifest.read_bytes() == before


def test_a_damaged_manifest_is_kept(own_copy):
    (own_copy / "manifest.json").write_text("{")
    storage = Storage(own_copy)
    repair_cache(storage, verify_cache(storage, deep=True))
    assert (own_copy / DAMAGED_MANIFEST).read_text() == "{"


def test_a_shard_is_removed_at_once_or_not_at_all(own_copy, cache_config, cache_folder, teacher, monkeypatch):
    """Killed while it deletes: the shard is not there any more, and the next build makes it again."""

    def die(path, **_):
        (Path(path) / "index.parquet").unlink()
        raise KeyboardInterrupt

    storage = Storage(own_copy)
    write_manifest(storage, dataclasses.replace(read_manifest(storage), complete=False, files={}, counts={}))
    with monkeypatch.context() as patch:
        patch.setattr("teacher_cache.store.storage.shutil.rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            storage.remove("shards/00001", "index.parquet")
    assert not (own_copy / "shards/00001").exists()
    (own_copy / "shards/00000/index.parquet").unlink()  # as older versions could leave it
    config = dataclasses.replace(cache_config, output=str(own_copy))
    assert build_cache(config, teacher=teacher, style="quiet").shards_made == 2
    assert _contents(own_copy) == _contents(cache_folder)


def test_an_image_that_could_be_read_too_late_is_found(cache_config, teacher, world, tmp_path, monkeypatch):
    """Two samples of one image in two shards; the image comes only after the first shard was made."""
    shutil.copytree(world / "images", tmp_path / "images")
    lines = json.loads((world / "train.json").read_text())
    name = next(line["image"] for line in lines if "image" in line)
    chosen = [line for line in lines if line.get("image") == name][:2]
    (tmp_path / "data.json").write_text(json.dumps(chosen))
    config = dataclasses.replace(
        cache_config,
        output=str(tmp_path / "cache"),
        data=dataclasses.replace(
            cache_config.data, path=str(tmp_path / "data.json"), image_folder=str(tmp_path / "images")
        ),
        layout=dataclasses.replace(cache_config.layout, shard_samples=1),
    )
    storage = Storage(config.output)
    hidden = (tmp_path / "images" / name).rename(tmp_path / "hidden.png")
    samples = spool(config.data, None)
    build_shards(prepare(config, storage, samples, teacher, "quiet"), [0])
    hidden.rename(tmp_path / "images" / name)
    with pytest.raises(CacheError, match=r"could not be read when images/00000 was made.*--redo-skipped"):
        build_cache(config, teacher=teacher, style="quiet")
    with monkeypatch.context() as patch:
        patch.setattr("teacher_cache.store.ledger.absent_images", lambda places, present: ())
        build_cache(config, teacher=teacher, style="quiet")
    with TeacherCache.open(config.output) as cache, pytest.raises(CacheError, match="line 0 holds no image"):
        cache.read_images(cache.read([0]).image_places)
    report = verify_cache(storage)
    assert report.shards_at_fault == [0]
    repair_cache(storage, report)
    assert build_cache(config, teacher=teacher, style="quiet").samples == 2
    assert verify_cache(storage, deep=True).ok
