"""LLaVA-KD's visual losses against full logits in float64, from states and from what the cache stores of them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from student_train.losses import image_losses as relations
from student_train.losses.by_source import exact_loss
from student_train.losses.catalogue import LossSpec
from student_train.losses.head_loss import head_losses
from student_train.losses.targets import ImageTargets, TeacherSide, decoded, scales_on
from teacher_cache.build.signals import Extractor
from teacher_cache.config import SignalsConfig
from teacher_cache.store.codecs import ChannelScales
from teacher_cache.store.records import TeacherShape
from tests.fixtures.rounding import EXACT, MODEL, rounding, within

IMAGES, TOKENS, WIDTH, VOCABULARY = 3, 16, 6, 40
STUDENT_WIDTH = 4


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TEACHER_STATES, TEACHER_HEAD = random(0, IMAGES, TOKENS, WIDTH), random(1, VOCABULARY, WIDTH)
STUDENT_STATES, STUDENT_HEAD = random(2, IMAGES, TOKENS, STUDENT_WIDTH), random(3, VOCABULARY, STUDENT_WIDTH)


def cached(visual: str, codec: str = "float16", top_k: int = 8) -> ImageTargets:
    """The images through phase one's extractor and back."""
    signals = SignalsConfig(visual=visual, codec=codec, visual_top_k=top_k)  # type: ignore[arg-type]
    shape = TeacherShape(WIDTH, VOCABULARY)
    scales = {"visual": ChannelScales(np.ones(WIDTH, np.float32))}
    head = TEACHER_HEAD.float()
    extractor = Extractor(signals, shape, head, scales)
    lines = [extractor.image(states.float()) for states in TEACHER_STATES]
    arrays = {name: torch.from_numpy(np.stack([line[name] for line in lines])) for name in lines[0]}
    if visual == "gram":
        arrays["gram_scale"] = arrays["gram_scale"].squeeze(1)
    on_device = {name: scales_on(s, "cpu") for name, s in scales.items()}
    return TeacherSide(signals, on_device, head, WIDTH, TOKENS).images(arrays)


def dense_relation(teacher_logits: Tensor, student_logits: Tensor) -> float:
    """1 − cosine of the two N × N matrices of inner products, in Python loops over one image."""

    def correlations(rows: list[list[float]]) -> list[float]:
        return [sum(x * y for x, y in zip(a, b, strict=True)) for a in rows for b in rows]

    t, s = correlations(teacher_logits.tolist()), correlations(student_logits.tolist())
    norm = math.sqrt(sum(x * x for x in t) * sum(y * y for y in s))
    return 1 - sum(x * y for x, y in zip(t, s, strict=True)) / norm


@pytest.mark.parametrize("space", ["logits", "hidden"])
def test_relation_loss_equals_the_one_on_full_logits(space: relations.Space) -> None:
    head = TEACHER_HEAD.float()
    images = ImageTargets(TOKENS, states=decoded(TEACHER_STATES), head=head)
    values = relations.relation(images, STUDENT_STATES, STUDENT_HEAD, space=space)
    once = dataclasses.replace(images, head=None, head_square=relations.head_square(head))
    assert torch.allclose(relations.teacher_gram(once, space), relations.teacher_gram(images, space), **within())
    teacher_rows = TEACHER_STATES @ TEACHER_HEAD.T if space == "logits" else TEACHER_STATES
    student_rows = STUDENT_STATES @ STUDENT_HEAD.T if space == "logits" else STUDENT_STATES
    expected = [dense_relation(t, s) for t, s in zip(teacher_rows, student_rows, strict=True)]
    assert values.tolist() == pytest.approx(expected, abs=rounding(operations=100))  # the states pass through float32


def test_relation_gradients_reach_states_and_head_as_through_full_logits() -> None:
    teacher = TEACHER_STATES @ TEACHER_HEAD.T

    def gradients(loss) -> list[Tensor]:
        states, head = STUDENT_STATES.clone().requires_grad_(), STUDENT_HEAD.clone().requires_grad_()
        return list(torch.autograd.grad(loss(states, head).sum(), [states, head]))

    def through_logits(states: Tensor, head: Tensor) -> Tensor:
        logits = states @ head.T
        t, s = (teacher @ teacher.mT).flatten(1), (logits @ logits.mT).flatten(1)
        return 1 - (t * s).sum(-1) / (t.square().sum(-1).sqrt() * s.square().sum(-1).sqrt())

    def through_head_square(states: Tensor, head: Tensor) -> Tensor:
        return relations.relation_loss(teacher @ teacher.mT, relations.student_gram(states, head, "logits"))

    for got, expected in zip(gradients(through_head_square), gradients(through_logits), strict=True):
        assert torch.allclose(got, expected, **within(EXACT, MODEL))


