"""Writing a cache: one shard at a time, complete or not at all, then the ledger and the manifest's last word."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from teacher_cache.data.conversations import Skipped
from teacher_cache.data.skipped import Allowed, counted
from teacher_cache.errors import CacheError
from teacher_cache.store.arrays import (
    ArrayLayout,
    chunk_rows_for,
    data_file,
    dimension_names,
    group_metadata,
    shard_bytes,
    zarr_metadata,
)
from teacher_cache.store.checksums import INDEX, METADATA_KEY, read_file_sums, sha256, sums_to_plain
from teacher_cache.store.index import (
    ImagePlace,
    image_table,
    sample_table,
)
from teacher_cache.store.ledger import check_fingerprint, ledger_lines, shard_entry, total_counts
from teacher_cache.store.manifest import FORMAT_VERSION, Manifest, write_manifest
from teacher_cache.store.names import GROUPS
from teacher_cache.store.names import HEAD as HEAD
from teacher_cache.store.names import LEDGER as LEDGER
from teacher_cache.store.names import SAMPLES as SAMPLES
from teacher_cache.store.names import SCALES as SCALES
from teacher_cache.store.names import SKIPPED as SKIPPED
from teacher_cache.store.names import answers_name as answers_name
from teacher_cache.store.names import images_name as images_name
from teacher_cache.store.names import shard_name as shard_name
from teacher_cache.store.records import Array, ArraySpec, TeacherRecord
from teacher_cache.store.storage import Parts, Storage
from teacher_cache.store.tables import INDEX_BYTES, json_lines, table_bytes, text


def write_shard(
    storage: Storage,
    manifest: Manifest,
    number: int,
    records: Sequence[TeacherRecord],
    places: Sequence[ImagePlace],
    skipped: Sequence[Skipped],
) -> None:
    """Commit ``shards/{number:05d}`` with its records in order; an unfinished one from before is replaced."""
    arrays = {s.name: _concatenate([r.arrays[s.name] for r in records], s) for s in manifest.arrays}
    files = _array_files(arrays, manifest.arrays, manifest)
    table = sample_table(records, places, manifest.image_token)
    extra = {"skipped": [dataclasses.asdict(s) for s in skipped], "shard": number}
    files[INDEX] = _index_bytes(table, files, manifest, extra)
    storage.commit_folder(shard_name(number), files, INDEX)


def write_images(
    storage: Storage, manifest: Manifest, number: int, images: Sequence[tuple[str, Mapping[str, Array] | None]]
) -> None:
    """Commit ``images/{number:05d}``: the images in order; None (unreadable image) has a line of zeros, unused."""
    arrays, specs = {}, manifest.image_arrays
    for spec in specs:
        blank = np.zeros((1 if spec.axis == "image" else 0, *spec.shape), spec.dtype)
        arrays[spec.name] = _concatenate([blank if a is None else a[spec.name] for _, a in images], spec)
    files = _array_files(arrays, specs, manifest)
    table = image_table([(image_id, None if a is None else _patches(a, specs)) for image_id, a in images])
    files[INDEX] = _index_bytes(table, files, manifest, {"shard": number})
    storage.commit_folder(images_name(number), files, INDEX)


def _patches(arrays: Mapping[str, Array], specs: Sequence[ArraySpec]) -> int:
    """N, the positions of an image with these arrays; of a Gram from the length of its upper triangle."""
    lines = len(arrays[specs[0].name])
    return lines if specs[0].axis == "patch" else (math.isqrt(8 * lines + 1) - 1) // 2


def committed_shards(storage: Storage, manifest: Manifest) -> set[int]:
    """Numbers of the shards that are complete. Whether they belong to the manifest is :func:`finish`'s question."""
    numbers = {int(name) for name in storage.names("shards") if name.isdecimal()}
    return {n for n in numbers if n < manifest.planned_shards and storage.exists(f"{shard_name(n)}/{INDEX}")}


def refuse_foreign_shards(storage: Storage, manifest: Manifest) -> None:
    """Shards whose manifest was lost may be gone on with when they were made with this configuration.

    Raises
    ------
    CacheError
        A shard was made with other settings, or cannot be read.
    """
    for name in storage.names("shards"):
        index = f"shards/{name}/{INDEX}"
        if name.isdigit() and storage.exists(index):
            try:
                _, metadata = read_file_sums(storage.read(index, INDEX_BYTES), f"{storage.url}/{index}")
            except CacheError:
                continue  # cut by an interrupted copy: made again
            check_fingerprint(storage, manifest, f"shards/{name}", metadata)


