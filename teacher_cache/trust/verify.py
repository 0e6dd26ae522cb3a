"""Is this cache what was written, and can it be trusted? Quick, deep, and by asking the teacher again.

Quick: manifest, side files, counts, sizes. Deep: every checksum, every number, the row rule (``store/invariants.py``).
``rescore_cache`` (``rescore.py``) lets the teacher score samples again. Each problem names shard, file and sample;
``repair_cache`` removes just the shards at fault, and building again makes them anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from teacher_cache.errors import CacheError, CacheVersionError, StorageError
from teacher_cache.store.checksums import INDEX, bad_block_of_file, sha256
from teacher_cache.store.faults import PASSING_NUMBERS
from teacher_cache.store.folder import Files, ShardFolder
from teacher_cache.store.invariants import Fault, image_faults, sample_of_block, shard_faults
from teacher_cache.store.ledger import absent_images
from teacher_cache.store.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from teacher_cache.store.prefetch import LocalCopy, LocalFiles, files_of
from teacher_cache.store.side_files import read_head, read_ledger, read_samples, read_scales
from teacher_cache.store.storage import Storage
from teacher_cache.store.tables import HEAD_BYTES, INDEX_BYTES, answer_ids
from teacher_cache.store.writer import (
    HEAD,
    LEDGER,
    SAMPLES,
    SCALES,
    SKIPPED,
    answers_name,
    images_name,
    shard_name,
    skipped_lines,
)
from teacher_cache.trust.rescore import rescore_cache as rescore_cache

T = TypeVar("T")

DAMAGED_MANIFEST = "manifest.damaged.json"
"""Where ``repair_cache`` keeps a manifest that cannot be read."""


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was written. ``shard`` is None for a fault of the cache as a whole. ``unread``: the
    system did not let us look, so nothing is known of it, and ``repair_cache`` leaves it."""

    what: str
    file: str = ""
    shard: int | None = None
    sample: str = ""
    unread: bool = False

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, f"sample {self.sample}" if self.sample else "") if part)
        return f"{where}: {self.what}" if where else self.what


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at, and what was wrong."""

    problems: tuple[Problem, ...]
    shards: int
    samples: int
    skipped: int
    bytes_read: int
    deep: bool
    is_cache: bool = True  # or there is neither a manifest that can be read nor a shard

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def repairable(self) -> bool:
        """Whether :func:`repair_cache` has something to remove."""
        return self.is_cache and not all(p.unread for p in self.problems)

    @property
    def shards_at_fault(self) -> list[int]:
        return sorted({p.shard for p in self.problems if p.shard is not None and not p.unread})

    def lines(self) -> list[str]:
        """What a person wants to read: the faults, then one line of sums."""
        looked = f"{self.shards:,} shards, {self.samples:,} samples + {self.skipped:,} skipped"
        how = f"every checksum of {self.bytes_read:,} bytes, numbers and row rule" if self.deep else "counts and sizes"
        if self.ok:
            return [f"ok: {looked}; checked {how}"]
        advice = "to repair: teacher-cache verify CACHE --repair, then teacher-cache build CONFIG"
        if not self.repairable:
            advice = "nothing is known to be wrong: mend that, and verify again" if self.is_cache else "no cache here"
        return [*map(str, self.problems), f"{len(self.problems)} problems in {looked}; {advice}"]


def verify_cache(cache: Storage | str | Path, *, deep: bool = False) -> VerifyReport:
    """Check a cache; what is wrong is reported. ``deep``: every checksum, every number and the row rule.

    Raises nothing but ``StorageError`` for an address of no store.

    >>> import teacher_cache as tc
    >>> tc.verify_cache("runs/tiny/cache", deep=True).problems
    ()
    """
    check = _Check(cache if isinstance(cache, Storage) else Storage(cache), deep)
    check.run()
    return VerifyReport(
        tuple(check.problems), check.shards, check.samples, check.skipped, check.bytes_read, deep, check.is_cache
    )


def repair_cache(storage: Storage, report: VerifyReport) -> list[int]:
    """Remove what ``report`` found at fault, so that build makes just that again; nothing where it is not repairable.

    The manifest first says that the cache is not complete. Returns the shards removed. Answers are removed only where
    their file is damaged: other shards are scored again, not answered. A damaged manifest is kept beside its place.

    Raises ``CacheError``: the cache is of another format version (there is nothing to repair), or a folder is a link
    that leads out of the cache (nothing is removed).
    """
    if not report.repairable:
        return []
    doomed = [name(shard) for shard in report.shards_at_fault for name in (shard_name, images_name)]
    for name in doomed:
        storage.exists(name)  # raises for a link that leaves, before anything is changed
    try:
        manifest = read_manifest(storage)
        write_manifest(storage, dataclasses.replace(manifest, complete=False, files={}, counts={}))
    except CacheVersionError:
        raise
    except CacheError:  # build writes it again and checks that the shards belong to it
        with contextlib.suppress(FileNotFoundError):
            storage.write(DAMAGED_MANIFEST, [storage.read(MANIFEST)])
        storage.remove_file(MANIFEST)
    for problem in report.problems:
        if problem.unread:
            continue
        if problem.file in (HEAD, SCALES) or (
            problem.shard is not None and problem.file == answers_name(problem.shard)
        ):
            storage.remove_file(problem.file)
    for name in doomed:
        storage.remove(name, INDEX)
    return report.shards_at_fault


class _Check:
    """One run of ``verify_cache``; gathers problems as it goes."""

    def __init__(self, storage: Storage, deep: bool) -> None:
        self.storage, self.deep = storage, deep
        self.problems: list[Problem] = []
        self._lines: pa.Table | None = None
        self.is_cache = True
        self._present: dict[int, npt.NDArray[np.bool_]] = {}
        self.shards = self.samples = self.skipped = self.bytes_read = 0

    def run(self) -> None:
        try:
            manifest = read_manifest(self.storage)
        except (CacheError, OSError) as error:
            self.problems.append(_problem(error, MANIFEST, None))
            self.is_cache = bool(
                self.problems[0].unread or self._try("shards", None, partial(self.storage.names, "shards"))
            )
            return
        if not manifest.complete:
            self.problems.append(Problem("the cache is not complete: run teacher-cache build with its configuration"))
        self._side_files(manifest)
        ledger = self._ledger(manifest)
        head = self._head(manifest) if self.deep else None
        if SAMPLES in manifest.files and not any(p.file == SAMPLES for p in self.problems):
            self._lines = self._try(SAMPLES, None, partial(read_samples, self.storage, manifest))
        files = files_of(self.storage, manifest.fingerprint)
        try:
            for number in range(manifest.planned_shards):
                self._shard(manifest, files, number, ledger, head)
        finally:
            files.close()
        if manifest.complete:
            self._accounts(manifest)

    def _side_files(self, manifest: Manifest) -> None:
        for name, expected in manifest.files.items():
            if not self.deep and name in (HEAD, SCALES):
                self._try(name, None, partial(self.storage.size, name))
                continue
            data = self._try(name, None, partial(self.storage.read, name, HEAD_BYTES if name == HEAD else INDEX_BYTES))
            if data is None:
                continue
            self.bytes_read += len(data)
            if sha256(data) != expected:
                self.problems.append(Problem("changed after it was written (sha256 differs)", name))

    def _try(self, name: str, number: int | None, look: Callable[[], T]) -> T | None:
        """What ``look`` finds; None, and a problem, where it cannot."""
        try:
            return look()
        except FileNotFoundError:
            self.problems.append(Problem("missing", name, number))
        except (CacheError, OSError) as error:
            self.problems.append(_problem(error, name, number))
        return None

    def _ledger(self, manifest: Manifest) -> pa.Table | None:
        """The ledger where it can be trusted."""
        if any(p.file == LEDGER for p in self.problems) or LEDGER not in manifest.files:
            return None
        return self._try(LEDGER, None, partial(read_ledger, self.storage, manifest))

    def _head(self, manifest: Manifest) -> Any:
        damaged = {p.file for p in self.problems}
        if HEAD not in manifest.files or damaged & {HEAD, SCALES}:
            return None
        scales: Any = {}
        if SCALES in manifest.files:
            scales = self._try(SCALES, None, partial(read_scales, self.storage, manifest))
        head = self._try(HEAD, None, partial(read_head, self.storage, manifest))
        return None if head is None or scales is None else (head, scales)

    def _shard(
        self, manifest: Manifest, files: LocalFiles | LocalCopy, number: int, ledger: pa.Table | None, head: Any
    ) -> None:
        line = ledger.slice(number, 1).to_pylist()[0] if ledger is not None else {}
        folder = self._folder(files, shard_name(number), number, line.get("index_sha256"), manifest)
        if manifest.image_arrays:
            images = self._folder(files, images_name(number), number, line.get("images_sha256"), manifest)
            if images is not None:
                self._present[number] = images.images.present
            if images is not None and self.deep and not any(p.shard == number for p in self.problems):
                self._faults(number, images_name(number), image_faults(images, manifest))
        answers = self._answers(number, line.get("answers_sha256"))
        if folder is None:
            return
        self._listed(folder, number, line)
        self.shards += 1
        self.samples += len(folder.samples.sample_ids)
        for line_number, shard, row in absent_images(folder.samples.places, self._present):
            what = f"refers to line {row}, whose image could not be read when it was made"
            sample = folder.samples.sample_ids[line_number].as_py()
            self.problems.append(Problem(what, images_name(shard), shard, sample))
        self.skipped += len(folder.extra["skipped"])
        if self.deep and not any(p.shard == number for p in self.problems):
            self._faults(number, shard_name(number), shard_faults(folder, manifest, head, answers))

    def _listed(self, folder: ShardFolder, number: int, line: dict[str, Any]) -> None:
        """The shard's samples are those that the ledger counts and ``samples.parquet`` lists."""
        samples, count = folder.samples, len(folder.samples.sample_ids)
        if line and line["samples"] != count:
            self.problems.append(Problem(f"{line['samples']} samples of shard {number}, but it has {count}", LEDGER))
        if self._lines is None or any(p.file == LEDGER or p.shard is not None for p in self.problems):
            return
        listed = self._lines.slice(self.samples, count)
        same = listed["sample_id"].to_pylist() == samples.sample_ids.to_pylist()
        if not same or any((listed[name].to_numpy() != column).any() for name, column in samples.counted.items()):
            self.problems.append(Problem(f"other samples or counts than those of shard {number}", SAMPLES))
            self._lines = None

    def _faults(self, number: int, name: str, faults: Iterator[Fault]) -> None:
        try:
            for what, array, sample in faults:
                self.problems.append(Problem(what, f"{name}/{array}" if array else name, number, sample))
        except (CacheError, OSError) as error:
            self.problems.append(_problem(error, name, number))

    def _folder(
        self, files: Files, name: str, number: int, digest: str | None, manifest: Manifest
    ) -> ShardFolder | None:
        """The folder, if its index can be trusted; sizes and (deep) checksums of its files are checked."""
        try:
            folder = ShardFolder(files, name, digest, True, self.storage.url, manifest)
        except (CacheError, OSError) as error:
            self.problems.append(_problem(error, f"{name}/{INDEX}", number))
            return None
        for file, sums in folder.sums.items():
            self._file(files, folder, f"{name}/{file}", number)
            self.bytes_read += sums.bytes if self.deep else 0
        return folder

    def _file(self, files: Files, folder: ShardFolder, name: str, number: int) -> None:
        file = name.split("/", 2)[2]
        expected = folder.sums[file]
        if not self.deep:
            found = self._try(name, number, lambda: self.storage.size_or_none(name) or 0)
            if found is not None and found != expected.bytes:
                shown = f"{found:,} bytes" if found else "no file, or an empty one"
                self.problems.append(Problem(f"expected {expected.bytes:,} bytes, found {shown}", name, number))
            return
        try:
            path = files.path(name, expected)
            block = bad_block_of_file(path, expected)
        except FileNotFoundError:
            self.problems.append(Problem(f"expected {expected.bytes:,} bytes, found no file", name, number))
            return
        except (CacheError, OSError) as error:
            self.problems.append(_problem(error, name, number))
            return
        if block is not None:
            sample = sample_of_block(folder, file, block)
            what = f"changed after it was written (checksum of the 1 MiB block {block} differs)"
            self.problems.append(Problem(what, name, number, sample))

    def _answers(self, number: int, digest: str | None) -> dict[str, list[int]] | None:
        """The shard's answers, where they are as they were written."""
        name = answers_name(number)
        unknown = digest is None and any(p.file == LEDGER and p.unread for p in self.problems)
        if digest == "" or (unknown and self._try(name, number, partial(self.storage.size_or_none, name)) is None):
            return None  # a cache may be without answers, which its ledger says
        if not self.deep:
            self._try(name, number, lambda: self.storage.size(name))
            return None
        data = self._try(name, number, lambda: self.storage.read(name, INDEX_BYTES))
        if data is None:
            return None
        self.bytes_read += len(data)
        if digest is not None and sha256(data) != digest:
            self.problems.append(Problem("changed after it was written (sha256 differs)", name, number))
            return None
        return self._try(name, number, partial(answer_ids, data, f"{self.storage.url}/{name}"))

    def _accounts(self, manifest: Manifest) -> None:
        """Cached + skipped = input, in the shards, the manifest and the list of the skipped."""
        if any(p.shard is not None for p in self.problems):
            return
        if self.samples + self.skipped != manifest.planned_samples:
            what = f"{self.samples} cached + {self.skipped} skipped samples, expected {manifest.planned_samples}"
            self.problems.append(Problem(what))
        if (self.samples, self.skipped) != (manifest.counts["samples"], manifest.counts["skipped"]):
            self.problems.append(Problem("the manifest counts other numbers of samples than its shards", MANIFEST))
        if not any(p.file == SKIPPED for p in self.problems):
            listed = self._try(SKIPPED, None, partial(skipped_lines, self.storage))
            if listed is not None and len(listed) != self.skipped:
                self.problems.append(Problem(f"{len(listed)} lines, expected {self.skipped}", SKIPPED))


def _problem(error: CacheError | OSError, file: str, shard: int | None) -> Problem:
    number = error.errno if isinstance(error, OSError) else 0
    denied = number in (errno.EACCES, errno.EPERM, *PASSING_NUMBERS)
    return Problem(str(error), file, shard, unread=denied or (number is None and isinstance(error, StorageError)))
