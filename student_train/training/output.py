"""Who writes into a run's folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from teacher_cache.store.locks import locked
from teacher_cache.store.storage import Storage


@contextlib.contextmanager
def output_lock(folder: str | Path) -> Iterator[None]:
    """Hold the lock of ``folder`` for the block; ``LockedError`` names the holder where another run has it.

    Of the processes of one run (``torchrun`` and ``accelerate launch`` number them by RANK) the first holds it for all.
    """
    with locked(Storage(folder)) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext():
        yield
