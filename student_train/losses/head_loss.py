"""The loss without the logits: output head and losses over chunks of rows, forward and backward at once.

A dense step holds several (rows × vocabulary) float32 tensors: logits, their softmax, their gradient, and in exact mode
the teacher's. Here a chunk's logits are formed, turned into losses and into the gradients of the chunk's states and of
the head, and dropped; backward only scales what forward has summed. The head's gradient grows in one (V, d) float32
buffer. Matmuls run in the dtype of the states and the head (or autocast's), softmax and sums in float32. The idea is
that of Liger Kernel (Hsu et al., 2024) and Cut Cross-Entropy (Wijmans et al., 2024).

Sums, never means: the trainer divides once, by the rows of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from student_train.losses import closed_form
from student_train.losses.by_source import row_loss
from student_train.losses.catalogue import LossSpec
from student_train.losses.targets import RowTargets
from student_train.losses.topk import wide
from teacher_cache.data.logit_rule import AS_THEY_ARE, LogitRule

RowLosses = Callable[[Tensor, slice], dict[str, Tensor]]
"""(student logits (rows, V) float32, rows) → per-row losses (rows,) by name."""

ChunkGradient = Callable[[Tensor, slice, bool], tuple[dict[str, Tensor], Tensor | None]]
"""(logits (rows, V) it may overwrite, rows, wanted) → losses by name and d(Σ weight·loss)/d(logits) (rows, V)."""

CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 24}
"""Logits of a chunk: 32 MiB float32 on a CPU, 64 MiB on a GPU, where a product needs more rows to fill the device."""

PRODUCT_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}
"""A half-precision chunk's share of the head's gradient is added block by block: on a CPU each stays in its cache (41
instead of 118 ms for 256 rows, V = 32,000, d = 640), and no second (V, d) tensor exists."""


class LogitHead(NamedTuple):
    """A student's output head, and what its class makes of its products before it calls them logits."""

    weight: Tensor
    rule: LogitRule = AS_THEY_ARE


