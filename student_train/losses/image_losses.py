"""LLaVA-KD's visual losses (Cai et al., arXiv 2410.16236): MDist on image positions, and RDist.

Letters: B images, N image positions, d width, V vocabulary. Visual states depend on the image alone, so these work on
distinct images; a caller whose batch holds an image twice weights it twice.

- **MDist, visual**: forward KL at every image position, over the vocabulary. :func:`visual_rows` gives the teacher's
  side as ordinary rows, so ``head_loss.head_losses`` computes it in chunks; no (N × V) tensor exists.
- **RDist**: 1 − cosine of the two self-correlation matrices (N × N). The released code correlates the logits, the paper
  speaks of visual tokens; both are here. logits·logitsᵀ = H·(WᵀW)·Hᵀ, so neither side forms logits.

A student with another number of image positions is refused, or matched by a named pooling of the teacher's grid.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from student_train.losses.shared_ids import shared_count
from student_train.losses.targets import ImageTargets, RowTargets, StoredStates, decoded
from student_train.losses.topk import wide
from teacher_cache.errors import LossError

Space = Literal["logits", "hidden"]


def relation(
    images: ImageTargets, student: Tensor, head: Tensor, grid: tuple[int, int] | None = None, space: Space = "logits"
) -> Tensor:
    """RDist of the stored teacher and the student's states (B, N, d) → (B,).

    Both Grams are over the ids that both sides have; a stored one has no others (``needs.check_shared``).
    """
    shared = shared_count(images.vocabulary, len(head))
    images = replace(images, head=None if images.head is None else images.head[:shared])
    return relation_loss(teacher_gram(images, space, grid), student_gram(student, head[:shared], space))


def relation_loss(teacher_gram: Tensor, student_gram: Tensor) -> Tensor:
    """RDist: 1 − cosine of the flattened matrices, (B, N, N) both → (B,). A Gram's scale is free."""
    teacher, student = wide(teacher_gram).flatten(-2), wide(student_gram).flatten(-2)
    return 1 - torch.nn.functional.cosine_similarity(teacher, student, dim=-1)


def hidden_gram(states: Tensor) -> Tensor:
    """H·Hᵀ of states (B, N, d) → (B, N, N), float32."""
    states = wide(states)
    return _product(states, states.mT)


def logit_gram(states: Tensor, head_square: Tensor) -> Tensor:
    """logits·logitsᵀ of states (B, N, d) → (B, N, N), float32; ``head_square`` (d, d) from :func:`head_square`."""
    states = wide(states)
    return _product(_product(states, head_square), states.mT)


def head_square(head: Tensor) -> Tensor:
    """WᵀW (d, d) float32 of an output head (V, d): once per step for the student, once per run for the teacher."""
    head = wide(head)
    return _product(head.T, head)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right as they are: autocast would make a Gram float16, whose largest number is 65,504, or bfloat16."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def student_gram(states: Tensor, head_weight: Tensor, space: Space) -> Tensor:
    """The student's (B, N, N), differentiable in its states (B, N, d) and, for logits, its head (V, d)."""
    return hidden_gram(states) if space == "hidden" else logit_gram(states, head_square(head_weight))


def teacher_gram(images: ImageTargets, space: Space, grid: tuple[int, int] | None = None) -> Tensor:
    """The teacher's (B, N', N') float32: the stored Gram, or that of the stored visual states.

    grid: ``(from, to)`` side lengths from :func:`pooled_grid`, or None. Pooling a Gram equals pooling the states it
    came from (and the logits, the head being linear), so both sources agree.

    Raises ``LossError``: where the cache holds neither.
    """
    packed = images.gram_hidden if space == "hidden" else images.gram_logits
    if packed is not None and images.gram_scale is not None:
        gram = unpack_gram(packed, images.gram_scale[:, 0 if space == "hidden" else 1])
        return gram if grid is None else pool_gram(gram, *grid)
    if images.states is None:
        raise LossError(
            f"relation loss on {space}: the cache holds neither a Gram nor visual states. Score the images again with "
            "signals.visual: gram (or states)."
        )
    states = images.states.decode(slice(None))
    states = states if grid is None else pool_grid(states, *grid)
    if space == "hidden":
        return hidden_gram(states)
    if images.rule.cap:
        raise LossError(
            "relation loss on logits, from visual states: the teacher soft-caps its logits, whose Gram is not that of "
            "head @ states. Set space: hidden"
        )
    if images.head_square is not None:
        return logit_gram(states, images.head_square)
    return logit_gram(states, head_square(_head(images, "relation loss on logits, from visual states")))


