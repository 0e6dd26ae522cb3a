"""Every loss against the paper's equation in float64 Python loops: values, and gradients by central differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.losses import row_losses as losses
from student_train.losses import topk
from student_train.losses.by_source import exact_loss, row_loss, scale_of
from student_train.losses.catalogue import CATALOGUE, Distributions, Logits, LossSpec
from student_train.losses.targets import RowTargets, decoded
from teacher_cache.build.signals import row_signals, sample_ids_and_counts
from teacher_cache.errors import LossError
from tests.fixtures.rounding import EXACT, MODEL, rounding, within

GRID = (0.5, 0.7, 1.0, 2.0, 4.0)
COLUMNS = (*(f"lse@{t:g}" for t in GRID), "mean", "std", "entropy")
TEMPERATURES = (0.5, 0.7, 1.0, 2.0, 4.0)
ROWS, VOCABULARY = 3, 9

Row = list[float]
Objective = Callable[[Row, Row], float]


def stats_of(logits: Tensor) -> dict[str, Tensor]:
    """The columns of ``stats`` in the dtype of ``logits``: what phase one stores, without its float32 rounding."""
    columns = {f"lse@{t:g}": torch.logsumexp(logits / t, -1) for t in GRID}
    logprobs = torch.log_softmax(logits, -1)
    columns["entropy"] = -(logprobs.exp() * logprobs).sum(-1)
    return columns | {"mean": logits.mean(-1), "std": logits.std(-1, correction=0)}


def random_logits(seed: int, rows: int = ROWS, vocabulary: int = VOCABULARY, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * scale


# The reference


def softmax(row: Row, temperature: float) -> Row:
    exponentials = [math.exp(x / temperature) for x in row]
    return [e / sum(exponentials) for e in exponentials]


def divergence(p: Row, q: Row) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def z_scores(row: Row) -> Row:
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row))
    return [(x - mean) / (deviation + 1e-7) for x in row]


def jensen_shannon(p: Row, q: Row, beta: float) -> float:
    middle = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * divergence(p, middle) + (1 - beta) * divergence(q, middle)


def buckets(p: Row, kept: list[int]) -> Row:
    head = [p[i] for i in kept]
    rest = [p[i] for i in range(len(p)) if i not in kept]
    return [*head, sum(rest)] if rest else head


def tail_aware(p: Row, q: Row, kept: list[int] | None) -> float:
    """Head and one bucket, and ``tail_weight`` times what is among the others, of which a top-k has ids and a rest."""
    by_rank = sorted(range(len(p)), key=lambda i: -p[i])
    head, others = by_rank[: OWN["tail_aware_kl"]["head_ids"]], by_rank[OWN["tail_aware_kl"]["head_ids"] :]
    if kept is not None:
        head, others = [i for i in head if i in kept], [i for i in others if i in kept]
    within = []
    for side in (p, q):
        masses = [side[i] for i in others]
        if kept is not None and len(kept) < len(p):
            masses.append(sum(side[i] for i in range(len(p)) if i not in kept))
        within.append([mass / sum(masses) for mass in masses])
    return divergence(buckets(p, head), buckets(q, head)) + OWN["tail_aware_kl"]["tail_weight"] * divergence(*within)


def reference(name: str, temperature: float, beta: float, kept: list[int] | None = None) -> Objective:
    """The objective of one row of teacher and student logits; ``kept``: merge all other ids into one bucket."""

    def value(teacher: Row, student: Row) -> float:
        if name == "logit_mse":
            ids = range(len(teacher)) if kept is None else kept
            return sum(((student[i] - teacher[i]) / temperature) ** 2 for i in ids) / len(ids)
        if name == "forward_kl_standardised":
            teacher, student = z_scores(teacher), z_scores(student)
        p, q = softmax(teacher, temperature), softmax(student, temperature)
        if name == "tail_aware_kl":
            return tail_aware(p, q, kept)
        if kept is not None:
            p, q = buckets(p, kept), buckets(q, kept)
        if name == "reverse_kl":
            return divergence(q, p)
        return jensen_shannon(p, q, beta) if name == "jsd" else divergence(p, q)

    return value


def central_difference(objective: Objective, teacher: Row, student: Row, step: float = 1e-6) -> Row:
    def moved(place: int, by: float) -> Row:
        return [x + by * (i == place) for i, x in enumerate(student)]

    return [
        (objective(teacher, moved(i, step)) - objective(teacher, moved(i, -step))) / (2 * step)
        for i in range(len(student))
    ]


def assert_equals(
    got: Callable[[Tensor], Tensor], objectives: list[Objective], teacher: Tensor, student: Tensor
) -> None:
    """Values and gradients of the per-row losses equal those of the reference."""
    student = student.clone().requires_grad_()
    values = got(student)
    assert values.shape == (len(teacher),)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    for r, objective in enumerate(objectives):
        t, s = teacher[r].tolist(), student[r].tolist()
        assert values[r].item() == pytest.approx(objective(t, s), rel=1e-9, abs=1e-12)
        assert gradient[r].tolist() == pytest.approx(central_difference(objective, t, s), rel=1e-6, abs=1e-8)


DENSE = [name for name, entry in CATALOGUE.items() if isinstance(entry, Logits)]
DIVERGENCES = [n for n in DENSE if isinstance(CATALOGUE[n], Distributions) and n != "forward_kl_standardised"]
"""f-divergences, of which merging ids gives a lower bound; what a top-k holds of z-scored logits is interpolated."""
OWN = {"jsd": {"beta": 0.3}, "tail_aware_kl": {"head_ids": 3, "tail_weight": 0.6}}


def dense(name: str, teacher: Tensor, student: Tensor, **settings: Any) -> Tensor:
    """The loss from all of the teacher's logits."""
    spec = LossSpec(name, source="exact", **settings)
    return exact_loss(spec, teacher, student) * scale_of(spec)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", DENSE)
