"""Which committed shards are not what was written: cut, incomplete or emptied by an interrupted copy.

Cheap, so that every build looks: presence and size of each file, and the checksums of the indexes' own pages. What is
found is made again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from teacher_cache.errors import CacheError
from teacher_cache.progress import Style, note
from teacher_cache.store.checksums import INDEX, FileSum, read_file_sums
from teacher_cache.store.folder import ShardFolder, folder_files
from teacher_cache.store.manifest import Manifest, write_manifest
from teacher_cache.store.storage import Storage
from teacher_cache.store.tables import INDEX_BYTES, answer_ids, parquet_file
from teacher_cache.store.writer import answers_name, committed_shards, images_name, shard_name


def redo_broken(storage: Storage, manifest: Manifest, style: Style = "auto") -> list[int]:
    """Remove what is broken, with a sentence for each, so that the build makes it again; the shards removed.

    A shard of other settings is left where it is: that is for ``writer.finish`` to refuse.
    """
    removed: list[int] = []
    committed = committed_shards(storage, manifest)
    for number in range(manifest.planned_shards):
        answers = _broken_answers(storage, number)
        why = answers or (_broken_shard(storage, manifest, number) if number in committed else "")
        if not why:
            continue
        note(f"{why}. Shard {number:05d} is made again", style)
        if not removed:  # no reader takes the cache for complete meanwhile
            write_manifest(storage, dataclasses.replace(manifest, complete=False, counts={}, files={}))
        storage.remove(shard_name(number), INDEX)
        storage.remove(images_name(number), INDEX)
        if answers:
            storage.remove_file(answers_name(number))
        removed.append(number)
    return removed


def _broken_answers(storage: Storage, number: int) -> str:
    name = answers_name(number)
    if storage.exists(name):
        try:
            answer_ids(storage.read(name, INDEX_BYTES), f"{storage.url}/{name}")
        except CacheError as error:
            return str(error)
    return ""


def _broken_shard(storage: Storage, manifest: Manifest, number: int) -> str:
    """What is wrong with the shard or its images; empty where nothing is."""
    try:
        for name in (shard_name(number), *([images_name(number)] if manifest.image_arrays else [])):
            for why in _faults(storage, manifest, name):
                return why
    except (CacheError, FileNotFoundError) as error:
        return str(error)
    return ""


def _faults(storage: Storage, manifest: Manifest, name: str) -> Iterator[str]:
    where = f"{storage.url}/{name}/{INDEX}"
    if not storage.exists(f"{name}/{INDEX}"):
        yield f"{where}: missing"
        return
    index = storage.read(f"{name}/{INDEX}", INDEX_BYTES)
    _, facts = read_file_sums(index, where)
    if facts["fingerprint"] != manifest.fingerprint:
        return
    try:
        parquet_file(index, where, checked=True).read(use_threads=False)
    except (OSError, ValueError) as error:
        yield f"{where}: changed after it was written ({error})"
        return
    folder = ShardFolder(_Index(index), name, None, True, storage.url, manifest)
    needed = {file for file in folder_files(manifest, name) if file.endswith("zarr.json")}
    if absent := sorted(needed - set(folder.sums)):
        yield f"{where}: without {absent[0]}"
    sizes = storage.sizes(name)
    for file, expected in folder.sums.items():
        if sizes.get(file) != expected.bytes:
            found = f"{sizes[file]:,} bytes" if file in sizes else "no file"
            yield f"{storage.url}/{name}/{file}: expected {expected.bytes:,} bytes, found {found}"


class _Index:
    """The files of a folder of which only the index, read already, is looked at."""

    def __init__(self, index: bytes) -> None:
        self._bytes = index

    def index(self, name: str) -> bytes:
        return self._bytes

    def path(self, name: str, expected: FileSum) -> Path:
        raise AssertionError(f"only the index is looked at, not {name}")

    def begin(self, name: str, expected: FileSum) -> object:
        raise AssertionError(f"only the index is looked at, not {name}")
