"""The row rule: which positions of a sample the cache keeps. The one place in the project where the shift is done.

The state at position p of a causal language model gives the distribution of token p + 1. Row r of the cache is the
distribution and the state for *answer token r*, so it is taken one position before that token, in the sequence that
the model reads: each image placeholder expanded to the positions of its image. How many those are may differ from image
to image and from teacher to student; rows and text positions are the same in number and order for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[Any]
Widths = int | npt.NDArray[Any]
"""Positions of each placeholder in the expanded sequence: one number for all, or (I,) in their order."""


@dataclass(frozen=True)
class Positions:
    """Positions of one sample in its expanded sequence: rows (R,), text (P,), visual (all images',), images (I,)."""

    rows: Ints
    """The positions that predict the answer tokens."""
    text: Ints
    """The text positions that predict a token: all but the sequence's last."""
    visual: Ints
    images: Ints
    """The first position of each image."""
    length: int


def positions_of(input_ids: Ids, loss_mask: Ids, image_token: int, widths: Widths) -> Positions:
    """Where the rows, text and image positions of one sample stand in the sequence that the model reads.

    ``input_ids``, ``loss_mask`` (T,), one placeholder an image; ``loss_mask`` marks the answer tokens.
    """
    is_image, width = _widths(input_ids, image_token, widths)
    start = np.cumsum(width) - width
    length = int(width.sum())
    answers = start[loss_mask]
    assert not len(answers) or answers[0] > 0, "an answer token needs a position before it"
    text = start[~is_image]
    expanded = np.repeat(is_image, width)
    return Positions(answers - 1, text[text < length - 1], np.flatnonzero(expanded), start[is_image], length)


def rows_among_text(input_ids: Ids, loss_mask: Ids, image_token: int) -> Ints:
    """(R,) which of the P text positions are the rows'. Needs no widths: both skip the images.

    The token before an answer token is always text, since a template puts words between the image and the answer.
    """
    found = positions_of(input_ids, loss_mask, image_token, 1)
    return np.searchsorted(found.text, found.rows)


def text_positions(tokens: Any, images: Any) -> Any:
    """P, the text positions that predict a token, of samples with ``tokens`` tokens and ``images`` placeholders."""
    return np.maximum(tokens - 1 - images, 0)


def expand(input_ids: Ids, image_token: int, widths: Widths) -> Ids:
    """(S,) ``input_ids`` as the model reads them: each placeholder as often as its image has positions."""
    return np.repeat(input_ids, _widths(input_ids, image_token, widths)[1])


def expanded_length(tokens: Any, images: Any, image_positions: Any) -> Any:
    """S, what the model reads of ``tokens`` tokens, ``images`` of them placeholders for ``image_positions`` in all."""
    return tokens - images + image_positions


def _widths(input_ids: Ids, image_token: int, widths: Widths) -> tuple[npt.NDArray[np.bool_], Ints]:
    is_image = input_ids == image_token
    width = np.ones(len(input_ids), np.int64)
    width[is_image] = widths
    return is_image, width