def test_dense_loss_equals_the_papers_equation(name: str, temperature: float) -> None:
    teacher, student = random_logits(0), random_logits(1)
    objective, own = reference(name, temperature, 0.3), OWN.get(name, {})
    assert_equals(
        lambda s: dense(name, teacher, s, temperature=temperature, **own), [objective] * ROWS, teacher, student
    )


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing_gives_all_ids_a_share_of_the_target(smoothing: float) -> None:
    logits, answers = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 6, 3, 3, 1])
    target = torch.full((5, 7), smoothing / 7, dtype=torch.float64)
    target[range(5), answers] += 1 - smoothing
    expected = -(target * logits.log_softmax(-1)).sum(-1)
    assert torch.allclose(losses.cross_entropy(answers, logits, smoothing), expected, rtol=1e-12)


def test_cross_entropy_is_minus_the_log_probability_of_the_answer() -> None:
    student, answers = random_logits(1), torch.tensor([0, 8, 3])
    objectives = [lambda _, s, a=a: -math.log(softmax(s, 1.0)[a]) for a in answers.tolist()]
    assert_equals(lambda s: losses.cross_entropy(answers, s), objectives, student, student)


@pytest.mark.parametrize("name", DENSE)
def test_temperature_squared_multiplies_the_loss_and_is_off_by_default(name: str) -> None:
    teacher, student = random_logits(0), random_logits(1)
    plain = dense(name, teacher, student, temperature=2.0)
    assert torch.allclose(dense(name, teacher, student, temperature=2.0, temperature_squared=True), 4 * plain)


def test_losses_of_half_precision_logits_are_float32() -> None:
    teacher, student = random_logits(0).bfloat16(), random_logits(1).bfloat16()
    for name in DENSE:
        assert dense(name, teacher, student).dtype == torch.float32


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_jsd_refuses_the_betas_at_which_it_vanishes(beta: float) -> None:
    with pytest.raises(ValueError, match=r"beta must lie between 0 and 1, found .* Use forward_kl in place of beta 0"):
        dense("jsd", random_logits(0), random_logits(1), beta=beta)


def test_jsd_over_beta_tends_to_forward_and_over_one_minus_beta_to_reverse_kl() -> None:
    teacher, student = random_logits(0), random_logits(1)
    forward = dense("jsd", teacher, student, beta=1e-7) / 1e-7
    reverse = dense("jsd", teacher, student, beta=1 - 1e-7) / 1e-7
    assert torch.allclose(forward, dense("forward_kl", teacher, student), rtol=1e-4)
    assert torch.allclose(reverse, dense("reverse_kl", teacher, student), rtol=1e-4)


