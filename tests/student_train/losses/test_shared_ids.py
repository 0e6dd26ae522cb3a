"""Checkpoints of one tokenizer padded to different sizes: every loss from every source is one over the shared ids."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from student_train.evaluation.agreement import agreement
from student_train.evaluation.answers import Student
from student_train.losses.by_source import row_loss
from student_train.losses.catalogue import CATALOGUE, Logits, LossSpec
from student_train.losses.head_loss import chunked_row_losses, head_losses, losses_of
from student_train.losses.needs import check_shared
from student_train.losses.targets import RowTargets, decoded
from student_train.training.trainer import Run
from teacher_cache.errors import ConfigError
from tests.fixtures import online
from tests.fixtures.online import EXACT, TEACHER, Oracle, build, dense_loss, divergence, fit_config
from tests.promises.test_offline_online import gradients, name_of, offline_gradients

ROWS, WIDTH, REAL, PADDED = 6, 5, 20, 24
SIZES = {"teacher larger": (PADDED, REAL), "student larger": (REAL, PADDED)}
TEMPERATURE = 2.0
TERMS = [
    *[LossSpec(n, source=s) for s in ("exact", "topk") for n, e in CATALOGUE.items() if isinstance(e, Logits)],
    *[LossSpec("forward_kl", source=source, temperature=TEMPERATURE) for source in ("exact", "topk")],
    LossSpec("reverse_kl", source="topk", temperature=TEMPERATURE, temperature_squared=True),
    LossSpec("forward_kl", source="sampled"),
]


class Case:
    """Random logits of both sides in float64. Of the teacher's ids beyond, two are likely and the others are not."""

    def __init__(self, teacher: int, student: int, kept: int) -> None:
        generator = torch.Generator().manual_seed(7)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.shared, self.kept_count = min(teacher, student), kept
        self.states, self.head = normal(ROWS, WIDTH), normal(teacher, WIDTH)
        self.logits = self.states @ self.head.T
        if teacher > student:
            extra = torch.tensor([3.0, 2.0, -60.0, -60.0], dtype=torch.float64).expand(ROWS, -1)
            self.states = torch.cat([self.states, torch.eye(ROWS, dtype=torch.float64)], -1)
            self.logits = torch.cat([self.logits[:, :student], extra], -1)
            self.head = torch.linalg.lstsq(self.states, self.logits).solution.T
        logprobs = self.logits.log_softmax(-1)
        head, ids = logprobs.topk(kept)
        self.draws = torch.stack([p.multinomial(12, True, generator=generator) for p in logprobs.exp()])
        stats = {f"lse@{t:g}": (self.logits / t).logsumexp(-1) for t in (1.0, TEMPERATURE)}
        stats["mean"], stats["std"] = self.logits.mean(-1), self.logits.std(-1, correction=0)
        stats["entropy"] = -(logprobs.exp() * logprobs).sum(-1)
        self.answers = torch.randint(0, self.shared, (ROWS,), generator=generator)
        self.targets = RowTargets(
            answer_ids=self.answers,
            topk_ids=ids,
            topk_logprobs=head,
            stats=stats,
            sampled_ids=self.draws,
            sampled_counts=torch.ones_like(self.draws),
            hidden=decoded(self.states),
            head=self.head,
            vocabulary=teacher,
        )
        self.student_states, self.student_head = normal(ROWS, WIDTH), normal(student, WIDTH)

    def reference(self, spec: LossSpec, student: Tensor) -> Tensor:
        """One value a row, by plain loops over the shared ids."""
        if spec.name == "cross_entropy":  # the student's own ids beyond must learn to be unlikely
            return -student.log_softmax(-1)[torch.arange(ROWS), self.answers]
        factor = spec.temperature**2 if spec.temperature_squared else 1.0
        rows = zip(self.logits[:, : self.shared], student[:, : self.shared], range(ROWS), strict=True)
        if spec.source == "sampled":
            return torch.stack([self._sampled(t, s, r) for t, s, r in rows])
        if spec.source == "exact":
            return factor * torch.stack([dense_loss(spec, t, s) for t, s, _ in rows])
        return factor * torch.stack([self._topk(spec, t, s, r) for t, s, r in rows])

    def _sampled(self, t: Tensor, s: Tensor, row: int) -> Tensor:
        own = [int(i) for i in self.draws[row] if i < self.shared]
        entropy = self.targets.stats["entropy"][row]
        return -torch.stack([s.log_softmax(-1)[i] for i in own]).mean() - entropy

    def _topk(self, spec: LossSpec, t: Tensor, s: Tensor, row: int) -> Tensor:
        assert self.targets.topk_ids is not None
        ids = [int(i) for i in self.targets.topk_ids[row] if i < self.shared]
        others = [i for i in range(self.shared) if i not in ids]
        if spec.name == "logit_mse":
            return ((s[ids] - t[ids]) / spec.temperature).square().mean()
        if spec.name == "forward_kl_standardised":
            t, s = ((x - x.mean()) / (x.std(correction=0) + 1e-7) for x in (t, s))
        p, q = (t / spec.temperature).softmax(-1), (s / spec.temperature).softmax(-1)
        if not others:
            return divergence(spec, p[ids], q[ids], len(ids))
        return divergence(spec, *(torch.cat([x[ids], x[others].sum()[None]]) for x in (p, q)), len(ids))


