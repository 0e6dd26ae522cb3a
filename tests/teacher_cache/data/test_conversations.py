"""LLaVA's data format: what is read, what is skipped with which reason, what is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PillowImage
from PIL.PngImagePlugin import PngInfo

from teacher_cache.config import DataConfig
from teacher_cache.data.conversations import Conversation, Image, Skipped, parse_sample, pieces
from teacher_cache.data.formats import to_line
from teacher_cache.data.images import MAX_PIXELS, load_image
from teacher_cache.data.sample_reader import SampleReader, read_conversations
from teacher_cache.data.spool import spool
from teacher_cache.errors import DataError, ImageError


def line(*values: str, **extra: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]
    return {"id": "a", "image": "a.png", "conversations": turns, **extra}


def test_images_stand_where_their_tags_stand_and_white_space_at_the_ends_is_the_tags() -> None:
    sample = parse_sample(line("what is\n<image> this", "a cat", "sure?", "yes"), 0)
    assert isinstance(sample, Conversation)
    assert sample.questions == ("what is\n<image> this", "sure?")
    assert sample.texts == ("what is\n this", "sure?")
    assert sample.answers == ("a cat", "yes")
    assert sample.images == (Image("a.png", "a.png"),)
    for text, found in [
        ("<image>\nwhat", ("", "what")),
        ("what \n <image>", ("what", "")),
        (" <image>\n<image> a <image> b\n<image>", ("", "", "a ", " b", "")),
        ("<image>", ("", "")),
        (" \n<image> <image>\n", ("", "", "")),
        ("a", ("a",)),
    ]:
        assert pieces(text) == found
        assert pieces("<image>".join(found)) == found


PARTS = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]


@pytest.mark.parametrize(
    ("data", "questions", "images"),
    [
        (
            line("<image>\n<image>\na", "b", "c <image>", "d", image=["x", "y", "z"]),
            ("<image><image>a", "c<image>"),
            "xyz",
        ),
        (line("a", "b", "c <image> d", "e", image="x"), ("a", "c <image> d"), "x"),
        (
            {"messages": [("user", "<image>q<image>"), ("assistant", "a")], "images": ["x", "x"]},
            ("<image>q<image>",),
            "xx",
        ),
        ({"messages": [("user", PARTS), ("assistant", "a")], "images": ["x", "y"]}, ("<image>and<image>",), "xy"),
        (
            {
                "messages": [
                    ("user", [{"type": "image", "image": "x"}, {"type": "text", "text": "q"}]),
                    ("assistant", "a"),
                ]
            },
            ("<image>q",),
            "x",
        ),
    ],
)
def test_several_images_stand_in_any_turn(data: dict[str, Any], questions: tuple[str, ...], images: str) -> None:
    if "messages" in data:
        data["messages"] = [{"role": role, "content": content} for role, content in data["messages"]]
    sample = parse_sample(data, 0)
    assert isinstance(sample, Conversation), sample
    assert sample.questions == questions
    assert [image.path for image in sample.images] == list(images)
    again = parse_sample(to_line(sample, "llava"), 0)
    assert isinstance(again, Conversation)
    assert (again.questions, again.images) == (sample.questions, sample.images)


def test_a_system_text_opens_a_conversation() -> None:
    turns = [{"from": "system", "value": "Be brief. "}, *line("q", "a")["conversations"]]
    sample = parse_sample({"id": "a", "conversations": turns}, 0)
    assert isinstance(sample, Conversation)
    assert (sample.system, sample.questions) == ("Be brief.", ("q",))
    assert parse_sample(to_line(sample, "llava"), 0) == sample


def test_each_turn_is_a_sample_of_its_own_where_a_template_rewrites_turns(tmp_path: Path) -> None:
    whole = line("<image> one", "1", "two <image>", "2", id="a", image=["x", "y"])
    (tmp_path / "d.json").write_text(json.dumps([whole, line("q", "a", id="b", image=None)]))
    first, second, other = read_conversations(DataConfig(path=str(tmp_path / "d.json")), by_turn=True)
    assert isinstance(first, Conversation)
    assert isinstance(second, Conversation)
    assert [s.sample_id for s in (first, second, other)] == ["a", "a@2", "b"]
    assert (first.questions, [i.path for i in first.images]) == (("<image>one",), ["x"])
    assert (second.answers, [i.path for i in second.images]) == (("1", "2"), ["x", "y"])


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (line("<image> a", "b", "<image> c", "d"), "<image> 2 times, but 1 images"),
        (line("<image> a", "b", image=None), "<image> in the text, but no image"),
        (line("a", "b"), "an image, but no <image>"),
        (line("<image> a", "b <image>"), "<image> inside an answer"),
        (line("<image> a"), "the last question has no answer"),
        ({"id": "a", "conversations": [{"from": "human", "value": "x"}] * 2}, "roles do not alternate: message 2"),
        ({"id": "a", "conversations": [{"from": "robot", "value": "x"}]}, "a message without from"),
        ({"id": "a", "conversations": []}, "no list of conversations"),
        ({"id": "a", "image": "x"}, "no list of conversations"),
        (line("<image> a", "b", image=["a.png", "b.png"]), "<image> 1 times, but 2 images"),
        (line("<image> a", "b", images=["b.png"]), "image and images name different pictures"),
        (line("<video> a", "b", image=None), "a <video> or <audio> tag"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]}, "a part of type video"),
        (line("<image> a", "b", tools=[{"name": "f"}]), "'tools' changes what the model is asked"),
        (line("<image> a", "b", objects={"ref": [], "bbox": [[1, 2]]}), "'objects' changes what"),
        (line("<image> a", "b", system=5), "a system text beside the messages that is no text"),
        (
            {"conversations": [*line("a", "b")["conversations"], {"from": "system", "value": "c"}]},
            "message 3 is the system",
        ),
        (line("<image> a", "b", image=5), "image: expected a path or the image's bytes, found int"),
        (line("<image> a", "b", image=True), "image: expected a path or the image's bytes, found bool"),
        (line("<image> a", "b", image={"bytes": 3.5}), "image: expected a path or the image's bytes, found float"),
        (line("<image> a", "b", image={"url": "x"}), "image: expected a path or the image's bytes, found dict"),
        (line("a", "b", image=None, image_path="a.png"), "'image_path' holds a picture, but pictures are read from"),
        (line("a", "b", image=None, frames=["a.png"]), "'frames' holds a picture"),
        (line("a", "b", image="", video="a.mp4"), "'video' holds a picture"),
        (line("a", "b", image=None, images=["a.png"]), "an image, but no <image>"),
        ({"id": "a\ud83d", "conversations": []}, "no list of conversations"),
        ({"id": "a", "messages": [{"role": "user", "content": [{"type": "text"}]}]}, "role (user or assistant)"),
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
        ('[{"messages": []}]', r"d\.json: none of 1 samples can be used: 1 × no list of conversations"),
        ('[{"x": 1}, {"x": 2}, 3]', r"none of 3 samples can be used: 2 × no list of conv.*; 1 × expected an object"),
        ('{"data": [], "version": 1}', "line 1: expected a list of samples, found one object with 'data', 'version'"),
        ('[{"id": 1}] x', "line 1: text behind the end of the list"),
        ('[{"id": 1}\n{"id": 2}]', "line 2: expected a comma or the end of the list"),
        ('[{"id": 1}', "the list has no end"),
        ('{"id": 1, "conversations": []}\n\n{"id": 2,,}', r"d\.json: line 3: not JSON"),
        ('"text"', "expected a list of samples"),
        ("[" * 100_000, r"d\.json: line 1: not a sample: lists or objects nested too deep"),
        ('[{"id": ' + "9" * 10_000 + "}]", r"d\.json: line 1: not a sample \(Exceeds the limit"),
        ("", "no samples"),
        ("[1,", "not JSON"),
        ("[]", "no samples"),
    ],
)
def test_a_file_of_another_format_is_refused(tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(DataError, match=error):
        read_conversations(DataConfig(path=str(path)))


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ('[{"id": "caf\u00e9"}]'.encode("latin-1"), "not UTF-8"),
        ('[{"id": "x"}]'.encode("utf-16"), "UTF-16"),
        (gzip.compress(b"[]", mtime=0), "a compressed file"),
        (b"PAR1" + bytes(60), "not a readable Parquet file"),
    ],
)
def test_a_file_in_another_encoding_is_refused_by_name(tmp_path: Path, content: bytes, error: str) -> None:
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"d\.json: .*{error}"):
        read_conversations(DataConfig(path=str(tmp_path / "d.json")))


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.JSONL", "d.ndjson", "d"])
@pytest.mark.parametrize("form", ["array", "indented array", "lines", "lines with empty ones"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_content_decides_how_a_file_is_read(tmp_path: Path, name: str, form: str, mark: str) -> None:
    lines = [line("<image> q \u00e9\U0001f600", "a", id=str(i)) for i in range(3)]
    text = {
        "array": json.dumps(lines, ensure_ascii=False),
        "indented array": "\r\n" + json.dumps(lines, indent=2) + "\n",
        "lines": "\n".join(json.dumps(x, ensure_ascii=False) for x in lines),
        "lines with empty ones": "\n\n".join(map(json.dumps, lines)) + "\r\n\n",
    }[form]
    content = (mark + text).encode()
    (tmp_path / name).write_bytes(content)
    reader = SampleReader(DataConfig(path=str(tmp_path / name)))
    assert [s.sample_id for s in reader if isinstance(s, Conversation)] == ["0", "1", "2"]
    assert reader.files == [{"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}]


def test_one_sample_alone_is_a_file_of_lines(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps(line("<image> q", "a")))
    assert [s.sample_id for s in read_conversations(DataConfig(path=str(tmp_path / "d.json")))] == ["a"]


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("form", ["array", "lines"])
def test_blocks_of_any_size_give_the_same_samples(
    tmp_path: Path, block: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teacher_cache.data.data_files.BLOCK", block)
    lines = [line('<image> q "\\u00e9 \u00e9\U0001f600', "a" * i, id=i, n=-1.5e3) for i in range(20)]
    text = json.dumps(lines, ensure_ascii=False) if form == "array" else "\n".join(map(json.dumps, lines))
    (tmp_path / "d").write_text(text, encoding="utf-8")
    reader = SampleReader(DataConfig(path=str(tmp_path / "d")))
    assert list(reader) == [parse_sample(x, i) for i, x in enumerate(lines)]
    assert reader.files[0]["sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_the_first_samples_are_read_without_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_cache.data.data_files.BLOCK", 4096)
    lines = [line("<image> q", "a" * 50, id=str(i)) for i in range(2000)]
    (tmp_path / "d.json").write_text(json.dumps(lines) + "broken behind what is needed")
    read: list[int] = []
    reader = SampleReader(DataConfig(path=str(tmp_path / "d.json"), max_samples=10), read.append)
    assert [s.sample_id for s in reader] == [str(i) for i in range(10)]
    assert sum(read) == 4096
    parsed = json.dumps(lines[:10])[:-1].encode()  # up to the end of the last one that was taken
    assert reader.files == [{"sha256": hashlib.sha256(parsed).hexdigest(), "bytes": len(parsed)}]


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (["a.png"], "a.png"),
        ([["a.png"]], "a.png"),
        ({"path": "a.png", "bytes": None}, "a.png"),
        ("a.png", "a.png"),
        ([], None),
        (float("nan"), None),
        (None, None),
        ("", None),
        ([None, ""], None),
        ({"bytes": None, "path": None}, None),
        ({"bytes": b"", "path": ""}, None),
        ([{"bytes": b"", "path": None}], None),
        ({"bytes": b"", "path": "a.png"}, "a.png"),
    ],
)
@pytest.mark.parametrize("key", ["image", "images"])
def test_one_image_is_read_however_it_is_written(key: str, value: Any, path: str | None) -> None:
    question = "q" if path is None else "<image> q"
    sample = parse_sample({**line(question, "a"), "image": None, key: value, "image_id": 17, "width": 3}, 0)
    assert isinstance(sample, Conversation), sample
    assert (sample.image.path if sample.image is not None else None) == path


def test_messages_of_roles_are_conversations() -> None:
    messages = [{"role": "user", "content": "<image>what"}, {"role": "assistant", "content": "a cat"}]
    sample = parse_sample({"messages": messages, "images": ["x.png"]}, 7)
    assert sample == Conversation("#7", ("<image>what",), ("a cat",), (Image("x.png", path="x.png"),))


def test_images_of_messages_without_a_tag_stand_before_the_first_question() -> None:
    """As TRL and ms-swift put them; LLaVA's format always says where."""
    messages = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "a cat"}]
    sample = parse_sample({"messages": messages, "images": ["x.png", "y.png"]}, 7)
    assert isinstance(sample, Conversation), sample
    assert sample.questions == ("<image><image>what",)


