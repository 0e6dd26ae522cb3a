"""Cross-entropy and forward KL with their gradients written out, in one buffer of logits.

Both have one shape, −Σ target·log q, with the gradient (mass of the target)·q − target. So one softmax, in place,
serves them all, and a top-k target touches k entries where autograd would make several (rows × V) tensors:

    cross-entropy        q − onehot
    forward KL, exact    q − p
    forward KL, top-k    q − p on the kept ids; q·(1 − p_tail / q_tail) on the others
    forward KL, sampled  q − count / N

times 1/T where T ≠ 1. ``head_loss.head_losses`` uses it where every loss is one of these. The oracle is autograd over
``by_source.row_loss``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from student_train.losses import topk
from student_train.losses.by_source import check_vocabulary, draws_of, scale_of
from student_train.losses.catalogue import Answers, Drawable, LossSpec
from student_train.losses.shared_ids import shared_count, shared_topk
from student_train.losses.targets import RowTargets

SMALLEST_TAIL = 1e-30
"""Below this share of the student's largest probability its tail has no gradient left in float32."""


@dataclass(frozen=True)
class SparseTarget:
    """ids (R, n) with probabilities (R, n); ``tail`` (R, 1): the mass of one bucket holding all other ids.

    ``constant`` (R,) is what −Σ target·log q lacks to the loss's value.
    """

    ids: Tensor
    probabilities: Tensor
    constant: Tensor
    tail: Tensor | None = None
    inside: Tensor | None = None
    """(R, n) which ids count; another one repeats one of its row's (``shared_ids.shared_topk``). None: all."""

    def to(self, dtype: torch.dtype) -> SparseTarget:
        tail = None if self.tail is None else self.tail.to(dtype)
        return SparseTarget(self.ids, self.probabilities.to(dtype), self.constant.to(dtype), tail, self.inside)


@dataclass(frozen=True)
class DenseTarget:
    """The teacher's logits (R, V) float32 at the loss's temperature; overwritten."""

    logits: Tensor


Target = SparseTarget | DenseTarget


def supported(specs: Sequence[LossSpec]) -> bool:
    """Whether these are at most one loss of the answers, without smoothing, and at most one forward KL, and nothing
    else."""
    kinds = [type(spec.entry) for spec in specs]
    plain = not any(any(spec.own().values()) for spec in specs)
    return plain and set(kinds) <= {Answers, Drawable} and len(set(kinds)) == len(kinds)


