"""One writer for an output: builds, fits and ablations hold its lock while they run.

On a disk the lock is the kernel's (``flock`` on ``.lock``), so it ends with its process however that ends, and holds
between containers and over NFS. An object store has no such thing: there ``.lock`` is an object that must not exist
before, and one whose process is known to be dead (same host, same boot, same process namespace) is taken over. The lock
of another host cannot be judged from here: it is left to a person, who is told whose it is and what removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shlex
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from teacher_cache.errors import StorageError
from teacher_cache.store.faults import explained
from teacher_cache.store.storage import Storage

LOCK = ".lock"
_TO_SIGN = 2.0
"""Seconds in which who has a lock file should have written its name into it."""
_NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


class LockedError(StorageError):
    """Another process writes into this output."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. ``place``: boot and process namespace, in which alone a pid means something."""

    host: str
    pid: int
    place: str
    since: str
    command: str
    token: str

    @classmethod
    def me(cls) -> Holder:
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        command = shlex.join([Path(sys.argv[0] or "python").name, *sys.argv[1:]])[:300]
        command = re.sub(r"://[^/@\s]*@", "://", command)  # no password goes into a file
        return cls(socket.gethostname(), os.getpid(), _place(), since, command, uuid.uuid4().hex)

    def bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @property
    def dead(self) -> bool:
        """Whether the process is known to have ended; False where it cannot be known from here."""
        if (self.host, self.place) != (socket.gethostname(), _place()) or not self.place:
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except OSError:
            return True
        return state in "ZX"

    def __str__(self) -> str:
        return f"{self.host}, process {self.pid}, since {self.since} ({self.command})"


@contextlib.contextmanager
def locked(storage: Storage, *, break_lock: bool = False) -> Iterator[None]:
    """Hold the lock of the output ``storage`` for the block.

    Raises ``LockedError``: another process holds it; names host, process, time and command. ``break_lock`` removes the
    lock *object* of a process that a person knows to be dead; a lock that the kernel keeps is never broken: its process
    lives.
    """
    with _object(storage, break_lock) if storage.local is None else _file(storage.local, storage, break_lock):
        yield


@contextlib.contextmanager
def _file(folder: Path, storage: Storage, break_lock: bool) -> Iterator[None]:
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    path = folder / LOCK
    with explained("write", str(path)):
        descriptor = _flock(path)
    if descriptor is None:  # a file system without locks
        with _object(storage, break_lock):
            yield
        return
    try:
        with explained("write", str(path)):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, Holder.me().bytes(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who waits for it sees that the file is another one
        os.close(descriptor)
        for parent in made:  # an output that was refused leaves no empty folder
            with contextlib.suppress(OSError):
                parent.rmdir()


@contextlib.contextmanager
def waiting_for(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` for the block, once whoever has it is done. Where the file system knows no locks the
    block runs at once."""
    with explained("write", str(path)):
        descriptor = _flock(path, wait=True)
    try:
        yield
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _flock(path: Path, wait: bool = False) -> int | None:
    """A descriptor that holds the lock of ``path``; None where the file system knows no locks."""
    patience = time.monotonic() + _TO_SIGN
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # the holder before left, and took its empty folder with it
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            held = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                if _holder(held) is None and time.monotonic() < patience:  # it has the lock, but has not signed yet
                    time.sleep(0.01)
                    continue
                raise _refused(str(path), _holder(held), "Wait for it, end it, or choose another output") from None
            if error.errno in _NO_FLOCK:
                return None
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # its holder removed it as it left


@contextlib.contextmanager
def _object(storage: Storage, break_lock: bool) -> Iterator[None]:
    me = Holder.me()
    if break_lock:
        storage.remove_file(LOCK)
    while not storage.create(LOCK, me.bytes()):
        try:
            held = _holder(storage.read(LOCK))
        except FileNotFoundError:
            continue
        if held is not None and held.token == me.token:  # our own, of a try whose answer was lost
            break
        if held is None or not held.dead:
            advice = "If that process is dead, run the same command with --break-lock; else wait, or end it"
            raise _refused(f"{storage.url}/{LOCK}", held, advice)
        storage.remove_file(LOCK)
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            held = _holder(storage.read(LOCK))
            if held is not None and held.token == me.token:
                storage.remove_file(LOCK)


def _refused(where: str, held: Holder | None, advice: str) -> LockedError:
    who = str(held) if held is not None else "another process, which does not say which"
    return LockedError(f"{where}: another run writes here: {who}. {advice}")


def _holder(data: bytes) -> Holder | None:
    try:
        plain = json.loads(data)
        return Holder(**{name: kind(plain[name]) for name, kind in _FIELDS.items()})
    except (ValueError, KeyError, TypeError):
        return None


_FIELDS: dict[str, type] = {"host": str, "pid": int, "place": str, "since": str, "command": str, "token": str}


def _place() -> str:
    """Boot and process namespace of this process; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
