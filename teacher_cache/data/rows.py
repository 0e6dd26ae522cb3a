"""The row rule: which positions of a sample the cache keeps. The one place in the project where the shift is done.

The state at position p of a causal language model gives the distribution of token p + 1. Row r of the cache is the
distribution and the state for *answer token r*, so it is taken one position before that token, in the sequence that
the model reads: each image placeholder expanded to its run of positions. How many those are may differ from image
to image and from teacher to student; rows and text positions are the same in number and order for both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[Any]
Widths = int | npt.NDArray[Any]
"""Positions of each placeholder in the expanded sequence: one number for all, or (G,) in their order."""


@dataclass(frozen=True)
class Positions:
    """Positions of one sample in its expanded sequence: rows (R,), text (P,), visual (all images',), images (G,)."""

    rows: Ints
    """The positions that predict the answer tokens."""
    text: Ints
    """The text positions that predict a token: all but the sequence's last."""
    visual: Ints
    images: Ints
    """The first position of each placeholder's run."""
    length: int


def positions_of(input_ids: Ids, loss_mask: Ids, image_token: int, widths: Widths) -> Positions:
    """Where the rows, text and image positions of one sample stand in the sequence that the model reads.

    ``input_ids``, ``loss_mask`` (T,), one placeholder a run of image positions; ``loss_mask`` marks the answer tokens.
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


def text_positions(tokens: Any, runs: Any) -> Any:
    """P, the text positions that predict a token, of samples with ``tokens`` tokens, ``runs`` placeholders of them."""
    return np.maximum(tokens - 1 - runs, 0)


def expand(input_ids: Ids, image_token: int, widths: Widths) -> Ids:
    """(S,) ``input_ids`` as the model reads them: each placeholder as often as its image has positions."""
    return np.repeat(input_ids, _widths(input_ids, image_token, widths)[1])


def collapse(input_ids: Ids, loss_mask: Ids, image: Ids) -> tuple[Ids, Ids, Ints]:
    """What a model reads, as a cache keeps it: of each run of positions that show one image its first one alone.

    ``image`` (S,): the number of the image that a position shows, −1 for text. Returns ``input_ids`` and ``loss_mask``
    (T,) and the runs (G, 2): positions, image number; they are the widths of :func:`expand`.
    """
    begins = np.ones(len(image), np.bool_)
    begins[1:] = (image[1:] != image[:-1]) | (image[1:] < 0)
    first = np.flatnonzero(begins)
    lengths = np.diff(np.append(first, len(image)))
    runs = np.stack([lengths, image[first]], -1).astype(np.int64)
    return input_ids[first], loss_mask[first], runs[image[first] >= 0]


def turns(loss_mask: Ids) -> list[slice]:
    """Which rows belong to each answer: an answer is a run of supervised tokens."""
    at = np.flatnonzero(loss_mask)
    cuts = [0, *(np.flatnonzero(np.diff(at) > 1) + 1).tolist(), len(at)]
    return [slice(a, b) for a, b in pairwise(cuts) if b > a]


def expanded_length(tokens: Any, runs: Any, image_positions: Any) -> Any:
    """S, what the model reads of ``tokens`` tokens, ``runs`` of them placeholders for ``image_positions`` in all."""
    return tokens - runs + image_positions


def _widths(input_ids: Ids, image_token: int, widths: Widths) -> tuple[npt.NDArray[np.bool_], Ints]:
    is_image = input_ids == image_token
    width = np.ones(len(input_ids), np.int64)
    width[is_image] = widths
    return is_image, width


@dataclass(frozen=True)
class TokenizedSample:
    """A whole conversation.

    input_ids: (T,) int64, one placeholder a run of image positions · loss_mask: (T,) bool, true at answer tokens, the
    end-of-answer token included · runs: (G, 2) positions and image number of each placeholder. The mask names the
    *answer tokens*.
    """

    sample_id: str
    input_ids: Ints
    loss_mask: npt.NDArray[np.bool_]
    runs: Ints = field(default_factory=lambda: np.zeros((0, 2), np.int64))

    @property
    def rows(self) -> int:
        """R: the number of answer tokens."""
        return int(self.loss_mask.sum())

    @property
    def length(self) -> int:
        """S: positions that the model reads."""
        return int(expanded_length(len(self.input_ids), len(self.runs), self.runs[:, 0].sum()))

    def expanded(self, image_token: int) -> Ints:
        """(S,) the ids as the model reads them."""
        return expand(self.input_ids, image_token, self.runs[:, 0])

    def positions(self, image_token: int) -> Positions:
        """Where its rows, text and images stand in what the model reads."""
        return positions_of(self.input_ids, self.loss_mask, image_token, self.runs[:, 0])
