"""Ids that teacher and student share, where one tokenizer's checkpoints are padded to different sizes.

Qwen2.5-7B has 152,064 output ids, 0.5B and 3B have 151,936: the ids beyond are no tokens. Both distributions are taken
over the n shared ids 0 … n − 1, so that an id beyond carries no mass on either side: the student's logits are cut, the
teacher's are cut (exact) or the mass of those that stand among its kept ids is taken out and the rest scaled to 1
(top-k, draws). Cross-entropy alone keeps the student's own ids beyond: they must learn to be unlikely.
"""

from __future__ import annotations

import torch
from torch import Tensor

NO_MASS = -1e4
"""A log-probability whose exponential is 0 in every float, and which multiplied by 0 is 0 (−inf is NaN)."""


def shared_count(teacher: int | None, student: int) -> int:
    """n: how many ids both sides have; the student's number where the teacher's is not known."""
    return student if teacher is None else min(teacher, student)


def shared_topk(
    ids: Tensor, logprobs: Tensor, teacher: int | None, shared: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """ids (R, k), log-probabilities over all of the teacher's ids (R, k) → the same over the shared ones, and which of
    the k are among them (None: all).

    An id beyond becomes one of its row's own ids with :data:`NO_MASS`. What lies beyond outside of the k is not known
    and stays in the tail.
    """
    if teacher is None or teacher <= shared:
        return ids, logprobs, None
    inside = ids < shared
    beyond = (logprobs.exp() * ~inside).sum(-1, keepdim=True).clamp(max=1 - 1e-6)
    own = ids.gather(-1, inside.int().argmax(-1, keepdim=True)).clamp(max=shared - 1)
    kept = torch.where(inside, logprobs - torch.log1p(-beyond), NO_MASS)
    return torch.where(inside, ids, own), kept, inside


def shared_draws(ids: Tensor, counts: Tensor, teacher: int | None, shared: int) -> tuple[Tensor, Tensor]:
    """Drawn ids and their counts (R, n) without the draws beyond: the others are draws from the shared ids."""
    if teacher is None or teacher <= shared:
        return ids, counts
    inside = ids < shared
    return ids.where(inside, 0), counts * inside
