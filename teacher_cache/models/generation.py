"""Answers and states of a model, for batches of samples of any family: one generator and one forward pass.

Teacher, student and evaluation ask here, so padding, token types, end tokens and draws are the same for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from teacher_cache.models.collate import Fields, collate, to_model


@dataclass(frozen=True)
class Decoding:
    """How answers are chosen: up to ``limit`` tokens, ``end`` included; ids in ``never`` are not answered.

    ``temperature`` 0 takes the most likely id; above it, ids are drawn from the smallest set of mass ``top_p``.
    """

    end: int
    pad: int
    limit: int
    never: tuple[int, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0


@torch.inference_mode()
def generate(model: Any, samples: Sequence[Fields], how: Decoding, seeds: Sequence[int] = ()) -> list[list[int] | None]:
    """The ids that ``model`` answers to each prompt, the end token included where it came.

    ``seeds``: one for each prompt where ids are drawn, so that an answer does not depend on its batch. None in place of
    an answer whose logits were not finite: the most likely id of NaN is 0, and whoever scores a row of those may have
    finite numbers for it.
    """
    inputs = to_model(collate(samples, how.pad, "left"), model)
    steps = _Steps(how, seeds if how.temperature > 0 else ())
    with plain_generation(model):
        out = model.generate(
            **inputs,
            max_new_tokens=how.limit,
            do_sample=False,
            num_beams=1,
            eos_token_id=how.end,
            pad_token_id=how.pad,
            logits_processor=LogitsProcessorList([steps]),
        )[:, inputs["input_ids"].shape[1] :]
    return [None if failed else _cut(row, how.end) for row, failed in zip(out.tolist(), steps.failed, strict=True)]


def forward(model: Any, samples: Sequence[Fields], pad: int, **options: Any) -> Any:
    """What the model without its head makes of the batch, padded on the right: ``last_hidden_state`` (B, S, d) after
    the final norm; ``options`` (``output_hidden_states``) as Transformers takes them."""
    return model.base_model(**to_model(collate(samples, pad, "right"), model), use_cache=False, **options)


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Without the folder's own ``generation_config.json``: Qwen-VL's has a repetition penalty, which ``generate`` would
    apply, so that a greedy answer is not what the rows predict."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _Steps(LogitsProcessor):  # type: ignore[misc]
    """Chooses the next id of every answer of a batch, by leaving its logit alone above minus infinity."""

    def __init__(self, how: Decoding, seeds: Sequence[int]) -> None:
        self._how = how
        self._generators = [np.random.default_rng(seed) for seed in seeds]
        self._ended: Tensor | None = None
        self._failed: Tensor | None = None

    @property
    def failed(self) -> list[bool]:
        """(B,) which answers met logits that are not finite before their end."""
        assert self._failed is not None
        return [bool(failed) for failed in self._failed]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """input_ids (B, S), scores (B, V) → (B, V)."""
        if self._ended is None or self._failed is None:
            self._ended = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
            self._failed = self._ended.clone()
        else:
            self._ended = self._ended | (input_ids[:, -1] == self._how.end)
        never = torch.tensor(self._how.never, dtype=torch.int64, device=scores.device)
        finite = torch.isfinite(scores).index_fill_(1, never, True).all(-1)
        self._failed = self._failed | ~(finite | self._ended)
        scores = scores.index_fill(1, never, -torch.inf)
        return self._drawn(scores, (self._ended | self._failed).tolist()) if self._generators else scores

    def _drawn(self, scores: Tensor, over: list[bool]) -> Tensor:
        how = self._how
        logits = scores.float().cpu()
        ids = [
            how.end if done else nucleus_draw(row / how.temperature, how.top_p, generator.random())
            for row, generator, done in zip(logits, self._generators, over, strict=True)
        ]
        chosen = torch.tensor(ids, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def nucleus_draw(logits: Tensor, top_p: float, uniform: float) -> int:
    """One id from softmax(logits) cut to the smallest set of mass ``top_p``, by inverse transform of ``uniform``."""
    probabilities, ids = torch.softmax(logits.double(), -1).sort(descending=True, stable=True)
    cumulative = probabilities.cumsum(-1)
    kept = int((cumulative - probabilities < top_p).sum())
    place = int(torch.searchsorted(cumulative[:kept], torch.tensor(uniform) * cumulative[kept - 1], right=True))
    return int(ids[min(place, kept - 1)])


def _cut(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids
