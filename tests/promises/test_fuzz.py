"""Damaged and hostile bytes: reader, checks and builder give what is true or an error of ours, nothing else.

``FUZZ_EXAMPLES`` says how many mutations each test tries (``make fuzz``: 5,000); ``FUZZ_SEED`` which ones.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PillowImage
from transformers import AutoTokenizer

from pipelines.tiny.prepare import TEACHER
from teacher_cache.build.answers import AnsweredSample, read_answers, write_answers
from teacher_cache.data.conversations import Image
from teacher_cache.data.images import open_picture
from teacher_cache.errors import UserError
from teacher_cache.pages.answers import export_answers
from teacher_cache.pages.info import cache_info
from teacher_cache.store.checksums import METADATA_KEY, sha256
from teacher_cache.store.manifest import Manifest, _canonical, digest
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.storage import Storage
from teacher_cache.store.writer import answers_name
from teacher_cache.trust.verify import verify_cache
from tests.fixtures.store import Made, signals, synthetic_cache

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1.5, float("nan"), "", "x", "../../etc/passwd", "a\0b", "\x1b[2J"),
    *([], {}, [[]], [-1, 2**40], {"bytes": -1, "blocks": [2**40]}, "uint128", "shards/00000"),
)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """``data`` with a few bits, bytes or a piece changed, or cut."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(out) + 1)
        kind = chance.randrange(5)
        if kind == 0 and place < len(out):
            out[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            out[place : place + chance.randint(1, 8)] = chance.randbytes(chance.randint(0, 8))
        elif kind == 2:
            other = chance.randrange(len(out) + 1)
            out[place:place] = out[other : other + chance.randint(1, 64)]
        elif kind == 3:
            del out[place : place + chance.randint(1, 64)]
        elif chance.random() < 0.3:
            del out[place:]
    return bytes(out)


def changed_tree(tree: Any, chance: random.Random) -> Any:
    """JSON with one value, somewhere, replaced, left out or added."""
    spots: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            spots.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(tree := json.loads(json.dumps(tree)))
    node, key = chance.choice(spots)
    if chance.random() < 0.2:
        del node[key]
    elif isinstance(node, dict) and chance.random() < 0.1:
        node[chance.choice(["../x", "zzz", ""])] = chance.choice(VALUES)
    else:
        node[key] = chance.choice(VALUES)
    return tree


@pytest.fixture(scope="module", params=[False, True], ids=["one image", "several images"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    extra = {"visual": "none", "attention": True} if request.param else {}
    config = signals("full", hidden="text", **extra)
    return synthetic_cache(tmp_path_factory.mktemp("fuzz") / "cache", config=config, several=request.param)


@pytest.fixture
def root(whole: Made, tmp_path: Path) -> Path:
    """A copy of the cache to damage, with a file beside it that nobody may touch."""
    assert whole.storage.local is not None
    shutil.copytree(whole.storage.local, tmp_path / "cache")
    return tmp_path / "cache"


def outcome(act: Callable[[], Any]) -> Any:
    """What came of it; ``None`` for an error of ours."""
    try:
        return act()
    except (UserError, IndexError):
        return None


def everything(root: Path, honest: Made | None) -> None:
    """Every way to look at the cache. ``honest``: what it held; None where forged digests may guard lies."""
    report = verify_cache(Storage(root), deep=True)
    assert report.lines()
    outcome(lambda: verify_cache(Storage(root)))
    outcome(lambda: cache_info(Storage(root)))
    outcome(lambda: export_answers(Storage(root), root.parent / "answers.json"))
    cache = outcome(lambda: TeacherCache.open(root))
    if cache is None:
        return
    with cache:
        for number in range(min(len(cache), 12)):
            batch = outcome(lambda number=number: cache.read([number]))
            if batch is not None and honest is not None:
                for name, array in honest.records[number].arrays.items():
                    np.testing.assert_array_equal(batch.arrays[name], array)
            if batch is not None and batch.image_places[0, 0] >= 0:
                outcome(lambda batch=batch: cache.read_images(batch.image_places))
        outcome(lambda: cache.counts("row"))
        outcome(lambda: [cache.head, cache.scales, *cache.sample_ids()])


def test_damaged_files_are_refused_or_read_as_they_were_written(whole: Made, root: Path) -> None:
    chance = random.Random(SEED)
    names = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    for _ in range(EXAMPLES):
        path = root / chance.choice(names)
        data = path.read_bytes()
        path.write_bytes(mutated(data, chance))
        everything(root, whole)
        path.write_bytes(data)


def answers_part(root: Path, whole: Made) -> tuple[Storage, Path]:
    samples = [
        AnsweredSample(f"s{n}", [(n, 5, 2**31), (7,)], ["stop", "length"], "teacher", image_checksum="ab" * 16)
        for n in range(9)
    ]
    storage = Storage(root)
    write_answers(storage, whole.manifest, 0, samples, AutoTokenizer.from_pretrained(TEACHER))
    return storage, root / answers_name(0)


def test_damaged_answers_are_refused_or_read_as_they_were_written(whole: Made, root: Path) -> None:
    chance = random.Random(SEED)
    storage, path = answers_part(root, whole)
    data, true = path.read_bytes(), read_answers(storage, whole.manifest, 0)
    assert true is not None
    for _ in range(EXAMPLES):
        path.write_bytes(mutated(data, chance))
        assert outcome(lambda: read_answers(storage, whole.manifest, 0)) in (None, true)
        assert verify_cache(storage, deep=True).lines()


def test_forged_answers_are_refused_or_harmless(whole: Made, root: Path) -> None:
    """Every column with another type, with nulls, with other values, or left out."""
    chance = random.Random(SEED)
    storage, path = answers_part(root, whole)
    table = pq.read_table(io.BytesIO(path.read_bytes()))
    for _ in range(EXAMPLES):
        name = chance.choice(table.column_names)
        values = table[name].to_pylist()
        lie = chance.choice([None, -1, 2**40, 1.5, "x", b"\xff", [None], [-1], [[1]], ["x"], {"a": 1}])
        some = [lie if chance.random() < 0.3 else value for value in values]
        made = column_of(some)
        made = column_of([lie] * len(values)) if made is None else made
        other = table.drop_columns([name])
        if chance.random() < 0.8:
            other = other.append_column(name, made)
        pq.write_table(other.replace_schema_metadata(table.schema.metadata), path)
        found = outcome(lambda: read_answers(storage, whole.manifest, 0))
        for sample in (found or {}).values():
            assert all(isinstance(i, int) and 0 <= i < 2**32 for answer in sample.answers for i in answer)
        assert verify_cache(storage, deep=True).lines()


def column_of(values: list[Any]) -> pa.Array | None:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):  # of no one type
        return None


def reseal(root: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The manifest with a valid digest over whatever it says, as a hostile author's would be."""
    plain = json.loads((root / "manifest.json").read_bytes())
    plain.pop("digest")
    for name in plain["files"]:
        plain["files"][name] = sha256((root / name).read_bytes())
    plain = change(plain)
    fields = {k: v for k, v in plain.items() if k in Manifest.__dataclass_fields__}
    with contextlib.suppress(Exception):  # a manifest that is none has no fingerprint
        plain["fingerprint"] = Manifest(**fields).fingerprint
    (root / "manifest.json").write_bytes(_canonical(plain | {"digest": digest(plain)}))


def test_forged_digests_are_right(whole: Made, root: Path) -> None:
    reseal(root, lambda plain: plain)
    everything(root, whole)
    assert verify_cache(Storage(root), deep=True).ok


def test_forged_manifests_are_refused_or_harmless(root: Path) -> None:
    chance = random.Random(SEED)
    manifest = (root / "manifest.json").read_bytes()
    for _ in range(EXAMPLES):
        reseal(root, lambda plain: changed_tree(plain, chance))
        everything(root, None)
        (root / "manifest.json").write_bytes(manifest)


def test_forged_indexes_are_refused_or_harmless(root: Path) -> None:
    chance = random.Random(SEED)
    beside = {n: (root / n).read_bytes() for n in ("manifest.json", "shards.parquet")}
    for _ in range(EXAMPLES):
        folders = ["shards/00000", "shards/00001", "images/00000"]
        folder = chance.choice([name for name in folders if (root / name).is_dir()])
        path = root / folder / "index.parquet"
        index = path.read_bytes()
        table = forged(pq.read_table(io.BytesIO(index)), chance)
        sink = io.BytesIO()
        pq.write_table(table, sink)
        path.write_bytes(sink.getvalue())
        ledger = pq.read_table(io.BytesIO(beside["shards.parquet"]))
        rows = ledger.to_pylist()
        column = "index_sha256" if folder.startswith("shards") else "images_sha256"
        rows[int(folder[-1])][column] = sha256(sink.getvalue())
        pq.write_table(pa.Table.from_pylist(rows, schema=ledger.schema), root / "shards.parquet")
        reseal(root, lambda plain: plain)
        everything(root, None)
        path.write_bytes(index)
        for name, data in beside.items():
            (root / name).write_bytes(data)


def forged(table: pa.Table, chance: random.Random) -> pa.Table:
    """An index with its metadata, one of its numbers, or one of its columns changed."""
    metadata = json.loads(table.schema.metadata[METADATA_KEY])
    if chance.random() < 0.5:
        metadata = changed_tree(metadata, chance)
    elif chance.random() < 0.8:
        kinds = {n: table.schema.field(n).type for n in table.column_names}
        name = chance.choice([n for n, kind in kinds.items() if not pa.types.is_string(kind)])
        kind, values = kinds[name], table[name].to_pylist()
        lies = [True, False, None] if name == "present" else [-1, -(2**31), 2**31 - 1, 10**6, None]
        lies = [[], None, [None], ["x"] * 9, [""]] if pa.types.is_list(kind) else lies
        values[chance.randrange(len(values))] = chance.choice(lies)
        table = table.set_column(table.column_names.index(name), name, pa.array(values, kind))
    else:
        table = table.drop_columns([chance.choice(table.column_names)])
    return table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata).encode()})


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_pictures_are_pictures_or_reasons(kind: str) -> None:
    chance, sink = random.Random(SEED), io.BytesIO()
    PillowImage.effect_noise((24, 16), 80).convert("RGB").save(sink, kind)
    for _ in range(EXAMPLES):
        data = mutated(sink.getvalue(), chance)
        outcome(lambda data=data: open_picture(Image("x", data=data), ""))
