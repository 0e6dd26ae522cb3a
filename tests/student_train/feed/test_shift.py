"""The shift of a teacher: exact logits of several caches over one set of answers, added up."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from student_train.config import check_fit_config
from student_train.losses.catalogue import LossSpec
from student_train.studies.run_plan import plan_fit
from student_train.training.origin import changed, sources_origin
from student_train.training.trainer import Run, fit
from teacher_cache.config import SignalsConfig
from teacher_cache.errors import CacheError, ConfigError
from teacher_cache.store.reader import TeacherCache
from tests.fixtures.online import TEACHER, Oracle, build, dense_loss, exact_cache, fit_config, states_of
from tests.fixtures.rounding import MODEL, rounding
from tests.promises.test_offline_online import gradients, offline_gradients

ROWS = SignalsConfig(preset="standard", hidden="rows", codec="float32", top_k=0)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    """Two relatives of the teacher, each with a cache of the teacher's answers."""
    folders = {n: relative(tmp_path_factory.mktemp(n) / "model", seed) for seed, n in enumerate(("before", "onto"))}
    return {name: (build(ROWS, teacher=folder, answerer=TEACHER), folder) for name, folder in folders.items()}


def relative(folder: Path, seed: int) -> Path:
    """The tiny teacher with other weights."""
    shutil.copytree(TEACHER, folder)
    model = LlavaForConditionalGeneration.from_pretrained(TEACHER)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("onto", [True, False])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_the_shifts_loss_and_gradients_are_those_of_the_live_teachers(
    name: str, onto: bool, others: dict[str, tuple[str, Path]], tmp_path: Path
) -> None:
    spec = LossSpec(name, source="exact", temperature=0.7)
    config = fit_config([spec], tmp_path)
    source = replace(config.sources[0], before=others["before"][0], onto=others["onto"][0] if onto else "", shift=0.5)
    run = Run.prepare(replace(config, sources=(source,)))
    offline, from_cache = offline_gradients(run)
    run.student.zero_grad()
    live = {key: Oracle(cache, folder=folder) for key, (cache, folder) in others.items()}
    live["cache"] = Oracle(exact_cache())
    values = []
    for number in run.plan.global_batch(0).tolist():
        sample, _ = live["cache"].asked(number)
        logits = {key: oracle.asked(number)[1].logits[sample.rows].double() for key, oracle in live.items()}
        target = logits["onto" if onto else "cache"] + 0.5 * (logits["cache"] - logits["before"])
        student = states_of(run.student.model, sample).logits[sample.rows].double()
        values += [dense_loss(spec, t, s) for t, s in zip(target, student, strict=True)]
    online = torch.stack(values).mean()
    online.backward()
    assert offline == pytest.approx(float(online.detach()), rel=rounding(operations=MODEL))
    scale = max(float(g.abs().max()) for g in gradients(run).values())
    for key, gradient in gradients(run).items():
        allowed = rounding(operations=2 * MODEL) * max(float(gradient.abs().max()), 0.01 * scale)
        assert float((from_cache[key] - gradient).abs().max()) < allowed, key


def test_a_plan_counts_the_states_of_every_cache(others: dict[str, tuple[str, Path]], tmp_path: Path) -> None:
    config = fit_config([LossSpec("forward_kl", source="exact")], tmp_path)
    shifted = replace(config, sources=(replace(config.sources[0], before=others["before"][0], onto=others["onto"][0]),))
    plain, whole = (plan_fit(c).cache_bytes for c in (config, shifted))
    with TeacherCache.open(exact_cache()) as cache:
        states = cache.manifest.counts["rows"] * cache.manifest.shape.hidden_size * 4
        samples = len(cache)
    seen = config.train.max_steps * config.train.global_batch / samples
    assert whole - plain == pytest.approx(2 * states * seen, rel=1e-6)


def test_another_cache_before_or_onto_is_another_run(others: dict[str, tuple[str, Path]], tmp_path: Path) -> None:
    """A finished run is not taken for that of other caches, and a checkpoint is not gone on from with them."""
    config = fit_config([LossSpec("forward_kl", source="exact")], tmp_path, max_steps=1)
    before, onto = others["before"][0], others["onto"][0]
    one, other = (replace(config.sources[0], before=url) for url in (before, onto))
    assert [name for name in changed(sources_origin([one]), sources_origin([other])) if ".before" in name]
    fit(replace(config, sources=(one,)), "quiet")
    with pytest.raises(CacheError, match=r"sources\[0\]\.content\[1\] was"):
        fit(replace(config, sources=(other,)), "quiet")


def test_a_cache_of_other_answers_is_refused(others: dict[str, tuple[str, Path]], tmp_path: Path) -> None:
    own = build(ROWS, teacher=others["before"][1])
    config = fit_config([LossSpec("forward_kl", source="exact")], tmp_path)
    run = Run.prepare(replace(config, sources=(replace(config.sources[0], before=own),)))
    with pytest.raises(CacheError, match=r"sources\[…\]\.before: .* holds other answers than .*teacher\.answerer"):
        offline_gradients(run)


def test_a_cache_of_other_samples_or_without_states_of_rows_is_refused(tmp_path: Path) -> None:
    config = fit_config([LossSpec("forward_kl", source="exact")], tmp_path)
    for signals, message in (
        (replace(ROWS, top_k=4, hidden="none"), "has signals hidden=none"),
        (ROWS, "is not over the samples of .*: [0-9]+ samples"),
    ):
        other = build(signals, max_samples=3)
        with pytest.raises(CacheError, match=message):
            Run.prepare(replace(config, sources=(replace(config.sources[0], before=other),)))


@pytest.mark.parametrize(
    ("loss", "source", "message"),
    [
        (LossSpec("forward_kl"), {"before": "b"}, r"before: forward_kl would learn the teacher, not its shift"),
        (LossSpec("hidden_mse"), {"before": "b"}, r"before: hidden_mse would learn the teacher"),
        (LossSpec("forward_kl", source="exact"), {"onto": "b"}, r"onto: nothing is added to it. Set before"),
    ],
)
def test_what_has_no_shift_is_refused(loss: LossSpec, source: dict[str, str], message: str, tmp_path: Path) -> None:
    config = fit_config([loss], tmp_path, cache="none")
    with pytest.raises(ConfigError, match=message):
        check_fit_config(replace(config, sources=(replace(config.sources[0], **source),)))
