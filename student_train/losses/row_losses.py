"""Distillation losses: plain functions, teacher first, one value per row.

Letters: R rows, V vocabulary, k kept ids, d width, N image positions. Every function returns (R,) float32 (float64 for
float64 inputs) and never reduces over rows: the trainer divides once, by the rows of the global batch.

A loss of two distributions takes their log-probabilities (R, buckets), and three kinds of teacher give them:

- **exact**: the teacher's logits (R, V); a bucket is an id.
- **top-k with one tail bucket** (:func:`buckets`): the k kept ids, with log-probabilities over the FULL vocabulary at
  the loss's temperature (``losses.topk``), and one bucket for the V − k others, whose mass is what the head leaves;
  nothing is renormalised. Merging ids cannot raise an f-divergence (data processing inequality), so forward KL, reverse
  KL and JSD on these k + 1 buckets are **lower bounds** of their dense values. For forward KL what is missing is tail
  mass × KL(teacher's tail ‖ student's tail); reverse KL's bound is looser, since what is missing carries the STUDENT's
  tail mass. With k = V they equal the dense ones. The bounds are those of the log-probabilities given. A cache's are
  float16: each is off by at most 2⁻¹¹ of itself, and at T by 2⁻¹¹/T (0.2 nats of a log-probability of −40 at T = 0.1),
  which may lift a value above its dense one.
- **sampled**: ids drawn from the teacher with their counts. Unbiased, in value and in gradient.

The temperature divides both sides' logits; ``temperature_squared`` multiplies by T², as Hinton et al. (2015) do to keep
gradients of one size: off by default, since neither LLAVADI's paper nor its code multiplies (``targets.row_loss``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from student_train.losses.shared_ids import NO_MASS
from student_train.losses.topk import STANDARDISE_EPS, tail_mass, wide
from teacher_cache.errors import LossError


def cross_entropy(answer_ids: Tensor, student_logits: Tensor, smoothing: float = 0.0) -> Tensor:
    """−log q(answer): answer_ids (R,) int64, student_logits (R, V) → (R,). LLAVADI, eq. 2.

    ``smoothing``: the share of the target that all V ids get alike (Szegedy et al., 2016), the control of every claim
    that a teacher's soft labels help.
    """
    return functional.cross_entropy(wide(student_logits), answer_ids, reduction="none", label_smoothing=smoothing)


# Two distributions: log-probabilities (R, buckets) of the teacher and of the student


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P_t ‖ P_s). LLAVADI, eq. 3 (whose printed form lacks the logarithm)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P_s ‖ P_t). LLAVADI, section 3.2; MiniLLM (Gu et al., 2024)."""
    return forward_kl(log_q, log_p)


