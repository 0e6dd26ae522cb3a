"""What a disk answers when it cannot: which answers may pass and are waited for, and what to do about the others."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from typing import TypeVar

from teacher_cache.errors import StorageError
from teacher_cache.files import again

T = TypeVar("T")
PASSING_NUMBERS = {
    *(errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN),
}
"""What a disk or a network file system answers when it may answer otherwise a moment later."""


def patiently(verb: str, where: str, call: Callable[[], T]) -> T:
    """``call``, again after passing faults; what is left is a ``StorageError``. ``FileNotFoundError`` is an answer and
    goes through."""
    with explained(verb, where):
        return again(call, _passes)


def _passes(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in PASSING_NUMBERS and not isinstance(error, StorageError)


_READING = ("read", "look for", "look up", "list")


@contextlib.contextmanager
def explained(verb: str, where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, (StorageError, FileNotFoundError)):
            raise
        denied = f"No permission to {verb} "
        denied += "it: ask its owner" if verb in _READING else "here: change it or set another output"
        advice = {
            errno.ENOSPC: "The disk is full: free space (teacher-cache plan says how much is needed)",
            errno.EDQUOT: "The quota is used up: free space or move the cache",
            errno.EACCES: denied,
            errno.EMFILE: "This process has too many files open: raise its limit (ulimit -n)",
            errno.EIO: "The disk or the network file system fails: look into the system's log",
            errno.EFBIG: "The file size limit of this process is reached: raise it (ulimit -f)",
            errno.EPERM: denied,
            errno.ENOTDIR: "A file lies where a folder is to be: move it away",
            errno.ENOTSUP: "This file system cannot do that (rename a folder, for one): set an output on a disk, or "
            "the address (s3://, gs://) of the bucket that it shows",
            errno.EROFS: "The file system is read-only: set another output",
        }.get(error.errno or 0, "")
        raise StorageError(
            error.errno,
            f"{where}: could not {verb} it ({error.strerror or error}). {advice or 'See the error above'}, "
            f"then run the same command again{'' if verb in _READING else ': committed shards stand'}",
        ) from error
