"""The end of a long command by a signal: between two steps, with what it has kept, and a status that says so.

The first SIGINT, SIGTERM or SIGHUP raises :class:`Stopped` where nothing can be lost (a model is being loaded), or is
remembered until the work asks for it (:meth:`Stop.between_steps`). A second one ends the process at once. A signal that
was ignored when the command began (``nohup``) stays ignored.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

SAME_REQUEST_SECONDS = 1.0
"""A launcher (``torchrun``, ``ablate``) sends on what a terminal has sent to the whole group already: the same signal
within this time is the same request, not a second one."""


class Stopped(KeyboardInterrupt):
    """A signal asked for the end. ``str`` is the sentence to show; ``status`` what the process is to exit with."""

    def __init__(self, number: int, kept: str = "What was complete before stands.") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}. {kept}")
        self.number = number

    @property
    def status(self) -> int:
        """As a shell reports a process that a signal ended."""
        return 128 + self.number


class Stop:
    """What was asked for so far; made by :func:`stopping`."""

    def __init__(self) -> None:
        self.at_once: Callable[[], None] = lambda: None
        """Called before a second signal ends the process: ends its children."""
        self._number, self._since, self._waits, self._parent = 0, 0.0, False, 0

    @property
    def asked(self) -> int:
        """The signal that asked for the end; 0 where none did. SIGHUP where the followed parent is gone."""
        if not self._number and self._parent and os.getppid() != self._parent:
            self._number = int(signal.SIGHUP)
        return self._number

    def check(self, kept: str = "What was complete before stands.") -> None:
        """Raises ``Stopped``: the end was asked for."""
        if self.asked:
            raise Stopped(self._number, kept)

    def follow_parent(self) -> None:
        """End when the process that started this one is gone: nobody else would end it."""
        self._parent = os.getppid()

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """In here a signal only sets :attr:`asked`; whoever works asks for it between two steps."""
        self.check()
        before, self._waits = self._waits, True
        try:
            yield
        finally:
            self._waits = before

    def handle(self, number: int, _frame: Any) -> None:
        if self._number:
            if number == self._number and time.monotonic() - self._since < SAME_REQUEST_SECONDS:
                return
            self.at_once()
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._number, self._since = number, time.monotonic()
        if not self._waits:
            raise Stopped(number)


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """Signals as described above, until the block is left. In another thread than the main one they stay as they are:
    Python delivers none there."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    mine = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in mine:
        signal.signal(number, stop.handle)
    try:
        yield stop
    except KeyboardInterrupt as interrupted:
        if stop.asked and not isinstance(interrupted, Stopped):  # what Ray makes of it
            raise Stopped(stop.asked) from None
        raise
    finally:
        for number in mine:
            signal.signal(number, before[number])


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Handlers stand after the block as before it: a library that puts in its own (Ray, on SIGTERM) does not."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS if main}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def left_to_parent(*_: object) -> None:
    """For a process that helps another (reads its data): a signal to the whole group is its parent's to handle."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