def density_weights(states: Tensor) -> Tensor:
    """(B, N) of mean 1 in each image: how unlike its other positions each one is, from the states (B, N, d).

    1 − the mean cosine with the others, over its mean. HEED (Liang and Jha, 2026, arXiv:2605.17093) weighs a patch's
    alignment by its self-dissimilarity, a stand-in for its density that needs no training: text and edges differ from
    the rest, sky and walls do not. Ours, since the paper's equation was not at hand: the mean cosine, the final-layer
    visual states (which a cache has), and the division by the mean.
    """
    unit = torch.nn.functional.normalize(wide(states), dim=-1)
    others = max(unit.shape[-2] - 1, 1)
    alike = ((unit * unit.sum(-2, keepdim=True)).sum(-1) - 1) / others
    unlike = (1 - alike).clamp(min=torch.finfo(unit.dtype).eps)
    return unlike / unlike.mean(-1, keepdim=True)


def unpack_gram(packed: Tensor, scale: Tensor) -> Tensor:
    """Upper triangles, row by row (B, N·(N + 1)/2), times scale (B,) → symmetric (B, N, N) float32."""
    side = (math.isqrt(8 * packed.shape[-1] + 1) - 1) // 2
    rows, columns = torch.triu_indices(side, side, device=packed.device)
    gram = torch.empty(len(packed), side, side, device=packed.device)
    values = packed.float() * scale.unsqueeze(-1)
    gram[:, rows, columns] = values
    gram[:, columns, rows] = values
    return gram


def visual_rows(images: ImageTargets, grid: tuple[int, int] | None = None) -> RowTargets:
    """The teacher's side of all B·N' image positions as rows, for the forward KL of MDist.

    From visual states (with ``source: exact``) or from the stored visual top-k (with ``source: topk``). Pooled states
    give the softmax of mean logits: a definition of ours, since the paper has no student with another grid. Only the
    pooled states of the batch (B·N' × d) are decoded; unpooled ones stay quantised.

    Raises ``LossError``: for a pooling with a top-k, which cannot be pooled, or where the cache holds neither.
    """
    if images.states is not None:
        head = _head(images, "visual forward KL")
        states = _visual_states(images, grid)
        return RowTargets(hidden=states, head=head, vocabulary=images.vocabulary, rule=images.rule)
    if images.topk_ids is None or images.topk_logprobs is None:
        raise LossError(
            "visual forward KL: the cache holds neither visual states nor a visual top-k. Score the images again with "
            "signals.visual: states (or topk)."
        )
    if grid is not None:
        raise LossError(
            f"visual forward KL: a top-k of {images.tokens} image positions cannot be pooled to {grid[1] ** 2}. Score "
            "the images again with signals.visual: states, or take a student with the teacher's grid."
        )
    return RowTargets(
        topk_ids=images.topk_ids.flatten(0, 1),
        topk_logprobs=images.topk_logprobs.flatten(0, 1),
        stats={name: column.flatten(0, 1) for name, column in images.stats.items()},
        vocabulary=images.vocabulary,
    )


def _visual_states(images: ImageTargets, grid: tuple[int, int] | None) -> StoredStates:
    assert images.states is not None
    if grid is None:
        return images.states.flatten()
    return decoded(pool_grid(images.states.decode(slice(None)), *grid).flatten(0, 1))


def pooled_grid(teacher_tokens: int, student_tokens: int, pool: int) -> tuple[int, int] | None:
    """How to match the teacher's image positions to the student's: None as they are, or the grid's sides (from, to).

    pool: the side to which the teacher's grid is mean-pooled; 0 for no pooling.

    Raises ``LossError``: where the numbers differ and no pooling is named, or the pooling does not lead from one grid
    to the other.
    """
    found = f"the teacher has {teacher_tokens} image positions, the student {student_tokens}"
    if pool == 0 and teacher_tokens == student_tokens:
        return None
    if pool == 0:
        raise LossError(
            f"relation and visual-token losses: {found}, and they are compared one to one. Take a student with "
            f"{teacher_tokens}, or name a pooling of the teacher's grid (pool: {math.isqrt(student_tokens)})."
        )
    side = math.isqrt(teacher_tokens)
    if side * side != teacher_tokens or side % pool or pool * pool != student_tokens:
        raise LossError(
            f"pool: {pool}: {found}; expected a square grid whose side is a multiple of {pool}, and {pool * pool} "
            "positions of the student. Correct the loss's pool, or drop relation and visual-token losses."
        )
    return side, pool


def pool_grid(states: Tensor, old: int = 24, new: int = 12) -> Tensor:
    """Mean over blocks of a square grid in row-major order: (…, old², d) → (…, new², d)."""
    block = old // new
    lead, width = states.shape[:-2], states.shape[-1]
    grid = states.reshape(*lead, new, block, new, block, width)
    return grid.mean((-4, -2)).reshape(*lead, new * new, width)


def pool_gram(gram: Tensor, old: int = 24, new: int = 12) -> Tensor:
    """P·G·Pᵀ with P the pooling of :func:`pool_grid`: (B, old², old²) → (B, new², new²), the pooled states' Gram."""
    return pool_grid(pool_grid(gram, old, new).mT, old, new).mT


def _head(images: ImageTargets, what: str) -> Tensor:
    if images.head is None:
        raise LossError(f"{what}: needs the teacher's output head, and none was given. Open the cache with its head.")
    return images.head
