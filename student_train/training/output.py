"""The folder of a run: who writes into it, its files, and what a finished run says of itself."""

from __future__ import annotations

import contextlib
import json
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from teacher_cache.store.locks import locked
from teacher_cache.store.storage import Storage


@dataclass(frozen=True)
class FitSummary:
    """What a run cost and where it ended. ``waiting_share``: part of the time in which the loop had no batch yet."""

    steps: int
    samples: int
    seconds: float
    cpu_seconds: float
    waiting_share: float
    peak_megabytes: float
    loss: float
    parts: dict[str, float]
    model: str


@contextlib.contextmanager
def output_lock(folder: str | Path) -> Iterator[None]:
    """Hold the lock of ``folder`` for the block; ``LockedError`` names the holder where another run has it.

    Of the processes of one run (``torchrun`` and ``accelerate launch`` number them by RANK) the first holds it for all.
    """
    with locked(Storage(folder)) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext():
        yield


def write_json(path: Path, facts: Any, allow_nan: bool = True) -> None:
    """Whole or not at all; its folder is made."""
    Storage(path.parent).write(path.name, [json.dumps(facts, indent=1, allow_nan=allow_nan).encode()])


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def peak_megabytes(device: torch.device) -> float:
    """Peak memory of the run: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
