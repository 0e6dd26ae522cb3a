"""Signals against dense float64 arithmetic, and the sampled ones against the distribution they estimate."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.build.signals import Extractor, row_signals, sample_ids_and_counts, stable_topk, wanted_states
from teacher_cache.store.codecs import ChannelScales
from teacher_cache.store.records import image_arrays, record_arrays, stats_names
from teacher_cache.teachers.teacher import SampleStates
from tests.fixtures.rounding import rounding, within
from tests.fixtures.store import IMAGE_TOKEN, IMAGE_TOKENS, SHAPE, signals

GRID = (0.5, 1.0, 2.0)


def _logits(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 4, (rows, vocabulary)).astype(np.float32))


@pytest.mark.gpu
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 6), vocabulary=st.integers(2, 50), k=st.integers(1, 60), seed=st.integers(0, 99))
def test_row_signals_equal_dense_float64(rows, vocabulary, k, seed, device):
    logits = _logits(rows, vocabulary, seed)
    found = {n: a.cpu() for n, a in row_signals(logits.to(device), min(k, vocabulary), GRID).items()}
    dense = logits.double().numpy()
    lse = np.log(np.exp(dense).sum(-1))
    order = np.argsort(-dense, axis=-1, kind="stable")[:, : min(k, vocabulary)]
    np.testing.assert_array_equal(found["topk_ids"].numpy(), order)
    logprobs = np.take_along_axis(dense, order, -1) - lse[:, None]
    np.testing.assert_allclose(found["topk_logprobs"].numpy(), logprobs, **within(torch.float16))
    p = np.exp(dense - lse[:, None])
    wanted = [np.log(np.exp(dense / t).sum(-1)) for t in GRID]
    wanted += [dense.mean(-1), dense.std(-1), -(p * (dense - lse[:, None])).sum(-1)]
    np.testing.assert_allclose(found["stats"].numpy(), np.stack(wanted, -1), **within(operations=100, scale=4))
    assert found["stats"].shape[1] == len(stats_names(signals(temperatures=GRID)))


def test_equal_logits_are_kept_in_the_order_of_their_ids():
    values, ids = stable_topk(torch.zeros(2, 50), 50)
    assert ids[0].tolist() == list(range(50))
    assert values.shape == (2, 50)


def test_random_sampling_is_unbiased():
    """Mean of counts / n over many draws is the distribution: within 5 standard errors everywhere."""
    logits = _logits(1, 12, 3) / 2
    draws, times = 20, 4000
    uniform = torch.from_numpy(np.random.default_rng(1).random((times, draws)))
    ids, counts = sample_ids_and_counts(logits.repeat(times, 1), uniform, None)
    assert (counts.long().sum(-1) == draws).all()
    total = torch.zeros(12, dtype=torch.float64).scatter_add(0, ids.flatten(), counts.flatten().double())
    p = torch.softmax(logits[0].double(), -1)
    error = (total / (draws * times) - p).abs() / (p * (1 - p) / (draws * times)).sqrt()
    assert error.max() < 5


def test_sampled_ids_are_distinct_and_unused_places_count_nothing():
    uniform = torch.from_numpy(np.random.default_rng(1).random((50, 9)))
    ids, counts = sample_ids_and_counts(_logits(50, 30), uniform, None)
    for row, count in zip(ids.tolist(), counts.tolist(), strict=True):
        used = [i for i, c in zip(row, count, strict=True) if c]
        assert len(used) == len(set(used))


def test_exact_head_and_sampled_tail_are_an_unbiased_estimate_of_the_whole_distribution():
    logits, k, draws, times = _logits(1, 12, 3) / 2, 4, 10, 4000
    head = row_signals(logits, k, GRID)["topk_ids"]
    uniform = torch.from_numpy(np.random.default_rng(1).random((times, draws)))
    ids, counts = sample_ids_and_counts(logits.repeat(times, 1), uniform, head.repeat(times, 1))
    used = counts > 0
    assert not torch.isin(ids[used], head).any()
    p = torch.softmax(logits[0].double(), -1)
    tail_mass = 1 - p[head[0]].sum()
    total = torch.zeros(12, dtype=torch.float64).scatter_add(0, ids[used], counts[used].double())
    estimate = p.clone()
    outside = [i for i in range(12) if i not in head[0].tolist()]
    estimate[outside] = tail_mass * total[outside] / (draws * times)
    assert ((estimate - p).abs() / p).max() < 0.05


def _extractor(config, head_rows=3, seed=0, whole=False):
    head = torch.from_numpy(
        np.random.default_rng(7).normal(size=(SHAPE.vocabulary, SHAPE.hidden_size)).astype(np.float32)
    )
    head = (2 * head).round() / 2 if whole else head
    ones = ChannelScales(np.ones(SHAPE.hidden_size, np.float32))
    scales = dict.fromkeys(("hidden", "hidden_second_last", "visual"), ones)
    return Extractor(config, SHAPE, head, scales, seed=seed, head_rows=head_rows)


def _states(rows: int, seed: int, image: bool = True) -> SampleStates:
    random = np.random.default_rng(seed)
    make = lambda n: torch.from_numpy(random.normal(size=(n, SHAPE.hidden_size)).astype(np.float32))  # noqa: E731
    visual = make(IMAGE_TOKENS) if image else None
    attention = torch.rand(rows, IMAGE_TOKENS) if image else None
    return SampleStates(make(rows), make(rows + 3), visual, make(rows), make(rows + 3), attention)


@pytest.mark.parametrize("preset", ["compact", "standard", "full", "llava_kd"])
@pytest.mark.parametrize("extra", [{}, {"second_last": True, "attention": True, "sampled": 5, "codec": "int4"}])
def test_a_record_has_exactly_the_arrays_of_the_contract(preset, extra):
    if preset == "compact":
        extra = {**extra, "second_last": False}
    config = signals(preset, **extra)
    states = [_states(4, 1), _states(0, 2, image=False), _states(7, 3)]
    records = _extractor(config).records(["a", "b", "c"], states)
    specs = [s for s in record_arrays(config, SHAPE) if s.axis not in ("token", "run")]
    for record, state in zip(records, states, strict=True):
        assert set(record) == {s.name for s in specs}
        for spec in specs:
            cells = 0 if state.attention is None else state.attention.numel()
            lines = {"row": len(state.rows), "position": len(state.text), "cell": cells}[spec.axis]
            array = record[spec.name]
            assert (array.shape, str(array.dtype)) == ((lines, *spec.shape), spec.dtype), spec.name
    for spec in image_arrays(config, SHAPE):
        array = _extractor(config).image(states[0].visual)[spec.name]
        lines = {"image": 1, "patch": IMAGE_TOKENS, "pair": IMAGE_TOKENS * (IMAGE_TOKENS + 1) // 2}[spec.axis]
        assert (array.shape, str(array.dtype)) == ((lines, *spec.shape), spec.dtype), spec.name


def _whole_numbers(states: SampleStates) -> SampleStates:
    """Their products with a head of whole numbers have no roundings, whatever the order of the sums."""
    return dataclasses.replace(states, rows=states.rows.round(), text=states.text.round())


def test_signals_do_not_depend_on_batch_or_chunk():
    config = signals(sampled=6, top_k=5)
    states = [_whole_numbers(_states(n, n)) for n in (3, 5, 1)]
    together = _extractor(config, head_rows=4, whole=True).records(["a", "b", "c"], states)
    for sample_id, state, wanted in zip("abc", states, together, strict=True):
        (alone,) = _extractor(config, head_rows=100, whole=True).records([sample_id], [state])
        for name, array in wanted.items():
            np.testing.assert_allclose(
                alone[name].astype(np.float64), array.astype(np.float64), rtol=rounding(operations=100), err_msg=name
            )


def test_another_seed_draws_other_ids_and_the_same_seed_the_same():
    draws = [
        _extractor(signals(sampled=6), seed=s).records([i], [_states(5, 1)])[0]["sampled_ids"].tolist()
        for s, i in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    ]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert draws[0] != draws[3]


def test_the_gram_is_that_of_states_and_of_logits():
    state = _states(1, 1).visual
    extractor = _extractor(signals("llava_kd"))
    stored = extractor.image(state)
    logits = (state @ extractor.head.T).double()
    for name, dense, scale in (
        ("gram_hidden", state.double() @ state.double().T, 0),
        ("gram_logits", logits @ logits.T, 1),
    ):
        upper = np.triu_indices(IMAGE_TOKENS)
        wanted = dense.numpy()[upper]
        found = stored[name].astype(np.float64) * stored["gram_scale"][0, scale]
        np.testing.assert_allclose(found, wanted, **within(torch.float16, 1, np.abs(wanted).max()))


def test_tail_mass_is_one_minus_the_kept_mass():
    logits = _logits(3, 40)
    found = row_signals(logits, 6, (1.0,))
    p = torch.softmax(logits.double(), -1)
    kept = p.gather(-1, found["topk_ids"]).sum(-1)
    assert torch.allclose(found["topk_logprobs"].double().exp().sum(-1), kept, **within(torch.float16, 2))
    assert math.isclose(
        float(found["stats"][0, 0]), float(torch.logsumexp(logits[0].double(), -1)), rel_tol=rounding(operations=100)
    )


def test_only_wanted_states_are_asked_of_the_teacher():
    assert dataclasses.astuple(wanted_states(signals("compact"))) == (False, False, False, False)
    assert wanted_states(signals("full", second_last=True, attention=True)).text
    assert wanted_states(signals("llava_kd")).visual
    assert SHAPE.vocabulary > IMAGE_TOKEN
