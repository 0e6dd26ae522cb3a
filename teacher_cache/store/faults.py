"""What a disk answers when it cannot: which answers may pass and are waited for, and what to do about the others."""

from __future__ import annotations

import contextlib
import errno
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from teacher_cache.errors import StorageError

T = TypeVar("T")
TRIES = 5
FIRST_WAIT_SECONDS = 0.2
PASSING_NUMBERS = {
    *(errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN),
}
"""What a disk or a network file system answers when it may answer otherwise a moment later."""


def patiently(verb: str, where: str, call: Callable[[], T]) -> T:
    """``call``, again after passing faults of the system with growing waits; what is left is a ``StorageError``.

    ``FileNotFoundError`` is an answer and goes through. ``call`` must be able to begin anew.
    """
    wait = FIRST_WAIT_SECONDS
    with explained(verb, where):
        for _ in range(TRIES - 1):
            try:
                return call()
            except OSError as error:
                if error.errno not in PASSING_NUMBERS or isinstance(error, StorageError):
                    raise
            time.sleep(wait * (1 + random.random()))
            wait *= 2
        return call()


_READING = ("read", "look for", "look up", "list")


@contextlib.contextmanager
def explained(verb: str, where: str) -> Any:
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
