"""Arrow files as Hugging Face's ``datasets`` writes them, a record batch at a time, checked before it is used."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa

STREAM, FILE = b"\xff\xff\xff\xff", b"ARROW1"
"""How a stream of messages begins, and a file, which is such a stream between two of these marks."""
_END = STREAM + bytes(4)


def record_batches(file: BinaryIO) -> Iterator[pa.RecordBatch]:
    """The record batches of ``file``, which is at its beginning.

    Raises ``ValueError`` or ``pa.ArrowException``: cut off, damaged, compressed (a page of such a file may unpack to
    any size) or with a dictionary. Arrow itself trusts the offsets that a batch holds, so each is validated here.
    """
    is_file = file.read(8)[: len(FILE)] == FILE
    mark = FILE if is_file else _END
    file.seek(-len(mark), 2)
    if file.read() != mark:
        raise ValueError("it has no end: cut off")
    file.seek(8 if is_file else 0)
    messages = pa.ipc.MessageReader.open_stream(pa.PythonFile(file, "r"))
    first = next(messages, None)
    if first is None or first.type != "schema":
        raise ValueError("no schema in it")
    schema = pa.ipc.read_schema(first)
    for message in messages:
        if message.type != "record batch":
            raise ValueError(f"a {message.type} where a record batch is expected")
        if _is_compressed(message.metadata.to_pybytes()):
            raise ValueError("compressed record batches; save it without compression")
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)
        yield batch


def _is_compressed(metadata: bytes) -> bool:
    """Whether a message's record batch has a ``BodyCompression`` (Arrow's Message.fbs: Message.header is field 2 and
    RecordBatch.compression field 3; each table of a flatbuffer begins with the way back to its list of fields)."""

    def place(table: int, field: int) -> int:
        fields = table - struct.unpack_from("<i", metadata, table)[0]
        entry = 4 + 2 * field
        (size,) = struct.unpack_from("<H", metadata, fields)
        offset = struct.unpack_from("<H", metadata, fields + entry)[0] if entry < size else 0
        return table + offset if offset else 0

    header = place(struct.unpack_from("<I", metadata)[0], 2)
    return bool(place(header + struct.unpack_from("<I", metadata, header)[0], 3))
