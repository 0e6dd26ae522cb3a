"""Distillation losses: plain functions, teacher first, one value per row.

Letters: R rows, V vocabulary, k kept ids, d width, N image positions. Every function returns (R,) float32 (float64 for
float64 inputs) and never reduces over rows: the trainer divides once, by the rows of the global batch.

Three kinds of teacher:

- **dense**: the teacher's logits (R, V). Exact.
- **top-k with one tail bucket**: ``topk_ids`` (R, k) and ``head_logprobs`` (R, k), which are log-probabilities over the
  FULL vocabulary at the loss's temperature (``losses.topk``). The V − k other ids form one bucket whose mass
  is what the head leaves; nothing is renormalised. Merging ids cannot raise an f-divergence (data processing
  inequality), so forward KL, reverse KL and JSD on these k + 1 buckets are **lower bounds** of their dense values; for
  forward KL what is missing is tail mass × KL(teacher's tail ‖ student's tail). With k = V they equal the dense ones.
  The bounds are those of the log-probabilities given. A cache's are float16: each is off by at most 2⁻¹¹ of itself, and
  at T by 2⁻¹¹/T (0.2 nats of a log-probability of −40 at T = 0.1), which may lift a value above its dense one.
- **sampled**: ids drawn from the teacher with their counts. Unbiased, in value and in gradient.

``temperature`` divides both sides' logits. ``temperature_squared`` multiplies by T², as Hinton et al. (2015) do to keep
gradients of one size; off by default, since neither LLAVADI's paper nor its code multiplies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from student_train.losses.shared_ids import NO_MASS
from student_train.losses.topk import STANDARDISE_EPS, tail_mass, wide
from teacher_cache.errors import LossError


def cross_entropy(answer_ids: Tensor, student_logits: Tensor) -> Tensor:
    """−log q(answer): answer_ids (R,) int64, student_logits (R, V) → (R,). LLAVADI, eq. 2."""
    return functional.cross_entropy(wide(student_logits), answer_ids, reduction="none")


# Dense teacher


def forward_kl(
    teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0, temperature_squared: bool = False
) -> Tensor:
    """KL(P_t ‖ P_s), (R, V) both → (R,). LLAVADI, eq. 3 (whose printed form lacks the logarithm)."""
    log_p, log_q = _log_softmax(teacher_logits, temperature), _log_softmax(student_logits, temperature)
    return kl(log_p, log_q) * _scale(temperature, temperature_squared)


def reverse_kl(
    teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0, temperature_squared: bool = False
) -> Tensor:
    """KL(P_s ‖ P_t), (R, V) both → (R,). LLAVADI, section 3.2; MiniLLM (Gu et al., 2024)."""
    log_p, log_q = _log_softmax(teacher_logits, temperature), _log_softmax(student_logits, temperature)
    return kl(log_q, log_p) * _scale(temperature, temperature_squared)


def jsd(
    teacher_logits: Tensor,
    student_logits: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    temperature_squared: bool = False,
) -> Tensor:
    """Generalised Jensen–Shannon divergence, (R, V) both → (R,): LLAVADI, eq. 4 = GKD (Agarwal et al., 2024), eq. 1.

    β·KL(P_t ‖ M) + (1 − β)·KL(P_s ‖ M) with M = β·P_t + (1 − β)·P_s. It vanishes at β = 0 and 1, where GKD's limits
    JSD/β → forward KL and JSD/(1 − β) → reverse KL; those two are asked for by their own names here.

    Raises ``LossError``: for β outside (0, 1).
    """
    log_p, log_q = _log_softmax(teacher_logits, temperature), _log_softmax(student_logits, temperature)
    return js_divergence(log_p, log_q, beta) * _scale(temperature, temperature_squared)


def logit_mse(
    teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0, temperature_squared: bool = False
) -> Tensor:
    """Mean over V of the squared difference of logits / T, (R, V) both → (R,). LLAVADI, table 2."""
    difference = (wide(student_logits) - wide(teacher_logits)) / temperature
    return difference.square().mean(-1) * _scale(temperature, temperature_squared)


def forward_kl_standardised(
    teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0, temperature_squared: bool = False
) -> Tensor:
    """Forward KL of z-scored logits / τ, (R, V) both → (R,). Sun et al., CVPR 2024, eq. 6, as LLAVADI uses it (τ = 1).

    The z-score is over the full vocabulary, each side by its own mean and standard deviation, and gradients flow
    through them. The deviation is the paper's (division by V); the released codes divide by V − 1, which is the same
    as τ larger by a factor √(V / (V − 1)): 1.6e-5 at V = 32,000.
    """
    return forward_kl(standardise(teacher_logits), standardise(student_logits), temperature, temperature_squared)


def standardise(logits: Tensor) -> Tensor:
    """(logits − mean) / (std + 1e-7) over the last axis."""
    logits = wide(logits)
    deviation, mean = torch.std_mean(logits, -1, correction=0, keepdim=True)
    return (logits - mean) / (deviation + STANDARDISE_EPS)


# Top-k and one tail bucket


def forward_kl_topk(
    topk_ids: Tensor,
    head_logprobs: Tensor,
    student_logits: Tensor,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    inside: Tensor | None = None,
) -> Tensor:
    """Forward KL over k + 1 buckets → (R,); a lower bound of :func:`forward_kl`, exact for k = V."""
    log_p, log_q = _buckets(topk_ids, head_logprobs, student_logits, temperature, inside)
    return kl(log_p, log_q) * _scale(temperature, temperature_squared)


def reverse_kl_topk(
    topk_ids: Tensor,
    head_logprobs: Tensor,
    student_logits: Tensor,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    inside: Tensor | None = None,
) -> Tensor:
    """Reverse KL over k + 1 buckets → (R,); a lower bound of :func:`reverse_kl`, exact for k = V.

    Looser than forward KL's bound: what is missing carries the STUDENT's tail mass, so wherever the student believes
    in ids that the teacher's head does not hold, only the mass out there is corrected, not its shape.
    """
    log_p, log_q = _buckets(topk_ids, head_logprobs, student_logits, temperature, inside)
    return kl(log_q, log_p) * _scale(temperature, temperature_squared)


def jsd_topk(
    topk_ids: Tensor,
    head_logprobs: Tensor,
    student_logits: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    inside: Tensor | None = None,
) -> Tensor:
    """JSD(β) over k + 1 buckets → (R,); a lower bound of :func:`jsd`, exact for k = V."""
    log_p, log_q = _buckets(topk_ids, head_logprobs, student_logits, temperature, inside)
    return js_divergence(log_p, log_q, beta) * _scale(temperature, temperature_squared)


def logit_mse_topk(
    topk_ids: Tensor,
    topk_logits: Tensor,
    student_logits: Tensor,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    inside: Tensor | None = None,
) -> Tensor:
    """Mean over the k kept ids of the squared difference of raw logits / T → (R,); topk_logits (R, k).

    Exact on the kept ids and blind to all others: neither a bound nor an estimate of the dense mean over V (the kept
    logits are the largest). Equal to it for k = V.
    """
    square = ((wide(student_logits).gather(-1, topk_ids) - wide(topk_logits)) / temperature).square()
    mean = square.mean(-1) if inside is None else (square * inside).sum(-1) / inside.sum(-1).clamp(min=1)
    return mean * _scale(temperature, temperature_squared)


def forward_kl_standardised_topk(
    topk_ids: Tensor,
    head_logprobs: Tensor,
    student_logits: Tensor,
    temperature: float = 1.0,
    temperature_squared: bool = False,
) -> Tensor:
    """Forward KL of z-scored logits over k + 1 buckets → (R,), ``head_logprobs`` from ``topk.topk_standardised``.

    A lower bound, and here a loose one: z-scoring flattens a language model's distribution so much that most mass lies
    in the tail, whose shape one bucket does not hold. Prefer the exact source. Equal to the dense one for k = V.
    """
    return forward_kl_topk(topk_ids, head_logprobs, standardise(student_logits), temperature, temperature_squared)


def forward_kl_topk_renormalised(
    topk_ids: Tensor, head_logprobs: Tensor, student_logits: Tensor, temperature: float = 1.0
) -> Tensor:
    """The common shortcut, kept for comparison only: the teacher's head scaled to mass 1 and no tail → (R,).

    Biased: its optimum is the scaled head, with nothing outside, so the student grows over-confident (Anshumann et al.,
    ACL 2025, section 3). The fidelity report measures its gradient error; no training configuration offers it.
    """
    log_p = torch.log_softmax(wide(head_logprobs), -1)
    return kl(log_p, _log_softmax(student_logits, temperature).gather(-1, topk_ids))


# Sampled ids


def forward_kl_sampled(
    sampled_ids: Tensor, sampled_counts: Tensor, teacher_entropy: Tensor, student_logits: Tensor
) -> Tensor:
    """Random Sampling KD (Anshumann et al., ACL 2025, section 3): ids and counts (R, n), entropy (R,) → (R,).

    −Σ (count / N)·log q − H(P_t). Linear in the counts, so its value and its gradient are unbiased estimates of forward
    KL's (one row may be negative). The draws were made at temperature 1 and serve no other. A place with count 0 is
    unused.
    """
    log_q = _log_softmax(student_logits, 1.0).gather(-1, sampled_ids)
    return -(draw_shares(sampled_counts) * log_q).sum(-1) - teacher_entropy


def forward_kl_hybrid(
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    sampled_ids: Tensor,
    sampled_counts: Tensor,
    teacher_entropy: Tensor,
    student_logits: Tensor,
    inside: Tensor | None = None,
) -> Tensor:
    """Exact head + tail draws weighted by the tail's mass → (R,): unbiased like sampling, with far less variance.

    ``sampled_*`` (R, n) were drawn outside the top-k (``signals.sampled_from: tail``). Unbiased up to the float16
    rounding of the head, which the tail mass inherits.
    """
    vocabulary = student_logits.shape[-1]
    ids, shares = hybrid_target(topk_ids, topk_logprobs, sampled_ids, sampled_counts, vocabulary, inside)
    log_q = _log_softmax(student_logits, 1.0).gather(-1, ids)
    return -(shares * log_q).sum(-1) - teacher_entropy


def hybrid_target(
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    sampled_ids: Tensor,
    sampled_counts: Tensor,
    vocabulary: int,
    inside: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Ids (R, k + n) and their probabilities: the head's own, and the tail's mass shared out over its draws."""
    head = wide(topk_logprobs)
    if inside is None and head.shape[-1] >= vocabulary:
        return topk_ids, head.exp()
    tail = tail_mass(head, vocabulary, inside) * draw_shares(sampled_counts)
    return torch.cat([topk_ids, sampled_ids], -1), torch.cat([head.exp(), tail], -1)


def draw_shares(sampled_counts: Tensor) -> Tensor:
    """Counts (R, n) → their share of the row's N draws, float32."""
    counts = sampled_counts.float()
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


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


# What the above share


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P ‖ Q) of log-probabilities (R, buckets) → (R,)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def js_divergence(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """β·KL(P ‖ M) + (1 − β)·KL(Q ‖ M), M = β·P + (1 − β)·Q, of log-probabilities (R, buckets) → (R,)."""
    if not 0 < beta < 1:
        raise LossError(
            f"jsd: beta must lie between 0 and 1, found {beta:g}, where the divergence is zero whatever the student "
            "does. Use forward_kl in place of beta 0 and reverse_kl in place of beta 1."
        )
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def _buckets(
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


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(wide(logits) / temperature, -1)


def _scale(temperature: float, temperature_squared: bool) -> float:
    return temperature**2 if temperature_squared else 1.0


def _head_mean(attention: Tensor) -> Tensor:
    return wide(attention).mean(-2) if attention.ndim == 3 else wide(attention)


def _cosines(text: Tensor, image: Tensor) -> Tensor:
    return functional.normalize(wide(text), dim=-1) @ functional.normalize(wide(image), dim=-1).T
