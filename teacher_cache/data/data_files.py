"""The records of data files, one at a time and in order: JSON arrays, JSON lines, Parquet and Arrow, known by content.

A file is read once, a block at a time, and its digest is that of the bytes that were parsed.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from teacher_cache.data.arrow_file import FILE, STREAM, record_batches
from teacher_cache.data.hub import SCHEME, hub_files, saved_files
from teacher_cache.data.parquet_pages import pages
from teacher_cache.errors import DataError

BLOCK = 4 << 20
"""Bytes read at a time."""
LARGEST_RECORD = 256 << 20
"""Characters of one sample; a file without a second sample in so many is no list of samples."""
PAGE_RATIO, PAGE_BYTES, PAGE_VALUES = 256, 64 << 20, 16 << 20
"""A Parquet page may be so many times its stored size, and so many bytes and values beyond that."""
_ARROW_ROWS = 16
"""Records of an Arrow batch in Python's hands at once: their embedded images are copied."""
KINDS = (".json", ".jsonl", ".ndjson", ".parquet")
"""What is taken out of a folder; a file that is named itself may be called anything."""
_SPACE = re.compile(r"[\ufeff \t\r\n]*")
Advance = Callable[[int], None]
Wanted = Callable[[str], bool]


def data_files(path: str | Sequence[str]) -> list[Path]:
    """The files that ``path`` names: each a file, a folder (its data files, sorted; of one by ``save_to_disk`` its
    Arrow files), a glob pattern (sorted) or a data set of Hugging Face's hub (:func:`hub.hub_files`).

    Raises ``DataError``: one of them names no file.
    """
    found: list[Path] = []
    for name in [path] if isinstance(path, str) else list(path):
        one = Path(name)
        if name.startswith(SCHEME):
            files = hub_files(name)
        elif one.is_dir() and (saved := saved_files(one)) is not None:
            files = saved
        elif one.is_dir():
            files = sorted(p for p in one.rglob("*") if p.suffix.lower() in KINDS and p.is_file())
            parquet = [p for p in files if p.suffix.lower() == ".parquet"]
            files = parquet or files  # beside the Parquet files of a hub's data set lie notes in JSON
        elif one.is_file() or not re.search(r"[*?\[]", name):
            files = [one]
        else:
            files = sorted(Path(p) for p in glob.glob(name, recursive=True) if Path(p).is_file())  # noqa: PTH207
        if not files or not files[0].is_file():
            raise DataError(
                f"{name}: no such data file. Set data.path to a JSON, JSONL or Parquet file, to a folder of them, to a "
                f"pattern such as data/train-*.parquet or to {SCHEME}OWNER/NAME"
            )
        found += files
    return found


