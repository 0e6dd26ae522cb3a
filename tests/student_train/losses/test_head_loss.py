"""The loss without the logits equals the loss with them: any chunk size, any losses, values and both gradients."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from student_train.config import LossSpec
from student_train.losses import head_loss
from student_train.losses.head_loss import (
    LogitHead,
    chunked_row_losses,
    default_chunk_rows,
    dense_row_losses,
    head_losses,
    losses_of,
)
from student_train.losses.targets import RowTargets, StoredStates, decoded, scales_on
from teacher_cache.build.signals import row_signals, sample_ids_and_counts
from teacher_cache.data.logit_rule import LogitRule
from teacher_cache.store.codecs import encode, fit_channel_scales
from tests.fixtures.rounding import EXACT, half_the_digits, rounding

GRID = (0.5, 0.7, 1.0, 2.0, 4.0)
COLUMNS = (*(f"lse@{t:g}" for t in GRID), "mean", "std", "entropy")
WIDTH, TEACHER_WIDTH = 6, 10

CE = LossSpec("cross_entropy", 0.5)
WRITTEN_OUT = [
    [CE],
    [LossSpec("forward_kl")],
    [CE, LossSpec("forward_kl", 2.0)],
    [CE, LossSpec("forward_kl", 2.0, source="exact")],
    [CE, LossSpec("forward_kl", 2.0, source="sampled")],
    [LossSpec("forward_kl", source="exact", temperature=0.7)],
    [CE, LossSpec("forward_kl", 2.0, source="exact", temperature=2.0, temperature_squared=True)],
    [CE, LossSpec("forward_kl", 2.0, source="topk", temperature=4.0)],
]
BY_AUTOGRAD = [
    [CE, LossSpec("reverse_kl"), LossSpec("jsd", source="exact", beta=0.3), LossSpec("logit_mse", 0.1)],
    [LossSpec("cross_entropy", 0.5, smoothing=0.2), LossSpec("forward_kl")],
    [LossSpec("forward_kl_standardised", source="exact"), LossSpec("forward_kl", temperature=0.5)],
]


def named(specs: list[LossSpec]) -> str:
    return " + ".join(f"{s.name}-{s.source}-{s.temperature:g}" for s in specs)


class Case:
    """R rows of a student and of a teacher, with every signal that phase one stores."""

    def __init__(self, rows: int, vocabulary: int, k: int, seed: int = 0, sampled_from: str = "all") -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.hidden, self.head = random(rows, WIDTH), random(vocabulary, WIDTH)
        self.row_weight = torch.rand(rows, generator=generator)
        states, teacher_head = random(rows, TEACHER_WIDTH), random(vocabulary, TEACHER_WIDTH)
        logits = states @ teacher_head.T
        stored = row_signals(logits, k, GRID)
        uniform = torch.rand(rows, 8, generator=generator, dtype=torch.float64)
        excluded = stored["topk_ids"] if sampled_from == "tail" else None
        ids, counts = sample_ids_and_counts(logits, uniform, excluded)
        self.targets = RowTargets(
            answer_ids=torch.randint(0, vocabulary, (rows,), generator=generator),
            topk_ids=stored["topk_ids"],
            topk_logprobs=stored["topk_logprobs"].float(),
            stats=dict(zip(COLUMNS, stored["stats"].unbind(-1), strict=True)),
            sampled_ids=ids,
            sampled_counts=counts,
            sampled_from=sampled_from,
            hidden=decoded(states),
            head=teacher_head,
        )

    def double(self) -> Case:
        """The teacher's side, too, in float64."""
        t = self.targets
        assert t.topk_logprobs is not None
        assert t.head is not None
        stats = {name: column.double() for name, column in t.stats.items()}
        self.targets = replace(t, topk_logprobs=t.topk_logprobs.double(), stats=stats, head=t.head.double())
        return self

    def on(self, device: str) -> Case:
        t, case = self.targets, copy.copy(self)

        def moved(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        case.hidden, case.head, case.row_weight = map(moved, (self.hidden, self.head, self.row_weight))
        assert t.hidden is not None
        stats = {name: column.to(device) for name, column in t.stats.items()}
        parts = {f.name: moved(getattr(t, f.name)) for f in fields(t)} | {"stats": stats}
        case.targets = RowTargets(**{**parts, "hidden": decoded(t.hidden.codes.to(device))})
        return case

    def leaves(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        return self.hidden.to(dtype, copy=True).requires_grad_(), self.head.to(dtype, copy=True).requires_grad_()

    def dense(self, specs: list[LossSpec]) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
        """The oracle in float64: total, sums, gradients of states and head."""
        hidden, head = self.leaves(torch.float64)
        losses = losses_of(specs, self.targets)
        total, sums = dense_row_losses(hidden, head, losses, weights_of(specs), self.row_weight)
        return total, sums, *torch.autograd.grad(total, [hidden, head])


def weights_of(specs: list[LossSpec]) -> dict[str, float]:
    return {spec.name: spec.weight for spec in specs}


def close(got: Tensor, expected: Tensor, tolerance: float = half_the_digits()) -> bool:
    return torch.allclose(got.cpu().double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(0, 13),
    vocabulary=st.integers(2, 40),
    chunk_rows=st.integers(1, 15),
    specs=st.sampled_from(WRITTEN_OUT + BY_AUTOGRAD),
    sampled_from=st.sampled_from(["all", "tail"]),
    data=st.data(),
)
def test_loss_and_gradients_equal_the_dense_ones_for_any_shape(
    rows: int,
    vocabulary: int,
    chunk_rows: int,
    specs: list[LossSpec],
    sampled_from: str,
    data: st.DataObject,
    device: str,
) -> None:
    k = data.draw(st.integers(1, vocabulary - (sampled_from == "tail")))
    case = Case(rows, vocabulary, k, seed=data.draw(st.integers(0, 99)), sampled_from=sampled_from)
    total, sums, hidden_gradient, head_gradient = case.dense(specs)
    case = case.on(device)
    hidden, head = case.leaves()
    got, got_sums = head_losses(hidden, head, case.targets, specs, weights_of(specs), case.row_weight, chunk_rows)
    (got * 0.25).backward()  # as a division by the rows of the global batch does
    assert close(got, total)
    assert got_sums.keys() == sums.keys()
    assert all(close(got_sums[name], sums[name]) and not got_sums[name].requires_grad for name in sums)
    assert hidden.grad is not None
    assert head.grad is not None
    assert close(hidden.grad, hidden_gradient / 4)
    assert close(head.grad, head_gradient / 4)


@pytest.mark.parametrize("specs", WRITTEN_OUT + BY_AUTOGRAD, ids=named)
def test_float64_agrees_to_float64_precision(specs: list[LossSpec]) -> None:
    case = Case(9, 30, 5).double()
    total, _, *gradients = case.dense(specs)
    for loss in (
        lambda h, w: head_losses(h, w, case.targets, specs, weights_of(specs), case.row_weight, 4),
        lambda h, w: chunked_row_losses(h, w, losses_of(specs, case.targets), weights_of(specs), case.row_weight, 4),
    ):
        hidden, head = case.leaves(torch.float64)
        got, _ = loss(hidden, head)
        assert got.dtype == torch.float64
        assert close(got, total, half_the_digits(EXACT))
        for g, e in zip(torch.autograd.grad(got, [hidden, head]), gradients, strict=True):
            assert close(g, e, half_the_digits(EXACT))


@pytest.mark.parametrize("rule", [LogitRule(0.25), LogitRule(1.0, 2.0), LogitRule(2.0, 1.5)], ids=str)
@pytest.mark.parametrize("specs", [WRITTEN_OUT[3], WRITTEN_OUT[6], BY_AUTOGRAD[0]], ids=named)
def test_each_side_has_its_own_logit_rule(specs: list[LossSpec], rule: LogitRule) -> None:
    """Scaled and soft-capped logits of student and teacher, by different rules, against autograd over all of them."""
    case = Case(9, 30, 5).double()
    assert case.targets.hidden is not None
    assert case.targets.head is not None
    products = case.targets.hidden.decode(slice(None)).double() @ case.targets.head.T
    own = replace(case.targets, rule=LogitRule(0.5, 3.0))
    assert close(own.exact_logits(slice(None)), 3 * torch.tanh(products * 0.5 / 3), half_the_digits(EXACT))
    hidden, head = case.leaves(torch.float64)
    logits = (hidden @ head.T) * rule.scale
    logits = rule.cap * torch.tanh(logits / rule.cap) if rule.cap else logits
    values = losses_of(specs, own)(logits, slice(0, 9))
    total = torch.stack([weights_of(specs)[n] * (v * case.row_weight).sum() for n, v in values.items()]).sum()
    expected = torch.autograd.grad(total, [hidden, head])
    got, _ = head_losses(hidden, LogitHead(head, rule), own, specs, weights_of(specs), case.row_weight, 4)
    assert close(got, total, half_the_digits(EXACT))
    for found, wanted in zip(torch.autograd.grad(got, [hidden, head]), expected, strict=True):
        assert close(found, wanted, half_the_digits(EXACT))


def test_a_tiny_student_tail_keeps_its_gradient() -> None:
    """Every kept id towers 24 nats over the rest: 1 − Σ head would be 0 in float32."""
    case = Case(6, 30, 5)
    case.hidden = torch.zeros(6, WIDTH)
    case.hidden[:, 0] = 1
    case.head = torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(5))
    assert case.targets.topk_ids is not None
    case.targets.topk_ids[:] = case.targets.topk_ids[0]
    case.head[case.targets.topk_ids[0], 0] += 24
    specs = [LossSpec("forward_kl")]
    total, _, *gradients = case.dense(specs)
    hidden, head = case.leaves()
    got, _ = head_losses(hidden, head, case.targets, specs, weights_of(specs), case.row_weight, 4)
    assert close(got, total)
    for g, e in zip(torch.autograd.grad(got, [hidden, head]), gradients, strict=True):
        assert close(g, e)


def test_row_weights_of_one_over_rows_average_each_sample_first() -> None:
    case, lengths = Case(6, 20, 4), [1, 5]
    per_row = losses_of([CE], case.targets)(case.hidden @ case.head.T, slice(0, 6))["cross_entropy"]
    weight = torch.cat([torch.full((n,), 1 / n) for n in lengths])
    _, sums = head_losses(*case.leaves(), case.targets, [CE], {"cross_entropy": 1.0}, weight, 4)
    assert close(sums["cross_entropy"], per_row[:1].mean() + per_row[1:].mean())


def test_rows_of_weight_zero_count_for_nothing() -> None:
    case = Case(6, 20, 4)
    case.row_weight[2:] = 0
    hidden, head = case.leaves()
    head_losses(hidden, head, case.targets, [CE], weights_of([CE]), case.row_weight, 4)[0].backward()
    assert hidden.grad is not None
    assert (hidden.grad[2:] == 0).all()
    assert (hidden.grad[:2] != 0).any()


@pytest.mark.parametrize("specs", [WRITTEN_OUT[2], BY_AUTOGRAD[0]], ids=named)
def test_a_frozen_head_gets_no_gradient_and_evaluation_builds_no_graph(specs: list[LossSpec]) -> None:
    case = Case(7, 20, 4)
    total, _, hidden_gradient, _ = case.dense(specs)
    hidden, head = case.leaves()
    head.requires_grad_(False)
    arguments = (case.targets, specs, weights_of(specs), case.row_weight, 3)
    got, _ = head_losses(hidden, head, *arguments)
    got.backward()
    assert head.grad is None
    assert hidden.grad is not None
    assert close(hidden.grad, hidden_gradient)
    with torch.no_grad():
        got, _ = head_losses(hidden, head, *arguments)
    assert not got.requires_grad
    assert close(got, total)


@pytest.mark.parametrize("wanted", [True, False])
def test_evaluation_costs_no_gradients(wanted: bool) -> None:
    case, seen = Case(7, 20, 4), []

    def spy(logits: Tensor, rows: slice) -> dict[str, Tensor]:
        seen.append(logits.requires_grad)
        return losses_of([CE], case.targets)(logits, rows)

    with torch.set_grad_enabled(wanted):
        chunked_row_losses(*case.leaves(), spy, weights_of([CE]), case.row_weight, 3)
    assert seen == [wanted] * 3


def test_a_second_backward_is_refused() -> None:
    case = Case(5, 20, 4)
    total, _ = head_losses(*case.leaves(), case.targets, [CE], weights_of([CE]), case.row_weight, 3)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward through one loss"):
        total.backward()


@pytest.mark.parametrize("block_elements", [1 << 20, 37 * WIDTH])
@pytest.mark.parametrize("specs", [WRITTEN_OUT[3], BY_AUTOGRAD[0]], ids=named)
def test_bfloat16_products_stay_near_float32_and_gradients_take_the_parameters_dtype(
    specs: list[LossSpec], block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head_loss.PRODUCT_ELEMENTS, "cpu", block_elements)
    case = Case(64, 200, 16)
    total, _, *gradients = case.dense(specs)
    hidden, head = case.leaves(torch.bfloat16)
    arguments = (case.targets, specs, weights_of(specs), case.row_weight, 10)
    got, _ = head_losses(hidden, head, *arguments)
    got.backward()
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(total.item(), rel=rounding(torch.bfloat16, 4))
    for leaf, e in zip((hidden, head), gradients, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.bfloat16
        assert ((leaf.grad.double() - e).norm() / e.norm()) < rounding(torch.bfloat16, 4)


def test_autocast_forms_the_logits_in_its_dtype_and_leaves_float32_gradients() -> None:
    case, specs = Case(16, 50, 8), WRITTEN_OUT[3]
    arguments = (case.targets, specs, weights_of(specs), case.row_weight, 5)
    hidden, head = case.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = head_losses(hidden, head, *arguments)
    got.backward()
    rounded, _ = head_losses(*case.leaves(torch.bfloat16), *arguments)
    assert got.item() == rounded.item()
    assert head.grad is not None
    assert head.grad.dtype == torch.float32


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("specs", [WRITTEN_OUT[2], WRITTEN_OUT[3], BY_AUTOGRAD[0]], ids=named)
def test_no_tensor_of_rows_times_vocabulary_ever_exists(specs: list[LossSpec]) -> None:
    rows, vocabulary, chunk_rows = 400, 300, 20
    case = Case(rows, vocabulary, 8)
    with Largest() as largest:
        total, _ = head_losses(*case.leaves(), case.targets, specs, weights_of(specs), case.row_weight, chunk_rows)
        total.backward()
    assert largest.elements == chunk_rows * vocabulary
    with Largest() as largest:
        case.dense(specs)
    assert largest.elements == rows * vocabulary, "the oracle should need them all"


@pytest.mark.parametrize("codec", ["float16", "bfloat16", "int8", "int4"])
def test_quantised_states_are_decoded_chunk_by_chunk(codec: str) -> None:
    """Targets on top of stored codes equal targets on top of their decoded states, also by an index of lines."""
    case, specs = Case(9, 30, 5), [LossSpec("forward_kl", source="exact")]
    lines = torch.tensor([8, 3, 0, 1, 11, 5, 2, 9, 7])
    text = torch.randn(12, TEACHER_WIDTH, generator=torch.Generator().manual_seed(3))
    scales = fit_channel_scales(text.numpy(), codec)
    codes, scale = encode(text, codec, scales)
    codes = codes.view(torch.bfloat16) if codec == "bfloat16" else codes
    stored = StoredStates(codes, scale, codec, scales_on(scales, "cpu"), lines)
    assert len(stored) == 9
    totals = []
    for hidden in (stored, decoded(stored.decode(slice(0, 9)))):
        targets = RowTargets(hidden=hidden, head=case.targets.head)
        totals.append(head_losses(*case.leaves(), targets, specs, weights_of(specs), case.row_weight, 4)[0])
    assert totals[0].item() == pytest.approx(totals[1].item(), rel=rounding(operations=100))
    assert (stored.decode(slice(0, 9)) - text[lines]).abs().max() < 0.5


def test_a_chunk_holds_at_least_one_row_and_follows_the_device() -> None:
    assert default_chunk_rows(32_000, torch.device("cpu")) == 262
    assert default_chunk_rows(32_000, torch.device("cuda")) == 524
    assert default_chunk_rows(1 << 30, torch.device("cpu")) == 1
