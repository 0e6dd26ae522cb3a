"""How many samples may be left out: one rule for making a cache and for training on plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from teacher_cache.data.conversations import Conversation, Skipped
from teacher_cache.data.sample_reader import SkipCount
from teacher_cache.errors import DataError

ALWAYS_ALLOWED = 16
"""Samples left out that stop nothing, however small the data is."""


@dataclass(frozen=True)
class Allowed:
    """What the ``max_skipped`` of a data set says of its ``total`` samples."""

    setting: str
    """Its name, for the error: ``data.max_skipped``."""
    share: float
    total: int

    @property
    def most(self) -> int:
        return max(ALWAYS_ALLOWED, int(self.share * self.total + 1e-6))  # 0.29 × 100 is 28.999…

    def check(self, skipped: float, reasons: object, *, found: str = "are skipped", where: str = "", do: str) -> None:
        """Refuse ``skipped`` samples (a fraction where it is an estimate) for their ``reasons``; ``do`` says, behind
        "mend the data or its image_folder", how to go on.

        Raises ``DataError``: more than the share, or none that can be used. It names the share that these would need.
        """
        what = f"{where}{': ' if where else ''}{skipped:,.0f} of {self.total:,} samples {found}"
        mend = f"Mend the data or {self.setting.replace('max_skipped', 'image_folder')}"
        if self.total and skipped >= self.total:
            raise DataError(f"{what}, so nothing is left ({reasons}). {mend}{do}")
        if skipped > self.most:
            needed = math.ceil(100 * skipped / self.total) / 100
            raise DataError(
                f"{what}, more than {self.setting}={self.share:g} allows ({reasons}). If they are meant to be "
                f"left out, set {self.setting}={needed:g} (or more){do}. Else: {mend[0].lower()}{mend[1:]}{do}"
            )


def counted(samples: Iterable[Conversation | Skipped]) -> SkipCount:
    """How many of ``samples`` are skipped, and why."""
    count = SkipCount()
    for sample in samples:
        count.add(sample)
    return count