class DataFile:
    """One data file; :attr:`facts` are known once :meth:`records` was left."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = {}

    def records(self, wanted: Wanted, advance: Advance) -> Generator[Any, None, None]:
        """Each record; of Parquet only the columns that are ``wanted``. ``advance`` is told of bytes as they are read.

        Whoever takes only the first records leaves the rest of a JSON file unread; the digest is then that of the
        part that was parsed.

        Raises ``DataError``: damaged, in another encoding, or no list of records; names the file and the line.
        """
        with self.path.open("rb") as file:
            start = file.read(8)
            file.seek(0)
            if start[:4] == b"PAR1":
                yield from self._table(file, "Parquet", self._parquet(file, wanted, advance))
                return
            if start.startswith((STREAM, FILE)):
                yield from self._table(file, "Arrow", self._arrow(file, wanted, advance))
                return
            if start[:2] == b"\x1f\x8b" or start[:4] in (b"PK\x03\x04", b"\x28\xb5\x2f\xfd"):
                raise DataError(f"{self.path}: a compressed file. Unpack it first")
            text = _Text(file, self.path, advance)
            try:
                yield from text.records()
            finally:
                self.facts = {"sha256": text.digest(), "bytes": text.bytes_parsed}

    def _table(self, file: BinaryIO, kind: str, batches: Iterator[pa.RecordBatch]) -> Iterator[Any]:
        """A few records at a time, so that no more than a page of embedded images is in memory."""
        before = os.fstat(file.fileno())
        try:
            for batch in batches:
                yield from batch.to_pylist()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{self.path}: not a readable {kind} file ({error}). Fetch it again") from error
        finally:
            file.seek(0)
            digest = hashlib.sha256()
            while block := file.read(BLOCK):
                digest.update(block)
            self.facts = {"sha256": digest.hexdigest(), "bytes": before.st_size}
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise DataError(f"{self.path}: changed while it was read. Let it rest, then run the same command again")

    def _parquet(self, file: BinaryIO, wanted: Wanted, advance: Advance) -> Iterator[pa.RecordBatch]:
        opened = pq.ParquetFile(pa.PythonFile(file, "r"), pre_buffer=False, buffer_size=BLOCK)
        columns = [name for name in opened.schema_arrow.names if wanted(name)]
        row_bytes = os.fstat(file.fileno()).st_size // max(opened.metadata.num_rows, 1)
        rows = min(1024, max(1, BLOCK // max(row_bytes, 1)))
        for group in range(opened.num_row_groups):
            self._check_pages(file, opened.metadata.row_group(group), columns)
            for batch in opened.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
                advance(batch.num_rows * row_bytes)
                yield batch

    def _arrow(self, file: BinaryIO, wanted: Wanted, advance: Advance) -> Iterator[pa.RecordBatch]:
        for batch in record_batches(file):
            advance(batch.nbytes)
            columns = batch.select([name for name in batch.schema.names if wanted(name)])
            for start in range(0, batch.num_rows, _ARROW_ROWS):
                yield columns.slice(start, _ARROW_ROWS)

    @staticmethod
    def _check_pages(file: BinaryIO, group: Any, columns: Sequence[str]) -> None:
        """Refuse a page that unpacks to far more than it is before there is room made for it."""
        chunks = [group.column(i) for i in range(group.num_columns)]
        for chunk in chunks:
            if chunk.path_in_schema.partition(".")[0] not in columns:
                continue
            for page in pages(lambda at, count: os.pread(file.fileno(), count, at), chunk):
                if page.unpacked > PAGE_RATIO * page.stored + PAGE_BYTES or page.values > page.stored + PAGE_VALUES:
                    raise ValueError(
                        f"column {chunk.path_in_schema}: a page of {page.stored:,} bytes that unpacks to "
                        f"{page.unpacked:,} bytes and {page.values:,} values"
                    )


class _Text:
    """A JSON file: the text that was read and not parsed yet, and a digest of what was parsed."""

    def __init__(self, file: BinaryIO, path: Path, advance: Advance) -> None:
        self._file, self._path, self._advance = file, path, advance
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._scan = json.JSONDecoder().raw_decode
        self._sum = hashlib.sha256()
        self._text, self._place, self._ended = "", 0, False
        self._line, self._read = 1, 0
        self.bytes_parsed = 0

    def digest(self) -> str:
        """sha256 of the bytes up to the last record that was taken; of the whole file at its end."""
        self._forget()
        return self._sum.hexdigest()

    def records(self) -> Iterator[Any]:
        first = self._next()
        if first == "[":
            yield from self._array()
        elif first == "{":
            yield from self._lines()
        elif first:
            raise self._error(f"expected a list of samples (LLaVA's JSON) or one sample a line, found {first!r}")

    def _array(self) -> Iterator[Any]:
        self._place += 1
        if self._next() != "]":
            while True:
                yield self._value()
                mark = self._next()
                if mark == "]":
                    break
                if mark != ",":
                    raise self._error("expected a comma or the end of the list" if mark else "the list has no end")
                self._place += 1
        self._place += 1
        if self._next():
            raise self._error("text behind the end of the list")

    def _lines(self) -> Iterator[Any]:
        first = self._value()
        if not self._next() and isinstance(first, dict) and not {"conversations", "messages"} & first.keys():
            raise self._error(f"expected a list of samples, found one object with {', '.join(map(repr, first))[:80]}")
        yield first
        while self._next():
            yield self._value()

    def _next(self) -> str:
        """The next character that is no space, '' at the end; the place is before it."""
        while True:
            found = _SPACE.match(self._text, self._place)
            assert found is not None
            self._place = found.end()
            if self._place < len(self._text):
                return self._text[self._place]
            if self._ended:
                return ""
            self._more()

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = self._scan(self._text, self._place)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos > len(self._text) - 16
                if self._ended or not cut_off or len(self._text) - self._place > LARGEST_RECORD:
                    raise self._error(f"not JSON ({error.msg})", error.pos) from error
            except RecursionError:
                raise self._error("not a sample: lists or objects nested too deep") from None
            except ValueError as error:  # an integer of thousands of digits
                raise self._error(f"not a sample ({str(error)[:60]})") from None
            else:
                if end < len(self._text) or self._ended:
                    self._place = end
                    return value
            self._more()

    def _more(self) -> None:
        self._forget()
        try:
            block = self._file.read(max(BLOCK, len(self._text)))  # twice as much of a record that is not whole yet
            if self._read == 0 and block[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(f"{self._path}: UTF-16. Save it as UTF-8")
            self._ended = not block
            self._text += self._decode.decode(block, final=self._ended)
        except UnicodeDecodeError as error:
            where = self._read + error.start
            raise DataError(f"{self._path}: byte {where}: not UTF-8 ({error.reason}). Save it as UTF-8") from None
        self._read += len(block)
        self._advance(len(block))

    def _forget(self) -> None:
        """Drop what was parsed, into the digest."""
        done, self._text = self._text[: self._place], self._text[self._place :]
        self._place = 0
        self._line += done.count("\n")
        data = done.encode()
        self._sum.update(data)
        self.bytes_parsed += len(data)

    def _error(self, what: str, place: int | None = None) -> DataError:
        line = self._line + self._text.count("\n", 0, self._place if place is None else place)
        return DataError(f"{self._path}: line {line}: {what}")
