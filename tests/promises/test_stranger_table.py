"""Forged caches, every digest right: each ends in a CacheError that names a file, or in true data."""

import json
import re
import resource
import shutil
import struct
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numcodecs.zstd import Zstd

from teacher_cache.errors import CacheError
from teacher_cache.pages.info import cache_info
from teacher_cache.pages.view import write_view
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.storage import Storage
from teacher_cache.trust.fidelity import cache_fidelity
from teacher_cache.trust.verify import verify_cache
from tests.fixtures.forged import edit_file, edit_index, edit_ledger, edit_zarr, put_sum, seal, untouched
from tests.fixtures.store import signals, synthetic_cache

FILES = re.compile(r"[\w-]+\.(json|jsonl|parquet|safetensors)|/c/0|shards/\d{5}|images/\d{5}")
MOST_MEGABYTES = 400
"""More than this above what the base cache takes is no bounded memory; the bombs of the table unpack to gigabytes."""


def manifest(change):
    return lambda root: seal(root, change)


def teacher(**fields):
    return manifest(lambda plain: plain["teacher"].update(fields))


def shape(**fields):
    return manifest(lambda plain: plain["teacher"]["shape"].update(fields))


def section(name, **fields):
    return manifest(lambda plain: plain[name].update(fields))


def index(folder="shards/00000", line=0, **fields):
    return lambda root: edit_index(root, folder, rows=lambda lines: lines[line].update(fields))


def facts(change, folder="shards/00000"):
    return lambda root: edit_index(root, folder, metadata=change)


def zarr(array, change, folder="shards/00000"):
    return lambda root: edit_zarr(root, array, change, folder)


def sharding(**fields):
    return zarr("hidden", lambda plain: plain["codecs"][0]["configuration"].update(fields))


def filled(array, byte, folder="shards/00000"):
    """The array's bytes all ``byte``, its chunk index as it was."""

    def make(root):
        name = str(next(p for p in (root / folder / array / "c").rglob("*") if p.is_file()).relative_to(root / folder))
        plain = json.loads((root / folder / array / "zarr.json").read_text())
        lines, outer = plain["shape"], plain["chunk_grid"]["configuration"]["chunk_shape"]
        size = int(np.prod(outer)) * np.dtype(plain["data_type"]).itemsize
        assert lines
        edit_file(root, folder, name, lambda data: bytes([byte]) * size + data[size:])

    return make


def poked(array, place, *values):
    """The first numbers of an array of uint32 from ``place`` on, replaced."""
    data = np.array(values, "<u4").tobytes()
    return lambda root: edit_file(
        root,
        "shards/00000",
        f"{array}/c/0/0",
        lambda whole: whole[: 4 * place] + data + whole[4 * place + len(data) :],
    )


def tensors(name, header, body=b""):
    def make(root):
        text = json.dumps(header).encode() if isinstance(header, dict) else header
        (root / name).write_bytes(struct.pack("<Q", len(text)) + text + body)
        seal(root)

    return make


def file_of(name, data):
    def make(root):
        (root / name).write_bytes(data)
        seal(root)

    return make


def unpacks_to_gigabytes(root):
    """attack/zbomb: 65 kB of zstd that say that they are 2 GiB of lines, and the index agrees."""
    path, rows, width = root / "shards/00000/hidden", 1 << 24, 128
    seal(
        root,
        lambda plain: (
            plain["teacher"]["shape"].update(hidden_size=width),
            plain["layout"].update(chunk_kilobytes=1 << 18),
        ),
    )
    packed = bytes(Zstd(level=1).encode(np.zeros(1 << 28, np.uint8)))
    chunks = rows * width >> 28
    places = np.array([[i * len(packed), len(packed)] for i in range(chunks)], "<u8").tobytes()
    data = packed * chunks + places + struct.pack("<I", google_crc32c.value(places))
    plain = json.loads((path / "zarr.json").read_text())
    lines = (1 << 28) // width
    plain["shape"] = [rows, width]
    plain["chunk_grid"]["configuration"]["chunk_shape"] = [rows, width]
    inner = plain["codecs"][0]["configuration"]
    inner["chunk_shape"] = [lines, width]
    inner["codecs"].append({"name": "zstd", "configuration": {"level": 3, "checksum": False}})
    (path / "c/0/0").write_bytes(data)
    (path / "zarr.json").write_text(json.dumps(plain))
    put_sum(root, "shards/00000", "hidden/c/0/0", data)
    put_sum(root, "shards/00000", "hidden/zarr.json", (path / "zarr.json").read_bytes())

    def one_sample(rows_of):
        for line in rows_of:
            line.update(row_start=0, rows=0)
        rows_of[0]["rows"] = rows
        for line in rows_of[1:]:
            line["row_start"] = rows

    fingerprint = json.loads((root / "manifest.json").read_text())["fingerprint"]
    for folder in [f"{kind}/{n:05d}" for kind in ("shards", "images") for n in range(3)]:
        edit_index(root, folder, metadata=lambda plain: plain.update(fingerprint=fingerprint))
    edit_index(root, "shards/00000", rows=one_sample)


