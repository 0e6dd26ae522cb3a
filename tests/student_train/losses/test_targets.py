"""Targets read from what phase one extracts give the live teacher's distribution, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from student_train.losses.by_source import exact_loss, row_loss
from student_train.losses.catalogue import LossSpec
from student_train.losses.targets import RowTargets, TeacherSide, scales_on
from teacher_cache.build.signals import Extractor
from teacher_cache.config import SignalsConfig
from teacher_cache.data.logit_rule import AS_THEY_ARE, LogitRule
from teacher_cache.store.codecs import ChannelScales
from teacher_cache.store.records import TeacherShape
from teacher_cache.teachers.teacher import SampleStates
from tests.fixtures.rounding import EXACT, within

WIDTH, VOCABULARY, TOKENS = 6, 40, 4
ROWS, POSITIONS = (2, 3), (5, 7)
PREDICTING = (torch.tensor([1, 4]), torch.tensor([0, 3, 6]))
"""Which of a sample's text positions predict its answer tokens."""

GENERATOR = torch.Generator().manual_seed(0)
HEAD = torch.randn(VOCABULARY, WIDTH, generator=GENERATOR)
TEXT = [torch.randn(p, WIDTH, generator=GENERATOR) for p in POSITIONS]
BEFORE = [torch.randn(p, WIDTH, generator=GENERATOR) for p in POSITIONS]
ATTENTION = [torch.rand(r, TOKENS, generator=GENERATOR) for r in ROWS]
ANSWERS = torch.randint(0, VOCABULARY, (sum(ROWS),), generator=GENERATOR)
LIVE = torch.cat([t[p] for t, p in zip(TEXT, PREDICTING, strict=True)]).double() @ HEAD.double().T


def from_cache(signals: SignalsConfig, rule: LogitRule = AS_THEY_ARE) -> RowTargets:
    """Two samples through phase one's extractor, their arrays joined as a batch joins them."""
    scales = {name: ChannelScales(np.ones(WIDTH, np.float32)) for name in ("hidden", "hidden_second_last")}
    extractor = Extractor(signals, TeacherShape(WIDTH, VOCABULARY), HEAD, scales, rule=rule)
    states = [
        SampleStates(text[p], text, None, before[p], before, attention)
        for text, before, attention, p in zip(TEXT, BEFORE, ATTENTION, PREDICTING, strict=True)
    ]
    records = extractor.records(["a", "b"], states)
    arrays = {name: torch.from_numpy(np.concatenate([r[name] for r in records])) for name in records[0]}
    if "attention" in arrays:
        arrays["attention"] = arrays["attention"].reshape(-1, TOKENS)  # as the feed gives it
    row_index = torch.cat([PREDICTING[0], PREDICTING[1] + POSITIONS[0]])
    on_device = {name: scales_on(s, "cpu") for name, s in scales.items()}
    return TeacherSide(signals, on_device, HEAD.double(), WIDTH, TOKENS, rule=rule).rows(arrays, ANSWERS, row_index)


@pytest.mark.parametrize("hidden", ["rows", "text"])
@pytest.mark.parametrize(("codec", "tolerance"), [("float16", 5e-3), ("bfloat16", 4e-2), ("int8", 0.1), ("int4", 1.5)])
def test_exact_logits_are_the_live_teachers(hidden: str, codec: str, tolerance: float) -> None:
    targets = from_cache(SignalsConfig(hidden=hidden, codec=codec))  # type: ignore[arg-type]
    assert (targets.exact_logits(slice(0, 5)) - LIVE).abs().max() < tolerance
    some, of_all = targets.exact_logits(slice(2, 4)), targets.exact_logits(slice(0, 5))[2:4]
    assert some.dtype == EXACT
    assert torch.allclose(some, of_all, **within(EXACT, WIDTH, float(HEAD.abs().max()) ** 2))


