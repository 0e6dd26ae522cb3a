"""The regenerated instruction set, in the data's order, in every format, written as it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from teacher_cache.config import DataConfig, SignalsConfig
from teacher_cache.data.conversations import Conversation, Format
from teacher_cache.data.image_files import image_checksum
from teacher_cache.data.sample_reader import read_conversations
from teacher_cache.errors import CacheError, DataError
from teacher_cache.pages.answers import export_answers
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.storage import Storage
from tests.fixtures.online import build, exact_cache, world
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


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", ["out.json", "out.jsonl", "out.parquet"])
@pytest.mark.parametrize("form", get_args(Format))
def test_what_goes_out_comes_in_again(tmp_path: Path, form: Format, name: str, several: bool) -> None:
    made = synthetic_cache(tmp_path / "cache", several=several)
    assert export_answers(made.storage, tmp_path / name, form) == len(made.records)
    found = read_conversations(DataConfig(path=str(tmp_path / name)))
    assert len(found) == len(made.records)
    for sample, record in zip(found, made.records, strict=True):
        assert isinstance(sample, Conversation), sample
        assert (sample.sample_id, sample.questions, sample.answers) == (
            record.sample_id,
            record.questions,
            record.answers,
        )
        assert tuple(image.path for image in sample.images) == record.image_ids


def test_the_images_go_with_them_as_the_teacher_saw_them(tmp_path: Path) -> None:
    """From their folder, and from the file into which they were put."""
    first, second = tmp_path / "first.parquet", tmp_path / "second.parquet"
    export_answers(Storage(exact_cache()), first, "trl", [str(world() / "images")])
    with TeacherCache.open(exact_cache()) as cache:
        expected = [checksum for text in cache.texts() for checksum in text.image_checksums]
    found = read_conversations(DataConfig(path=str(first)))
    images = [image for sample in found if isinstance(sample, Conversation) for image in sample.images]
    assert [image_checksum(image.data) for image in images] == expected
    with pytest.raises(DataError, match="image_folder"):
        export_answers(Storage(exact_cache()), second, "trl", [str(first)])  # its cache names them by their paths
    assert not second.exists()
    cache = build(SignalsConfig(preset="compact"), path=str(first), image_folder="", regenerate="none")
    export_answers(Storage(cache), second, "trl", [str(first)])
    assert read_conversations(DataConfig(path=str(second))) == found


def test_other_images_of_the_same_names_are_refused(tmp_path: Path) -> None:
    made = synthetic_cache(tmp_path / "cache")
    for record in made.records:
        for name in record.image_ids:
            (tmp_path / name).write_bytes(b"another")
    with pytest.raises(DataError, match="other bytes than those the teacher saw"):
        export_answers(made.storage, tmp_path / "out.parquet", "llava", [str(tmp_path)])


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
