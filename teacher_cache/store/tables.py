"""JSON and Parquet of a stranger, bounded before they are unpacked, so that a small file cannot fill the memory.

Parquet and zstd say how much they unpack to, and a hostile file says anything. Every limit here is far above what this
package writes, and each fault ends in a ``CacheError`` that names the file.

Parquet is read by the calling thread alone: a thread of Arrow's pools outlives the read, and where it still holds a
buffer of Python's when the interpreter ends, it aborts the process (``verify`` of a good cache did, in 14 of 100 runs).
``pyarrow.parquet.read_table`` goes through the pools even with ``use_threads=False``; a ``ParquetFile`` without
pre-buffering does not.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from teacher_cache.data.parquet_pages import pages
from teacher_cache.errors import CacheError

JSON_BYTES = 64 << 20
INDEX_BYTES = 1 << 30
"""Of an index, a ledger or a list of samples; 665,000 samples take 30 MB in ``samples.parquet``."""
HEAD_BYTES = 1 << 38
"""Of a head: 16,777,216 ids of a width of 4,096 in float32."""
_ROWS_PER_BYTE, _SPARE_ROWS = 8, 4096
"""Every line of our tables holds an id or a digest of its own, which takes more than an eighth of a byte."""
_RATIO, _SPARE_BYTES = 256, 16 << 20
_FAULTS = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, EOFError)


def json_object(data: bytes | str, where: str) -> dict[str, Any]:
    """The object that ``data`` holds; a ``CacheError`` for other JSON, too much of it, NaN, or too deep a nest."""
    if len(data) > JSON_BYTES:
        raise CacheError(f"{where}: {len(data):,} bytes of JSON, expected at most {JSON_BYTES:,}")
    try:
        plain = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        found = "an empty file" if not data else "not JSON that can be read"
        raise CacheError(f"{where}: {found} ({str(error)[:200]})") from error
    if not isinstance(plain, dict):
        raise CacheError(f"{where}: expected a JSON object, found {type(plain).__name__}")
    return plain


def json_lines(data: bytes, where: str) -> list[dict[str, Any]]:
    """The object in every line; the error says which line is none."""
    return [json_object(line, f"{where}: line {number}") for number, line in enumerate(data.splitlines(), 1)]


def parquet_file(data: bytes, where: str, checked: bool = False) -> pq.ParquetFile:
    """The open table, whose counts of lines and bytes are within what its size allows. ``checked``: its pages are
    compared with their checksums as they are read."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False, page_checksum_verification=checked)
        facts = file.metadata
        groups = [facts.row_group(i) for i in range(facts.num_row_groups)]
        chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
        every = [page for chunk in chunks for page in pages(lambda at, count: data[at : at + count], chunk)]
        declared = sum(page.unpacked + 4 * page.values for page in every)
    except _FAULTS as error:
        found = "an empty file" if not data else "no Parquet file that can be read"
        raise CacheError(f"{where}: {found} ({error})") from error
    if facts.num_rows > _ROWS_PER_BYTE * len(data) + _SPARE_ROWS or declared > _RATIO * len(data) + _SPARE_BYTES:
        raise CacheError(
            f"{where}: {len(data):,} bytes that unpack to {facts.num_rows:,} lines and {declared:,} bytes: more than "
            "any table of teacher-cache; do not use this cache, and ask whoever gave it to you"
        )
    return file


def table_bytes(table: pa.Table, metadata: Mapping[bytes, bytes] | None = None) -> bytes:
    """``table`` as a file with ``metadata``. Without Arrow's copy of the schema and without statistics, which nobody
    asks for and which are half of a small index."""
    sink = io.BytesIO()
    options = {"compression": "zstd", "write_page_checksum": True, "store_schema": False, "write_statistics": False}
    with pq.ParquetWriter(sink, table.schema.remove_metadata(), **options) as writer:
        writer.write_table(table)
        if metadata:
            writer.add_key_value_metadata(metadata)
    return sink.getvalue()


def read_table(
    data: bytes, where: str, columns: Mapping[str, pa.DataType], rows: int | None = None, *, checked: bool = False
) -> pa.Table:
    """``columns`` (name: type) of a Parquet file, without nulls.

    ``rows``: how many lines there must be · ``checked``: also the checksums of its pages.
    """
    file = parquet_file(data, where, checked)
    schema = file.schema_arrow
    for name, kind in columns.items():
        found = schema.field(name).type if name in schema.names else "no such column"
        untyped = found == pa.null() and not file.metadata.num_rows  # what a column without lines is written as
        if found != kind and not untyped:
            raise CacheError(f"{where}: column {name}: expected {kind}, found {found}")
    if rows is not None and file.metadata.num_rows != rows:
        raise CacheError(f"{where}: expected {rows:,} lines, found {file.metadata.num_rows:,}")
    try:
        table = file.read(columns=list(columns), use_threads=False)
        table.validate(full=True)
        table = table.select(list(columns)).cast(pa.schema(columns.items()))
    except _FAULTS as error:
        raise CacheError(f"{where}: cannot be read ({error})") from error
    for name in columns:
        if table[name].null_count:
            raise CacheError(f"{where}: column {name} has a line without a value")
    return table


def answer_ids(data: bytes, where: str) -> dict[str, list[int]]:
    """The token ids of all answers of each sample, in order, from ``answers/part-00000.parquet``."""
    table = read_table(data, where, {"sample_id": pa.string(), "token_ids": pa.list_(pa.uint32())})
    ids_of: dict[str, list[int]] = {}
    for sample, ids in zip(table["sample_id"].to_pylist(), table["token_ids"].to_pylist(), strict=True):
        ids_of.setdefault(sample, []).extend(ids)
    return ids_of


def whole(value: object, least: int, most: int, what: str, where: str) -> int:
    """``value`` where it is a whole number from ``least`` to ``most``."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        shown = ascii(value)[:80]
        raise CacheError(f"{where}: {what}: expected a whole number from {least:,} to {most:,}, found {shown}")
    return value


def text(value: object, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise CacheError(f"{where}: {what}: expected text, found {ascii(value)[:80]}")
    return value


def mapping(value: object, what: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CacheError(f"{where}: {what}: expected an object, found {ascii(value)[:80]}")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
