"""What is left out of a cache: never for a fault that passes, never too much, and made up for when asked."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PillowImage

from teacher_cache.build.build import answer_only, build_cache
from teacher_cache.config import CacheConfig, DataConfig
from teacher_cache.data.image_files import OtherImageError
from teacher_cache.errors import CacheError, DataError
from teacher_cache.store.manifest import read_manifest
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.storage import Storage
from teacher_cache.teachers.torch_teacher import TorchTeacher
from teacher_cache.trust.verify import verify_cache
from tests.teacher_cache.build.test_build import contents


@pytest.fixture
def own(cache_config: CacheConfig, world: Path, tmp_path: Path) -> CacheConfig:
    """The tiny world with images and data of its own, which a test may change."""
    shutil.copytree(world / "images", tmp_path / "images")
    shutil.copy(world / "train.json", tmp_path / "d.json")
    data = DataConfig(path=str(tmp_path / "d.json"), image_folder=str(tmp_path / "images"))
    return replace(cache_config, output=str(tmp_path / "cache"), data=data)


def lines_of(config: CacheConfig) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(Path(str(config.data.path)).read_text())
    return found


def test_a_folder_without_the_images_stops_a_build_before_any_work(
    own: CacheConfig, teacher: TorchTeacher, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for folder, error in (
        (
            "empty",
            r"samples would be skipped.*images tried: .* × an image: no such file.*set data\.max_skipped=0\.\d+ ",
        ),
        ("nowhere", "is not there"),
    ):
        config = replace(own, data=replace(own.data, image_folder=str(tmp_path / folder)))
        with pytest.raises(DataError, match=error):
            build_cache(config, teacher=teacher, style="quiet")
        assert not (tmp_path / "cache" / "manifest.json").exists()


def test_more_skips_than_allowed_stop_a_build_and_what_was_made_stands(
    own: CacheConfig, teacher: TorchTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last third's images are broken: they are there, so only reading them tells."""
    monkeypatch.setattr("teacher_cache.data.skipped.ALWAYS_ALLOWED", 2)
    lines = lines_of(own)
    broken = {line["image"] for line in lines[-20:] if "image" in line} - {s.get("image") for s in lines[:-20]}
    for name in broken:
        (Path(own.data.image_folder) / name).write_bytes(b"<html>")
    lost = sum(line.get("image") in broken for line in lines)
    assert lost > 0.1 * len(lines)
    with pytest.raises(
        DataError,
        match=r"samples are skipped, more than data\.max_skipped=0\.1.*cannot be decoded.*set data\.max_s.*=0\.\d+ ",
    ):
        build_cache(own, teacher=teacher, style="quiet")
    assert list((Path(own.output) / "shards").glob("0*"))
    allowed = replace(own, data=replace(own.data, max_skipped=0.5))
    assert build_cache(allowed, teacher=teacher, style="quiet").skipped == lost
    with pytest.raises(DataError, match=rf"cache: {lost} of {len(lines)} samples are skipped.*--redo-skipped"):
        build_cache(own, teacher=teacher, style="quiet")


def test_a_cache_without_a_sample_is_never_complete(own: CacheConfig, teacher: TorchTeacher) -> None:
    lines = [line for line in lines_of(own) if "image" in line][:3]
    for line in lines:
        (Path(own.data.image_folder) / line["image"]).write_bytes(b"<html>")
    Path(str(own.data.path)).write_text(json.dumps(lines))
    for codec, error in (
        ("float16", r"3 of 3 samples are skipped, so nothing is left \(3 × an image: cannot"),
        ("int8", "none of 3 samples"),
    ):
        config = replace(own, output=f"{own.output}-{codec}", signals=replace(own.signals, codec=codec))
        with pytest.raises(ValueError, match=error):
            build_cache(config, teacher=teacher, style="quiet")
        assert not read_manifest(Storage(config.output)).complete


def test_scales_are_fitted_on_usable_samples_wherever_they_begin(own: CacheConfig, teacher: TorchTeacher) -> None:
    lines = lines_of(own)
    shown = next(line for line in lines if "image" in line)
    missing = [{**shown, "id": f"m{i}", "image": f"not_here/{i}.png"} for i in range(40)]
    Path(str(own.data.path)).write_text(json.dumps(missing + lines[:8]))
    signals = replace(own.signals, codec="int8", calibration_samples=4)
    config = replace(own, signals=signals, data=replace(own.data, max_skipped=1.0))
    summary = build_cache(config, teacher=teacher, style="quiet")
    assert (summary.samples, summary.skipped) == (8, 40)


def test_redo_skipped_makes_up_for_images_that_came_back(
    own: CacheConfig, cache_config: CacheConfig, teacher: TorchTeacher, tmp_path: Path
) -> None:
    """The cache is then, byte for byte, what it is when the images were there all along."""
    whole = replace(own, output=str(tmp_path / "whole"))
    build_cache(whole, teacher=teacher, style="quiet")
    name = next(line["image"] for line in lines_of(own)[20:] if "image" in line)
    away = (Path(own.data.image_folder) / name).rename(tmp_path / "away.png")
    skipped = build_cache(own, teacher=teacher, style="quiet").skipped
    assert skipped > 0
    away.rename(Path(own.data.image_folder) / name)
    assert build_cache(own, teacher=teacher, style="quiet").skipped == skipped  # what is made stays
    again = build_cache(own, teacher=teacher, style="quiet", redo_skipped=True)
    assert again.skipped == 0
    assert 0 < again.shards_made < read_manifest(Storage(own.output)).planned_shards
    assert contents(Path(own.output)) == contents(tmp_path / "whole")
    assert build_cache(own, teacher=teacher, style="quiet", redo_skipped=True).shards_made == 0


