"""Data sets of Hugging Face: by name, with subsets and splits, and folders that ``save_to_disk`` wrote."""

from __future__ import annotations

import builtins
import io
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from PIL import Image as PillowImage

from teacher_cache.config import DataConfig
from teacher_cache.data.conversations import Conversation, Image
from teacher_cache.data.formats import to_line, write_lines
from teacher_cache.data.images import load_image
from teacher_cache.data.sample_reader import SampleReader, read_conversations
from teacher_cache.errors import DataError

SAMPLES = [
    Conversation(f"{i}", ("<image>what",), (f"a cat {i}",), (Image("a.png", path="a.png"),), system="Be brief.")
    for i in range(40)
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def png(colour: int) -> bytes:
    buffer = io.BytesIO()
    PillowImage.new("RGB", (3, 2), (colour, 8, 7)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the hub's ``lab/cats`` holds, found by that name: two subsets, one with two splits."""
    folder = tmp_path / "here" / "lab" / "cats"
    for name, samples in (("a/train", SAMPLES[:30]), ("a/dev", SAMPLES[30:]), ("b/train", SAMPLES[:2])):
        write_lines((to_line(s, "messages") for s in samples), folder / f"{name}.parquet", "messages")
    files = [{"split": "train", "path": "a/train.parquet"}, {"split": "dev", "path": "a/dev.parquet"}]
    plain = [{"config_name": "a", "data_files": files, "default": True}]
    plain += [{"config_name": "b", "data_files": [{"split": "train", "path": "b/train.parquet"}]}]
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': plain})}\n---\n")
    monkeypatch.chdir(tmp_path / "here")
    return "hf://datasets/lab/cats"


@pytest.mark.parametrize(
    ("query", "samples"),
    [("", SAMPLES[:30]), ("?split=dev", SAMPLES[30:]), ("?subset=b&split=train", SAMPLES[:2])],
)
def test_a_data_set_of_the_hub_is_read_by_name(named: str, query: str, samples: list[Conversation]) -> None:
    reader = SampleReader(DataConfig(path=named + query))
    assert list(reader) == samples
    assert [len(file["sha256"]) for file in reader.files] == [64]


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("?split=train[:3]", "one whole split"),
        ("?split=train%2Bdev", "one whole split"),
        ("?splt=train", "expected hf://datasets/OWNER/NAME"),
        ("?split=test", "datasets cannot load it"),
        ("?subset=c", "datasets cannot load it"),
    ],
)
def test_what_is_not_in_a_data_set_is_refused(named: str, query: str, error: str) -> None:
    with pytest.raises(DataError, match=error):
        read_conversations(DataConfig(path=named + query))


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return whole(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install 'teacher-cache\[datasets\]'"):
        read_conversations(DataConfig(path="hf://datasets/lab/cats"))


def test_a_saved_data_set_is_read_without_datasets(tmp_path: Path) -> None:
    """Several files, embedded pictures, and what ``map`` left beside them."""
    rows = [to_line(s, "trl", [{"bytes": png(i), "path": None}]) for i, s in enumerate(SAMPLES)]
    write_lines(rows, tmp_path / "d.parquet", "trl", embedded=True)
    made = datasets.Dataset.from_parquet(str(tmp_path / "d.parquet"))
    assert made[3]["images"][0].size == (3, 2), "datasets knows the images for what they are"
    made.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    (tmp_path / "saved" / "cache-left-by-map.arrow").write_bytes(b"nothing that is read")
    found = read_conversations(DataConfig(path=str(tmp_path / "saved")))
    assert found == read_conversations(DataConfig(path=str(tmp_path / "d.parquet")))
    assert len(found) == 40
    assert isinstance(found[7], Conversation)
    assert load_image(found[7].images[0], "").getpixel((0, 0)) == (7, 8, 7)


def test_of_several_saved_splits_one_is_named(tmp_path: Path) -> None:
    rows = [to_line(s, "sharegpt") for s in SAMPLES]
    made = datasets.Dataset.from_list(rows)
    datasets.DatasetDict(train=made.select(range(30)), dev=made.select(range(30, 40))).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match="several splits"):
        read_conversations(DataConfig(path=str(tmp_path / "d")))
    assert read_conversations(DataConfig(path=str(tmp_path / "d" / "dev"))) == SAMPLES[30:]
    (tmp_path / "d" / "dev" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="not as save_to_disk writes it"):
        read_conversations(DataConfig(path=str(tmp_path / "d" / "dev")))


def arrow(path: Path, stream: bool = True, **options: Any) -> bytes:
    table = pa.Table.from_pylist([to_line(s, "sharegpt") for s in SAMPLES])
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(str(path), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=16)
    return path.read_bytes()


@pytest.mark.parametrize("stream", [True, False])
def test_an_arrow_file_is_read_whole_or_refused(tmp_path: Path, stream: bool) -> None:
    data = arrow(tmp_path / "d.arrow", stream)
    assert read_conversations(DataConfig(path=str(tmp_path / "d.arrow"))) == SAMPLES
    (tmp_path / "d.arrow").write_bytes(data[:-8])
    with pytest.raises(DataError, match="cut off"):
        read_conversations(DataConfig(path=str(tmp_path / "d.arrow")))
    arrow(tmp_path / "d.arrow", stream, compression="zstd")
    with pytest.raises(DataError, match="without compression"):
        read_conversations(DataConfig(path=str(tmp_path / "d.arrow")))


def test_a_damaged_arrow_file_gives_samples_or_an_error_of_ours(tmp_path: Path) -> None:
    data, chance = arrow(tmp_path / "d.arrow"), random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        (tmp_path / "d.arrow").write_bytes(damaged)
        try:
            read_conversations(DataConfig(path=str(tmp_path / "d.arrow")))
        except DataError:
            refused += 1
    assert refused > 30
