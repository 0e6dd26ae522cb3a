"""Two caches of the same samples, one by vLLM and one by torch or in another way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from teacher_cache.store.reader import TeacherCache
from tests.fixtures.rounding import MODEL, within

CLOSE = within(operations=MODEL)
"""Of states and logits of about 1 and above: two engines sum in another order."""


def assert_same_caches(one: Path, other: Path, differing: int = 0) -> None:
    """The same samples and ids, and every array of numbers within :data:`CLOSE` (float16: a unit in the last place).
    At most ``differing`` samples may have another answer."""
    with TeacherCache.open(one) as ours, TeacherCache.open(other) as oracle:
        assert list(ours.sample_ids()) == list(oracle.sample_ids())
        for index in range(len(oracle)):
            mine, theirs = ours[index].arrays, oracle[index].arrays
            assert mine.keys() == theirs.keys()
            if differing and not np.array_equal(mine["input_ids"], theirs["input_ids"]):
                differing -= 1
                continue
            for array in ("input_ids", "loss_mask"):
                np.testing.assert_array_equal(mine[array], theirs[array])
            for array in mine.keys() - {"input_ids", "loss_mask", "topk_ids"}:  # ids of equal logits may change places
                stored = within(torch.float16, 2) if mine[array].dtype == np.float16 else CLOSE
                left, right = mine[array].astype(float), theirs[array].astype(float)
                np.testing.assert_allclose(left, right, **stored, err_msg=array)
