"""The fidelity report against dense float64 arithmetic, and against the live teacher."""

import dataclasses

import numpy as np
import pytest
import torch

from teacher_cache.build.build import build_cache
from teacher_cache.store.invariants import log_softmax
from teacher_cache.store.storage import Storage
from teacher_cache.trust.fidelity import answer_places, bucketed_kl, cache_fidelity, kl_to_topk
from tests.fixtures.store import signals, synthetic_cache


def test_every_row_knows_its_place_in_its_answer():
    mask = np.array([0, 0, 1, 1, 1, 0, 1, 0, 1, 1], bool)
    place, length = answer_places(mask)
    assert place.tolist() == [0, 1, 2, 0, 0, 1]
    assert length.tolist() == [3, 3, 3, 1, 2, 2]
    assert answer_places(np.zeros(4, bool))[0].tolist() == []


def test_kl_to_a_top_k_of_the_whole_vocabulary_is_nothing_and_shrinks_with_k():
    p = log_softmax(np.random.default_rng(0).normal(0, 3, (5, 40)))
    ids = np.argsort(-p, -1)
    found = [kl_to_topk(p, ids[:, :k], np.take_along_axis(p, ids[:, :k], -1)).mean() for k in (2, 8, 20, 40)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 1e-9
    one = np.exp(p[0])
    spread = np.full(40, (1 - one[ids[0, :8]].sum()) / 32)
    spread[ids[0, :8]] = one[ids[0, :8]]
    dense = (one * np.log(one / spread)).sum()
    np.testing.assert_allclose(kl_to_topk(p, ids[:, :8], np.take_along_axis(p, ids[:, :8], -1))[0], dense)


def test_the_bucketed_divergence_bounds_the_whole_one_from_below():
    random = np.random.default_rng(1)
    p, q = (log_softmax(random.normal(0, 2, (50, 30))) for _ in range(2))
    ids = np.argsort(-p, -1)[:, :6]
    low = bucketed_kl(np.take_along_axis(p, ids, -1), np.take_along_axis(q, ids, -1))
    assert (low <= (np.exp(p) * (p - q)).sum(-1) + 1e-9).all()
    assert (low >= 0).all()


def test_states_stored_exactly_lose_nothing_and_coarser_codecs_lose_more(tmp_path):
    found = {}
    for codec in ("float32", "int8", "int4"):
        made = synthetic_cache(tmp_path / codec, 30, config=signals(codec=codec))
        report = cache_fidelity(made.storage, 30)
        assert report.reference == "stored states"
        assert report.group("all rows").rows == sum(r.rows for r in made.records)
        found[codec] = report.group("all rows").states_kl
    assert found["float32"] < 1e-5 < found["int8"] < found["int4"]


def test_groups_share_out_the_rows(tmp_path):
    made = synthetic_cache(tmp_path / "c", 30)
    report = cache_fidelity(made.storage, 30)
    rows = {g.name: g.rows for g in report.groups}
    whole = rows["all rows"]
    assert sum(n for name, n in rows.items() if name.startswith("answers of")) == whole
    assert sum(n for name, n in rows.items() if name.startswith("answer tokens")) == whole
    assert rows["first token of an answer"] == 2 * len(made.records)
    facts = dict(report.as_rows())
    assert f"{whole:,} rows" in facts["all rows"]
    assert "lower bound" in facts["exact is"]


def test_a_cache_without_states_reports_mass_alone(tmp_path):
    made = synthetic_cache(tmp_path / "c", config=signals("compact"))
    report = cache_fidelity(made.storage)
    group = report.group("all rows")
    assert (report.reference, group.topk_kl, group.states_kl) == ("none", None, None)
    kept = np.concatenate([np.exp(r.arrays["topk_logprobs"].astype(np.float64)).sum(-1) for r in made.records])
    assert group.mass == pytest.approx(kept.mean())


@pytest.mark.parametrize("preset", ["compact", "standard"])
def test_with_the_live_teacher_exact_means_exact(cache_config, teacher, tmp_path, preset):
    config = dataclasses.replace(
        cache_config,
        output=str(tmp_path / "c"),
        data=dataclasses.replace(cache_config.data, max_samples=12),
        signals=signals(preset, top_k=4, codec="int8", calibration_samples=8),
    )
    build_cache(config, teacher=teacher, style="quiet")
    report = cache_fidelity(Storage(config.output), 12, config=config, teacher=teacher)
    group = report.group("all rows")
    assert report.reference == "teacher"
    assert 0 < group.topk_kl < 1
    assert group.mass <= 1
    if preset == "standard":
        assert 0 <= group.states_kl < 0.02
        assert group.first_id_kept > 0.9
    else:
        assert group.states_kl is None
    assert torch.is_tensor(teacher.head())