def many_lines(root):
    """2 MB of Parquet that unpack to gigabytes: one id, three hundred million times."""
    count = 100_000_000
    ids = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int8)), ["x"])
    pq.write_table(pa.table({"sample_id": ids, "rows": pa.array(np.zeros(count, np.int32))}), root / "samples.parquet")
    seal(root)


DEEP = b'{"a":' * 200_000 + b"1" + b"}" * 200_000

FORGED = {
    "manifest: a key is missing": manifest(lambda plain: plain.pop("counts")),
    "manifest: an unknown key": manifest(lambda plain: plain.update(colour="red")),
    "manifest: a section is a list": manifest(lambda plain: plain.update(teacher=[])),
    "manifest: no shape": manifest(lambda plain: plain["teacher"].pop("shape")),
    "manifest: a width of 10^9": shape(hidden_size=10**9),
    "manifest: a negative width": shape(hidden_size=-1),
    "manifest: the vocabulary is text": shape(vocabulary="many"),
    "manifest: the vocabulary is smaller": shape(vocabulary=50),
    "manifest: another width than the arrays": shape(hidden_size=41),
    "manifest: another key in the shape": shape(depth=3),
    "manifest: an unknown codec": section("signals", codec="pickle"),
    "manifest: another codec": section("signals", codec="float16"),
    "manifest: top_k of 10^12": section("signals", top_k=10**12),
    "manifest: a temperature of 0": section("signals", temperatures=[0.0, 1.0]),
    "manifest: more components than channels": section("signals", pca=10**6),
    "manifest: shards of no sample": section("layout", shard_samples=0),
    "manifest: shards of another size": section("layout", shard_samples=3),
    "manifest: chunks of 10^12 kB": section("layout", chunk_kilobytes=10**12),
    "manifest: 10^9 shards": manifest(lambda plain: plain.update(planned_shards=10**9)),
    "manifest: 10^15 samples": manifest(lambda plain: plain.update(planned_samples=10**15, planned_shards=10**15 // 4)),
    "manifest: complete is text": manifest(lambda plain: plain.update(complete="yes")),
    "manifest: counts are text": section("counts", rows="<b>"),
    "manifest: counts other samples": section("counts", samples=11),
    "manifest: an absolute name": section("files", **{"/etc/hostname": "0" * 64}),
    "manifest: a digest that is a path": section("files", **{"shards.parquet": "../../../../etc"}),
    "manifest: a data file without a name": section("data", files=[{"sha256": "0"}]),
    "manifest: the model is a number": teacher(model=5),
    "manifest: max_length of 10^12": teacher(max_length=10**12),
    "manifest: version 1": manifest(lambda plain: plain.update(format_version=1)),
    "manifest: no logit rule": manifest(lambda plain: plain["teacher"].pop("logit_rule")),
    "manifest: a scale of 0": teacher(logit_rule={"scale": 0.0, "cap": 0.0}),
    "manifest: a negative cap": teacher(logit_rule={"scale": 1.0, "cap": -30.0}),
    "manifest: another logit rule": teacher(logit_rule={"scale": 0.25, "cap": 0.0}),
    "manifest: the chat template is a number": teacher(chat_template=7),
    "manifest: the processor is text": teacher(processor="<b>"),
    "manifest: added tokens in a list": teacher(
        vocabulary={"base": "b", "merges": "", "ids": 9, "added": [], "begin": None, "end": None}
    ),
    "manifest: an end token without its id": teacher(
        vocabulary={"base": "b", "merges": "", "ids": 9, "added": {}, "begin": None, "end": ["</s>"]}
    ),
    "manifest: no end token": manifest(lambda plain: plain["teacher"].pop("end_token")),
    "manifest: nested 200,000 deep": lambda root: (root / "manifest.json").write_bytes(DEEP),
    "manifest: empty": lambda root: (root / "manifest.json").write_bytes(b""),
    "manifest: not UTF-8": lambda root: (root / "manifest.json").write_bytes(b"\xff\xfe{}"),
    "manifest: a number of 10,000 digits": lambda root: (root / "manifest.json").write_bytes(
        b'{"a":' + b"9" * 10_000 + b"}"
    ),
    "ledger: a negative number of samples": lambda root: edit_ledger(root, lambda lines: lines[0].update(samples=-4)),
    "ledger: more samples than the index": lambda root: edit_ledger(
        root, lambda lines: (lines[0].update(samples=3), lines[1].update(samples=4))
    ),
    "ledger: a shard less": lambda root: edit_ledger(root, lambda lines: lines.pop()),
    "ledger: empty": file_of("shards.parquet", b""),
    "ledger: no Parquet": file_of("shards.parquet", b"PAR1" + b"\0" * 64 + b"PAR1"),
    "samples: three hundred million lines in 2 MB": many_lines,
    "skipped: no JSON": file_of("skipped.jsonl", b"{\n"),
    "skipped: nested deep": file_of("skipped.jsonl", DEEP + b"\n"),
    "skipped: without a reason": file_of("skipped.jsonl", b'{"sample_id": "x"}\n'),
    "index: a negative start": index(line=1, row_start=-5),
    "index: rows overlap": index(line=1, row_start=0),
    "index: rows beyond the end": index(line=1, row_start=10**7),
    "index: 2^40 rows": index(rows=2**40),
    "index: negative rows": index(rows=-1),
    "index: a negative image row": index(image_row=-2),
    "index: an image row beyond the end": index(image_row=10**6),
    "index: image shard 10^6": index(image_shard=10**6),
    "index: an image of a later shard": index(image_shard=2),
    "index: negative runs": index(runs=-1),
    "index: 2^40 runs": index(runs=2**40),
    "index: runs overlap": index(line=1, run_start=0),
    "index: runs beyond the end": index(line=1, run_start=10**7),
    "index: runs without an image": index(image_ids=[], image_checksums=[]),
    "index: an image without a run": index(line=1, image_ids=["x"], image_checksums=["y"]),
    "index: more images than runs": index(image_ids=["x", "y"], image_checksums=["x", "y"]),
    "index: an image without a checksum": index(image_checksums=[]),
    "index: images are null": index(image_ids=None),
    "index: an image is null": index(image_ids=[None]),
    "index: negative image positions": index(image_positions=-4),
    "index: 2^60 image positions": index(image_positions=2**60),
    "index: image positions that are not the runs'": index(image_positions=5),
    "images: negative patches": index("images/00000", patches=-1),
    "images: 2^40 patches": index("images/00000", patches=2**40),
    "images: patches overlap": index("images/00000", line=1, patch_start=0),
    "images: patches of an image that is not there": index("images/00000", present=False),
    "array: runs of no position": filled("runs", 0),
    "array: runs of 2^32 images": filled("runs", 0xFF),
    "array: a run longer than the index says": poked("runs", 0, 5),
    "array: a run of 2^32 positions": poked("runs", 0, 2**32 - 1),
    "array: a run of an image beyond the list": poked("runs", 1, 1),
    "index: sample_id is null": index(sample_id=None),
    "index: answers are null": index(answers=None),
    "index: fewer answers than questions": index(answers=["only one"]),
    "index: an answer is null": index(answers=[None, "x"]),
    "index: no list of the skipped": facts(lambda plain: plain.pop("skipped")),
    "index: skipped with another key": facts(
        lambda plain: plain.update(skipped=[{"sample_id": "x", "reason": "y", "z": 1}])
    ),
    "index: no files": facts(lambda plain: plain.pop("files")),
    "index: a file of negative size": facts(lambda plain: plain["files"]["zarr.json"].update(bytes=-1)),
    "index: blocks are text": facts(lambda plain: plain["files"]["zarr.json"].update(blocks="many")),
    "index: of another cache": facts(lambda plain: plain.update(fingerprint="0" * 64)),
    "index: of another shard": facts(lambda plain: plain.update(shard=1)),
    "index: an array is not in it": facts(lambda plain: plain["files"].pop("hidden/c/0/0")),
    "images: present of fewer lines": lambda root: edit_index(root, "images/00000", rows=lambda lines: lines.pop()),
    "images: of another cache": facts(lambda plain: plain.update(fingerprint="0" * 64), "images/00000"),
    "array: stats are NaN": filled("stats", 0xFF),
    "array: topk_logprobs are NaN": filled("topk_logprobs", 0xFF),
    "array: hidden_scale is NaN": filled("hidden_scale", 0xFF),
    "array: hidden_scale is 0": filled("hidden_scale", 0),
    "array: visual_scale is NaN": filled("visual_scale", 0xFF, "images/00000"),
    "array: input_ids beyond the vocabulary": filled("input_ids", 0xFF),
    "zarr.json: 10^12 rows": zarr("hidden", lambda plain: plain.update(shape=[10**12, 40])),
    "zarr.json: negative rows": zarr("hidden", lambda plain: plain.update(shape=[-1, 40])),
    "zarr.json: no axis": zarr("hidden", lambda plain: plain.update(shape=[])),
    "zarr.json: objects": zarr("hidden", lambda plain: plain.update(data_type="object")),
    "zarr.json: another type": zarr("topk_logprobs", lambda plain: plain.update(data_type="float32")),
    "zarr.json: fewer rows": zarr("hidden", lambda plain: plain.update(shape=[3, 40])),
    "zarr.json: chunks of no line": sharding(chunk_shape=[0, 40]),
    "zarr.json: another codec": sharding(codecs=[{"name": "numcodecs.pickle", "configuration": {}}]),
    "zarr.json: an empty object": zarr("hidden", lambda plain: plain.clear()),
    "zarr.json: nested deep": lambda root: edit_file(root, "shards/00000", "hidden/zarr.json", lambda _: DEEP),
    "array: unpacks to gigabytes": unpacks_to_gigabytes,
    "head: empty": file_of("head.safetensors", b""),
    "head: cut": lambda root: file_of("head.safetensors", (root / "head.safetensors").read_bytes()[:500])(root),
    "head: another shape": tensors(
        "head.safetensors", {"head": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
    "head: a shape of 10^12": tensors(
        "head.safetensors", {"head": {"dtype": "F32", "shape": [97, 10**12], "data_offsets": [0, 4]}}
    ),
    "head: offsets beyond the end": tensors(
        "head.safetensors", {"head": {"dtype": "F32", "shape": [97, 40], "data_offsets": [0, 15520]}}
    ),
    "head: a header of 2^60 bytes": file_of("head.safetensors", struct.pack("<Q", 1 << 60)),
    "scales: of no array's width": tensors(
        "scales.safetensors",
        {"hidden.channel_scale": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        b"\0\0\x80?",
    ),
    "scales: NaN": tensors(
        "scales.safetensors",
        {"hidden.channel_scale": {"dtype": "F32", "shape": [40], "data_offsets": [0, 160]}},
        b"\xff" * 160,
    ),
    "scales: text": file_of("scales.safetensors", b"not safetensors at all"),
}
UNSEEN_WHEN_READ = {
    "array: stats are NaN",
    "array: topk_logprobs are NaN",
    "array: hidden_scale is NaN",
    "array: hidden_scale is 0",
    "array: visual_scale is NaN",
    "array: input_ids beyond the vocabulary",
    "manifest: max_length of 10^12",
    "manifest: another logit rule",
}
"""The cache's numbers are given as they are; ``verify --deep`` looks at what they are."""
REFUSED_WHEN_READ = {what for what in FORGED if what.startswith(("array: run", "array: a run"))}
"""They say how far a sample is to be expanded, so nobody is given them unseen."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "cache"
    return synthetic_cache(folder, config=signals("standard", visual="states")), folder


def read_all(folder: Path):
    with TeacherCache.open(folder) as cache:
        batch = cache.read(range(len(cache)))
        places = batch.image_places[batch.image_places[:, 0] >= 0]
        images = cache.read_images(places)
        _ = cache.head, cache.scales, cache.counts("row"), list(cache.sample_ids()), list(cache.texts())
        return batch, images


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_cache_ends_in_a_cache_error_or_in_true_data(base, tmp_path, what):
    made, folder = base
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/thesis.tex").write_text("work")
    root = tmp_path / "home/cache"
    shutil.copytree(folder, root)
    FORGED[what](root)
    before = _peak()
    with untouched(tmp_path / "victim", root):
        outcomes = [
            _outcome(read, root)
            for read in (
                read_all,
                lambda root: verify_cache(Storage(root)),
                lambda root: verify_cache(Storage(root), deep=True),
                lambda root: cache_info(Storage(root)),
                lambda root: write_view(root, tmp_path / "view.html", samples=6),
                lambda root: cache_fidelity(Storage(root), 4),
            )
        ]
    assert _peak() - before < MOST_MEGABYTES, what
    read, _, deep = outcomes[:3]
    assert not deep.ok, what
    assert all(FILES.search(str(problem)) for problem in deep.problems), deep.lines()
    assert isinstance(read, CacheError) or what not in REFUSED_WHEN_READ, what
    if not isinstance(read, CacheError):
        _same(read, made, what)


def _outcome(look, root: Path):
    """What it gives, or its CacheError, which names a file; everything else is a failure of the test."""
    try:
        return look(root)
    except CacheError as error:
        named = FILES.search(str(error))
        if not named:
            raise AssertionError(f"names no file: {error}") from error
        return error


def _same(read, made, what: str) -> None:
    batch, images = read
    for name, array in batch.arrays.items():
        wanted = np.concatenate([record.arrays[name] for record in made.records])
        assert array.shape == wanted.shape
        if not what.startswith("array: "):
            np.testing.assert_array_equal(array, wanted, err_msg=name)
    assert what in UNSEEN_WHEN_READ or images


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def test_the_table_is_as_long_as_it_says():
    assert len(FORGED) >= 40
    assert set(FORGED) >= UNSEEN_WHEN_READ
