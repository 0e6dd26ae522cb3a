"""What is watched while an answer is generated."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor


class FiniteLogits(LogitsProcessor):  # type: ignore[misc]
    """Notes which sequences of a batch met logits that are not finite before their end; the logits stay as they are.

    A half-precision model that overflows goes on without a word: the most likely id of NaN is 0, so the answer is a row
    of padding, or of exclamation marks. Whoever scores that answer may have finite numbers for it.
    """

    def __init__(self, prompt: int, end: int, suppressed: int) -> None:
        """``prompt``: tokens before the answers · ``suppressed``: the id whose logit is minus infinity by intention."""
        self._prompt, self._end, self._suppressed = prompt, end, suppressed
        self._failed: torch.Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """input_ids (B, S), scores (B, V) → the same scores."""
        self.look(scores, (input_ids[:, self._prompt :] == self._end).any(-1))
        return scores

    def look(self, logits: torch.Tensor, ended: torch.Tensor) -> None:
        """``logits`` (B, V) of the next token of each sequence, ``ended`` (B,) those that have their end token."""
        finite = torch.isfinite(logits)
        finite[:, self._suppressed] = True
        failed = ~finite.all(-1) & ~ended.to(logits.device)
        self._failed = failed if self._failed is None else self._failed | failed

    def failed(self, place: int) -> bool:
        """Whether the sequence at ``place`` of the batch is worth nothing."""
        return self._failed is not None and bool(self._failed[place])
