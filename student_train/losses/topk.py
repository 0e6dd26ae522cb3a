"""The teacher's distribution from its stored top-k: log-probabilities (R, k) and the statistics of the full vocabulary.

Stored are log-probabilities at temperature 1 (float16) and, per row, log-sum-exps on a grid of temperatures, mean and
standard deviation of all V logits. With these the head is exact at every temperature of the grid, and so is the mass
that it leaves to the V − k other ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from teacher_cache.errors import LossError

STANDARDISE_EPS = 1e-7
"""As in the released code of logit standardisation and of LLAVADI."""


def topk_at_temperature(topk_logprobs: Tensor, stats: Mapping[str, Tensor], temperature: float) -> Tensor:
    """Stored (R, k) log-probabilities at temperature 1 → those at ``temperature``, over the full vocabulary.

    Exact but for what float16 has rounded: at most 2⁻¹¹ of the stored log-probability, divided by the temperature.

    The raw logit is log-probability + lse@1; divided by T, less lse@T, it is the log-probability at T.

    Raises ``LossError``: where ``stats`` (column name → (R,)) has no log-sum-exp at this temperature: the normaliser
    would be a guess.
    """
    if temperature == 1:
        return wide(topk_logprobs)
    normaliser = log_sum_exp(stats, temperature)
    return topk_logits(topk_logprobs, stats) / temperature - normaliser.unsqueeze(-1)


def topk_logits(topk_logprobs: Tensor, stats: Mapping[str, Tensor]) -> Tensor:
    """The teacher's raw logits (R, k) at the kept ids: log-probability at temperature 1 + lse@1."""
    return wide(topk_logprobs) + log_sum_exp(stats, 1.0).unsqueeze(-1)


def log_sum_exp(stats: Mapping[str, Tensor], temperature: float) -> Tensor:
    """(R,) the stored log-sum-exp of the teacher's logits / T."""
    name = f"lse@{temperature:g}"
    if name not in stats:
        grid = ", ".join(n.removeprefix("lse@") for n in stats if n.startswith("lse@")) or "none"
        raise LossError(
            f"temperature {temperature:g} on top-k: expected a stored log-sum-exp at it, found those at temperatures "
            f"{grid}. Use one of these, take the loss from `source: exact`, or score again with {temperature:g} in "
            "signals.temperatures."
        )
    return stats[name]


def topk_standardised(
    topk_logprobs: Tensor, stats: Mapping[str, Tensor], vocabulary: int, temperature: float = 1.0
) -> Tensor:
    """(R, k) log-probabilities of the teacher's z-scored logits / τ at the kept ids, over the full vocabulary.

    A softmax of z-scores is a softmax of logits at T = τ·std, another T for each row. The kept logits, the mean and the
    deviation are exact; the log-sum-exp at that T is not stored and is **interpolated** (:func:`_tail_log_sum_exp`).
    """
    mean, deviation = stats["mean"].unsqueeze(-1), stats["std"].unsqueeze(-1)
    inverse = 1 / ((deviation + STANDARDISE_EPS) * temperature)
    centred = topk_logits(topk_logprobs, stats) - mean
    scaled = centred * inverse
    normaliser = torch.logsumexp(scaled, -1, keepdim=True)
    if topk_logprobs.shape[-1] < vocabulary:
        tail = _tail_log_sum_exp(centred, stats, vocabulary, inverse)
        normaliser = torch.logaddexp(normaliser, tail)
    return scaled - normaliser