# Top-k and one tail bucket


def topk_loss(name: str, teacher: Tensor, k: int, temperature: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The kept ids, and the loss by the stored signals of float64 ``teacher`` logits."""
    values, ids = teacher.topk(k)
    stats = stats_of(teacher)
    logprobs = values - stats["lse@1"].unsqueeze(-1)
    targets = RowTargets(topk_ids=ids, topk_logprobs=logprobs, stats=stats)
    spec = LossSpec(name, temperature=temperature, **OWN.get(name, {}))
    return ids, lambda student: row_loss(spec, targets, student, slice(0, len(teacher)))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", [*DIVERGENCES, "logit_mse"])
def test_topk_loss_equals_the_equation_over_k_plus_one_buckets(name: str, temperature: float) -> None:
    teacher, student = random_logits(2), random_logits(3)
    ids, loss = topk_loss(name, teacher, 4, temperature)
    objectives = [reference(name, temperature, 0.3, kept) for kept in ids.tolist()]
    assert_equals(loss, objectives, teacher, student)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", DENSE)
def test_topk_loss_equals_the_dense_loss_when_k_is_the_vocabulary(name: str, temperature: float) -> None:
    teacher, student = random_logits(2), random_logits(3)
    _, loss = topk_loss(name, teacher, VOCABULARY, temperature)
    assert_equals(loss, [reference(name, temperature, 0.3)] * ROWS, teacher, student)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 5),
    st.integers(2, 30),
    st.data(),
    st.sampled_from(TEMPERATURES),
    st.sampled_from(DIVERGENCES),
)
def test_topk_divergence_is_a_lower_bound_of_the_dense_one(rows, vocabulary, data, temperature, name) -> None:
    k = data.draw(st.integers(1, vocabulary))
    seed = data.draw(st.integers(0, 999))
    teacher, student = random_logits(seed, rows, vocabulary), random_logits(seed + 1, rows, vocabulary)
    _, loss = topk_loss(name, teacher, k, temperature)
    bound = dense(name, teacher, student, temperature=temperature, **OWN.get(name, {}))
    assert loss(student).shape == (rows,)
    # The tail is 1 − Σ of what is kept: where next to nothing is left, its logarithm has few digits left, too.
    kept = torch.zeros_like(teacher, dtype=torch.bool).scatter(-1, teacher.topk(k).indices, True)
    left = (teacher / temperature).softmax(-1).masked_fill(kept, 0).sum(-1)
    noise = rounding(EXACT, MODEL) * (1 + torch.where(left > 0, 1 / left, left))
    assert (loss(student) <= bound + noise).all()
    assert (loss(student) >= -noise).all()


def test_tail_aware_kl_with_the_tails_own_mass_is_the_forward_kl() -> None:
    teacher, student = random_logits(4, 1), random_logits(5, 1)
    mass = 1 - teacher.softmax(-1).topk(3).values.sum().item()
    apart = dense("tail_aware_kl", teacher, student, head_ids=3, tail_weight=mass)
    assert torch.allclose(apart, dense("forward_kl", teacher, student))


def test_what_the_bucketed_forward_kl_lacks_is_tail_mass_times_the_kl_of_the_tails() -> None:
    teacher, student = random_logits(4), random_logits(5)
    ids, loss = topk_loss("forward_kl", teacher, 3, 1.0)
    tail_t, tail_s = (x.scatter(-1, ids, -math.inf) for x in (teacher, student))
    mass = (torch.logsumexp(tail_t, -1) - torch.logsumexp(teacher, -1)).exp()
    p, q = tail_t.softmax(-1), tail_s.softmax(-1)
    missing = mass * torch.where(p > 0, p * (p / q.clamp(min=1e-300)).clamp(min=1e-300).log(), p).sum(-1)
    assert torch.allclose(loss(student) + missing, dense("forward_kl", teacher, student))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_stored_head_is_exact_at_every_temperature_of_the_grid(temperature: float) -> None:
    logits = random_logits(6, 20, 500).float()
    stored = row_signals(logits, 16, GRID)
    stats = dict(zip(COLUMNS, stored["stats"].unbind(-1), strict=True))
    exact = torch.log_softmax(logits.double() / temperature, -1).gather(-1, stored["topk_ids"])
    head = topk.topk_at_temperature(stored["topk_logprobs"], stats, temperature)
    assert (head - exact).abs().max() < 4e-3 / temperature  # float16 of log-probabilities between −8 and 0
    mass = topk.tail_mass(head, 500).squeeze(-1)
    assert (mass - (1 - exact.exp().sum(-1))).abs().max() < 1e-3 / temperature


def test_temperature_off_the_grid_is_refused() -> None:
    _, loss = topk_loss("forward_kl", random_logits(0), 4, 3.0)
    with pytest.raises(
        ValueError, match=r"temperature 3 on top-k: .* found those at temperatures 0\.5, 0\.7, 1, 2, 4\."
    ):
        loss(random_logits(1))


def test_tail_mass_is_never_zero_and_never_more_than_the_last_kept_id_allows() -> None:
    overfull = torch.tensor([[0.7, 0.3001, 1e-5]]).log()
    assert topk.tail_mass(overfull, 32000).item() == pytest.approx(1e-5)
    rounded = torch.tensor([[0.7, 0.2998, 1e-9]]).log()
    assert topk.tail_mass(rounded, 32000).item() == pytest.approx(32e-6, rel=1e-3)
    assert topk.tail_mass(torch.tensor([[0.6, 0.3]]).log(), 32000).item() == pytest.approx(0.1)


def test_float32_gradient_of_a_tiny_tail_equals_float64() -> None:
    """The student's tail holds 1e-9 of its mass: 1 − Σ head is 0 in float32, and the gradient would explode."""
    teacher = random_logits(7, 4, 40)
    ids = teacher.topk(5).indices
    student = random_logits(8, 4, 40).scatter(-1, ids, torch.full((4, 5), 24.0, dtype=torch.float64))
    _, loss = topk_loss("forward_kl", teacher, 5, 1.0)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        moved = student.to(dtype).requires_grad_()
        gradients.append(torch.autograd.grad(loss(moved).sum(), moved)[0].double())
    assert torch.allclose(*gradients, **within(operations=100))


@pytest.mark.parametrize("shape", ["normal", "heavy"])
def test_standardised_topk_is_close_to_its_exact_buckets(shape: str) -> None:
    """The normaliser at a row's own temperature is interpolated; the bound is that of the docstring."""
    logits = random_logits(9, 50, 4000, scale=3.0)
    if shape == "heavy":
        logits[:, :30] += torch.linspace(20, 3, 30, dtype=torch.float64)
    student = random_logits(10, 50, 4000, scale=3.0)
    ids, loss = topk_loss("forward_kl_standardised", logits, 64, 1.0)
    exact_head = losses.standardise(logits).log_softmax(-1).gather(-1, ids)
    head = topk.topk_standardised(
        logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True), stats_of(logits), logits.shape[-1]
    )
    assert (head - exact_head).abs().max() < 5e-3
    exact = losses.forward_kl(*losses.buckets(ids, exact_head, losses.standardise(student), 1.0, None))
    assert torch.allclose(loss(student), exact, atol=5e-3)