def finish(storage: Storage, manifest: Manifest, allowed: Allowed | None = None) -> Manifest:
    """Write ledger, skipped list and the manifest that says ``complete``; every planned shard must be there.

    Raises
    ------
    CacheError
        A shard is missing, foreign, or samples are not accounted for (cached + skipped = input); an image was other
        bytes in one shard than in another.
    DataError
        No sample is left, or more were skipped than are ``allowed``.
    """
    missing = sorted(set(range(manifest.planned_shards)) - committed_shards(storage, manifest))
    if missing:
        raise CacheError(
            f"{storage.url}: {len(missing)} of {manifest.planned_shards} shards are missing (first: {missing[0]:05d}). "
            "Run teacher-cache build with the same configuration to make them"
        )
    entries, skipped, tables = [], [], []
    present: dict[int, Array] = {}
    seen: dict[str, tuple[str, int]] = {}
    for number in range(manifest.planned_shards):
        entry, reasons, table = shard_entry(storage, manifest, number, present, seen)
        entries.append(entry)
        skipped += reasons
        tables.append(table)
    if allowed is not None:
        again = " and run teacher-cache build (with --redo-skipped, if the data was mended)"
        allowed.check(len(skipped), counted(skipped), where=storage.url, do=again)
    storage.write(LEDGER, [table_bytes(ledger_lines(entries))])
    samples = pa.concat_tables(tables)
    counts = total_counts(entries, len(skipped), samples)
    storage.write(SAMPLES, [table_bytes(samples)])
    lines = "".join(json.dumps(dataclasses.asdict(s), ensure_ascii=False) + "\n" for s in skipped)
    storage.write(SKIPPED, [lines.encode()])
    for name in _groups(manifest):
        storage.write(name, [group_metadata({"teacher_cache_format": FORMAT_VERSION})])
    files = _side_files(storage, manifest)
    done = dataclasses.replace(manifest, complete=True, counts=counts, files=files)
    write_manifest(storage, done)
    return done


def skipped_lines(storage: Storage) -> list[dict[str, Any]]:
    """``sample_id`` and ``reason`` of every sample that was left out, from ``skipped.jsonl``."""
    where = f"{storage.url}/{SKIPPED}"
    lines = json_lines(storage.read(SKIPPED, INDEX_BYTES), where)
    for number, line in enumerate(lines, 1):
        for name in ("sample_id", "reason"):
            text(line.get(name), name, f"{where}: line {number}")
    return lines


def _side_files(storage: Storage, manifest: Manifest) -> dict[str, str]:
    names = (LEDGER, SAMPLES, SKIPPED, HEAD, SCALES, *_groups(manifest))
    return {name: sha256(storage.read(name)) for name in names if storage.exists(name)}


def _groups(manifest: Manifest) -> list[str]:
    """The Zarr groups above those of the shards, so that plain zarr opens the cache as one hierarchy."""
    return [name for name in GROUPS if manifest.image_arrays or not name.startswith("images/")]


def _concatenate(parts: Sequence[Array], spec: ArraySpec) -> Array:
    for part in parts:
        assert (part.dtype, part.shape[1:]) == (np.dtype(spec.dtype), spec.shape), (spec, part.dtype, part.shape)
    return np.concatenate(parts) if parts else np.zeros((0, *spec.shape), spec.dtype)


def _array_files(arrays: Mapping[str, Array], specs: Sequence[ArraySpec], manifest: Manifest) -> dict[str, Parts]:
    layout_config = manifest.layout
    files: dict[str, Parts] = {"zarr.json": [group_metadata({"teacher_cache_format": FORMAT_VERSION})]}
    for spec in specs:
        array = arrays[spec.name]
        layout = ArrayLayout(
            spec.dtype,
            spec.shape,
            len(array),
            chunk_rows_for(spec.line_bytes, len(array), layout_config["chunk_kilobytes"] * 1024),
            layout_config["compression"] != "none",
        )
        files[f"{spec.name}/zarr.json"] = [zarr_metadata(layout, dimension_names(spec))]
        if len(array):
            files[f"{spec.name}/{data_file(layout)}"] = shard_bytes(array, layout)
    return files


def _index_bytes(table: pa.Table, files: Mapping[str, Parts], manifest: Manifest, extra: dict[str, Any]) -> list[bytes]:
    metadata = {
        "files": sums_to_plain(files),
        "fingerprint": manifest.fingerprint,
        "format_version": FORMAT_VERSION,
        **extra,
    }
    encoded = json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode()
    return [table_bytes(table, {METADATA_KEY: encoded})]
