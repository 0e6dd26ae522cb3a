"""Pages say what they unpack to, whatever the footer says; what is far more than it is is refused unread."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from teacher_cache.config import DataConfig
from teacher_cache.data.parquet_pages import pages
from teacher_cache.data.sample_reader import SampleReader
from teacher_cache.errors import CacheError, DataError
from teacher_cache.store.tables import parquet_file

HIDDEN = 200_000_000


def written(table: pa.Table, **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def varint(number: int, size: int = 0) -> bytes:
    """A whole number as thrift's compact protocol writes it, in no less than ``size`` bytes."""
    rest, out = 2 * number, bytearray()
    while True:
        rest, low = rest >> 7, rest & 127
        if not rest and len(out) + 1 >= size:
            return bytes([*out, low])
        out.append(low | 128)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "zstd", "snappy"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_pages_are_found_as_they_were_written(version: str, compression: str, dictionary: bool) -> None:
    lines = [{"id": f"s{n % 300}", "ids": list(range(n % 5)), "image": bytes(n % 7)} for n in range(9000)]
    data = written(
        pa.Table.from_pylist(lines),
        data_page_version=version,
        compression=compression,
        use_dictionary=dictionary,
        row_group_size=5000,
        data_page_size=4096,
        write_page_checksum=True,
    )
    facts = pq.ParquetFile(io.BytesIO(data)).metadata
    assert facts.num_row_groups == 2
    for group in range(2):
        for column in range(3):
            chunk = facts.row_group(group).column(column)
            found = list(pages(lambda at, count: data[at : at + count], chunk))
            headers = chunk.total_compressed_size - sum(page.stored for page in found)
            assert len(found) > 1
            assert 0 < headers < 120 * len(found)
            assert sum(page.unpacked for page in found) + headers == chunk.total_uncompressed_size
            dictionary_values = found[0].values if chunk.has_dictionary_page else 0
            assert sum(page.values for page in found) == chunk.num_values + dictionary_values


def test_a_column_without_values_has_no_pages() -> None:
    data = written(pa.table({"id": pa.array([], pa.string())}))
    chunk = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(0)
    assert not list(pages(lambda at, count: data[at : at + count], chunk))
    assert parquet_file(data, "samples.parquet").metadata.num_rows == 0


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """One value of zeros in 10 kB, and a footer that says that it is small."""
    table = pa.table({"id": ["a"], "image": [bytes(HIDDEN)]})
    data = written(table, compression="zstd", use_dictionary=False, write_statistics=False)
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer = data[start:]
    chunk = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0)
    for size in (chunk.total_byte_size, chunk.column(1).total_uncompressed_size):
        footer = footer.replace(varint(size), varint(1000, len(varint(size))))
    lying = data[:start] + footer
    assert len(lying) < HIDDEN // 1000
    assert pq.ParquetFile(io.BytesIO(lying)).metadata.row_group(0).total_byte_size == 1000
    return lying


def test_a_table_of_a_cache_whose_footer_lies_is_refused_unread(bomb: bytes) -> None:
    before = pa.default_memory_pool().bytes_allocated()
    with pytest.raises(CacheError, match=r"samples\.parquet: .* bytes that unpack to 1 lines and 200,000,0\d\d bytes"):
        parquet_file(bomb, "samples.parquet")
    assert pa.default_memory_pool().bytes_allocated() == before


def test_a_data_file_with_a_page_that_unpacks_to_far_more_is_refused_unread(bomb: bytes, tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(bomb)
    with pytest.raises(
        DataError, match=r"d\.parquet: .*column image: a page of .* bytes that unpacks to 200,000,0\d\d"
    ):
        list(SampleReader(DataConfig(path=str(tmp_path / "d.parquet"))))


@pytest.mark.parametrize("header", [b"", b"\x00", b"\x15", b"\xff" * 40, b"\x1c" * 40, b"\x15" + b"\x80" * 40])
def test_a_page_header_that_is_none_is_an_error(header: bytes) -> None:
    data = written(pa.table({"id": ["a"]}), use_dictionary=False)
    chunk = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(0)
    with pytest.raises(ValueError, match=r"page|number|structs"):
        list(pages(lambda at, count: header, chunk))