def _tail_log_sum_exp(centred: Tensor, stats: Mapping[str, Tensor], vocabulary: int, inverse: Tensor) -> Tensor:
    """(R, 1) log Σ over the ids outside the head of exp(b·(logit − mean)) at b = ``inverse`` (R, 1), interpolated.

    As a function of b it is smooth and convex, since the large logits are in the head. Known exactly: its value, slope
    and curvature at b = 0 (number, mean and variance of the tail's logits, from ``mean`` and ``std``) and its value at
    b = 1/T ≤ 1 of the grid. The polynomial through all of these moves the normaliser at b = 1/std by 0.0004 nats in the
    mean and 0.002 at most (SmolLM2-135M, 750 rows of English, k = 64), less than float16 moves a log-probability.
    Beyond b = 1, which takes logits with a deviation below 1/τ, it goes on by mean and variance of the tail alone, or
    along its last chord where b·std > 2 (off by 0.02 to 0.1 nats).
    """
    rest = vocabulary - centred.shape[-1]
    mean = -centred.sum(-1, keepdim=True) / rest
    square = (vocabulary * stats["std"].unsqueeze(-1).square() - centred.square().sum(-1, keepdim=True)) / rest
    nodes = [0.0, 0.0, 0.0]
    values = [torch.full_like(mean, math.log(rest))] * 3
    for temperature in sorted(_grid(stats), reverse=True):
        if temperature < 1:
            continue
        whole = (stats[f"lse@{temperature:g}"] - stats["mean"] / temperature).unsqueeze(-1)
        nodes.append(1 / temperature)
        values.append(whole + tail_mass(centred / temperature - whole, vocabulary).log())
    curvature = (square - mean.square()).clamp(min=0) / 2
    inside = _newton(nodes, values, [mean, curvature], inverse)
    by_moments = _newton(nodes[:3], values[:3], [mean, curvature], inverse)
    slope = (values[-1] - values[-2]) / (nodes[-1] - nodes[-2])  # lse@1 is always there: the logits come from it
    chord = values[-1] + slope * (inverse - nodes[-1])
    beyond = torch.where(inverse * stats["std"].unsqueeze(-1) <= 2, by_moments, chord)
    return torch.where(inverse <= nodes[-1], inside, beyond)


def _newton(nodes: list[float], values: list[Tensor], at_zero: list[Tensor], place: Tensor) -> Tensor:
    """Newton's polynomial through (nodes, values), the first three nodes being 0; at_zero: f'(0), f''(0)/2."""
    level, coefficients = list(values), [values[0]]
    for order in range(1, len(nodes)):
        level = [
            at_zero[order - 1]
            if nodes[i + order] == nodes[i]
            else (level[i + 1] - level[i]) / (nodes[i + order] - nodes[i])
            for i in range(len(level) - 1)
        ]
        coefficients.append(level[0])
    result = torch.zeros_like(place)
    for node, coefficient in zip(reversed(nodes), reversed(coefficients), strict=True):
        result = result * (place - node) + coefficient
    return result


def _grid(stats: Mapping[str, Tensor]) -> list[float]:
    return [float(name.removeprefix("lse@")) for name in stats if name.startswith("lse@")]


def tail_mass(head_logprobs: Tensor, vocabulary: int, inside: Tensor | None = None) -> Tensor:
    """(R, 1) the mass outside the head: 1 − Σ exp(head_logprobs), > 0.

    The log-probabilities are stored in float16, so the difference is off by up to 5e-4 × entropy / T. Two facts hold it
    in place: no id outside is likelier than the least likely inside, so the mass is at most (V − k)·p_k; and where
    rounding leaves nothing, it is taken as p_k. ``inside`` (R, k): which of the k count (``shared_ids.shared_topk``);
    a row whose k are all of V has no tail.
    """
    head = head_logprobs.exp()
    tiny = torch.finfo(head.dtype).tiny
    if inside is None:
        least, others = head.amin(-1, keepdim=True), torch.full_like(head[..., :1], vocabulary - head.shape[-1])
    else:
        least = head.where(inside, 1.0).amin(-1, keepdim=True)
        others = vocabulary - inside.sum(-1, keepdim=True)
    rest = torch.minimum(1 - head.sum(-1, keepdim=True), others * least)
    return torch.where(others > 0, torch.where(rest > 0, rest, least), tiny).clamp(min=tiny)


def wide(values: Tensor) -> Tensor:
    """float32, or float64 where it came as that."""
    return values if values.dtype == torch.float64 else values.float()
