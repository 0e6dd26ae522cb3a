"""What the pages of a Parquet file say they unpack to, read before anything makes room for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Page(NamedTuple):
    """What a page says of itself: its bytes in the file, its bytes unpacked, and its values, nulls among them."""

    stored: int
    unpacked: int
    values: int


def pages(read: Callable[[int, int], bytes], chunk: Any) -> Iterator[Page]:
    """The pages of a column chunk (its ``ColumnChunkMetaData``), by their headers alone: the footer may say anything,
    and Arrow makes room for what a page's header says. ``read(offset, count)`` gives bytes of the file.

    Raises ``ValueError`` where a header is none (thrift's compact protocol; parquet.thrift, PageHeader).
    """
    if not chunk.num_values:
        return  # none is read, and its places may be anything
    start, dictionary = chunk.data_page_offset, chunk.dictionary_page_offset if chunk.has_dictionary_page else None
    start = dictionary if dictionary and 0 < dictionary < start else start
    end = start + chunk.total_compressed_size
    for _ in range(_MOST_PAGES):
        if start >= end:
            return
        header, fields = _header(read, start)
        stored, unpacked = fields.get(3, -1), fields.get(2, -1)
        values = max(fields[kind].get(1, 0) for kind in (5, 7, 8) if kind in fields) if {5, 7, 8} & fields.keys() else 0
        if stored < 0 or unpacked < 0 or values < 0:
            raise ValueError("a page without its size")
        yield Page(stored, unpacked, values)
        start += header + stored
    raise ValueError(f"more than {_MOST_PAGES:,} pages in a column")


_MOST_PAGES = 1 << 20


def _header(read: Callable[[int, int], bytes], start: int) -> tuple[int, dict[int, Any]]:
    """Bytes of the page header at ``start``, and its fields."""
    for room in (4096, 1 << 24):  # the second for one that holds long statistics
        struct = _Struct(read(start, room))
        with contextlib.suppress(IndexError):
            fields = struct.read()
            return struct.place, fields
    raise ValueError("a page header that has no end")


class _Struct:
    """A thrift struct in compact form: its whole numbers and its structs by field, the rest skipped."""

    def __init__(self, data: bytes) -> None:
        self._data, self.place = data, 0

    def read(self, depth: int = 0) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._number()
            fields[number] = self._value(head & 15, depth)
        return fields

    def _byte(self) -> int:
        self.place += 1
        return self._data[self.place - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def _number(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _value(self, kind: int, depth: int) -> Any:
        if depth > 8:
            raise ValueError("structs nested too deep")
        if kind in (1, 2):  # true, false: in the field's head
            return None
        if kind in (4, 5, 6):
            return self._number()
        if kind in (3, 7, 8):
            size = {3: 1, 7: 8}.get(kind) or self._varint()
            self.place += size
            return None
        if kind == 12:
            return self.read(depth + 1)
        raise ValueError("a field of a kind that no page header has")
