"""What an interrupted copy left broken is found when the build goes on, and made again to the same bytes."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from teacher_cache.build.build import build_cache
from teacher_cache.build.calibration import scales_to_bytes
from teacher_cache.errors import CacheError
from teacher_cache.store.broken import redo_broken
from teacher_cache.store.codecs import fit_channel_scales
from teacher_cache.store.manifest import read_manifest, write_manifest
from teacher_cache.store.storage import Storage
from teacher_cache.trust.verify import verify_cache
from tests.fixtures.store import signals, synthetic_cache


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


BROKEN = {
    "an array is missing": ("shards/00001/hidden", gone, 1),
    "an array is cut": ("shards/00001/hidden/c/0/0", half, 1),
    "metadata of an array is empty": ("shards/00001/stats/zarr.json", empty, 1),
    "the index is empty": ("shards/00001/index.parquet", empty, 1),
    "the index is cut": ("shards/00001/index.parquet", half, 1),
    "an array of its images is missing": ("images/00001/visual", gone, 1),
    "the index of its images is empty": ("images/00001/index.parquet", empty, 1),
    "its answers are empty": ("answers/part-00001.parquet", empty, 1),
    "its answers are cut": ("answers/part-00001.parquet", half, 1),
    "the head is empty": ("head.safetensors", empty, 0),
    "the head is cut": ("head.safetensors", half, 0),
    "the cost is empty": ("cost.json", empty, 0),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_a_copy_left_broken_is_made_again(what, cache_folder, cache_config, teacher, tmp_path, capsys):
    name, damage, made = BROKEN[what]
    root = tmp_path / "cache"
    shutil.copytree(cache_folder, root)
    storage = Storage(root)
    write_manifest(storage, dataclasses.replace(read_manifest(storage), complete=False, files={}, counts={}))
    damage(root / name)
    done = build_cache(dataclasses.replace(cache_config, output=str(root)), teacher=teacher, style="lines")
    assert done.shards_made == made
    said = capsys.readouterr().err
    assert not made or "Shard 00001 is made again" in said
    assert verify_cache(storage, deep=True).ok
    assert _contents(root) == _contents(cache_folder)


def _contents(root: Path) -> dict[str, bytes]:
    files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    manifest = json.loads(files.pop("manifest.json"))
    files.pop("cost.json")
    return files | {"manifest": json.dumps({k: v for k, v in manifest.items() if k not in ("created_at", "digest")})}


@pytest.mark.parametrize("url", ["folder", "memory://broken/c"])
def test_sound_shards_are_left_alone_and_a_shard_of_other_settings_is_not_removed(tmp_path, url):
    made = synthetic_cache(tmp_path / "c" if url == "folder" else url, config=signals("full"))
    assert redo_broken(made.storage, made.manifest, "quiet") == []
    other = dataclasses.replace(made.manifest, generation=made.manifest.generation | {"seed": 7})
    assert redo_broken(made.storage, other, "quiet") == []
    assert made.storage.exists("shards/00001/index.parquet")
    made.storage.remove_file("shards/00001/hidden/c/0/0")
    assert redo_broken(made.storage, made.manifest, "quiet") == [1]


def _leftover(root: Path, source: Path, name: str) -> None:
    root.mkdir()
    shutil.copy(source / name, root / name)


def test_the_head_of_another_teacher_is_refused(cache_folder, cache_config, teacher, tmp_path):
    """attack/03: a head that lay in the folder was kept, whoever made it, and every exact loss was wrong."""
    _leftover(tmp_path / "c", cache_folder, "head.safetensors")
    data = bytearray((tmp_path / "c/head.safetensors").read_bytes())
    data[-8:] = b"\0" * 8
    (tmp_path / "c/head.safetensors").write_bytes(data)
    with pytest.raises(CacheError, match=r"head\.safetensors: another teacher's output head.*Move it away"):
        build_cache(dataclasses.replace(cache_config, output=str(tmp_path / "c")), teacher=teacher, style="quiet")


@pytest.mark.parametrize("fingerprint", ["", "0" * 64])
def test_scales_of_another_cache_are_refused(cache_config, teacher, tmp_path, fingerprint, cache_folder):
    (tmp_path / "c").mkdir()
    width = read_manifest(Storage(cache_folder)).shape.hidden_size
    rows = np.ones((4, width), np.float32)
    scales = scales_to_bytes({"hidden": fit_channel_scales(rows, "int8")}, fingerprint)
    (tmp_path / "c/scales.safetensors").write_bytes(scales)
    with pytest.raises(CacheError, match=r"scales\.safetensors: scales fitted for another cache.*Move it away"):
        build_cache(dataclasses.replace(cache_config, output=str(tmp_path / "c")), teacher=teacher, style="quiet")
