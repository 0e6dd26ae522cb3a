"""Writing a cache: one shard at a time, complete or not at all, then the ledger and the manifest's last word."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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
from teacher_cache.store.manifest import FORMAT_VERSION, Manifest, write_manifest
from teacher_cache.store.names import GROUPS
from teacher_cache.store.names import HEAD as HEAD
from teacher_cache.store.names import LEDGER as LEDGER
from teacher_cache.store.names import SAMPLES as SAMPLES
from teacher_cache.store.names import SCALES as SCALES
from teacher_cache.store.names import SKIPPED as SKIPPED
from teacher_cache.store.records import Array, ArraySpec, TeacherRecord, line_counts
from teacher_cache.store.storage import Parts, Storage
from teacher_cache.store.tables import INDEX_BYTES, json_lines, read_table, text


@dataclass(frozen=True)
class ImagePlace:
    """Where an image's line stands: ``images/{shard:05d}``, line ``row``; (−1, −1) where there is none."""

    shard: int = -1
    row: int = -1


@dataclass(frozen=True)
class ShardEntry:
    """One line of the ledger ``shards.parquet``."""

    shard: int
    samples: int
    skipped: int
    rows: int
    tokens: int
    positions: int
    images: int
    bytes: int
    index_sha256: str
    images_sha256: str
    answers_sha256: str


def shard_name(number: int) -> str:
    return f"shards/{number:05d}"


def images_name(number: int) -> str:
    return f"images/{number:05d}"


def answers_name(number: int) -> str:
    return f"answers/part-{number:05d}.parquet"


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
    table = _index_table(records, places, manifest)
    extra = {"skipped": [dataclasses.asdict(s) for s in skipped], "shard": number}
    files[INDEX] = _index_bytes(table, files, manifest, extra)
    storage.commit_folder(shard_name(number), files, INDEX)


def write_images(
    storage: Storage, manifest: Manifest, number: int, images: Sequence[tuple[str, Mapping[str, Array] | None]]
) -> None:
    """Commit ``images/{number:05d}``: a line per image, in order; None (unreadable image) becomes zeros, unused."""
    arrays = {}
    for spec in manifest.image_arrays:
        lines = [np.zeros(spec.shape, spec.dtype) if a is None else a[spec.name] for _, a in images]
        arrays[spec.name] = np.stack(lines) if lines else np.zeros((0, *spec.shape), spec.dtype)
    files = _array_files(arrays, manifest.image_arrays, manifest)
    table = pa.table({"image_id": [i for i, _ in images], "present": [a is not None for _, a in images]})
    files[INDEX] = _index_bytes(table, files, manifest, {"shard": number})
    storage.commit_folder(images_name(number), files, INDEX)


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
            _check_fingerprint(storage, manifest, f"shards/{name}", metadata)


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
        entry, reasons, table = _entry(storage, manifest, number, present, seen)
        entries.append(entry)
        skipped += reasons
        tables.append(table)
    if allowed is not None:
        again = " and run teacher-cache build (with --redo-skipped, if the data was mended)"
        allowed.check(len(skipped), counted(skipped), where=storage.url, do=again)
    ledger = pa.Table.from_pylist([dataclasses.asdict(e) for e in entries], schema=_LEDGER_SCHEMA)
    storage.write(LEDGER, [_parquet(ledger)])
    storage.write(SAMPLES, [_parquet(pa.concat_tables(tables))])
    lines = "".join(json.dumps(dataclasses.asdict(s), ensure_ascii=False) + "\n" for s in skipped)
    storage.write(SKIPPED, [lines.encode()])
    for name in _groups(manifest):
        storage.write(name, [group_metadata({"teacher_cache_format": FORMAT_VERSION})])
    done = dataclasses.replace(
        manifest, complete=True, counts=_counts(entries, len(skipped)), files=_side_files(storage, manifest)
    )
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