@pytest.mark.parametrize(("scale", "temperature"), [(0.3, 1.0), (0.8, 0.7), (1.5, 0.25)])
def test_standardised_topk_stays_near_beyond_the_grid(scale: float, temperature: float) -> None:
    """A deviation below 1/τ asks for the tail beyond the polynomial's last node."""
    logits = random_logits(11, 8, 1000, scale=scale)
    values, ids = logits.topk(32)
    logprobs = values - logits.logsumexp(-1, keepdim=True)
    head = topk.topk_standardised(logprobs, stats_of(logits), 1000, temperature)
    exact = (losses.standardise(logits) / temperature).log_softmax(-1).gather(-1, ids)
    assert (head - exact).abs().max() < 0.1


def test_renormalised_topk_is_biased_where_the_bucketed_one_is_not() -> None:
    """A student equal to its teacher should rest: it does under the bucket, not where the head is scaled to mass 1 and
    has no tail, whose optimum has nothing outside (Anshumann et al., ACL 2025, section 3)."""
    teacher = random_logits(13)
    ids, loss = topk_loss("forward_kl", teacher, 4, 1.0)
    student = teacher.clone().requires_grad_()
    (rest,) = torch.autograd.grad(loss(student).sum(), student)
    assert rest.abs().max() < 1e-9
    head, kept = teacher.log_softmax(-1).gather(-1, ids), student.log_softmax(-1).gather(-1, ids)
    (pushed,) = torch.autograd.grad(losses.forward_kl(head.log_softmax(-1), kept).sum(), student)
    tail = 1 - head.exp().sum(-1)
    assert torch.allclose(pushed.gather(-1, ids).sum(-1), -tail)  # what it pushes into the head is the tail's mass


