"""Parquet files that lie in memory, read by the calling thread alone.

Arrow's thread pools outlive a read: a pool thread that still holds a Python buffer when the interpreter ends calls into
it and aborts the process, so ``verify`` of a good cache ended with 134 in 14 of 100 runs. ``pyarrow.parquet``'s own
``read_table`` reads through them even with ``use_threads=False``; ``ParquetFile`` without pre-buffering does not. Our
files are small, so threads had nothing to give either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq


def read_table(data: bytes, columns: Sequence[str] | None = None, *, checked: bool = False) -> pa.Table:
    """The whole file, or just ``columns``. ``checked``: also the checksums of its pages.

    Raises ``pyarrow.ArrowInvalid`` or ``OSError`` where the bytes are no such file.
    """
    with open_file(data, checked) as file:
        return file.read(columns=None if columns is None else list(columns), use_threads=False)


def read_batches(data: bytes, columns: Sequence[str], lines: int) -> Iterator[pa.RecordBatch]:
    """The file's ``columns``, at most ``lines`` of it at a time."""
    with open_file(data, False) as file:
        yield from file.iter_batches(batch_size=lines, columns=list(columns), use_threads=False)


def column_names(data: bytes) -> list[str]:
    """The names of the file's columns."""
    with open_file(data, False) as file:
        return list(file.schema_arrow.names)


def metadata(data: bytes) -> dict[bytes, bytes]:
    """The file's own key-value metadata."""
    with open_file(data, False) as file:
        return dict(file.metadata.metadata or {})


def open_file(data: bytes, checked: bool = False) -> pq.ParquetFile:
    """The open file, whose numbers nobody has looked at: ``tables.parquet_file`` bounds a stranger's."""
    return pq.ParquetFile(pa.BufferReader(data), pre_buffer=False, page_checksum_verification=checked)