def _check_images(storage: Storage, number: int, table: pa.Table, seen: dict[str, tuple[str, int]]) -> None:
    """One image has one content; ``seen`` (image_id → checksum, shard) grows."""
    for image, checksum in zip(table["image_id"].to_pylist(), table["image_checksum"].to_pylist(), strict=True):
        before = seen.setdefault(image, (checksum, number))
        if before[0] != checksum:
            raise CacheError(
                f"{storage.url}/{shard_name(number)}: image {image} was other bytes (checksum {checksum}) than when "
                f"{shard_name(before[1])} was made ({before[0]}): the image folder changed in the middle of the build. "
                "Restore it, delete the shards made with the other images, and run teacher-cache build again"
            )


def absent_images(places: Array, present: Mapping[int, Array]) -> Iterator[tuple[int, int, int]]:
    """(line, image shard, image line) of samples whose image line holds none.

    places (M, 2): shard and line of each sample's image, −1 without one · present: by shard, which lines hold an image
    that could be read when the shard was made; it may have been readable only later, when another shard was.
    """
    for line, (shard, row) in enumerate(places.tolist()):
        if shard in present and not (0 <= row < len(present[shard]) and present[shard][row]):
            yield line, shard, row


def _entry(
    storage: Storage, manifest: Manifest, number: int, present: dict[int, Array], seen: dict[str, tuple[str, int]]
) -> tuple[ShardEntry, list[Skipped], pa.Table]:
    """The shard's line of the ledger, what it left out and its lines of ``samples.parquet``; adds to ``present``."""
    where = f"{storage.url}/{shard_name(number)}/{INDEX}"
    index = storage.read(f"{shard_name(number)}/{INDEX}", INDEX_BYTES)
    sums, metadata = read_file_sums(index, where)
    _check_fingerprint(storage, manifest, shard_name(number), metadata)
    table = read_table(index, where, _ENTRY_COLUMNS)
    _check_images(storage, number, table, seen)
    skipped = [Skipped(**s) for s in metadata["skipped"]]
    size = manifest.layout["shard_samples"]
    planned = min(size, manifest.planned_samples - number * size)
    if table.num_rows + len(skipped) != planned:
        raise CacheError(
            f"{storage.url}/{shard_name(number)}: {table.num_rows} cached + {len(skipped)} skipped samples, expected "
            f"{planned}. Run teacher-cache verify --repair, then teacher-cache build again"
        )
    total = {name: int(np.sum(table[name].to_numpy())) for name in ("tokens", "rows", "positions")}
    byte_count, images, images_digest = sum(s.bytes for s in sums.values()) + len(index), 0, ""
    if manifest.image_arrays:
        where = f"{storage.url}/{images_name(number)}/{INDEX}"
        images_index = storage.read(f"{images_name(number)}/{INDEX}", INDEX_BYTES)
        images_sums, metadata = read_file_sums(images_index, where)
        _check_fingerprint(storage, manifest, images_name(number), metadata)
        present[number] = read_table(images_index, where, {"present": pa.bool_()})["present"].to_numpy()
        images = len(present[number])
        byte_count += sum(s.bytes for s in images_sums.values()) + len(images_index)
        images_digest = sha256(images_index)
    places = np.stack([table[name].to_numpy() for name in ("image_shard", "image_row")], -1)
    for line, shard, _ in absent_images(places, present):
        raise CacheError(
            f"{storage.url}/{shard_name(number)}: sample {table['sample_id'][line]} has an image that could not be "
            f"read when {images_name(shard)} was made, and can be now. Run teacher-cache build "
            "--redo-skipped with the same configuration: it makes both again"
        )
    answers = answers_name(number)
    answers_digest = sha256(storage.read(answers)) if storage.exists(answers) else ""
    entry = ShardEntry(
        shard=number,
        samples=table.num_rows,
        skipped=len(skipped),
        **total,
        images=images,
        bytes=byte_count,
        index_sha256=sha256(index),
        images_sha256=images_digest,
        answers_sha256=answers_digest,
    )
    return entry, skipped, _sample_lines(table, number)


