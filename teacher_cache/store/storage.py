"""Files of a cache, in a local folder or behind any fsspec URL, with the two ways to commit.

Local: a folder is written under a temporary name, fsynced and renamed; it exists complete or not at all. Object
stores cannot rename: there the folder's last object is its commit mark, and a folder without the mark does not exist
for any reader. Both ways write the mark last, so one rule ("no index.parquet, no shard") serves both.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from teacher_cache.errors import StorageError
from teacher_cache.files import TRIES, again, flush, whole
from teacher_cache.store import names
from teacher_cache.store.faults import explained, patiently
from teacher_cache.terminal import without_secrets

Parts = Iterable[bytes | memoryview]
T = TypeVar("T")


class Storage:
    """A cache's root folder. Names are relative, with ``/``."""

    def __init__(self, url: str | Path, options: Mapping[str, Any] | None = None) -> None:
        #: the whole address, passwords included
        self.address = str(url).rstrip("/")
        #: what messages and files may say: the address without passwords and signatures
        self.url = without_secrets(self.address)
        self.options = dict(options or {})
        self._connect()
        self.local: Path | None = Path(self._root) if "file" in _protocols(self._open_fs) else None

    def _connect(self) -> None:
        try:
            self._open_fs, self._root = fsspec.core.url_to_fs(self.address, **self.options)
        except (ValueError, ImportError) as error:  # an unknown protocol, or one whose library is not installed
            raise StorageError(
                f"{self.url}: {without_secrets(str(error))}. Name a folder, or s3:// or gs:// (extras s3, gcs)"
            ) from error
        self._process = os.getpid()

    @property
    def _fs(self) -> Any:
        """The file system, connected anew in a forked worker (its network thread does not survive a fork), and
        without what it remembers of earlier listings, which another writer may have changed."""
        if self._process != os.getpid():
            self._connect()
        self._open_fs.invalidate_cache()
        return self._open_fs

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.address, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"], state["options"])  # type: ignore[misc]

    def path(self, name: str) -> str:
        """The address of ``name`` ("" for the root) as the file system knows it; names that leave are refused."""
        return f"{self._root}/{names.plain_name(name, self.url) if name else name}"

    def local_file(self, name: str) -> Path:
        """The regular file ``name`` of a local cache; ``CacheError`` for a link that leaves, or no file."""
        assert self.local is not None
        return names.regular_file(self.local, name)

    def exists(self, name: str) -> bool:
        return self._ask("look for", name, names.is_there, lambda fs, path: bool(fs.exists(path)))

    def read(self, name: str, at_most: int | None = None) -> bytes:
        """The whole file; ``FileNotFoundError`` when there is none.

        With ``at_most`` a file of more bytes ends in a ``CacheError``, whatever the server said of its size.
        """
        if self.local is not None or at_most is None:
            inside = functools.partial(names.read_inside, at_most=at_most)
            return self._ask("read", name, inside, lambda fs, path: bytes(fs.cat_file(path)))
        with tempfile.TemporaryDirectory(prefix="teacher-cache-") as folder:
            self.download(name, target := Path(folder, "file"), at_most)
            return target.read_bytes()

    def size(self, name: str) -> int:
        return self._ask("look up", name, names.file_size, lambda fs, path: int(fs.info(path)["size"]))

    def size_or_none(self, name: str) -> int | None:
        """The size of a file, or None when there is none."""
        try:
            return self.size(name)
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> list[str]:
        """Entries of ``folder`` (last part of the name), sorted; none when it does not exist."""
        return self._ask("list", folder, names.entries, _remote_entries)

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file below ``folder``, by name relative to it."""
        return self._ask("list", folder, names.sizes_below, _remote_sizes)

    def write(self, name: str, parts: Parts) -> None:
        """Write one file so that it is either the old one or the new one, never half of it."""
        if self.local is None:
            data = b"".join(parts)
            self._retry("write", name, lambda fs, path: fs.pipe_file(path, data))
            return
        target = names.inside(self.local, name)
        with explained("write", str(target)):
            kept = list(parts)  # a try after a fault writes all of it again
            self.remove_unfinished(name)
        patiently("write", str(target), lambda: _write_whole(target, kept))

    def create(self, name: str, data: bytes) -> bool:
        """Write a file that must not be there yet; False when it is."""
        try:
            if self.local is not None:
                with names.inside(self.local, name).open("xb") as file:
                    file.write(data)
            else:
                self._retry("write", name, lambda fs, path: fs.pipe_file(path, data, mode="create"))
        except FileExistsError:
            return False
        return True

    def commit_folder(self, folder: str, files: Mapping[str, Parts], mark: str) -> None:
        """Write ``files`` (relative names) as ``folder``; the folder is there when ``mark``, written last, is."""
        ordered = [*(n for n in files if n != mark), mark]
        if self.local is None:
            if self.exists(f"{folder}/{mark}"):  # a folder that is redone does not exist meanwhile
                self._retry("delete", f"{folder}/{mark}", lambda fs, path: fs.rm_file(path))
            for name in ordered:
                self.write(f"{folder}/{name}", files[name])
            return
        target = names.inside(self.local, folder)
        patiently("write", str(target), lambda: self._commit_local(folder, target, files, ordered))

    def _commit_local(self, folder: str, target: Path, files: Mapping[str, Parts], ordered: list[str]) -> None:
        temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        try:
            self.remove_unfinished(folder)
            for name in ordered:
                path = temporary / name
                path.parent.mkdir(parents=True, exist_ok=True)
                _write_file(path, files[name])
            for inner in {(temporary / name).parent for name in ordered}:
                flush(inner)
            if target.exists():  # a folder that is redone: out of sight first, then away
                if not target.is_dir():
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
                old = target.with_name(f".{target.name}.tmp-old-{os.getpid()}")
                target.rename(old)
                shutil.rmtree(old)
            temporary.rename(target)
            flush(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def remove_unfinished(self, folder: str) -> None:
        """Delete what a killed process left of a folder (or file); nothing that was committed."""
        if self.local is None:
            return
        target = names.inside(self.local, folder)
        for left in target.parent.glob(f".{target.name}.tmp-*"):
            if left.is_dir() and not left.is_symlink():  # a stranger's link is never followed
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)

    def remove(self, folder: str, mark: str) -> None:
        """Delete a committed folder: at once, or not at all."""
        if self.local is not None:
            target = names.inside(self.local, folder)
            with explained("delete", str(target)), contextlib.suppress(FileNotFoundError):
                aside = target.with_name(f".{target.name}.tmp-old-{os.getpid()}")
                target.rename(aside)
                aside.unlink() if aside.is_symlink() or aside.is_file() else shutil.rmtree(aside)
            return
        self.remove_file(f"{folder}/{mark}")
        with contextlib.suppress(FileNotFoundError):
            self._retry("delete", folder, lambda fs, path: fs.rm(path, recursive=True))

    def remove_file(self, name: str) -> None:
        """Delete one file, if it is there."""
        if self.local is not None:
            names.inside(self.local, name).unlink(missing_ok=True)
            return
        with contextlib.suppress(FileNotFoundError):
            self._retry("delete", name, lambda fs, path: fs.rm_file(path))

    def download(self, name: str, target: Path, at_most: int) -> None:
        """Copy a remote file to ``target``, which appears complete or not at all; ``at_most`` bytes are written."""
        where = f"{self.url}/{name}"
        with explained("write", str(target)), whole(target) as part:
            self._retry("read", name, lambda fs, path: fs.get_file(path, str(part), callback=_AtMost(where, at_most)))

    def free_bytes(self) -> int | None:
        """Free space where the cache lies; None for an object store."""
        if self.local is None:
            return None
        folder = self.local
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def _ask(self, verb: str, name: str, local: Callable[[Path, str], T], remote: Callable[[Any, str], T]) -> T:
        """What the disk says of (root, name), or the object store of (file system, path)."""
        root = self.local
        if root is not None:
            return patiently(verb, f"{root}/{name}", lambda: local(root, name))
        return self._retry(verb, name, remote)

    def _retry(self, verb: str, name: str, call: Callable[[Any, str], T]) -> T:
        """``call`` (of the file system and the path of ``name``), again after passing faults."""
        try:
            return again(lambda: call(self._fs, self.path(name)), _passing)
        except PermissionError as error:
            raise StorageError(
                errno.EACCES,
                f"{self.url}/{name}: no permission to {verb} it ({error}). Check the credentials and the bucket's "
                "policy, or set another output; committed shards stand",
            ) from error
        except Exception as error:
            if not _passing(error):
                raise
            raise StorageError(
                f"{self.url}/{name}: could not {verb} it in {TRIES} tries ({error}). Committed shards stand; run the "
                "same command again to go on."
            ) from error


def _passing(error: Exception) -> bool:
    """Whether trying again may help: network and service faults, which clients raise under names of their own."""
    if isinstance(error, (FileNotFoundError, FileExistsError, PermissionError)):
        return False
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CLIENTS


_CLIENTS = {"botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "requests", "urllib3"}


def _remote_entries(fs: Any, path: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return sorted({str(e).rstrip("/").rsplit("/", 1)[-1] for e in fs.ls(path, detail=False)})
    return []


def _remote_sizes(fs: Any, path: str) -> dict[str, int]:
    start = path.rstrip("/") + "/"
    with contextlib.suppress(FileNotFoundError):
        return {n.partition(start)[2] or n: int(f["size"]) for n, f in fs.find(path, detail=True).items()}
    return {}


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


class _AtMost(fsspec.callbacks.Callback):  # type: ignore[misc]
    """Ends a transfer that brings more than it should: a server may send without end."""

    def __init__(self, where: str, bytes_: int) -> None:
        super().__init__()
        self._where, self._limit = where, bytes_

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self._limit:
            raise names.too_large(self._where, None, self._limit)


def _write_whole(target: Path, parts: Parts) -> None:
    with whole(target) as part:
        _write_file(part, parts)
    flush(target.parent)


def _write_file(path: Path, parts: Parts) -> None:
    path.unlink(missing_ok=True)
    with path.open("xb") as file:  # a new file: a link that lies in its place is not followed
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