@pytest.mark.parametrize("space", ["logits", "hidden"])
def test_stored_gram_gives_the_loss_of_stored_states(space: relations.Space) -> None:
    student = relations.student_gram(STUDENT_STATES, STUDENT_HEAD, space)
    from_gram = relations.teacher_gram(cached("gram"), space)
    from_states = relations.teacher_gram(cached("states"), space)
    assert torch.allclose(from_gram, from_states, **within(torch.float16, 2, from_states.abs().max()))
    got, expected = (relations.relation_loss(gram, student) for gram in (from_gram, from_states))
    assert torch.allclose(got, expected, **within(torch.float16))


def test_relation_loss_ignores_scale_and_is_zero_for_equal_relations() -> None:
    gram = relations.hidden_gram(TEACHER_STATES)
    assert relations.relation_loss(gram, 7 * gram).abs().max() < rounding(EXACT, MODEL)
    assert (relations.relation_loss(gram, -gram) - 2).abs().max() < rounding(EXACT, MODEL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("space", ["logits", "hidden"])
def test_relation_loss_is_that_of_float32_under_autocast(space: relations.Space, dtype: torch.dtype) -> None:
    """Inner products of real states are far beyond 65,504, float16's largest number."""
    images = ImageTargets(TOKENS, states=decoded(60 * TEACHER_STATES.float()), head=TEACHER_HEAD.float())
    states, head = 60 * STUDENT_STATES.float(), STUDENT_HEAD.float()

    def value() -> Tensor:
        student = relations.student_gram(states, head, space)
        return relations.relation_loss(relations.teacher_gram(images, space), student)

    expected = value()
    with torch.autocast("cpu", dtype=dtype):
        assert relations.student_gram(states, head, space).dtype == torch.float32
        assert torch.allclose(value(), expected, **within(operations=100))


# Visual forward KL


def visual_kl(images: ImageTargets, source: str, chunk_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss and its gradients in the student's states and head."""
    states = STUDENT_STATES.float().flatten(0, 1).requires_grad_()
    head = STUDENT_HEAD.float().requires_grad_()
    spec = LossSpec("forward_kl", source=source)  # type: ignore[arg-type]
    rows = relations.visual_rows(images)
    total, _ = head_losses(states, head, rows, [spec], {"forward_kl": 1.0}, torch.ones(len(states)), chunk_rows)
    return total, *torch.autograd.grad(total, [states, head])


@pytest.mark.parametrize("chunk_rows", [1, 7, 16, 100])
def test_visual_forward_kl_equals_the_one_on_full_logits(chunk_rows: int) -> None:
    images = ImageTargets(TOKENS, states=decoded(TEACHER_STATES.float()), head=TEACHER_HEAD.float())
    states, head = STUDENT_STATES.flatten(0, 1).clone().requires_grad_(), STUDENT_HEAD.clone().requires_grad_()
    teacher = (TEACHER_STATES @ TEACHER_HEAD.T).flatten(0, 1)
    expected = exact_loss(LossSpec("forward_kl", source="exact"), teacher, states @ head.T).sum()
    gradients = torch.autograd.grad(expected, [states, head])
    total, *got = visual_kl(images, "exact", chunk_rows)
    assert total.item() == pytest.approx(expected.item(), rel=rounding(operations=MODEL))
    for g, e in zip(got, gradients, strict=True):
        assert torch.allclose(g.double(), e, **within(operations=MODEL, scale=e.abs().max()))


def test_visual_top_k_of_the_whole_vocabulary_equals_visual_states() -> None:
    kept, exact = visual_kl(cached("topk", top_k=VOCABULARY), "topk", 7), visual_kl(cached("states"), "exact", 7)
    for g, e in zip(kept, exact, strict=True):
        assert torch.allclose(g, e, **within(torch.float16, 20))  # both sides are stored in float16


@pytest.mark.parametrize("codec", ["float16", "bfloat16", "int8", "int4"])
def test_visual_rows_are_the_positions_of_one_image_after_another(codec: str) -> None:
    rows = relations.visual_rows(cached("states", codec))
    assert rows.hidden is not None
    states = rows.hidden.decode(slice(None))
    assert states.shape == (IMAGES * TOKENS, WIDTH)
    tolerance = {"float16": 1e-3, "bfloat16": 1e-2, "int8": 2e-2, "int4": 0.3}[codec]
    assert (states - TEACHER_STATES.flatten(0, 1)).abs().max() < tolerance * TEACHER_STATES.abs().max()


# Students with another number of image positions


def test_pooling_averages_blocks_of_the_grid() -> None:
    states = random(4, 1, 16, 3)
    pooled = relations.pool_grid(states, 4, 2)
    for y in range(2):
        for x in range(2):
            block = [states[0, (2 * y + dy) * 4 + 2 * x + dx] for dy in (0, 1) for dx in (0, 1)]
            assert torch.allclose(pooled[0, 2 * y + x], torch.stack(block).mean(0))


@pytest.mark.parametrize("space", ["logits", "hidden"])
def test_pooled_gram_is_the_gram_of_pooled_states(space: relations.Space) -> None:
    rows = TEACHER_STATES @ TEACHER_HEAD.T if space == "logits" else TEACHER_STATES
    pooled = relations.pool_grid(rows, 4, 2)
    assert torch.allclose(relations.pool_gram(rows @ rows.mT, 4, 2), pooled @ pooled.mT)
    stored = relations.teacher_gram(cached("gram"), space, (4, 2))
    from_states = relations.teacher_gram(cached("states"), space, (4, 2))
    largest = (rows @ rows.mT).abs().max().item()
    assert torch.allclose(stored.double(), pooled @ pooled.mT, **within(torch.float16, 2, largest))
    assert torch.allclose(from_states.double(), pooled @ pooled.mT, **within(torch.float16, 2, largest))


def test_pooled_visual_rows_are_those_of_mean_logits() -> None:
    rows = relations.visual_rows(cached("states"), (4, 2))
    logits = relations.pool_grid(TEACHER_STATES @ TEACHER_HEAD.T, 4, 2).flatten(0, 1)
    assert torch.allclose(rows.exact_logits(slice(0, 12)).double(), logits, **within(torch.float16, 20))


def test_equal_grids_need_no_pooling() -> None:
    assert relations.pooled_grid(576, 576, 0) is None
    assert relations.pooled_grid(576, 144, 12) == (24, 12)


@pytest.mark.parametrize(
    ("teacher", "student", "pool", "message"),
    [
        (576, 144, 0, r"the teacher has 576 image positions, the student 144, .* \(pool: 12\)"),
        (576, 100, 10, r"pool: 10: .* a square grid whose side is a multiple of 10, and 100 positions"),
        (576, 64, 12, r"pool: 12: .* and 144 positions of the student"),
        (728, 196, 14, r"pool: 14: the teacher has 728"),
    ],
)
def test_grids_that_do_not_match_are_refused(teacher: int, student: int, pool: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        relations.pooled_grid(teacher, student, pool)


def test_what_the_cache_does_not_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"relation loss on hidden: the cache holds neither a Gram nor visual states"):
        relations.teacher_gram(ImageTargets(TOKENS), "hidden")
    with pytest.raises(
        ValueError, match=r"visual forward KL: the cache holds neither visual states nor a visual top-k"
    ):
        relations.visual_rows(cached("gram"))
    with pytest.raises(ValueError, match=r"a top-k of 16 image positions cannot be pooled to 4"):
        relations.visual_rows(cached("topk"), (4, 2))
    with pytest.raises(ValueError, match=r"needs the teacher's output head"):
        relations.teacher_gram(ImageTargets(TOKENS, states=decoded(TEACHER_STATES)), "logits")


def test_density_is_how_unlike_a_position_is_to_the_others_of_its_image() -> None:
    states = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    states[0, :4] = states[0, 0]
    weights = relations.density_weights(states)
    for image, found in zip(states, weights, strict=True):
        unlike = []
        for n in range(5):
            cosines = [float(image[n] @ image[m] / (image[n].norm() * image[m].norm())) for m in range(5) if m != n]
            unlike.append(1 - sum(cosines) / 4)
        assert found.tolist() == pytest.approx([u / (sum(unlike) / 5) for u in unlike])
    assert weights[0].argmax() == 4
    assert relations.density_weights(torch.ones(1, 7, 3)).tolist() == [pytest.approx([1.0] * 7)]
    assert relations.density_weights(torch.ones(1, 1, 3)).tolist() == [[1.0]]
