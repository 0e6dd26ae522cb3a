"""Bytes and durations as people read them, in one way on every page and in every plan."""

from __future__ import annotations


def bytes_text(count: float) -> str:
    """1,230,000 → ``1.2 MB``; units of a thousand, as disks and GPUs are sold."""
    unit, size = next(((u, s) for u, s in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if count >= s), ("kB", 1e3))
    return f"{count / size:,.1f} {unit}"


def seconds_text(seconds: float) -> str:
    """5,400 → ``1.5 h``."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:,.1f} min" if seconds >= 120 else f"{seconds:,.1f} s"