# Sampled ids


def draw(logits: Tensor, draws: int, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    uniform = torch.rand(len(logits), draws, dtype=torch.float64, generator=torch.Generator().manual_seed(14))
    return sample_ids_and_counts(logits, uniform, excluded)


@pytest.mark.parametrize("kind", ["all", "tail"])
def test_sampled_forward_kl_is_unbiased_in_value_and_gradient(kind: str) -> None:
    repeats = 20_000
    teacher, student = random_logits(15, 1, 12), random_logits(16, 1, 12)
    values, kept = teacher.topk(3)
    ids, counts = draw(teacher.expand(repeats, -1), 8, kept.expand(repeats, -1) if kind == "tail" else None)
    targets = RowTargets(
        topk_ids=kept.expand(repeats, -1),
        topk_logprobs=(values - teacher.logsumexp(-1, keepdim=True)).expand(repeats, -1),
        stats={name: column.expand(repeats) for name, column in stats_of(teacher).items()},
        sampled_ids=ids,
        sampled_counts=counts,
        sampled_from=kind,
    )
    many = student.expand(repeats, -1).clone().requires_grad_()
    estimates = row_loss(LossSpec("forward_kl", source="sampled"), targets, many, slice(0, repeats))
    (gradients,) = torch.autograd.grad(estimates.sum(), many)
    one = student.clone().requires_grad_()
    exact = dense("forward_kl", teacher, one)
    (gradient,) = torch.autograd.grad(exact.sum(), one)
    error = 4.5 * estimates.std() / math.sqrt(repeats)
    assert abs(estimates.mean() - exact).item() < error + 1e-12
    errors = 4.5 * gradients.std(0) / math.sqrt(repeats)
    assert ((gradients.mean(0) - gradient[0]).abs() <= errors + 1e-9).all()
    assert error < 0.05, "the test would accept anything"


def test_exact_head_and_tail_draws_vary_less_than_draws_alone() -> None:
    teacher, student = random_logits(17, 1, 50).expand(4000, -1), random_logits(18, 1, 50).expand(4000, -1)
    values, kept = teacher.topk(5)
    head, entropy = values - teacher.logsumexp(-1, keepdim=True), stats_of(teacher)["entropy"]
    log_q = student.log_softmax(-1)
    ids, counts = draw(teacher, 8)
    plain = losses.forward_kl_of_draws(ids, losses.draw_shares(counts), entropy, log_q)
    target = losses.hybrid_target(kept, head, *draw(teacher, 8, kept), 50)
    hybrid = losses.forward_kl_of_draws(*target, entropy, log_q)
    assert hybrid.std() < plain.std() / 2


@pytest.mark.parametrize(
    "spec",
    [LossSpec("reverse_kl", source="sampled"), replace(LossSpec("forward_kl", source="sampled"), temperature=2.0)],
)
def test_draws_serve_forward_kl_at_temperature_one_only(spec: LossSpec) -> None:
    with pytest.raises(ValueError, match=r"from sampled ids: expected forward_kl at temperature 1"):
        row_loss(replace(spec, temperature=2.0), RowTargets(), random_logits(0), slice(0, ROWS))


# Hidden states and affinity


def cosine(a: Row, b: Row) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_hidden_losses_equal_their_equations() -> None:
    teacher, student = random_logits(20), random_logits(21)
    width = teacher.shape[1]
    mean_square = lambda t, s: sum((a - b) ** 2 for a, b in zip(t, s, strict=True)) / width  # noqa: E731
    assert_equals(lambda s: losses.hidden_mse(teacher, s), [mean_square] * ROWS, teacher, student)
    assert_equals(lambda s: losses.hidden_cosine(teacher, s), [lambda t, s: 1 - cosine(t, s)] * ROWS, teacher, student)


def test_hidden_projector_is_linear_gelu_linear_to_the_teachers_width() -> None:
    projector = losses.HiddenProjector(6, 10)
    states = torch.randn(4, 6)
    first, _, second = projector
    x = states @ first.weight.T + first.bias
    expected = (x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))) @ second.weight.T + second.bias
    assert torch.allclose(projector(states), expected, **within(operations=100))
    assert expected.shape == (4, 10)


