"""Where a student's samples come from: several Parquet files, plain data on disk, texts without the arrays."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.tiny.tokenizer import conversation_text
from student_train.config import SourceConfig
from student_train.feed.plain import PlainSource
from student_train.feed.sources import CacheSource, check_images, open_source
from teacher_cache.build.build import build_cache
from teacher_cache.config import CacheConfig, DataConfig
from teacher_cache.data.conversations import Conversation
from teacher_cache.data.images import load_image
from teacher_cache.data.sample_reader import read_conversations
from teacher_cache.errors import DataError
from teacher_cache.store.reader import TeacherCache
from teacher_cache.teachers.torch_teacher import TorchTeacher
from tests.fixtures.online import tiny_reader

READER = tiny_reader()


@pytest.fixture(scope="module")
def parquet_cache(
    cache_config: CacheConfig, teacher: TorchTeacher, world: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A folder of two Parquet files with embedded images, and the cache that was made from it."""
    folder = tmp_path_factory.mktemp("parquet")
    lines = json.loads((world / "train.json").read_text())[:24]
    for part in range(2):
        rows = [
            {**s, "image": {"bytes": (world / "images" / s["image"]).read_bytes(), "path": s["image"]}}
            if "image" in s
            else {**s, "image": None}
            for s in lines[12 * part : 12 * part + 12]
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"train-{part}.parquet", row_group_size=5)
    data = replace(cache_config.data, path=str(folder), image_folder="")
    config = replace(cache_config, output=str(folder / "cache"), data=data)
    assert build_cache(config, teacher=teacher, style="quiet").skipped == 0
    return folder, folder / "cache"


@pytest.mark.parametrize("named", ["files", "folder", "pattern"])
def test_images_in_several_parquet_files_are_found(parquet_cache: tuple[Path, Path], world: Path, named: str) -> None:
    folder, cache = parquet_cache
    path: str | tuple[str, ...] = {
        "files": tuple(str(folder / f"train-{i}.parquet") for i in range(2)),
        "folder": str(folder),
        "pattern": str(folder / "*.parquet"),
    }[named]
    source = open_source(SourceConfig(cache=str(cache), image_data=path), READER, [], [])
    check_images(source)
    other = pickle.loads(pickle.dumps(source)) if named == "pattern" else source  # as a loader process gets it
    lines = json.loads((world / "train.json").read_text())[:24]
    for line, images in zip(lines, other.read(range(24)).images, strict=True):
        assert len(images) == ("image" in line)
        for image in images:
            assert not image.data  # its bytes lie on disk
            expected = (world / "images" / line["image"]).read_bytes()
            assert (
                load_image(image, "").tobytes() == load_image(replace(image, stored=None, data=expected), "").tobytes()
            )


def test_an_image_that_is_in_none_of_the_files_is_an_error_before_the_first_step(
    parquet_cache: tuple[Path, Path],
) -> None:
    folder, cache = parquet_cache
    for part in (SourceConfig(image_data=str(folder / "train-0.parquet")), SourceConfig()):
        source = CacheSource(replace(part, cache=str(cache)), READER.tokenizer, [], [])
        with pytest.raises(DataError, match=r"image_data: no image of digest [0-9a-f]{32} in it.* all of the Parquet"):
            check_images(source)


@pytest.mark.parametrize(("folder", "found"), [("", "not set, but the source names "), (".", r"\. holds no ")])
def test_an_image_file_that_is_not_in_the_folder_is_an_error_before_the_first_step(
    cache_folder: Path, folder: str, found: str
) -> None:
    source = CacheSource(SourceConfig(cache=str(cache_folder), image_folder=folder), READER.tokenizer, [], [])
    with pytest.raises(DataError, match=rf"image_folder: {found}.*Set it to the folder that the images lie in"):
        check_images(source)


def test_original_answers_read_texts_only(cache_folder: Path, world: Path, tmp_path: Path) -> None:
    """Every array of the cache is damaged, and nobody notices: nobody looks."""
    shutil.copytree(cache_folder, tmp_path / "cache")
    for path in (tmp_path / "cache" / "shards").rglob("c/**/*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
    config = SourceConfig(cache=str(tmp_path / "cache"), answers="original", image_folder=str(world / "images"))
    source = open_source(config, READER, [], [])
    with TeacherCache.open(cache_folder) as cache:
        assert len(source) == len(cache)
        assert source.image_counts.tolist() == cache.images().tolist()
    assert sum(int(mask.sum()) for mask in source.read(range(len(source))).loss_mask) == source.rows.sum()


def test_plain_data_lie_on_disk_and_other_processes_share_them(world: Path) -> None:
    config = SourceConfig(data=str(world / "train.json"), image_folder=str(world / "images"))
    source = PlainSource.from_data(config, READER.chat)
    sent = pickle.dumps(source)
    assert len(sent) < 4096 + 24 * len(source)  # places and counts, no ids and no texts
    other = pickle.loads(sent)
    found = [c for c in read_conversations(DataConfig(path=config.data)) if isinstance(c, Conversation)]
    order = np.random.default_rng(0).permutation(len(found)).tolist()
    raw = other.read(order)
    for place, i in enumerate(order):
        text = conversation_text(list(zip(found[i].texts, found[i].answers, strict=True)), image=bool(found[i].images))
        ids = READER.tokenizer(text)["input_ids"]
        answers = [READER.tokenizer(answer + "</s>")["input_ids"] for answer in found[i].answers]
        assert raw.input_ids[place].tolist() == ids
        assert raw.input_ids[place][raw.loss_mask[place]].tolist() == [token for a in answers for token in a]
        assert raw.images[place] == [image for image in [found[i].image] if image is not None]
        assert (source.rows[i], source.lengths[i]) == (sum(map(len, answers)), len(ids))


def test_plain_parquet_data_keep_their_images(parquet_cache: tuple[Path, Path]) -> None:
    folder, _ = parquet_cache
    source = PlainSource.from_data(SourceConfig(data=str(folder / "train-0.parquet")), READER.chat)
    images = list(source.images())
    assert images
    assert all(load_image(image, "").size[0] > 1 for image in images)