def test_a_system_text_stands_beside_the_messages_or_in_them() -> None:
    beside = parse_sample(line("q", "a", image=None, system="Be brief."), 0)
    turns = [{"from": "system", "value": "Be brief."}, *line("q", "a")["conversations"]]
    assert beside == parse_sample({"id": "a", "conversations": turns}, 0)
    assert beside == parse_sample({"id": "a", "conversations": turns, "system": "Be brief."}, 0)
    other = parse_sample({"id": "a", "conversations": turns, "system": "Be long."}, 0)
    assert isinstance(other, Skipped)
    assert "another than in them" in other.reason


@pytest.mark.parametrize("value", [None, [], "[]", {"ref": [], "bbox": [[]]}, ""])
def test_empty_tools_and_objects_change_nothing(value: Any) -> None:
    assert parse_sample(line("<image> q", "a", tools=value, objects=value), 0) == parse_sample(
        line("<image> q", "a"), 0
    )


def test_objects_that_are_no_boxes_are_of_somebody_else() -> None:
    found = parse_sample(line("<image> q", "a", objects=["cat", "dog"]), 0)
    assert found == parse_sample(line("<image> q", "a"), 0)


def test_turns_in_columns_are_those_in_rows() -> None:
    """As ``datasets`` before version 4 stored lists of objects."""
    rows = line("<image> q", "a", "r", "b")
    columns = {key: [turn[key] for turn in rows["conversations"]] for key in ("from", "value")}
    assert parse_sample({**rows, "conversations": columns}, 0) == parse_sample(rows, 0)


