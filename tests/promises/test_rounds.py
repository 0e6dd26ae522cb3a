"""Data from the student: who answered which sample, who scored it, and the rounds built on it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from student_train.config import FitConfig, LossSpec, StudentConfig
from student_train.studies.rounds import RoundsConfig, student_cache, train_rounds
from teacher_cache.build.answers import read_answers
from teacher_cache.build.build import open_teacher
from teacher_cache.config import CacheConfig, DataConfig, SignalsConfig, as_plain, load_config
from teacher_cache.data.conversations import Conversation
from teacher_cache.data.sample_reader import read_conversations
from teacher_cache.errors import ConfigError, DataError, TeacherError
from teacher_cache.store.reader import TeacherCache
from tests.fixtures.online import TEACHER, Oracle, build, fit_config, student_folder, world
from tests.fixtures.rounding import MODEL, within

SIGNALS = SignalsConfig(preset="standard", top_k=8, codec="float32")


@pytest.fixture(scope="module")
def phase_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("phase-one") / "cache.yaml"
    plain = {
        "data": {"path": str(world() / "train.json"), "image_folder": str(world() / "images")},
        "teacher": {
            "model": "pipelines/tiny/teacher",
            "backend": "torch",
            "dtype": "float32",
            "chat_template": "tiny",
            "max_length": 256,
        },
        "generation": {"max_new_tokens": 6},
        "signals": {"top_k": 8, "codec": "float32"},
    }
    path.write_text(json.dumps(plain))
    return path


@pytest.fixture(scope="module")
def cache(phase_one: Path, tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    folder = str(tmp_path_factory.mktemp("student-cache") / "cache")
    student_cache(str(phase_one), student_folder(), folder, share=0.5)
    return TeacherCache.open(folder)


def test_share_of_samples_is_a_function_of_their_ids() -> None:
    def picked(share: float) -> set[str]:
        samples = read_conversations(DataConfig(path=str(world() / "train.json"), regenerate_share=share))
        return {s.sample_id for s in samples if isinstance(s, Conversation) and s.regenerate}

    everything = picked(1.0)
    assert not picked(0.0)
    assert picked(0.3) < picked(0.6) < everything
    assert len(picked(0.5)) == pytest.approx(len(everything) / 2, abs=6)
    with pytest.raises(DataError, match="between 0 and 1"):
        picked(1.5)


def test_student_answers_its_share_and_originals_stay(cache: TeacherCache) -> None:
    sources = {record.sample_id: record.source for record in cache}
    assert set(sources.values()) == {"student", "original"}
    stored = read_answers(cache.storage, cache.manifest, 0)
    assert stored is not None
    for record in cache:
        assert stored[record.sample_id].source == record.source
        if record.source == "original":
            assert record.answers == record.original_answers
    answered = [r for r in cache if r.source == "student"]
    assert any(r.answers != r.original_answers for r in answered)


def test_teacher_scores_what_the_student_said(cache: TeacherCache) -> None:
    """The states are the teacher's on the student's words, not the student's own."""
    oracle = Oracle(str(cache.storage.url))
    number = next(i for i, record in enumerate(cache) if record.source == "student" and record.image_ids)
    sample, teacher = oracle.asked(number)
    record = cache[number]
    assert np.allclose(record.arrays["hidden"], teacher.last[sample.rows].numpy(), **within(operations=MODEL))


def test_manifest_names_the_student_and_its_weights(cache: TeacherCache, tmp_path: Path, phase_one: Path) -> None:
    assert cache.manifest.data["answerer"] == "student"
    other = tmp_path / "cache"
    student_cache(str(phase_one), student_folder(1), str(other), share=0.5)
    with TeacherCache.open(str(other)) as second:
        assert second.manifest.data["answerer_weights"] != cache.manifest.data["answerer_weights"]
        assert second.manifest.fingerprint != cache.manifest.fingerprint


def test_answerer_with_another_tokenizer_is_refused(tmp_path: Path, phase_one: Path) -> None:
    other = tmp_path / "student"
    shutil.copytree(student_folder(), other)
    plain = json.loads((other / "tokenizer.json").read_text())
    words = plain["model"]["vocab"]
    words["red"], words["blue"] = words["blue"], words["red"]
    (other / "tokenizer.json").write_text(json.dumps(plain))
    config = load_config(CacheConfig, phase_one, [f"output={tmp_path}/cache", f"teacher.answerer={other}"])
    with pytest.raises(TeacherError, match="its tokenizer is not the teacher's"):
        open_teacher(config, [])


def rounds_of(config: FitConfig, phase_one: Path, output: Path, rounds: int) -> RoundsConfig:
    tree = as_plain(config)
    tree["losses"] = [{"name": loss.name} for loss in config.losses]
    return RoundsConfig(str(output), tree, str(phase_one), ("data.max_samples=8",), rounds)


def test_a_phase_one_that_fails_ends_the_rounds(
    tmp_path: Path, phase_one: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="phase one ended with exit code 1"):
        student_cache(str(phase_one), student_folder(), str(tmp_path / "cache"), sets=["data.path=nowhere.json"])
    assert "nowhere.json: no such data file" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="needs output, fit"):
        train_rounds(RoundsConfig(output=str(tmp_path), cache=str(phase_one)))


def test_later_rounds_of_a_cut_student_train_on_from_what_it_learnt(tmp_path: Path, phase_one: Path) -> None:
    """Not from the teacher's layers again."""
    first = build(SIGNALS, max_samples=8)
    config = fit_config([LossSpec("cross_entropy")], "", cache=first, max_steps=1)
    config = dataclasses.replace(config, student=StudentConfig(layers_from=str(TEACHER), layers=1))
    summaries = train_rounds(rounds_of(config, phase_one, tmp_path, 1))
    began = json.loads((tmp_path / "round-1" / "run.json").read_text())["config"]["student"]
    assert (began["model"], began["layers_from"], began["layers"]) == (summaries[0].model, "", 0)


def test_rounds_train_on_from_the_student_that_answered(tmp_path: Path, phase_one: Path) -> None:
    first = build(SIGNALS, max_samples=8)
    config = fit_config([LossSpec("cross_entropy"), LossSpec("forward_kl")], "", cache=first, max_steps=2)
    config = dataclasses.replace(config, student=dataclasses.replace(config.student, attention="sdpa"))
    summaries = train_rounds(rounds_of(config, phase_one, tmp_path, 2))
    assert [Path(s.model).parent.name for s in summaries] == ["round-0", "round-1", "round-2"]
    with TeacherCache.open(str(tmp_path / "round-2" / "cache")) as cache:
        assert cache.manifest.data["answerer"] == "model"
        assert {r.source for r in cache} == {"student", "original"}
    assert all(torch.isfinite(torch.tensor(s.loss)) for s in summaries)
