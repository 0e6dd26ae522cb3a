"""Parquet in memory is read by the calling thread: what lives on in a pool could abort the interpreter at its end."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from teacher_cache.errors import CacheError
from teacher_cache.store.tables import parquet_file, read_table

ROOT = Path(__file__).parents[3]


def sample() -> tuple[pa.Table, bytes]:
    table = pa.table({"id": [f"s{n}" for n in range(50)], "ids": [list(range(n % 4)) for n in range(50)]})
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({b"k": b"v"}), sink, row_group_size=20, write_page_checksum=True)
    return table, sink.getvalue()


def test_what_was_written_is_read() -> None:
    table, data = sample()
    columns = dict(zip(table.column_names, table.schema.types, strict=True))
    assert read_table(data, "t", columns).equals(table)
    assert read_table(data, "t", {"ids": columns["ids"]}, checked=True)["ids"].equals(table["ids"])
    assert parquet_file(data, "t").metadata.metadata[b"k"] == b"v"


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no such file at all"])
def test_what_is_no_parquet_file_is_an_error(data: bytes) -> None:
    with pytest.raises(CacheError, match=r"^t: (an empty file|no Parquet file that can be read)"):
        parquet_file(data, "t")


COUNT = """
import os, sys
from pathlib import Path
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.storage import Storage
from teacher_cache.trust.verify import verify_cache
before = set(os.listdir("/proc/self/task"))
assert verify_cache(Storage(sys.argv[1]), deep=True).ok
with TeacherCache.open(sys.argv[1]) as cache:
    cache.read(range(len(cache))), cache.counts("row"), list(cache.texts())
print([Path(f"/proc/self/task/{t}/comm").read_text() for t in sorted(set(os.listdir("/proc/self/task")) - before)])
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed in Linux's /proc")
def test_reading_a_cache_starts_no_thread_that_outlives_it(cache_folder: Path) -> None:
    out = subprocess.run([sys.executable, "-c", COUNT, str(cache_folder)], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


def test_no_other_file_reads_parquet_with_arrows_threads() -> None:
    for path in [*(ROOT / "teacher_cache").rglob("*.py"), *(ROOT / "student_train").rglob("*.py")]:
        assert not re.findall(r"\bpq\.read_\w+", path.read_text("utf-8")), path