@pytest.mark.parametrize("value", [None, float("nan"), ""])
def test_an_id_that_is_none_is_no_id(value: Any) -> None:
    assert parse_sample(line("<image> q", "a", id=value), 3).sample_id == "#3"


def test_files_a_folder_and_a_pattern_are_read_alike(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "empty").mkdir(parents=True)
    lines = [line("<image> q", "a", id=str(i)) for i in range(6)]
    for part in range(3):
        pq.write_table(pa.Table.from_pylist(lines[2 * part : 2 * part + 2]), folder / f"train-0000{part}-of-3.parquet")
    (folder / "info.json").write_text("{}")
    names = tuple(str(p) for p in sorted(folder.glob("*.parquet")))
    found = [
        [s.sample_id for s in read_conversations(DataConfig(path=path))]
        for path in (names, str(folder), str(folder / "train-*.parquet"))
    ]
    assert found == [list("012345")] * 3
    for path in (str(folder / "dev-*.parquet"), str(tmp_path / "none.json"), str(folder / "empty")):
        with pytest.raises(DataError, match="no such data file"):
            read_conversations(DataConfig(path=path))


def test_many_duplicates_of_duplicates_get_ids(tmp_path: Path) -> None:
    ids = ["x" + "#2" * k for k in range(1500)] + ["x"]
    (tmp_path / "d.json").write_text(json.dumps([line("<image> q", "a", id=i) for i in ids]))
    found = read_conversations(DataConfig(path=str(tmp_path / "d.json"), duplicate_ids="number"))
    assert len({s.sample_id for s in found}) == len(ids)


