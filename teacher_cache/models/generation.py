"""One batch of answers, each id the most likely one: a teacher answers with it, and a student that is evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from teacher_cache.data.tokenization import Ids


@dataclass(frozen=True)
class Limits:
    """``new_tokens``: the most of an answer · ``end``: the id that ends it · ``never``: ids that it may not hold."""

    new_tokens: int
    end: int
    pad: int
    never: Ids


def padded(sequences: Sequence[npt.NDArray[np.int64]], pad: int, side: str) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask``, (B, S) int64, of sequences padded on their ``left`` or ``right``."""
    length = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), length), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for line, sequence in enumerate(sequences):
        taken = slice(length - len(sequence), length) if side == "left" else slice(0, len(sequence))
        ids[line, taken], mask[line, taken] = torch.from_numpy(sequence), 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.inference_mode()
def generate(model: Any, batch: Mapping[str, torch.Tensor], limits: Limits) -> list[Ids | None]:
    """The answer to each prompt of ``batch`` (padded on the left, on the model's device): its ids, the end token
    included; without one where ``new_tokens`` cut it off. None where its logits were not finite."""
    watch = FiniteLogits(batch["input_ids"].shape[1], limits)
    produced = model.generate(
        **batch,
        max_new_tokens=limits.new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=limits.end,
        pad_token_id=limits.pad,
        suppress_tokens=list(limits.never),
        logits_processor=LogitsProcessorList([watch]),
    )
    return watch.answers(produced[:, batch["input_ids"].shape[1] :])


class FiniteLogits(LogitsProcessor):  # type: ignore[misc]
    """Notes which sequences of a batch met logits that are not finite before their end; the logits stay as they are.

    A half-precision model that overflows goes on without a word: the most likely id of NaN is 0, so the answer is a row
    of padding, or of exclamation marks. Whoever scores that answer may have finite numbers for it.
    """

    def __init__(self, prompt: int, limits: Limits) -> None:
        """``prompt``: tokens before the answers. Logits of ``limits.never`` are minus infinity by intention."""
        self._prompt, self._limits = prompt, limits
        self._never = torch.tensor(limits.never)
        self._failed: torch.Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """input_ids (B, S), scores (B, V) → the same scores."""
        self.look(scores, (input_ids[:, self._prompt :] == self._limits.end).any(-1))
        return scores

    def look(self, logits: torch.Tensor, ended: torch.Tensor) -> None:
        """``logits`` (B, V) of the next token of each sequence, ``ended`` (B,) those that have their end token."""
        finite = torch.isfinite(logits)
        finite[:, self._never.to(logits.device)] = True
        failed = ~finite.all(-1) & ~ended.to(logits.device)
        self._failed = failed if self._failed is None else self._failed | failed

    def failed(self, place: int) -> bool:
        """Whether the sequence at ``place`` of the batch is worth nothing."""
        return self._failed is not None and bool(self._failed[place])

    def answers(self, produced: torch.Tensor) -> list[Ids | None]:
        """(B, A) the ids after the prompts → each up to and with its end token, None where it failed."""
        return [None if self.failed(place) else self._cut(tuple(ids)) for place, ids in enumerate(produced.tolist())]

    def _cut(self, ids: Ids) -> Ids:
        return ids[: ids.index(self._limits.end) + 1] if self._limits.end in ids else ids
