"""How many files a process keeps mapped, and how many indexes in memory.

Linux allows a process 65,530 maps (``vm.max_map_count``), and a large cache has more files than that; an allocation
that needs a map then fails anywhere in the process. So all caches of a process share one bound. Past it, arrays that
were not used lately are unmapped, one for each that is mapped; mapping one again costs some 50 µs, as all that is known
of it (its place, layout and which blocks were checked) stays.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")

RESERVE = 16_384
"""Maps left to everything else in the process: libraries, stacks of threads, allocations."""
LINUX_MAPS = 65_530


class Mapped(Protocol):
    used: bool
    """Set when it is read; cleared here."""

    def unmap(self) -> None:
        """Let go of the file until it is read again."""
        ...


class OpenMaps:
    """At most ``limit`` mapped arrays; those not used for longest (to within one round of the queue) go first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._queue: deque[weakref.ref[Mapped]] = deque()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Of those that still live."""
        return sum(array() is not None for array in self._queue)

    def opening(self, array: Mapped, open_map: Callable[[], T]) -> T:
        """What ``open_map`` gives, counted as ``array``'s map. Where the system has no room for it (``ulimit -v``),
        half of the others are let go of until it has, or until there is none left."""
        with self._lock:
            self._shrink(self.limit - 1)
        while True:
            try:
                opened = open_map()
                break
            except OSError as error:
                full = error.errno == errno.ENOMEM or os.strerror(errno.ENOMEM) in str(error)  # Arrow's has no number
                if not full or not self._queue:
                    raise
            with self._lock:
                self._shrink(len(self._queue) // 2)
        with self._lock:
            self._queue.append(weakref.ref(array))
        return opened

    def _shrink(self, limit: int) -> None:
        while len(self._queue) > max(limit, 0):
            array = self._queue[0]()
            if array is not None and array.used:  # a second chance
                array.used = False
                self._queue.rotate(-1)
                continue
            self._queue.popleft()
            if array is not None:
                array.unmap()


class Sized(Protocol):
    @property
    def memory_bytes(self) -> int: ...


S = TypeVar("S", bound=Sized)


class Kept(Generic[S]):
    """Things by number, together at most ``limit_bytes`` (and always the last one): those kept first go first, a few at
    a time. A list, because a lookup among ten thousand costs what the processor's caches miss."""

    def __init__(self, count: int, limit_bytes: int) -> None:
        self._limit, self.bytes = limit_bytes, 0
        self._things: list[S | None] = [None] * count
        self._order: deque[int] = deque()

    def get(self, number: int) -> S | None:
        return self._things[number]

    def keep(self, number: int, thing: S) -> None:
        if self._things[number] is None:
            self._order.append(number)
            self.bytes += thing.memory_bytes
        self._things[number] = thing
        while self.bytes > self._limit and len(self._order) > 1:
            gone = self._order.popleft()
            old, self._things[gone] = self._things[gone], None
            self.bytes -= old.memory_bytes if old is not None else 0

    def clear(self) -> None:
        self._things = [None] * len(self._things)
        self._order.clear()
        self.bytes = 0

    def __iter__(self) -> Iterator[S]:
        return (thing for thing in list(self._things) if thing is not None)


def process_limit() -> int:
    """How many arrays this process may map."""
    allowed = LINUX_MAPS
    with contextlib.suppress(OSError, ValueError):
        allowed = int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii"))
    return max(allowed - RESERVE, allowed // 4)


MAPS = OpenMaps(process_limit())
"""Shared by all caches of the process, because the bound is the process's."""