def head_losses(
    hidden: Tensor,
    head: Tensor | LogitHead,
    stored: RowTargets,
    specs: Sequence[LossSpec],
    weights: Mapping[str, float],
    row_weight: Tensor,
    chunk_rows: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of ``specs`` over the rows, by written-out gradients where there are some, else by autograd.

    Same result as :func:`chunked_row_losses` over ``by_source.row_loss``; see there. The teacher's logits follow its
    own rule (``stored``), the student's that of ``head``.
    """
    head_weight, rule = head if isinstance(head, LogitHead) else LogitHead(head)
    if not closed_form.supported(specs):
        losses = losses_of(specs, stored)
        ruled = losses if rule == AS_THEY_ARE else lambda products, rows: losses(rule.apply(products), rows)
        return chunked_row_losses(hidden, head_weight, ruled, weights, row_weight, chunk_rows)

    def gradient(logits: Tensor, rows: slice, wanted: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        if rule == AS_THEY_ARE:
            return closed_form.losses_and_gradient(specs, weights, stored, rows, logits)
        values, inner = closed_form.losses_and_gradient(specs, weights, stored, rows, rule.apply(logits))
        return values, rule.backward(inner, rule.apply(logits))  # the first was overwritten

    return _apply(hidden, head_weight, gradient, [spec.name for spec in specs], weights, row_weight, chunk_rows)


def losses_of(specs: Sequence[LossSpec], stored: RowTargets) -> RowLosses:
    """``by_source.row_loss`` of each spec, by its name."""
    return lambda logits, rows: {spec.name: row_loss(spec, stored, logits, rows) for spec in specs}


def chunked_row_losses(
    hidden: Tensor,
    head_weight: Tensor,
    row_losses: RowLosses,
    weights: Mapping[str, float],
    row_weight: Tensor,
    chunk_rows: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ over rows and losses of row_weight·weight·loss (a scalar); by name Σ row_weight·loss (detached, unweighted).

    hidden (R, d) and head_weight (V, d) get gradients, once (a second backward is refused: the gradients are scaled in
    place) · row_weight (R,) float32: 1, or 1 / rows of its sample for a per-sample average · weights: one for each name
    that ``row_losses`` returns · chunk_rows: None takes :data:`CHUNK_ELEMENTS`. R = 0 gives zeros and zero gradients.
    """

    def gradient(logits: Tensor, rows: slice, wanted: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        if not wanted:
            return row_losses(logits, rows), None
        with torch.enable_grad():
            logits.requires_grad_()
            values = row_losses(logits, rows)
            total = torch.stack([weights[name] * value.sum() for name, value in values.items()]).sum()
            return values, torch.autograd.grad(total, logits)[0]

    return _apply(hidden, head_weight, gradient, list(weights), weights, row_weight, chunk_rows)


def dense_row_losses(
    hidden: Tensor, head_weight: Tensor, row_losses: RowLosses, weights: Mapping[str, float], row_weight: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """What :func:`chunked_row_losses` computes, with all logits at once and autograd throughout: the oracle."""
    logits = hidden @ head_weight.T
    values = row_losses(wide(logits), slice(0, len(hidden)))
    sums = {name: (value * row_weight).sum() for name, value in values.items()}
    total = torch.stack([weights[name] * value for name, value in sums.items()]).sum()
    return total, {name: value.detach() for name, value in sums.items()}


def default_chunk_rows(vocabulary: int, device: torch.device) -> int:
    return max(1, _per_device(CHUNK_ELEMENTS, device) // vocabulary)


def _per_device(elements: Mapping[str, int], device: torch.device) -> int:
    return elements.get(device.type, elements["cuda"])


def _slices(length: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _apply(
    hidden: Tensor,
    head_weight: Tensor,
    gradient: ChunkGradient,
    names: Sequence[str],
    weights: Mapping[str, float],
    row_weight: Tensor,
    chunk_rows: int | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    sweep = _Sweep(
        gradient,
        {name: weights[name] for name in names},
        _slices(len(hidden), chunk_rows or default_chunk_rows(len(head_weight), hidden.device)),
        _product_dtype(hidden, head_weight),
        torch.is_grad_enabled(),
    )
    sums = cast(Any, _HeadLoss).apply(hidden, head_weight, row_weight, sweep)
    return sums[-1], dict(zip(names, sums[:-1], strict=True))


def _product_dtype(hidden: Tensor, head_weight: Tensor) -> torch.dtype:
    """The dtype in which autocast, or else type promotion, would form the logits."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, head_weight.dtype)


@dataclass(frozen=True)
class _Sweep:
    """How the rows are gone through: what gives a chunk's losses and gradient, the weight of each loss by name, the
    chunks, the dtype of products, whether gradients are wanted."""

    gradient: ChunkGradient
    weights: Mapping[str, float]
    chunks: Sequence[slice]
    dtype: torch.dtype
    grad_enabled: bool


class _HeadLoss(torch.autograd.Function):
    """Forward sums the losses and, chunk by chunk, both gradients; backward multiplies them by its scalar.

    Returns one sum a name, then the weighted total, which alone has a gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head_weight: Tensor, row_weight: Tensor, sweep: _Sweep) -> tuple[Tensor, ...]:
        weights, needs = sweep.weights, [sweep.grad_enabled and needed for needed in ctx.needs_input_grad[:2]]
        sums = torch.zeros(len(weights), device=hidden.device, dtype=wide(hidden[:0]).dtype)
        grads = _Gradients(hidden, head_weight, *needs)
        with torch.autocast(hidden.device.type, enabled=False):
            head = head_weight.detach().to(sweep.dtype)
            for rows in sweep.chunks:
                states, weight = hidden.detach()[rows].to(sweep.dtype), row_weight[rows]
                values, grad_logits = sweep.gradient(wide(states @ head.T), rows, any(needs))
                sums += torch.stack([(values[name].detach() * weight).sum() for name in weights])
                if any(needs) and grad_logits is not None:
                    grads.add(rows, grad_logits.to(sweep.dtype), states, head, weight.unsqueeze(-1))
        ctx.gradients = grads
        parts = sums.unbind()
        ctx.mark_non_differentiable(*parts)
        return *parts, sum((w * part for w, part in zip(weights.values(), parts, strict=True)), sums.new_zeros(()))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "head_loss: a second backward through one loss; its gradients were scaled in place by the first. "
                "Compute the loss again, or add the losses and call backward once."
            )
        grads, ctx.gradients = ctx.gradients, None
        return *grads.scaled(grad_outputs[-1]), None, None


class _Gradients:
    """The running gradients of the states (R, d) and of the head (V, d, float32), where they are needed."""

    def __init__(self, hidden: Tensor, head_weight: Tensor, hidden_needed: bool, head_needed: bool) -> None:
        self.head_dtype = head_weight.dtype
        self.hidden = torch.zeros_like(hidden) if hidden_needed else None
        self.head = torch.zeros_like(head_weight, dtype=wide(head_weight[:0]).dtype) if head_needed else None

    def add(self, rows: slice, grad_logits: Tensor, states: Tensor, head: Tensor, row_weight: Tensor) -> None:
        """A chunk's. The row weights multiply d numbers a row here, instead of V in ``grad_logits``."""
        if self.hidden is not None:
            self.hidden[rows] = ((grad_logits @ head) * row_weight).to(self.hidden.dtype)
        if self.head is None:
            return
        weighted = (states * row_weight).to(states.dtype)
        if self.head.dtype == weighted.dtype:
            self.head.addmm_(grad_logits.T, weighted)
            return
        for ids in _slices(len(self.head), _per_device(PRODUCT_ELEMENTS, states.device) // states.shape[-1]):
            self.head[ids].add_(grad_logits[:, ids].T @ weighted)

    def scaled(self, factor: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden = None if self.hidden is None else self.hidden.mul_(factor)
        head = None if self.head is None else self.head.mul_(factor).to(self.head_dtype)
        return hidden, head
