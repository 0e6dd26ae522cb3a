"""Files of a remote cache, copied into a bounded local folder, ahead of their use where the order is known.

Several processes may share one folder: a file appears complete or not at all, the space used is what lies in the
folder, and the file used longest ago goes first. A copy is checked before it appears, so a broken transfer is tried
again and never mistaken for a damaged cache.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from teacher_cache.errors import CacheError
from teacher_cache.files import whole
from teacher_cache.store.checksums import FileSum, bad_block_of_file
from teacher_cache.store.names import inside
from teacher_cache.store.storage import Storage
from teacher_cache.store.tables import INDEX_BYTES

THREADS = 4
_TRANSFERS = 3


class LocalFiles:
    """The files of a local cache, where they lie."""

    def __init__(self, storage: Storage) -> None:
        assert storage.local is not None
        self._storage = storage

    def path(self, name: str, expected: FileSum) -> Path:
        return self._storage.local_file(name)

    def begin(self, name: str, expected: FileSum) -> None:
        """Nothing to copy."""

    def index(self, name: str) -> bytes:
        return self._storage.read(name, INDEX_BYTES)

    def close(self) -> None:
        """Nothing is held."""


class LocalCopy:
    """``folder`` holds at most ``gigabytes`` of ``storage``'s files (and always the file that was asked for last).

    ``generation`` (a digest that covers every file of the cache) keeps the copies of another build apart.
    ``deletions`` counts how often copies were deleted: a reader then lets go of those it has mapped.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str | Path | None,
        gigabytes: float,
        generation: str,
    ) -> None:
        self._remote, self._limit = storage, int(gigabytes * 2**30)
        self.deletions = 0
        self._own = folder is None
        self._folder = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="teacher-cache-"))
        self._folder.mkdir(parents=True, exist_ok=True)
        self._root = inside(self._folder, generation[:16])
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="prefetch")
        self._under_way: dict[str, Future[Path]] = {}
        self._under_way_bytes = 0
        self._lock = threading.Lock()
        self._process = os.getpid()

    def begin(self, name: str, expected: FileSum) -> Future[Path]:
        """Start to copy ``name`` unless it is there or on its way."""
        with self._lock:
            future = self._under_way.get(name)
            if future is None:
                future = self._under_way[name] = self._threads.submit(self._copy, name, expected)
            return future

    def path(self, name: str, expected: FileSum) -> Path:
        """The local copy of ``name``; errors of the copying thread surface here."""
        target = inside(self._root, name)
        for _ in range(_TRANSFERS):  # another process may delete a copy just before we use it
            future = self.begin(name, expected)
            try:
                future.result()
            finally:
                with self._lock:
                    self._under_way.pop(name, None)
            with contextlib.suppress(FileNotFoundError):
                os.utime(target)
                return target
        raise CacheError(
            f"{self._folder}: {name} was deleted {_TRANSFERS} times before it could be read. The prefetch folder is "
            f"too small ({self._limit / 2**30:.1f} GB) for the processes that share it: raise prefetch_gigabytes"
        )

    def index(self, name: str) -> bytes:
        """An index, from the remote cache itself: small, and its digest is checked by the caller."""
        return self._remote.read(name, INDEX_BYTES)

    def close(self) -> None:
        if os.getpid() != self._process:  # a forked worker: threads and folder are the parent's
            return
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._own:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _copy(self, name: str, expected: FileSum) -> Path:
        target = inside(self._root, name)
        with contextlib.suppress(FileNotFoundError):
            if target.stat().st_size == expected.bytes:
                os.utime(target)
                return target
        with self._lock:
            self._under_way_bytes += expected.bytes
            self._make_room()
        try:
            return self._transfer(name, target, expected)
        finally:
            with self._lock:
                self._under_way_bytes -= expected.bytes

    def _transfer(self, name: str, target: Path, expected: FileSum) -> Path:
        with whole(target) as fetched:
            for _ in range(_TRANSFERS):
                try:
                    self._remote.download(name, fetched, expected.bytes)
                except FileNotFoundError:
                    raise CacheError(f"{self._remote.url}/{name}: missing; {_REPAIR}") from None
                if bad_block_of_file(fetched, expected) is None:
                    return target
            raise CacheError(
                f"{self._remote.url}/{name}: copied {_TRANSFERS} times ({fetched.stat().st_size:,} bytes), but the "
                f"checksum of its index ({expected.bytes:,} bytes) never fits: it was changed after it was written; "
                f"{_REPAIR}"
            )

    def _make_room(self) -> None:
        """Delete the copies used longest ago until those under way fit under the limit."""
        files = sorted(_files(self._folder))
        total = sum(size for _, size, _ in files) + self._under_way_bytes
        for _, size, path in files:
            if total <= self._limit:
                return
            path.unlink(missing_ok=True)
            total -= size
            self.deletions += 1


_REPAIR = "run teacher-cache verify --repair with the cache's configuration"


def _files(folder: Path) -> list[tuple[float, int, Path]]:
    """(time of last use, size, path) of every finished copy in ``folder``."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            if ".tmp-" not in name:  # a transfer that is under way
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    found.append((stat.st_mtime, stat.st_size, path))
    return found


def files_of(storage: Storage, generation: str) -> LocalFiles | LocalCopy:
    """The files of a cache that is looked through once: where they lie, or copies that are soon deleted."""
    return LocalFiles(storage) if storage.local is not None else LocalCopy(storage, None, 2.0, generation)
