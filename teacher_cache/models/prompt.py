"""A conversation with room for its answers: what stands around them is read once, and any answers are put in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from teacher_cache.data.rows import Ints, TokenizedSample, expanded_length
from teacher_cache.models.slots import Ids


@dataclass(frozen=True)
class Prompt:
    """``segments[t]`` stands before answer t, one placeholder a run of image positions; ``runs[t]`` (G, 2) are its
    runs. Only where the template leaves earlier turns as they were (``Chat.one_sequence``)."""

    sample_id: str
    segments: tuple[Ids, ...]
    runs: tuple[Ints, ...]
    end: int

    @classmethod
    def of(cls, sample: TokenizedSample, image_token: int, end: int) -> Prompt:
        """From a conversation whose every answer is one token."""
        cuts = np.flatnonzero(sample.loss_mask)
        begins = [0, *(cuts[:-1] + 1).tolist()]
        parts = [sample.input_ids[a:b] for a, b in zip(begins, cuts.tolist(), strict=True)]
        held = np.cumsum([np.count_nonzero(part == image_token) for part in parts])
        segments = tuple(tuple(part.tolist()) for part in parts)
        return cls(sample.sample_id, segments, tuple(np.split(sample.runs, held[:-1])), end)

    @property
    def length(self) -> int:
        """Positions that the questions take with their images."""
        runs = np.concatenate(self.runs)
        return int(expanded_length(sum(map(len, self.segments)), len(runs), runs[:, 0].sum()))

    def sample(self, answers: Sequence[Ids], ask: bool = False) -> TokenizedSample:
        """The conversation up to its last given answer, or (``ask``) to the prompt for the next one.

        An answer that was cut off lacks its end token. A later question needs it before it, but it is nobody's answer,
        so it is never supervised.
        """
        ids: list[int] = []
        mask: list[bool] = []
        turns = len(answers) + ask
        for turn in range(turns):
            answer = answers[turn] if turn < len(answers) else ()
            close = () if turn + 1 == turns or answer[-1:] == (self.end,) else (self.end,)
            ids += [*self.segments[turn], *answer, *close]
            mask += [False] * len(self.segments[turn]) + [True] * len(answer) + [False] * len(close)
        marks: npt.NDArray[np.bool_] = np.asarray(mask, np.bool_)
        return TokenizedSample(self.sample_id, np.asarray(ids, np.int64), marks, np.concatenate(self.runs[:turns]))
