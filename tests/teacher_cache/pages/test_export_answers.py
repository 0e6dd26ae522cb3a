"""The regenerated instruction set: LLaVA JSON in the data's order, written as it is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from teacher_cache.errors import CacheError
from teacher_cache.pages.info import export_answers
from tests.fixtures.store import synthetic_cache


def test_answers_come_in_the_datas_order(tmp_path: Path) -> None:
    made = synthetic_cache(tmp_path / "cache")
    assert export_answers(made.storage, tmp_path / "deep/out.json") == len(made.records)
    text = (tmp_path / "deep/out.json").read_text(encoding="utf-8")
    lines = json.loads(text)
    assert [line["id"] for line in lines] == [r.sample_id for r in made.records]
    answers = [[t["value"] for t in line["conversations"] if t["from"] == "gpt"] for line in lines]
    assert answers == [list(r.answers) for r in made.records]
    assert text == json.dumps(lines, ensure_ascii=False, indent=1)


def test_a_cache_without_samples_gives_an_empty_list(tmp_path: Path) -> None:
    made = synthetic_cache(tmp_path / "cache", 3, skipped=(0, 1, 2))
    assert export_answers(made.storage, tmp_path / "out.json") == 0
    assert json.loads((tmp_path / "out.json").read_text()) == []


def test_a_damaged_cache_leaves_no_half_file(tmp_path: Path) -> None:
    made = synthetic_cache(tmp_path / "cache")
    (tmp_path / "cache/shards/00002/index.parquet").write_bytes(b"")
    with pytest.raises(CacheError):
        export_answers(made.storage, tmp_path / "out.json")
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
