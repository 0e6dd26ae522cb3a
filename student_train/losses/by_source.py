"""One loss of logits, row by row, from each kind of teacher that a cache holds: its logits, its top-k, its draws."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from student_train.losses import row_losses, topk
from student_train.losses.catalogue import CATALOGUE, Answers, Distributions, Drawable, Logits, LossSpec, Parted
from student_train.losses.shared_ids import shared_count, shared_draws, shared_topk
from student_train.losses.targets import RowTargets
from teacher_cache.errors import LossError


def row_loss(spec: LossSpec, targets: RowTargets, student_logits: Tensor, rows: slice) -> Tensor:
    """One value per row (rows,) of the loss that ``spec`` names; ``student_logits`` (rows, V) are those of ``rows``.

    Raises ``LossError``: for a loss of something else than logits, or a signal that the cache does not hold.
    """
    entry = spec.entry
    if isinstance(entry, Answers):
        return entry.function(targets.answers(rows), student_logits, **spec.own())
    if not isinstance(entry, Logits):
        known = ", ".join(name for name, other in CATALOGUE.items() if isinstance(other, (Answers, Logits)))
        raise LossError(f"loss {spec.name}: it is none of single rows' logits. Take one of {known}")
    shared = shared_count(targets.vocabulary, student_logits.shape[-1])
    student_logits = student_logits[..., :shared]
    if spec.source == "sampled":
        ids, shares, entropy = draws_of(spec, targets, rows, shared)
        return draws_function(spec)(ids, shares, entropy, row_losses.log_softmax(student_logits, 1.0))
    if spec.source == "exact":
        value = exact_loss(spec, targets.exact_logits(rows, shared), student_logits)
    else:
        value = _topk_loss(spec, targets, student_logits, rows)
    return value * scale_of(spec)


def exact_loss(spec: LossSpec, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """The loss (R,) of the teacher's logits (R, V), before it is multiplied by the temperature's square."""
    check_vocabulary(spec.name, teacher_logits.shape[-1], student_logits.shape[-1])
    entry = spec.entry
    if not isinstance(entry, Distributions):
        return entry.function(teacher_logits, student_logits, spec.temperature, **spec.own())
    sides = [row_losses.standardise(s) if entry.standardised else s for s in (teacher_logits, student_logits)]
    log_p, log_q = (row_losses.log_softmax(side, spec.temperature) for side in sides)
    return _divergence(spec, log_p, log_q, log_p.shape[-1])


def _topk_loss(spec: LossSpec, targets: RowTargets, student_logits: Tensor, rows: slice) -> Tensor:
    ids, logprobs, stats = targets.kept(rows)
    entry, vocabulary = spec.entry, student_logits.shape[-1]
    if not isinstance(entry, Distributions):
        logits = topk.topk_logits(logprobs, stats)
        ids, _, inside = shared_topk(ids, topk.wide(logprobs), targets.vocabulary, vocabulary)
        kept = topk.wide(student_logits).gather(-1, ids)
        return entry.function(logits, kept, spec.temperature, inside, **spec.own())
    inside = None
    if entry.standardised:  # of a larger teacher: refused before the first step
        head = topk.topk_standardised(logprobs, stats, vocabulary, spec.temperature)
        student_logits = row_losses.standardise(student_logits)
    else:
        head = topk.topk_at_temperature(logprobs, stats, spec.temperature)
        ids, head, inside = shared_topk(ids, head, targets.vocabulary, vocabulary)
    log_p, log_q = row_losses.buckets(ids, head, student_logits, spec.temperature, inside)
    return _divergence(spec, log_p, log_q, ids.shape[-1])


def _divergence(spec: LossSpec, log_p: Tensor, log_q: Tensor, ids: int) -> Tensor:
    """``ids``: so many of the buckets are ids."""
    more = {"ids": ids} if isinstance(spec.entry, Parted) else {}
    return spec.entry.function(log_p, log_q, **more, **spec.own())


def draws_of(spec: LossSpec, targets: RowTargets, rows: slice, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (R, n), the probability that each stands for (R, n), and the teacher's entropy (R,)."""
    draws_function(spec)
    ids, counts, entropy = targets.draws(rows)
    ids, counts = shared_draws(ids, counts, targets.vocabulary, vocabulary)
    if targets.sampled_from == "all":
        return ids, row_losses.draw_shares(counts), entropy
    head_ids, logprobs, _ = targets.kept(rows)
    head_ids, head, inside = shared_topk(head_ids, topk.wide(logprobs), targets.vocabulary, vocabulary)
    return *row_losses.hybrid_target(head_ids, head, ids, counts, vocabulary, inside), entropy


def draws_function(spec: LossSpec) -> Callable[..., Tensor]:
    """The loss's function for draws, which are made at temperature 1."""
    if not isinstance(spec.entry, Drawable) or spec.temperature != 1:
        known = " or ".join(name for name, entry in CATALOGUE.items() if isinstance(entry, Drawable))
        raise LossError(
            f"loss {spec.name} at temperature {spec.temperature:g} from sampled ids: expected {known} at temperature "
            "1, of which alone draws give an unbiased estimate. Use `source: exact` or `topk`."
        )
    return spec.entry.draws


def check_vocabulary(name: str, teacher: int, student: int) -> None:
    """Exact losses compare id by id."""
    if teacher != student:
        raise LossError(
            f"loss {name}: the teacher's head gives {teacher:,} logits, the student's {student:,}. Cut both heads to "
            f"the {min(teacher, student):,} ids that they share."
        )


def scale_of(spec: LossSpec) -> float:
    """T² where the settings ask for it."""
    return spec.temperature**2 if spec.temperature_squared else 1.0