def jsd(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised Jensen–Shannon divergence: LLAVADI, eq. 4 = GKD (Agarwal et al., 2024), eq. 1.

    β·KL(P_t ‖ M) + (1 − β)·KL(P_s ‖ M) with M = β·P_t + (1 − β)·P_s. It vanishes at β = 0 and 1, where GKD's limits
    JSD/β → forward KL and JSD/(1 − β) → reverse KL; those two are asked for by their own names here.

    Raises ``LossError``: for β outside (0, 1).
    """
    if not 0 < beta < 1:
        raise LossError(
            f"jsd: beta must lie between 0 and 1, found {beta:g}, where the divergence is zero whatever the student "
            "does. Use forward_kl in place of beta 0 and reverse_kl in place of beta 1."
        )
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)


def tail_aware_kl(log_p: Tensor, log_q: Tensor, ids: int, head_ids: int = 10, tail_weight: float = 1.0) -> Tensor:
    """KL(P̄_t ‖ P̄_s) + tail_weight · KL(T_t ‖ T_s): the tail-aware divergence of Dasgupta et al., 2026
    (arXiv:2602.20816), which takes the tail's part of the KL out of the shadow of the teacher's modes.

    The head is the teacher's ``head_ids`` most likely ids. P̄ has them and one bucket of all others, T is the
    distribution among these others. By the chain rule the forward KL is this with tail_weight = 1 − Σ P_t(head), next
    to nothing where the teacher is sure. The paper's: top-K and tail apart, and the settings K and β. Ours, since its
    equation was not at hand: that form (decoupled distillation, Zhao et al., CVPR 2022, with a larger head), the
    defaults, and the one bucket that a top-k has for what it does not hold.

    ``ids``: so many of the columns are ids; one more is a top-k's tail bucket, which belongs to T. Both terms are lower
    bounds of their dense values then.
    """
    most = log_p[:, :ids].topk(min(head_ids, ids), -1).indices
    none = torch.finfo(log_p.dtype).min / 4  # not −inf, whose gradient is NaN where a row is all head
    log_head, log_tail = [], []
    for log in (log_p, log_q):
        rest = log.scatter(-1, most, none)
        mass = rest.logsumexp(-1, keepdim=True).clamp(min=NO_MASS)
        log_head.append(torch.cat([log.gather(-1, most), mass], -1))
        log_tail.append(rest - mass)
    return forward_kl(log_head[0], log_head[1]) + tail_weight * forward_kl(log_tail[0], log_tail[1])


def forward_kl_standardised(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Forward KL of z-scored logits / τ (:func:`standardise`): Sun et al., CVPR 2024, eq. 6; LLAVADI has τ = 1.

    From a top-k it is a loose bound: z-scoring flattens a language model's distribution so much that most mass lies in
    the tail, whose shape one bucket does not hold. Prefer the exact source.
    """
    return forward_kl(log_p, log_q)


def standardise(logits: Tensor) -> Tensor:
    """(logits − mean) / (std + 1e-7) over the last axis, the full vocabulary; gradients flow through both.

    The deviation is the paper's (division by V); the released codes divide by V − 1, which is the same as τ larger by a
    factor √(V / (V − 1)): 1.6e-5 at V = 32,000.
    """
    logits = wide(logits)
    deviation, mean = torch.std_mean(logits, -1, correction=0, keepdim=True)
    return (logits - mean) / (deviation + STANDARDISE_EPS)


def forward_kl_of_draws(ids: Tensor, shares: Tensor, teacher_entropy: Tensor, log_q: Tensor) -> Tensor:
    """Random Sampling KD (Anshumann et al., ACL 2025, section 3): ids and shares (R, n), log_q (R, V) → (R,).

    −Σ share·log q − H(P_t), the shares being those of the row's draws (:func:`draw_shares`) or an exact head with the
    tail's mass on its draws (:func:`hybrid_target`), which varies far less. Linear in the shares, so its value and its
    gradient are unbiased estimates of forward KL's (one row may be negative); a hybrid one's up to the float16 rounding
    of the head, which the tail mass inherits. Draws are made at temperature 1 and serve no other.
    """
    return -(shares * log_q.gather(-1, ids)).sum(-1) - teacher_entropy


# Logits


def logit_mse(
    teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0, inside: Tensor | None = None
) -> Tensor:
    """Mean of the squared difference of raw logits / T, over V or over the k kept ids (R, k). LLAVADI, table 2.

    Exact on the kept ids and blind to all others: neither a bound nor an estimate of the dense mean over V (the kept
    logits are the largest). ``inside`` (R, k): which of the kept ids both sides have.
    """
    square = ((wide(student_logits) - wide(teacher_logits)) / temperature).square()
    return square.mean(-1) if inside is None else (square * inside).sum(-1) / inside.sum(-1).clamp(min=1)


# Hidden states and affinity


class HiddenProjector(nn.Sequential):
    """Student states (R, d_s) → the teacher's width (R, d_t): Linear · GELU · Linear. LLAVADI, section 3.2.

    Trained with the student, left out of its export.
    """

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__(nn.Linear(student_width, teacher_width), nn.GELU(), nn.Linear(teacher_width, teacher_width))


def hidden_mse(teacher_states: Tensor, projected: Tensor) -> Tensor:
    """Mean over d of the squared difference, (R, d) both → (R,). LLAVADI, table 1."""
    return (wide(projected) - wide(teacher_states)).square().mean(-1)


def hidden_cosine(teacher_states: Tensor, projected: Tensor) -> Tensor:
    """1 − cosine, (R, d) both → (R,). LLAVADI, table 1; DistilBERT (Sanh et al., 2019)."""
    return 1 - functional.cosine_similarity(wide(teacher_states), wide(projected), dim=-1)


def attention_mse(teacher_attention: Tensor, student_attention: Tensor) -> Tensor:
    """Mean over the image positions of the squared difference of attention scores → (R,). LLAVADI, table 3.

    teacher_attention (R, N) mean over heads, or (R, heads, N); student_attention likewise. Heads are averaged first, so
    their numbers may differ. Rows are answer tokens looking at the image; the other direction is zero under a causal
    mask with the image first.
    """
    return (_head_mean(student_attention) - _head_mean(teacher_attention)).square().mean(-1)


def similarity_mse(teacher_image: Tensor, teacher_text: Tensor, student_image: Tensor, student_text: Tensor) -> Tensor:
    """Squared difference of the cosine matrices text × image, mean over the image positions → (R,). LLAVADI, table 3.

    Of one sample: *_image (N, d), *_text (R, d), each side in its own width.
    """
    teacher = _cosines(teacher_text, teacher_image)
    return (_cosines(student_text, student_image) - teacher).square().mean(-1)


# What the above are given


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """(R, V) log-probabilities of logits / T, in float32 at least."""
    return torch.log_softmax(wide(logits) / temperature, -1)


def draw_shares(sampled_counts: Tensor) -> Tensor:
    """Counts (R, n) → their share of the row's N draws, float32. A place with count 0 is unused."""
    counts = sampled_counts.float()
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def hybrid_target(
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    sampled_ids: Tensor,
    sampled_counts: Tensor,
    vocabulary: int,
    inside: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Ids (R, k + n) and their probabilities: the head's own, and the tail's mass shared out over its draws, which were
    made outside the top-k (``signals.sampled_from: tail``)."""
    head = wide(topk_logprobs)
    if inside is None and head.shape[-1] >= vocabulary:
        return topk_ids, head.exp()
    tail = tail_mass(head, vocabulary, inside) * draw_shares(sampled_counts)
    return torch.cat([topk_ids, sampled_ids], -1), torch.cat([head.exp(), tail], -1)


def buckets(
    topk_ids: Tensor, head_logprobs: Tensor, student_logits: Tensor, temperature: float, inside: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (R, k + 1) of teacher and student: the kept ids and the rest (no rest for k = V).

    ``inside`` (R, k): which of the kept ids both sides have; the others have no mass (``shared_ids.shared_topk``).
    """
    head = wide(head_logprobs)
    scaled = wide(student_logits) / temperature
    normaliser = torch.logsumexp(scaled, -1, keepdim=True)
    kept = scaled.gather(-1, topk_ids) - normaliser
    kept = kept if inside is None else kept.where(inside, NO_MASS)
    vocabulary = scaled.shape[-1]
    if inside is None and head.shape[-1] >= vocabulary:
        return head, kept
    # Summed over the tail itself: 1 − Σ head would lose a small tail, and its gradient with it, to rounding.
    nothing = -math.inf if inside is None else torch.finfo(scaled.dtype).min / 4  # a row may have no tail at all
    rest = torch.logsumexp(scaled.scatter(-1, topk_ids, nothing), -1, keepdim=True) - normaliser
    rest = rest if inside is None else rest.clamp(min=NO_MASS)
    return torch.cat([head, tail_mass(head, vocabulary, inside).log()], -1), torch.cat([kept, rest], -1)


def _head_mean(attention: Tensor) -> Tensor:
    return wide(attention).mean(-2) if attention.ndim == 3 else wide(attention)


def _cosines(text: Tensor, image: Tensor) -> Tensor:
    return functional.normalize(wide(text), dim=-1) @ functional.normalize(wide(image), dim=-1).T
