"""Checksums of a folder's files, kept in its index: a CRC-32C for every block of 1 MiB."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from teacher_cache.store import parquet
from teacher_cache.store.names import INDEX as INDEX

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


def read_file_sums(index: bytes) -> tuple[dict[str, FileSum], dict[str, Any]]:
    """Checksums of a folder's files, and the rest of the index's metadata, from the bytes of ``index.parquet``."""
    metadata = json.loads(parquet.metadata(index)[METADATA_KEY])
    sums = {name: FileSum(s["bytes"], tuple(s["blocks"])) for name, s in metadata.pop("files").items()}
    return sums, metadata


def bad_block(data: npt.NDArray[np.uint8], sums: FileSum) -> int | None:
    """The first block of a whole file whose checksum does not fit, or None; a wrong size is the last block's fault."""
    for block, expected in enumerate(sums.blocks):
        if google_crc32c.value(data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]) != expected:
            return block
    return None if len(data) == sums.bytes else max(len(sums.blocks) - 1, 0)


def bad_block_of_file(path: Path, sums: FileSum) -> int | None:
    """:func:`bad_block` of a file on disk, which is never in memory whole."""
    if path.stat().st_size != sums.bytes:
        return max(len(sums.blocks) - 1, 0)
    with path.open("rb") as file:
        for block, expected in enumerate(sums.blocks):
            if google_crc32c.value(file.read(BLOCK_BYTES)) != expected:
                return block
    return None


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