def test_exact_logits_follow_the_teachers_rule() -> None:
    """Top-k of the capped logits and exact logits from the stored states agree, as for a live Gemma."""
    rule = LogitRule(0.5, 2.0)
    targets = from_cache(SignalsConfig(hidden="rows", codec="float32", top_k=8), rule)
    expected = 2 * torch.tanh(LIVE * 0.5 / 2)
    assert (targets.exact_logits(slice(0, 5)) - expected).abs().max() < 1e-4
    assert targets.topk_ids is not None
    assert targets.topk_logprobs is not None
    kept = expected.log_softmax(-1).gather(-1, targets.topk_ids)
    assert (kept - targets.topk_logprobs).abs().max() < 1e-2


def test_advantage_shares_out_a_samples_weight_and_adds_none() -> None:
    advantage = torch.tensor([0.0, 2.0, -1.0, 0.5, 3.0, 0.0, 0.0, 1.0])
    owner = torch.tensor([4, 4, 4, 4, 7, 9, 9, 4])
    factors = RowTargets(advantage=advantage).advantage_factors(owner, 0.4)
    low, high = 5 / (2 * 3), 5 / (2 * 2)
    assert factors.tolist() == pytest.approx([low, high, low, low, 1, 1, 1, high])  # one row, and no image: as before
    with pytest.raises(ValueError, match=r"the cache holds no advantage.*signals\.advantage"):
        RowTargets().advantage_factors(owner, 0.4)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "logit_mse"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_whole_vocabulary_kept_equals_the_live_teacher(name: str, temperature: float) -> None:
    targets = from_cache(SignalsConfig(hidden="none", top_k=VOCABULARY))
    student = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(1))
    spec = LossSpec(name, temperature=temperature)
    got = torch.cat([row_loss(spec, targets, student[rows], rows) for rows in (slice(0, 2), slice(2, 5))])
    expected = exact_loss(spec, LIVE, student)
    assert torch.allclose(got.double(), expected, **within(torch.float16, 20))


@pytest.mark.parametrize("sampled_from", ["all", "tail"])
def test_draws_keep_their_rows_and_their_number(sampled_from: str) -> None:
    targets = from_cache(SignalsConfig(hidden="none", top_k=4, sampled=9, sampled_from=sampled_from))  # type: ignore[arg-type]
    ids, counts, entropy = targets.draws(slice(1, 5))
    assert ids.dtype == torch.int64
    assert (counts.sum(-1, dtype=torch.int64) == 9).all()
    logprobs = LIVE.log_softmax(-1)
    assert torch.allclose(entropy.double(), -(logprobs.exp() * logprobs).sum(-1)[1:], **within(operations=100))
    assert targets.sampled_from == sampled_from
    drawn_from_head = (ids.unsqueeze(-1) == targets.kept(slice(1, 5))[0].unsqueeze(1)).any(-1) & (counts > 0)
    assert drawn_from_head.any() == (sampled_from == "all")


def test_answers_attention_and_the_layer_before_keep_their_rows() -> None:
    targets = from_cache(SignalsConfig(hidden="text", codec="float16", second_last=True, attention=True))
    assert torch.equal(targets.answers(slice(1, 4)), ANSWERS[1:4])
    assert targets.attention is not None
    assert torch.allclose(targets.attention, torch.cat(ATTENTION), **within(torch.float16))
    assert targets.hidden_second_last is not None
    before = torch.cat([b[p] for b, p in zip(BEFORE, PREDICTING, strict=True)])
    assert torch.allclose(targets.hidden_second_last.decode(slice(0, 5)), before, **within(torch.float16, 2))


def test_what_was_not_stored_is_none() -> None:
    targets = from_cache(SignalsConfig(hidden="none", top_k=0))
    assert targets.topk_ids is None
    assert targets.hidden is None
    assert targets.attention is None
    assert set(targets.stats) >= {"lse@1", "mean", "std", "entropy"}


def test_vocabularies_beyond_sixteen_bits_keep_their_ids() -> None:
    wide = torch.tensor([[70_000, 3]], dtype=torch.uint32)
    arrays: dict[str, Tensor] = {"topk_ids": wide, "topk_logprobs": torch.zeros(1, 2, dtype=torch.float16)}
    targets = TeacherSide(SignalsConfig(), {}, None, WIDTH, TOKENS).rows(arrays, None)
    assert targets.topk_ids is not None
    assert targets.topk_ids.tolist() == [[70_000, 3]]
    assert targets.topk_ids.dtype == torch.int64