_ENTRY_COLUMNS = {
    **dict.fromkeys(("sample_id", "image_id", "image_checksum"), pa.string()),
    **dict.fromkeys(("tokens", "rows", "positions"), pa.int64()),
    **dict.fromkeys(("image_shard", "image_row"), pa.int32()),
}


def _sample_lines(table: pa.Table, shard: int) -> pa.Table:
    columns: dict[str, Any] = {"sample_id": table["sample_id"].cast(pa.string())}
    columns["shard"] = pa.array(np.full(table.num_rows, shard, np.int32))
    for name in ("tokens", "rows", "positions"):
        columns[name] = table[name].cast(pa.int32())
    columns["has_image"] = pa.array([bool(i) for i in table["image_id"].to_pylist()], pa.bool_())
    return pa.table(columns)


def _check_fingerprint(storage: Storage, manifest: Manifest, name: str, metadata: Mapping[str, Any]) -> None:
    if metadata["fingerprint"] != manifest.fingerprint:
        raise CacheError(
            f"{storage.url}/{name}: made with other settings (fingerprint {metadata['fingerprint'][:12]}, expected "
            f"{manifest.fingerprint[:12]}). Choose another output, or move that folder away and run teacher-cache "
            "build again with the configuration that made the rest"
        )


def _counts(entries: Sequence[ShardEntry], skipped: int) -> dict[str, int]:
    names = ("samples", "rows", "tokens", "positions", "images", "bytes")
    return {"skipped": skipped, **{n: sum(getattr(e, n) for e in entries) for n in names}}


def _side_files(storage: Storage, manifest: Manifest) -> dict[str, str]:
    names = (LEDGER, SAMPLES, SKIPPED, HEAD, SCALES, *_groups(manifest))
    return {name: sha256(storage.read(name)) for name in names if storage.exists(name)}


def _groups(manifest: Manifest) -> list[str]:
    """The Zarr groups above those of the shards, so that plain zarr opens the cache as one hierarchy."""
    return [name for name in GROUPS if manifest.image_arrays or not name.startswith("images/")]


_LEDGER_SCHEMA = pa.schema(
    [(f.name, pa.string() if f.name.endswith("sha256") else pa.int64()) for f in dataclasses.fields(ShardEntry)]
)


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


def _index_table(records: Sequence[TeacherRecord], places: Sequence[ImagePlace], manifest: Manifest) -> pa.Table:
    counts = [line_counts(r.arrays["input_ids"], r.arrays["loss_mask"], manifest.image_token) for r in records]
    columns: dict[str, Any] = {
        "sample_id": pa.array([r.sample_id for r in records], pa.string()),
        "image_id": pa.array([r.image_id for r in records], pa.string()),
        "image_checksum": pa.array([r.image_checksum for r in records], pa.string()),
        "image_shard": pa.array([p.shard for p in places], pa.int32()),
        "image_row": pa.array([p.row for p in places], pa.int32()),
    }
    for axis, plural in (("token", "tokens"), ("row", "rows"), ("position", "positions")):
        lines = np.array([c[axis] for c in counts], np.int64)  # type: ignore[index]
        columns[f"{axis}_start"] = np.cumsum(lines) - lines
        columns[plural] = lines
    texts = pa.list_(pa.string())
    for name in ("questions", "answers", "original_answers"):
        columns[name] = pa.array([list(getattr(r, name)) for r in records], texts)
    columns["source"] = pa.array([r.source for r in records], pa.string())
    return pa.table(columns)


def _index_bytes(table: pa.Table, files: Mapping[str, Parts], manifest: Manifest, extra: dict[str, Any]) -> list[bytes]:
    metadata = {
        "files": sums_to_plain(files),
        "fingerprint": manifest.fingerprint,
        "format_version": FORMAT_VERSION,
        **extra,
    }
    encoded = json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode()
    return [_parquet(table.replace_schema_metadata({METADATA_KEY: encoded}))]


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()
