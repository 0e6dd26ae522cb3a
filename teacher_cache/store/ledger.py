"""The ledger: what each shard holds, and whether that fits the manifest, the other shards and its own images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from teacher_cache.data.conversations import Skipped
from teacher_cache.errors import CacheError
from teacher_cache.store.checksums import INDEX, read_file_sums, sha256
from teacher_cache.store.index import COUNTED, MOST_LINES, read_image_lines, read_sample_lines
from teacher_cache.store.manifest import Manifest
from teacher_cache.store.names import answers_name, images_name, shard_name
from teacher_cache.store.records import Array
from teacher_cache.store.storage import Storage
from teacher_cache.store.tables import INDEX_BYTES, read_table


@dataclass(frozen=True)
class ShardEntry:
    """One line of the ledger ``shards.parquet``."""

    shard: int
    samples: int
    skipped: int
    rows: int
    tokens: int
    positions: int
    runs: int
    image_positions: int
    images: int
    bytes: int
    index_sha256: str
    images_sha256: str
    answers_sha256: str


_SCHEMA = pa.schema(
    [(f.name, pa.string() if f.name.endswith("sha256") else pa.int64()) for f in dataclasses.fields(ShardEntry)]
)


def ledger_lines(entries: Sequence[ShardEntry]) -> pa.Table:
    """``shards.parquet``."""
    return pa.Table.from_pylist([dataclasses.asdict(entry) for entry in entries], schema=_SCHEMA)


def shard_entry(
    storage: Storage, manifest: Manifest, number: int, present: dict[int, Array], seen: dict[str, tuple[str, int]]
) -> tuple[ShardEntry, list[Skipped], pa.Table]:
    """The shard's line of the ledger, what it left out and its lines of ``samples.parquet``; adds to ``present``."""
    where = f"{storage.url}/{shard_name(number)}/{INDEX}"
    index = storage.read(f"{shard_name(number)}/{INDEX}", INDEX_BYTES)
    sums, metadata = read_file_sums(index, where)
    check_fingerprint(storage, manifest, shard_name(number), metadata)
    table = read_table(index, where, _ENTRY_COLUMNS)
    lines = read_sample_lines(index, where, manifest)
    _check_images(storage, number, table, seen)
    skipped = [Skipped(**s) for s in metadata["skipped"]]
    size = manifest.layout["shard_samples"]
    planned = min(size, manifest.planned_samples - number * size)
    if table.num_rows + len(skipped) != planned:
        raise CacheError(
            f"{storage.url}/{shard_name(number)}: {table.num_rows} cached + {len(skipped)} skipped samples, expected "
            f"{planned}. Run teacher-cache verify --repair, then teacher-cache build again"
        )
    total = {name: int(table[name].to_numpy().sum()) for name in COUNTED}
    byte_count, images, images_digest = sum(s.bytes for s in sums.values()) + len(index), 0, ""
    if manifest.image_arrays:
        where = f"{storage.url}/{images_name(number)}/{INDEX}"
        images_index = storage.read(f"{images_name(number)}/{INDEX}", INDEX_BYTES)
        images_sums, metadata = read_file_sums(images_index, where)
        check_fingerprint(storage, manifest, images_name(number), metadata)
        present[number] = read_image_lines(images_index, where).present
        images = len(present[number])
        byte_count += sum(s.bytes for s in images_sums.values()) + len(images_index)
        images_digest = sha256(images_index)
    for line, shard, _ in absent_images(lines.places, present):
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
    "sample_id": pa.string(),
    **dict.fromkeys(("image_ids", "image_checksums"), pa.list_(pa.string())),
    **dict.fromkeys(COUNTED, pa.int64()),
}


def _sample_lines(table: pa.Table, shard: int) -> pa.Table:
    """The shard's lines of ``samples.parquet``."""
    columns: dict[str, Any] = {"sample_id": table["sample_id"]}
    columns["shard"] = pa.array(np.full(table.num_rows, shard, np.int32))
    columns |= {name: table[name].cast(pa.int32()) for name in COUNTED}
    columns["images"] = pc.list_value_length(table["image_ids"])
    return pa.table(columns)


def _check_images(storage: Storage, number: int, table: pa.Table, seen: dict[str, tuple[str, int]]) -> None:
    """One image has one content; ``seen`` (image_id → checksum, shard) grows."""
    names, sums = (pc.list_flatten(table[name]).to_pylist() for name in ("image_ids", "image_checksums"))
    for image, checksum in zip(names, sums, strict=True):
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


def check_fingerprint(storage: Storage, manifest: Manifest, name: str, metadata: Mapping[str, Any]) -> None:
    if metadata["fingerprint"] != manifest.fingerprint:
        raise CacheError(
            f"{storage.url}/{name}: made with other settings (fingerprint {metadata['fingerprint'][:12]}, expected "
            f"{manifest.fingerprint[:12]}). Choose another output, or move that folder away and run teacher-cache "
            "build again with the configuration that made the rest"
        )


def total_counts(entries: Sequence[ShardEntry], skipped: int, samples: pa.Table) -> dict[str, int]:
    """Sums over the shards, and the fewest and most positions of one image (their mean where a sample has several)."""
    names = ("samples", *COUNTED, "images", "bytes")
    shown, positions = (samples[name].to_numpy() for name in ("images", "image_positions"))
    shown, positions = shown[shown > 0], positions[shown > 0]
    extremes = {
        "least_image": int((positions // shown).min(initial=MOST_LINES)) if len(shown) else 0,
        "most_image": int((-(-positions // shown)).max(initial=0)),
    }
    return {"skipped": skipped, **{n: sum(getattr(e, n) for e in entries) for n in names}, **extremes}
