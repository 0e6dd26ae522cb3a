"""Every sample of a data set, one at a time: a conversation, or why it is none."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from teacher_cache.config import DataConfig
from teacher_cache.data.conversations import Conversation, Skipped, is_read, parse_sample, turn_by_turn
from teacher_cache.data.data_files import DataFile, data_files
from teacher_cache.errors import DataError


class SampleReader:
    """The samples of ``data``, one at a time, in file order; a line that cannot be used comes as :class:`Skipped`.

    ``advance`` is told of bytes as they are read. ``by_turn``: each turn of a conversation is a sample of its own
    (``conversations.turn_by_turn``). :attr:`files` are the facts of what was parsed (sha256, bytes), known once the
    iteration has ended.

    Raises
    ------
    DataError
        When a file is missing, damaged or no list of samples; when none of all samples can be used; or when a sample_id
        comes twice and ``data.duplicate_ids`` is ``error``.
    """

    def __init__(
        self, data: DataConfig, advance: Callable[[int], None] = lambda count: None, by_turn: bool = False
    ) -> None:
        self._data, self._advance, self._by_turn = data, advance, by_turn
        self.paths = data_files(data.path)
        self.files: list[dict[str, Any]] = []
        self.skips = SkipCount()

    def __iter__(self) -> Iterator[Conversation | Skipped]:
        self.files, self.skips = [], SkipCount()
        regenerate, skipped = self._regenerate_rule(), self.skips
        seen: dict[str, int] = {}
        for path in self.paths:
            for line in self._lines(path, lambda: self._data.max_samples - skipped.samples):
                sample = parse_sample(line, skipped.samples)
                unique = _unique(sample.sample_id, seen, self._data, path, skipped.samples)
                sample = replace(sample, sample_id=unique)
                if isinstance(sample, Conversation):
                    sample = replace(sample, regenerate=regenerate(unique))
                parts = turn_by_turn(sample) if self._by_turn and isinstance(sample, Conversation) else [sample]
                for part in parts:
                    if part is not sample and part.sample_id != unique:
                        part = replace(part, sample_id=_unique(part.sample_id, seen, self._data, path, skipped.samples))
                    skipped.add(part)
                    yield part
        names = ", ".join(map(str, self.paths[:3]))
        if not skipped.samples:
            raise DataError(f"{names}: no samples. Set data.path to a LLaVA JSON, JSONL or Parquet file.")
        if skipped.skipped == skipped.samples:
            raise DataError(f"{names}: none of {skipped.samples:,} samples can be used: {skipped}")

    def _lines(self, path: Path, left: Callable[[], int]) -> Iterator[Any]:
        """The file's records, no more than ``data.max_samples`` of all files together."""
        if self._data.max_samples and left() <= 0:
            return
        file = DataFile(path)
        with contextlib.closing(file.records(is_read, self._advance)) as lines:
            for line in lines:
                yield line
                if self._data.max_samples and left() <= 0:
                    break
        self.files.append(file.facts)

    def _regenerate_rule(self) -> Callable[[str], bool]:
        data = self._data
        ids = self._regenerate_ids() if data.regenerate == "ids" else frozenset()
        if not 0 <= data.regenerate_share <= 1:
            raise DataError(f"data.regenerate_share: expected a share between 0 and 1, found {data.regenerate_share:g}")
        limit = int(data.regenerate_share * 2**32)

        def rule(sample_id: str) -> bool:
            picked = data.regenerate == "all" or sample_id in ids
            return picked and int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:4], "little") < limit

        return rule

    def _regenerate_ids(self) -> frozenset[str]:
        if not self._data.regenerate_ids:
            raise DataError("data.regenerate is 'ids', but data.regenerate_ids names no file (one sample_id a line)")
        path = Path(self._data.regenerate_ids)
        if not path.is_file():
            raise DataError(f"data.regenerate_ids: {path}: no such file")
        content = path.read_bytes()
        self.files.append({"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)})
        return frozenset(content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")) - {""}


def _unique(sample_id: str, seen: dict[str, int], data: DataConfig, path: Path, number: int) -> str:
    while True:
        seen[sample_id] = seen.get(sample_id, 0) + 1
        if seen[sample_id] == 1:
            return sample_id
        if data.duplicate_ids == "error":
            raise DataError(
                f"{path}: sample {number} has the id {sample_id!r} of an earlier one. "
                "Make ids unique, or set data.duplicate_ids=number to cache it as "
                f"{sample_id}#{seen[sample_id]}."
            )
        sample_id = f"{sample_id}#{seen[sample_id]}"


def read_conversations(data: DataConfig, by_turn: bool = False) -> list[Conversation | Skipped]:
    """Every sample of ``data`` in memory; raises as :class:`SampleReader`. For all of a large file: ``data.spool``."""
    return list(SampleReader(data, by_turn=by_turn))


@dataclass
class SkipCount:
    """How many samples were seen, how many were skipped, and for which kinds of reasons."""

    samples: int = 0
    skipped: int = 0
    kinds: dict[str, int] = field(default_factory=dict)

    def add(self, sample: Conversation | Skipped) -> None:
        self.samples += 1
        if isinstance(sample, Skipped):
            self.skipped += 1
            kind = kind_of(sample.reason)
            self.kinds[kind] = self.kinds.get(kind, 0) + 1

    def merge(self, other: SkipCount) -> None:
        self.samples += other.samples
        self.skipped += other.skipped
        for kind, count in other.kinds.items():
            self.kinds[kind] = self.kinds.get(kind, 0) + count

    def __str__(self) -> str:
        listed = sorted(self.kinds.items(), key=lambda item: (-item[1], item[0]))
        text = "; ".join(f"{count:,} × {kind}" for kind, count in listed[:4])
        return text + (f"; {len(listed) - 4} more kinds" if len(listed) > 4 else "")


def kind_of(reason: str) -> str:
    """``reason`` without what tells one sample from another: the image's name, numbers, quoted text."""
    kind = re.sub(r"^image .*: (?=[^:]*$)", "an image: ", reason, flags=re.DOTALL)
    return re.sub(r"\d[\d,]*", "N", re.sub(r"(?<=value): .*", "", kind, flags=re.DOTALL))[:120]