def test_samples_on_disk_are_those_in_memory(tmp_path: Path) -> None:
    """Conversations, skipped samples and embedded images, by number, in slices and in another process's hands."""
    buffer = io.BytesIO()
    PillowImage.new("RGB", (3, 2), (9, 8, 7)).save(buffer, "PNG")
    picture = {"bytes": buffer.getvalue(), "path": None}
    lines = [line("<image> q", f"a{i}", id=str(i), image=picture if i % 3 else None) for i in range(600)]
    pq.write_table(pa.Table.from_pylist(lines), tmp_path / "d.parquet")
    data = DataConfig(path=str(tmp_path / "d.parquet"), regenerate_share=0.5)
    memory = read_conversations(data)
    with spool(data, tmp_path / "kept") as samples:
        other = pickle.loads(pickle.dumps(samples))  # as a loader process gets it
        for found in (list(samples), samples[:], [samples[i] for i in range(600)], list(other)):
            assert [_with_bytes(s) for s in found] == memory
        assert samples[-1] == samples[599]
        ids = [s.image.image_id if isinstance(s, Conversation) and s.image is not None else "" for s in memory]
        assert list(samples.image_ids()) == ids
        assert samples.skips.skipped == 200
        assert (tmp_path / "kept" / "images.bin").stat().st_size == len(buffer.getvalue())  # one image, once
    assert not (tmp_path / "kept").exists()


def _with_bytes(sample: Conversation | Skipped) -> Conversation | Skipped:
    if isinstance(sample, Skipped) or sample.image is None:
        return sample
    assert sample.image.stored is not None
    return replace(sample, images=(replace(sample.image, data=sample.image.stored.read(), stored=None),))


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


def test_a_line_of_jsonl_ends_at_its_line_feed_and_nowhere_else(tmp_path: Path) -> None:
    text = json.dumps(line("<image> one\u2028two\x85three", "a"), ensure_ascii=False)
    (tmp_path / "d.jsonl").write_text(text + "\n", encoding="utf-8")
    [sample] = read_conversations(DataConfig(path=str(tmp_path / "d.jsonl")))
    assert isinstance(sample, Conversation)
    assert sample.texts == ("one\u2028two\x85three",)


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
