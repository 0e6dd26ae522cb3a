"""A sample as a student reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Line:
    """What a student reads at once: a sample, or one turn of it where its template rewrites earlier turns.

    ``input_ids``, ``loss_mask`` (T,): one placeholder, ``image_token``, for each run of image positions.
    """

    sample: int
    """Which of its micro-batch."""
    input_ids: Ints
    loss_mask: npt.NDArray[np.bool_]
    widths: Ints
    """(G,) positions of each run."""
    image_token: int
    """-1 where the student reads text only."""
    fields: Mapping[str, Tensor] = field(default_factory=dict[str, Any])
    """What else its processor makes: token types (S,); pixels and the like, on their own axes."""