def test_attention_mse_averages_heads_first_so_their_numbers_may_differ() -> None:
    teacher = random_logits(22)
    student = torch.stack([random_logits(s) for s in (23, 24)], 1)  # (R, 2 heads, N)
    expected = [
        sum(((student[r, 0, n] + student[r, 1, n]).item() / 2 - teacher[r, n].item()) ** 2 for n in range(VOCABULARY))
        / VOCABULARY
        for r in range(ROWS)
    ]
    assert losses.attention_mse(teacher, student).tolist() == pytest.approx(expected)
    many = teacher.unsqueeze(1).expand(-1, 5, -1)
    assert losses.attention_mse(many, student).tolist() == pytest.approx(expected)


def test_similarity_mse_compares_text_image_cosines_across_widths() -> None:
    teacher_image, teacher_text = random_logits(25, 4, 8), random_logits(26, 3, 8)
    student_image, student_text = random_logits(27, 4, 5), random_logits(28, 3, 5)
    expected = [
        sum(
            (
                cosine(student_text[r].tolist(), student_image[n].tolist())
                - cosine(teacher_text[r].tolist(), teacher_image[n].tolist())
            )
            ** 2
            for n in range(4)
        )
        / 4
        for r in range(3)
    ]
    got = losses.similarity_mse(teacher_image, teacher_text, student_image, student_text)
    assert got.tolist() == pytest.approx(expected)


# Choosing a loss


def test_exact_source_equals_the_dense_loss_on_the_live_teachers_logits() -> None:
    states, head, student = random_logits(30, 5, 6), random_logits(31, 12, 6), random_logits(32, 5, 12)
    targets = RowTargets(hidden=decoded(states.float()), head=head)
    live = (states.float().double() @ head.T)[1:4]
    for name in DENSE:
        spec = LossSpec(name, source="exact", temperature=0.7)
        got = row_loss(spec, targets, student[1:4], slice(1, 4))
        assert torch.allclose(got, dense(name, live, student[1:4], temperature=0.7))


@pytest.mark.parametrize(
    ("spec", "targets", "message"),
    [
        (LossSpec("cross_entropy"), RowTargets(), "the cache holds no answer tokens"),
        (LossSpec("forward_kl"), RowTargets(), "topk: the cache holds no topk_ids"),
        (LossSpec("jsd", source="exact"), RowTargets(), r"exact: the cache holds no hidden.*signals\.hidden"),
        (LossSpec("forward_kl", source="sampled"), RowTargets(), "sampled: the cache holds no sampled_ids"),
        (LossSpec("hidden_mse"), RowTargets(), "loss hidden_mse: .* Take one of cross_entropy, forward_kl"),
    ],
)
def test_what_the_cache_does_not_hold_is_refused(spec: LossSpec, targets: RowTargets, message: str) -> None:
    with pytest.raises(LossError, match=message):
        row_loss(spec, targets, random_logits(0), slice(0, ROWS))


def test_two_vocabularies_are_refused() -> None:
    targets = RowTargets(hidden=decoded(torch.zeros(3, 2)), head=torch.zeros(32064, 2))
    with pytest.raises(ValueError, match=r"head gives 32,064 logits, the student's 9\. Cut both heads to the 9 ids"):
        row_loss(LossSpec("forward_kl", source="exact"), targets, random_logits(0), slice(0, 3))
