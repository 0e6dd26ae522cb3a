"""Files that appear whole, are opened without risk, and are asked for again when what stands in the way may pass; and
what YAML is read as."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import yaml

T = TypeVar("T")
TRIES = 5
FIRST_WAIT_SECONDS = 0.2
"""Each wait is about twice the one before: together some 4 s, what a mount takes to come back."""


def again(call: Callable[[], T], passing: Callable[[Exception], bool]) -> T:
    """``call``, which must be able to begin anew, again after faults that are ``passing``."""
    for attempt in range(TRIES - 1):
        try:
            return call()
        except Exception as error:
            if not passing(error):
                raise
        time.sleep(FIRST_WAIT_SECONDS * 2**attempt * (1 + random.random()))
    return call()


@contextlib.contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``target`` when the block ends well: whoever reads meanwhile sees
    the old file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}-{random.getrandbits(32):08x}")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, lies on the disk. CIFS and some FUSE file systems cannot do the
    latter: after a power cut names and sizes are looked at anyway, and what is not whole is made again."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def open_checked(path: Path, check: Callable[[os.stat_result], object]) -> BinaryIO:
    """``path`` open for reading, if ``check`` lets it pass: no pipe is waited for, and it is looked at before, since
    opening alone can do things to a device, and after, since it may be another file by then."""
    check(path.stat())
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        check(os.fstat(file.fileno()))
    except BaseException:
        file.close()
        raise
    return file


class _Yaml(yaml.SafeLoader):
    """YAML's safe subset, in which 1e-3 is a number as everywhere else."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(text: str) -> Any:
    """``text`` as plain data."""
    return yaml.load(text, _Yaml)
