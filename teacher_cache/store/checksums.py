"""Checksums of a folder's files, kept in its index: a CRC-32C for every block of 1 MiB."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from teacher_cache.errors import CacheError
from teacher_cache.store.names import INDEX as INDEX
from teacher_cache.store.tables import json_object, mapping, parquet_file, text, whole

BLOCK_BYTES = 1 << 20
"""Files are checksummed in blocks of this size, so that a reader checks what it touches and no more."""
METADATA_KEY = b"teacher_cache"
"""Where an index keeps the checksums: the key in the Parquet file's metadata."""


@dataclass(frozen=True)
class FileSum:
    """Size and CRC-32C of each block of one file."""

    bytes: int
    blocks: tuple[int, ...]


def file_sum(parts: Iterable[bytes | memoryview]) -> FileSum:
    """Checksums of a file given in parts."""
    crcs: list[int] = []
    open_crc, filled, total = 0, 0, 0
    for part in parts:
        rest = np.frombuffer(part, np.uint8)
        total += len(rest)
        while len(rest):
            take = min(BLOCK_BYTES - filled, len(rest))
            open_crc = google_crc32c.extend(open_crc, rest[:take])
            rest, filled = rest[take:], filled + take
            if filled == BLOCK_BYTES:
                crcs.append(open_crc)
                open_crc, filled = 0, 0
    if filled:
        crcs.append(open_crc)
    return FileSum(total, tuple(crcs))


def sums_to_plain(files: Mapping[str, Iterable[bytes | memoryview]]) -> dict[str, Any]:
    """The counterpart of :func:`read_file_sums`."""
    sums = {name: file_sum(parts) for name, parts in files.items()}
    return {name: {"bytes": s.bytes, "blocks": list(s.blocks)} for name, s in sums.items()}


def read_file_sums(index: bytes, where: str) -> tuple[dict[str, FileSum], dict[str, Any]]:
    """Checksums of a folder's files, and the rest of the index's metadata, from the bytes of ``index.parquet``.

    Raises ``CacheError``: not an index as :func:`sums_to_plain` and the writer make it; ``where`` names the file.
    """
    plain = json_object((parquet_file(index, where).metadata.metadata or {}).get(METADATA_KEY, b""), where)
    sums = {}
    for name, entry in mapping(plain.pop("files", None), "files", where).items():
        what = f"files.{ascii(name)[:80]}"
        entry = mapping(entry, what, where)
        size = whole(entry.get("bytes"), 0, 1 << 50, f"{what}.bytes", where)
        blocks = entry.get("blocks")
        if not isinstance(blocks, list) or len(blocks) != -(-size // BLOCK_BYTES):
            raise CacheError(f"{where}: {what}.blocks: expected a list with a checksum for every MiB")
        sums[name] = FileSum(size, tuple(whole(b, 0, (1 << 32) - 1, f"{what}.blocks", where) for b in blocks))
    text(plain.get("fingerprint"), "fingerprint", where)
    whole(plain.get("shard"), 0, 1 << 40, "shard", where)
    skipped = plain.get("skipped", [])
    if not isinstance(skipped, list):
        raise CacheError(f"{where}: skipped: expected a list, found {ascii(skipped)[:80]}")
    for entry in skipped:
        if set(mapping(entry, "skipped", where)) != {"sample_id", "reason"}:
            raise CacheError(f"{where}: skipped: expected sample_id and reason, found {', '.join(map(ascii, entry))}")
        text(entry["sample_id"], "skipped.sample_id", where)
        text(entry["reason"], "skipped.reason", where)
    return sums, plain


def bad_block_of_file(path: Path, sums: FileSum) -> int | None:
    """The first block of a file whose checksum does not fit, or None; a wrong size is the last block's fault."""
    if path.stat().st_size != sums.bytes:
        return max(len(sums.blocks) - 1, 0)
    with path.open("rb") as file:
        for block, expected in enumerate(sums.blocks):
            if google_crc32c.value(file.read(BLOCK_BYTES)) != expected:
                return block
    return None


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
