"""How far two ways to one number may lie apart. From the dtype and the work between, never from what one machine gave.

Processors differ in the order in which they sum a product's terms, so in the last bits of everything after it. What is
asked for bit by bit is bytes; what can be computed in float64 end to end is, and compared within ``rounding(EXACT)``.
"""

from __future__ import annotations

import math
from typing import Any

import torch

EXACT = torch.float64
MODEL = 1000
"""Roundings one after another through a tiny model: the longest sum of each of its matmuls (64 to 384 terms, two to
four layers of seven, a projector and a tower), which add up to some thousands in the worst case and to far fewer as a
random walk. A gradient goes the way twice."""


def rounding(dtype: torch.dtype = torch.float32, operations: int = 1) -> float:
    """The share of a number that ``operations`` roundings in ``dtype``, one after another, may change."""
    return operations * torch.finfo(dtype).eps


def half_the_digits(dtype: torch.dtype = torch.float32, steps: int = 1) -> float:
    """The share that cancelling may change: half of the digits are left, the rule of thumb for a difference.

    So for weights after ``steps`` of AdamW: an update is a gradient over its own size, and where the gradient's terms
    cancel rounding decides its direction. Steps add up.
    """
    return steps * math.sqrt(torch.finfo(dtype).eps)


def within(
    dtype: torch.dtype = torch.float32, operations: int = 1, scale: float | torch.Tensor = 1.0
) -> dict[str, Any]:
    """``rtol`` and ``atol`` for ``allclose``, where the largest numbers that were summed are about ``scale``."""
    share = rounding(dtype, operations)
    return {"rtol": share, "atol": share * float(scale)}