def swap_images(config: CacheConfig) -> None:
    """Every picture gets its neighbour's name."""
    paths = sorted(Path(config.data.image_folder).glob("train-*"))
    content = [path.read_bytes() for path in paths]
    for path, other in zip(paths, content[1:] + content[:1], strict=True):
        path.write_bytes(other)


def test_images_exchanged_between_answering_and_scoring_are_found(own: CacheConfig, teacher: TorchTeacher) -> None:
    answer_only(own, style="quiet")
    swap_images(own)
    with pytest.raises(OtherImageError, match=r"answers/part-00000.*was answered about other bytes of image train-"):
        build_cache(own, teacher=teacher, style="quiet")


def test_images_exchanged_in_the_middle_of_a_build_are_found(own: CacheConfig, teacher: TorchTeacher) -> None:
    """An image of two shards: one made before, one after."""
    build_cache(own, teacher=teacher, style="quiet")
    lines = lines_of(own)
    name = next(line["image"] for line in lines if "image" in line)
    Path(str(own.data.path)).write_text(json.dumps([*lines, {**lines[0], "id": "again", "image": name}]))
    config = replace(own, output=own.output + "-2", layout=replace(own.layout, shard_samples=10))
    build_cache(config, teacher=teacher, style="quiet")
    last = read_manifest(Storage(config.output)).planned_shards - 1
    shutil.rmtree(Path(config.output) / "shards" / f"{last:05d}")
    (Path(config.output) / "answers" / f"part-{last:05d}.parquet").unlink()
    swap_images(own)
    with pytest.raises(CacheError, match=rf"shards/{last:05d}: image train-.* was other bytes .*shards/0000"):
        build_cache(config, teacher=teacher, style="quiet")


def test_the_same_bytes_at_another_path_go_on_with_a_cache(
    own: CacheConfig, teacher: TorchTeacher, tmp_path: Path
) -> None:
    build_cache(own, teacher=teacher, style="quiet")
    before = contents(Path(own.output))
    assert str(tmp_path) not in before["manifest.json"].decode()
    shutil.rmtree(Path(own.output) / "shards" / "00001")
    moved = tmp_path / "elsewhere" / "renamed.jsonl"
    moved.parent.mkdir()
    shutil.move(str(own.data.path), moved)
    shutil.move(own.data.image_folder, moved.parent / "pictures")
    data = replace(own.data, path=str(moved), image_folder=str(moved.parent / "pictures"))
    assert build_cache(replace(own, data=data), teacher=teacher, style="quiet").shards_made == 1
    assert contents(Path(own.output)) == before
    assert verify_cache(Storage(own.output), deep=True).ok
    moved.write_text(moved.read_text() + "\n")
    with pytest.raises(CacheError, match=r"data\.files"):
        build_cache(replace(own, data=data), teacher=teacher, style="quiet")


def test_the_digest_is_of_the_bytes_that_were_parsed(
    own: CacheConfig, teacher: TorchTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data file is exchanged while the teacher loads: the manifest speaks of what the cache holds."""
    import hashlib

    from teacher_cache.build import build as score

    parsed = Path(str(own.data.path)).read_bytes()
    monkeypatch.setattr(score, "open_teacher", lambda *_: Path(str(own.data.path)).write_text("[]") and teacher)
    monkeypatch.setattr(TorchTeacher, "close", lambda self: None)
    build_cache(own, style="quiet")
    assert read_manifest(Storage(own.output)).data["files"] == [
        {"sha256": hashlib.sha256(parsed).hexdigest(), "bytes": len(parsed)}
    ]


def test_a_build_leaves_none_of_its_samples_behind(own: CacheConfig, teacher: TorchTeacher) -> None:
    build_cache(own, teacher=teacher, style="quiet")
    assert not (Path(own.output) / ".samples").exists()
    with TeacherCache.open(own.output) as cache:
        batch = cache.read(range(len(cache)), [])
        assert [len(i) for i in batch.image_ids] == [sum(len(c) == 32 for c in s) for s in batch.image_checksums]


def test_a_picture_of_another_size_than_the_tower_takes_is_skipped_with_both_sizes(
    own: CacheConfig, teacher: TorchTeacher
) -> None:
    """The tiny teacher's processor does not resize; nothing below it could look at the picture."""
    lines = [line for line in lines_of(own) if "image" in line][:6]
    Path(str(own.data.path)).write_text(json.dumps(lines))
    name = lines[0]["image"]
    PillowImage.new("RGB", (40, 30)).save(Path(own.data.image_folder) / name)
    lost = sum(line["image"] == name for line in lines)
    assert build_cache(own, teacher=teacher, style="quiet").skipped == lost < 6
    first = json.loads((Path(own.output) / "skipped.jsonl").read_text().splitlines()[0])
    assert "makes 40 x 30 pixels of an image, and the vision tower takes 32 x 32" in first["reason"]
