"""What all ranks agree on once a step, before the weights change: the loss, the gradient's norm, time and signals.

One reduction and one copy to the host, of a vector as long as the number of loss terms and a few more: the only time in
a step that the host waits for the device. It is what the log shows, so looking costs nothing beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from teacher_cache.stopping import SIGNALS


@dataclass(frozen=True)
class Agreed:
    """Of one step, the same on every rank."""

    parts: dict[str, float]
    """Each loss term over the global batch, ``loss`` their weighted sum."""
    norm: float
    cpu_seconds: float
    """Mean of the ranks."""
    signal: int
    """The first of the signals that any rank was sent; 0 for none."""

    def fault(self) -> str:
        """What is not a finite number, in words; empty where all are."""
        wrong = [f"{name} {value}" for name, value in self.parts.items() if not math.isfinite(value)]
        if not math.isfinite(self.norm):
            wrong.append(f"gradient norm {self.norm}")
        return ", ".join(wrong)


def exchange(accelerator: Accelerator, sums: Mapping[str, Tensor], norm: Any, cpu_seconds: float, asked: int) -> Agreed:
    """Every rank must call it: ``sums`` are its own parts of the terms, ``norm`` is that of all ranks' gradient."""
    names = sorted(sums)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)  # FSDP's norm is spread
    device = accelerator.device
    own = torch.tensor([cpu_seconds, *(float(asked == number) for number in SIGNALS)])
    values = torch.stack([*(sums[name].float() for name in names), norm.float().to(device)])
    found: list[float] = accelerator.reduce(torch.cat([values, own.to(device, non_blocking=True)]), "sum").tolist()
    ranks, count = accelerator.num_processes, len(names)
    signals = [int(number) for number, times in zip(SIGNALS, found[count + 2 :], strict=True) if times]
    parts = dict(zip(names, found[:count], strict=True))
    return Agreed(parts, found[count] / ranks, found[count + 1] / ranks, signals[0] if signals else 0)