def losses_and_gradient(
    specs: Sequence[LossSpec], weights: Mapping[str, float], stored: RowTargets, rows: slice, logits: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Student ``logits`` (R, V) float32 of ``rows`` → losses (R,) by name, and d(Σ weight·loss) / d(logits) (R, V).

    The gradient lies in the buffer of ``logits``; T ≠ 1, or a teacher of fewer ids, takes one more.
    """
    shared = shared_count(stored.vocabulary, logits.shape[-1])
    teacher = {spec.name: _target(spec, stored, rows, shared) for spec in specs}
    fewer = shared < logits.shape[-1]
    apart = [s for s in specs if s.temperature != 1 or (fewer and not isinstance(s.entry, Answers))]
    values: dict[str, Tensor] = {}
    gradients = []
    for spec in apart:  # before the softmax at temperature 1 over all ids overwrites the logits
        gradients.append(logits[:, :shared] / spec.temperature)
        scale = {spec.name: weights[spec.name] * scale_of(spec) / spec.temperature}
        values |= _soft_target_losses(gradients[-1], {spec.name: teacher.pop(spec.name)}, scale)
        values[spec.name] *= scale_of(spec)
    if teacher:
        values |= _soft_target_losses(logits, teacher, weights)
    elif not fewer:
        return values, gradients[0]
    else:
        logits.zero_()
    for gradient in gradients:
        logits[:, :shared].add_(gradient)
    return values, logits


@dataclass(frozen=True)
class _Sums:
    """Of the student's exp(logit − largest): over all ids, over the tail (R, 1), and the kept ids' own (R, k)."""

    total: Tensor
    tail: Tensor
    kept: Tensor | None

    @property
    def log_total(self) -> Tensor:
        return self.total.log()


def _soft_target_losses(
    logits: Tensor, teacher: Mapping[str, Target], weights: Mapping[str, float]
) -> dict[str, Tensor]:
    """Losses (R,) by name; ``logits`` (R, V) becomes the gradient of their weighted sum. At most one has a tail."""
    sparse = {name: t.to(logits.dtype) for name, t in teacher.items() if isinstance(t, SparseTarget)}
    dense = {name: t for name, t in teacher.items() if isinstance(t, DenseTarget)}
    bucketed = next((target for target in sparse.values() if target.tail is not None), None)
    logits.sub_(logits.amax(-1, keepdim=True))
    gathered = {name: logits.gather(-1, target.ids) for name, target in sparse.items()}
    against = {name: _against_dense(target.logits, logits) for name, target in dense.items()}
    sums = _exponentiate(logits, bucketed)
    values = {name: _sparse_value(target, gathered[name], sums) for name, target in sparse.items()}
    values |= {name: value + sums.log_total.squeeze(-1) for name, (value, _) in against.items()}
    _to_gradient(logits, sums, sparse, bucketed, weights, sum(weights[name] for name in dense))
    for name, (_, probabilities) in against.items():
        logits.sub_(probabilities, alpha=weights[name])
    return values


def _against_dense(teacher_logits: Tensor, shifted: Tensor) -> tuple[Tensor, Tensor]:
    """KL(P ‖ Q) less the student's log-sum-exp (R,), and P (R, V); ``teacher_logits`` is used up."""
    teacher_logits.sub_(teacher_logits.amax(-1, keepdim=True))
    probabilities = teacher_logits.exp()
    total = probabilities.sum(-1, keepdim=True)
    probabilities.div_(total)
    difference = teacher_logits.sub_(shifted).mul_(probabilities).sum(-1)
    return difference - total.log().squeeze(-1), probabilities


def _exponentiate(shifted: Tensor, bucketed: SparseTarget | None) -> _Sums:
    """exp in place. The tail is summed by itself (its head set to 0): a total less the head would round it away."""
    shifted.exp_()
    if bucketed is None:
        total = shifted.sum(-1, keepdim=True)
        return _Sums(total, total, None)
    kept = shifted.gather(-1, bucketed.ids)
    tail = shifted.scatter_(-1, bucketed.ids, 0.0).sum(-1, keepdim=True)
    counted = kept if bucketed.inside is None else kept * bucketed.inside
    return _Sums(tail + counted.sum(-1, keepdim=True), tail.clamp(min=SMALLEST_TAIL), kept)


def _sparse_value(target: SparseTarget, shifted: Tensor, sums: _Sums) -> Tensor:
    """constant − Σ target·log q, ``shifted`` (R, n) being the student's logits at the target's ids."""
    value = target.constant - (target.probabilities * (shifted - sums.log_total)).sum(-1)
    if target.tail is None:
        return value
    return value - (target.tail * (sums.tail.log() - sums.log_total)).squeeze(-1)


def _to_gradient(
    exponentials: Tensor,
    sums: _Sums,
    sparse: Mapping[str, SparseTarget],
    bucketed: SparseTarget | None,
    weights: Mapping[str, float],
    mass: float,
) -> None:
    """exp(logit) → Σ weight·(mass·q − target), in place; ``mass`` starts with that of the dense targets."""
    factor = mass + sum(weights[name] * _mass(target) for name, target in sparse.items())
    if bucketed is None or bucketed.tail is None or sums.kept is None:
        exponentials.mul_(factor / sums.total)
    else:
        weight = next(weights[name] for name, target in sparse.items() if target is bucketed)
        exponentials.mul_(factor / sums.total - weight * bucketed.tail / sums.tail)
        exponentials.scatter_(-1, bucketed.ids, sums.kept * (factor / sums.total))
    for name, target in sparse.items():
        exponentials.scatter_add_(-1, target.ids, target.probabilities * -weights[name])


def _mass(target: SparseTarget) -> Tensor:
    mass = target.probabilities.sum(-1, keepdim=True)
    return mass if target.tail is None else mass + target.tail


def _target(spec: LossSpec, stored: RowTargets, rows: slice, vocabulary: int) -> Target:
    """What the student is drawn to, at the loss's temperature."""
    if isinstance(spec.entry, Answers):
        ids = stored.answers(rows).unsqueeze(-1)
        ones = torch.ones(ids.shape, device=ids.device)
        return SparseTarget(ids, ones, ones.new_zeros(len(ids)))
    if spec.source == "exact":
        logits = stored.exact_logits(rows, vocabulary)
        check_vocabulary(spec.name, logits.shape[-1], vocabulary)
        return DenseTarget(logits if spec.temperature == 1 else logits.div_(spec.temperature))
    if spec.source == "sampled":
        ids, shares, entropy = draws_of(spec, stored, rows, vocabulary)
        return SparseTarget(ids, shares, -entropy)
    ids, logprobs, stats = stored.kept(rows)
    head = topk.topk_at_temperature(logprobs, stats, spec.temperature)
    ids, head, inside = shared_topk(ids, head, stored.vocabulary, vocabulary)
    constant = (head.exp() * head).sum(-1)
    if inside is None and ids.shape[-1] >= vocabulary:
        return SparseTarget(ids, head.exp(), constant)
    tail = topk.tail_mass(head, vocabulary, inside)
    return SparseTarget(ids, head.exp(), constant + (tail * tail.log()).squeeze(-1), tail, inside)
