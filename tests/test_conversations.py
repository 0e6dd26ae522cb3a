"""LLaVA's data format: what is read, what is skipped with which reason, what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PillowImage
from PIL.PngImagePlugin import PngInfo

from teacher_cache.config import DataConfig
from teacher_cache.conversations import (
    Conversation,
    DataError,
    Skipped,
    parse_sample,
    read_conversations,
    to_llava_json,
)
from teacher_cache.images import MAX_PIXELS, ImageError, load_image


def line(*values: str, **extra: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]
    return {"id": "a", "image": "a.png", "conversations": turns, **extra}


def test_image_tag_is_moved_to_the_front_of_the_first_question() -> None:
    sample = parse_sample(line("what is\n<image> this", "a cat", "sure?", "yes"), 0)
    assert isinstance(sample, Conversation)
    assert sample.questions == ("what is\n this", "sure?")
    assert sample.answers == ("a cat", "yes")
    assert sample.image is not None
    assert sample.image.path == "a.png"


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (line("<image> a", "b", "<image> c", "d"), "<image> 2 times"),
        (line("<image> a", "b", image=None), "<image> in the text, but no image"),
        (line("a", "b"), "an image, but no <image>"),
        (line("a", "b", "<image> c", "d"), "<image> in a later turn"),
        (line("<image> a", "b <image>"), "<image> inside an answer"),
        (line("<image> a"), "the last question has no answer"),
        ({"id": "a", "conversations": [{"from": "human", "value": "x"}] * 2}, "roles do not alternate: message 2"),
        ({"id": "a", "conversations": [{"from": "robot", "value": "x"}]}, "a message without from"),
        ({"id": "a", "conversations": []}, "no list of conversations"),
        ({"id": "a", "image": "x"}, "no list of conversations"),
        (line("<image> a", "b \ud83d"), "not Unicode text: 'b \\ud83d'"),
        ("text", "expected an object"),
    ],
)
def test_a_line_that_cannot_be_used_is_skipped_with_its_reason(sample: Any, reason: str) -> None:
    found = parse_sample(sample, 3)
    assert isinstance(found, Skipped)
    assert reason in found.reason


def test_nothing_is_lost(tmp_path: Path) -> None:
    lines = [line("<image> q", "a", id=str(i)) for i in range(5)]
    lines[2] = {"id": "2", "conversations": "nonsense"}
    path = tmp_path / "d.json"
    path.write_text(json.dumps(lines))
    found = read_conversations(DataConfig(path=str(path)))
    assert [s.sample_id for s in found] == list("01234")
    assert isinstance(found[2], Skipped)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"a": 1}', "expected a list of samples"),
        ('[{"messages": []}]', "no sample has 'conversations'"),
        ("[1,", "not JSON"),
        ("[]", "no samples"),
    ],
)
def test_a_file_of_another_format_is_refused(tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(DataError, match=error):
        read_conversations(DataConfig(path=str(path)))


def test_duplicate_ids_are_refused_or_numbered(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([line("<image> q", "a")] * 3))
    with pytest.raises(DataError, match="sample 1 has the id 'a' of an earlier one"):
        read_conversations(DataConfig(path=str(path)))
    found = read_conversations(DataConfig(path=str(path), duplicate_ids="number"))
    assert [s.sample_id for s in found] == ["a", "a#2", "a#3"]


def test_regenerate_by_id_list(tmp_path: Path) -> None:
    path, ids = tmp_path / "d.json", tmp_path / "ids.txt"
    path.write_text(json.dumps([line("<image> q", "a", id=i) for i in "xyz"]))
    ids.write_text("x\nz\n")
    found = read_conversations(DataConfig(path=str(path), regenerate="ids", regenerate_ids=str(ids)))
    assert [s.regenerate for s in found if isinstance(s, Conversation)] == [True, False, True]


def test_jsonl_and_parquet_give_what_json_gives(tmp_path: Path) -> None:
    lines = [line("<image> q", "a", id=str(i)) for i in range(3)]
    (tmp_path / "d.json").write_text(json.dumps(lines))
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pq.write_table(pa.Table.from_pylist(lines), tmp_path / "d.parquet")
    found = [read_conversations(DataConfig(path=str(tmp_path / f"d.{e}"))) for e in ("json", "jsonl", "parquet")]
    assert found[0] == found[1] == found[2]
    assert (
        to_llava_json(s for s in found[0] if isinstance(s, Conversation))[0]["conversations"][0]["value"]
        == "<image>\nq"
    )


def test_a_line_of_jsonl_ends_at_its_line_feed_and_nowhere_else(tmp_path: Path) -> None:
    text = json.dumps(line("<image> one\u2028two\x85three", "a"), ensure_ascii=False)
    (tmp_path / "d.jsonl").write_text(text + "\n", encoding="utf-8")
    [sample] = read_conversations(DataConfig(path=str(tmp_path / "d.jsonl")))
    assert isinstance(sample, Conversation)
    assert sample.questions == ("one\u2028two\x85three",)


def test_parquet_with_image_bytes(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    PillowImage.new("RGB", (3, 2), (9, 8, 7)).save(buffer, "PNG")
    table = pa.Table.from_pylist([line("<image> q", "a", image={"bytes": buffer.getvalue(), "path": None})])
    pq.write_table(table, tmp_path / "d.parquet")
    [sample] = read_conversations(DataConfig(path=str(tmp_path / "d.parquet")))
    assert isinstance(sample, Conversation)
    assert sample.image is not None
    assert load_image(sample.image, tmp_path).size == (3, 2)


def test_bad_images_are_named(tmp_path: Path) -> None:
    from teacher_cache.conversations import Image

    PillowImage.new("RGB", (64, 64)).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path.parent / "secret.png").write_bytes((tmp_path / "good.png").read_bytes())
    (tmp_path / "link.png").symlink_to(tmp_path.parent / "secret.png")
    side = int(MAX_PIXELS**0.5) + 1
    PillowImage.new("1", (side, side)).save(tmp_path / "huge.png")
    texts = PngInfo()
    texts.add_text("comment", "x" * (70 << 20), zip=True)
    PillowImage.new("RGB", (8, 8)).save(tmp_path / "texts.png", pnginfo=texts)
    expected = {
        "missing.png": "no such file",
        "texts.png": "cannot be decoded",
        "nul\x00.png": "not a name that a file can have",
        "cut.png": "cannot be decoded",
        "text.png": "cannot be decoded",
        "../secret.png": "leaves the image folder",
        "link.png": "leaves the image folder",
        "/etc/passwd": "leaves the image folder",
        "huge.png": "pixels, more than",
    }
    for name, reason in expected.items():
        with pytest.raises(ImageError, match=reason):
            load_image(Image(name, name), tmp_path)
