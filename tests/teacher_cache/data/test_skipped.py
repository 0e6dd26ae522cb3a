"""How much may be left out: the same rule for a build and for plain data, and an error that says what to set."""

from __future__ import annotations

import re

import pytest

from teacher_cache.data.conversations import Skipped
from teacher_cache.data.skipped import ALWAYS_ALLOWED, Allowed, counted
from teacher_cache.errors import DataError


def check(skipped: int, total: int, share: float) -> None:
    lost = counted(Skipped(f"s{i}", f"image {i}.png: an empty file") for i in range(skipped))
    Allowed("data.max_skipped", share, total).check(skipped, lost, where="there", do=" and build")


@pytest.mark.parametrize(("total", "share", "most"), [(100, 0.29, 29), (1000, 0.1, 100), (20, 0.1, ALWAYS_ALLOWED)])
def test_exactly_the_share_is_allowed_and_sixteen_always(total: int, share: float, most: int) -> None:
    check(most, total, share)
    with pytest.raises(DataError, match=rf"there: {most + 1} of {total:,} samples are skipped, .* × an image: an em"):
        check(most + 1, total, share)


@pytest.mark.parametrize(("skipped", "total"), [(130, 150), (29, 100), (17, 18), (333_333, 665_000)])
def test_the_share_that_the_error_names_is_enough(skipped: int, total: int) -> None:
    with pytest.raises(DataError) as error:
        check(skipped, total, 0.01)
    named = re.search(r"set data\.max_skipped=([\d.]+) \(or more\) and build", str(error.value))
    assert named is not None
    check(skipped, total, float(named[1]))


@pytest.mark.parametrize("total", [1, 16, 100])
def test_no_share_makes_nothing_enough(total: int) -> None:
    """Where no sample is left, no setting helps, and none is named."""
    with pytest.raises(DataError, match=r"so nothing is left .*Mend the data or data\.image_folder") as error:
        check(total, total, 1.0)
    assert "set data.max_skipped" not in str(error.value)
