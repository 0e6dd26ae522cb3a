"""Waiting for what another process or thread will do: as long as it takes. Nothing here measures time."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 300.0
"""Seconds after which something is taken for lost, so that a fault ends a run; never how long a thing should take."""


def until(holds: Callable[[], bool], *, alive: Callable[[], bool] = lambda: True) -> None:
    """Return once ``holds``; raises where it cannot come any more: ``alive`` says no, or :data:`PATIENCE` is over."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert alive(), "what was waited for has ended"
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)