@pytest.mark.parametrize("kept", ["some", "all"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("spec", TERMS, ids=name_of)
def test_every_loss_and_its_gradient_are_those_over_the_shared_ids(spec: LossSpec, sizes: str, kept: str) -> None:
    teacher, student = SIZES[sizes]
    case = Case(teacher, student, teacher if kept == "all" else 8)
    if spec.name == "forward_kl_standardised" and spec.source == "topk":
        if sizes == "teacher larger":
            with pytest.raises(ConfigError, match="Take source: exact"):
                check_shared([spec], teacher, student, "none", "a cache")
            return
        if kept == "some":  # interpolated, and not exact
            return
    logits = (case.student_states @ case.student_head.T).requires_grad_()
    expected = case.reference(spec, logits)
    (wanted,) = torch.autograd.grad(expected.sum(), logits)
    found = row_loss(spec, case.targets, logits, slice(0, ROWS))
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    # States are decoded to float32, and the shares of draws are float32.
    tolerance = {"rtol": 1e-7, "atol": 1e-9} if spec.source == "topk" else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(gradient, wanted, **tolerance)
    if sizes == "student larger":
        assert not gradient[:, case.shared :].any()


@pytest.mark.parametrize("together", [False, True], ids=["alone", "with cross-entropy"])
@pytest.mark.parametrize("kept", [8, REAL, PADDED])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("spec", [s for s in TERMS if s.name == "forward_kl"], ids=name_of)
def test_written_out_gradients_are_those_of_autograd(spec: LossSpec, sizes: str, kept: int, together: bool) -> None:
    teacher, student = SIZES[sizes]
    case = Case(teacher, student, min(kept, teacher))
    specs = [LossSpec("cross_entropy", weight=0.3), spec] if together else [spec]
    weights = {s.name: s.weight for s in specs}
    found = []
    for by_hand in (True, False):
        states, head = (x.clone().requires_grad_() for x in (case.student_states, case.student_head))
        row_weight = torch.linspace(0.5, 1, ROWS, dtype=torch.float64)
        if by_hand:
            total, parts = head_losses(states, head, case.targets, specs, weights, row_weight, 4)
        else:
            total, parts = chunked_row_losses(states, head, losses_of(specs, case.targets), weights, row_weight, 4)
        total.backward()
        found.append((total.detach(), parts[spec.name], states.grad, head.grad))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9)


def padded(folder: Path, source: str | Path, size: int) -> str:
    shutil.copytree(source, folder)
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    model.resize_token_embeddings(size, mean_resizing=False)
    own = model.get_output_embeddings().weight
    own.data[72:] = torch.randn(size - 72, own.shape[1]) * own.std()
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Teacher and student of 80 ids in place of 72, and a cache of that teacher."""
    folder = tmp_path_factory.mktemp("padded")
    teacher = padded(folder / "teacher", TEACHER, 80)
    student = padded(folder / "student", online.student_folder(), 80)
    signals = replace(EXACT, attention=False, second_last=False)
    return {"teacher": teacher, "student": student, "cache": build(signals, teacher=teacher)}


ONLINE = [
    LossSpec("cross_entropy"),
    *[LossSpec("forward_kl", source=source) for source in ("exact", "topk", "sampled")],
    LossSpec("forward_kl", source="exact", tokens="all"),
    LossSpec("jsd", source="topk"),
    LossSpec("logit_mse", source="topk"),
    LossSpec("visual_kl"),
    LossSpec("relation", space="logits"),
]


@pytest.mark.parametrize("sizes", SIZES)
def test_losses_and_gradients_equal_those_of_the_live_teacher_over_the_shared_ids(
    larger: dict[str, Any], sizes: str, tmp_path: Path
) -> None:
    of_teacher = sizes == "teacher larger"
    cache = larger["cache"] if of_teacher else online.exact_cache()
    oracle = Oracle(cache, folder=Path(larger["teacher"]) if of_teacher else TEACHER)
    beyond = 0
    for number, spec in enumerate(ONLINE):
        config = fit_config([spec], tmp_path / str(number), cache=cache, global_batch=6)
        if not of_teacher:
            config = replace(config, student=replace(config.student, model=larger["student"]))
        run = Run.prepare(config)
        offline, from_cache = offline_gradients(run)
        run.student.zero_grad()
        numbers = run.plan.global_batch(0).tolist()
        live = oracle.loss(run.student.model, run.student.projectors, [spec], numbers)
        live.backward()
        assert offline == pytest.approx(float(live.detach()), rel=2e-4), name_of(spec)
        for name, gradient in gradients(run).items():
            scale = float(gradient.abs().max())
            assert torch.allclose(from_cache[name], gradient, rtol=1e-2, atol=1e-2 * scale), (name_of(spec), name)
        beyond += sum(int((oracle.cache[n].arrays["topk_ids"] >= 72).sum()) for n in numbers)
    assert (beyond > 0) == of_teacher  # the case is not an empty one


@pytest.mark.parametrize("sizes", SIZES)
def test_agreement_with_a_teacher_of_another_size(larger: dict[str, Any], sizes: str) -> None:
    of_teacher = sizes == "teacher larger"
    cache = larger["cache"] if of_teacher else online.exact_cache()
    student = Student.load(online.student_folder() if of_teacher else larger["student"])
    source = fit_config([LossSpec("cross_entropy")], "unused", cache=cache).sources[0]
    found = agreement(student, source)
    assert np.isfinite(found.kl)
    assert 0 <= found.top1 <= found.top5 <= 1
