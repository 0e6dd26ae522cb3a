"""Numbers that mean nothing are not cached: those that are not finite, and those beyond a model's positions."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, GPT2Config

from pipelines.tiny.models import load_llava
from pipelines.tiny.prepare import TEACHER
from student_train.config import LossSpec
from student_train.evaluation.answers import Student, answer_questions
from student_train.training.trainer import fit
from teacher_cache.build.build import build_cache
from teacher_cache.build.signals import NOT_FINITE
from teacher_cache.config import CacheConfig, TeacherConfig
from teacher_cache.data.conversations import Conversation
from teacher_cache.data.rows import expand
from teacher_cache.errors import ConfigError, EvaluationError, TeacherError
from teacher_cache.models.model_config import position_limit
from teacher_cache.models.open_chat import load_processor
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.storage import Storage
from teacher_cache.teachers.torch_teacher import TorchTeacher
from teacher_cache.trust.verify import verify_cache
from tests.fixtures.building import asked
from tests.fixtures.online import fit_config

SIGNALS: dict[str, dict[str, Any]] = {
    "states in int8": {"hidden": "rows", "visual": "none", "codec": "int8"},
    "everything": {"hidden": "text", "visual": "states", "codec": "int8", "second_last": True},
    "top-k alone": {"hidden": "none", "visual": "none"},
    "Grams": {"hidden": "none", "visual": "gram"},
}


def copy_of(source: Path, folder: Path, **text_settings: Any) -> Path:
    shutil.copytree(source, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"] |= text_settings
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def change(folder: Path, name: str, to: Any) -> Path:
    weights = load_file(folder / "model.safetensors")
    (found,) = [key for key in weights if key.endswith(name)]
    weights[found] = to(weights[found].float())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def word(world: Path) -> tuple[str, int]:
    """A word of the vocabulary that no sample of the tiny world holds, and its id."""
    _, tokenizer = load_processor(TeacherConfig(model=str(TEACHER), chat_template="tiny"))
    said = tokenizer((world / "train.json").read_text())["input_ids"]
    free = [w for w, i in sorted(tokenizer.get_vocab().items()) if w.isalpha() and i not in said]
    return free[0], int(tokenizer.convert_tokens_to_ids(free[0]))


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory, word: tuple[str, int]) -> Path:
    """The tiny teacher, for which one word is too large in float16: 7e4 is infinite there."""

    def enlarge(table: torch.Tensor) -> torch.Tensor:
        table[word[1]] = 7e4
        return table

    folder = copy_of(TEACHER, tmp_path_factory.mktemp("overflow") / "teacher")
    return change(folder, "embed_tokens.weight", enlarge)


@pytest.fixture
def data(world: Path, tmp_path: Path, word: tuple[str, int]) -> Path:
    """Twelve samples; the third one asks with the word, and its image comes in no other."""
    lines = [line for line in json.loads((world / "train.json").read_text()) if "image" in line][:12]
    lines[2]["conversations"][0]["value"] += f" {word[0]}"
    (tmp_path / "data.json").write_text(json.dumps(lines))
    return tmp_path / "data.json"


def config_of(cache_config: CacheConfig, data: Path, model: Path, dtype: str, **signals: Any) -> CacheConfig:
    return replace(
        cache_config,
        output=str(data.parent / f"cache-{dtype}"),
        data=replace(cache_config.data, path=str(data)),
        teacher=replace(cache_config.teacher, model=str(model), dtype=dtype),
        signals=replace(cache_config.signals, **signals),
        layout=replace(cache_config.layout, shard_samples=5),
    )


def skipped_in(output: str) -> list[dict[str, str]]:
    lines = (Path(output) / "skipped.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("regenerate", ["all", "none"])
@pytest.mark.parametrize("signals", SIGNALS)
def test_a_sample_that_overflows_is_skipped_with_its_reason_and_spoils_no_other(
    signals: str, regenerate: Literal["all", "none"], cache_config: CacheConfig, data: Path, overflowing: Path
) -> None:
    """With ``none`` nothing is generated, so that the scored numbers alone tell."""
    config = config_of(cache_config, data, overflowing, "float16", **SIGNALS[signals])
    config = replace(config, data=replace(config.data, regenerate=regenerate))
    summary = build_cache(config, style="quiet")
    assert (summary.samples, summary.skipped) == (11, 1)
    (skipped,) = skipped_in(config.output)
    assert skipped["reason"] == NOT_FINITE
    assert skipped["sample_id"] == str(json.loads(data.read_text())[2]["id"])
    assert verify_cache(Storage(config.output), deep=True).ok
    with TeacherCache.open(config.output) as cache:
        for fitted in cache.scales.values():
            parts = [getattr(fitted, f.name) for f in dataclasses.fields(fitted)]
            assert all(np.isfinite(part).all() for part in parts if part is not None)


def test_the_same_teacher_in_a_wider_dtype_caches_every_sample(
    cache_config: CacheConfig, data: Path, overflowing: Path
) -> None:
    config = config_of(cache_config, data, overflowing, "float32", codec="float32")
    assert build_cache(config, style="quiet").samples == 12


@pytest.mark.parametrize("codec", ["int8", "float16"])
def test_a_teacher_that_overflows_everywhere_is_refused(
    codec: str, cache_config: CacheConfig, data: Path, tmp_path: Path
) -> None:
    folder = change(copy_of(TEACHER, tmp_path / "teacher"), "language_model.model.norm.weight", lambda w: w * 3e4)
    config = config_of(cache_config, data, folder, "float16", codec=codec)
    config = replace(config, layout=replace(config.layout, shard_samples=12))
    with pytest.raises(TeacherError, match=r"not finite|finite logits.*teacher\.dtype=float16.*Set teacher\.dtype="):
        build_cache(config, style="quiet")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_student_that_overflows_while_it_answers_is_noticed(
    temperature: float, cache_config: CacheConfig, data: Path, overflowing: Path
) -> None:
    """The teacher's own numbers for what it is given to score are finite, so only the answering tells."""
    config = config_of(cache_config, data, TEACHER, "float16", codec="float16")
    config = replace(
        config,
        teacher=replace(config.teacher, answerer=str(overflowing)),
        generation=replace(config.generation, temperature=temperature),
    )
    summary = build_cache(config, style="quiet")
    assert (summary.samples, summary.skipped) == (11, 1)
    assert skipped_in(config.output)[0]["reason"] == NOT_FINITE
    stored = replace(config, output=config.output + "-again")
    shutil.copytree(Path(config.output) / "answers", Path(stored.output) / "answers")
    assert build_cache(stored, style="quiet").answer_seconds == 0
    assert skipped_in(stored.output) == skipped_in(config.output)


def test_a_student_that_overflows_is_not_evaluated(data: Path, world: Path, overflowing: Path) -> None:
    student = Student.load(overflowing, "float16")
    with pytest.raises(EvaluationError, match="the student's logits are not finite"):
        answer_questions(student, data, world / "images", max_new_tokens=4)


@pytest.fixture(scope="module")
def short_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of(TEACHER, tmp_path_factory.mktemp("short") / "teacher", max_position_embeddings=24)


def test_samples_beyond_the_teachers_positions_are_skipped_with_their_length(
    cache_config: CacheConfig, world: Path, short_teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "data.json").write_text((world / "train.json").read_text())
    config = config_of(cache_config, tmp_path / "data.json", short_teacher, "float32", codec="float16")
    config = replace(config, data=replace(config.data, max_skipped=1.0))
    summary = build_cache(config, style="quiet")
    assert summary.samples
    assert summary.skipped
    reasons = [line["reason"] for line in skipped_in(config.output)]
    assert all("the model has 24 positions" in reason for reason in reasons)
    with TeacherCache.open(config.output) as cache:
        token, image_tokens = cache.manifest.image_token, cache.manifest.image_tokens
        lengths = [len(expand(cache[i].arrays["input_ids"], token, image_tokens)) for i in range(len(cache))]
    assert max(lengths) <= 24
    assert any(length > 20 for length in lengths), "the limit itself is usable"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_ends_one_token_beyond_the_last_position_whatever_its_batch(
    temperature: float, cache_config: CacheConfig, short_teacher: Path
) -> None:
    generation = replace(cache_config.generation, temperature=temperature, max_new_tokens=40)
    teacher = TorchTeacher(replace(cache_config.teacher, model=str(short_teacher)), generation, cache_config.speed)
    around = asked(teacher, Conversation("", ("",), ("",))).shown.sample.length
    questions = [" ".join(["red"] * (length - around)) for length in (4, 11, 22, 25)]
    requests = [asked(teacher, Conversation(str(i), (q,), ("",)), seed=i) for i, q in enumerate(questions)]
    together = teacher.answer(requests)
    assert [a.token_ids for a in together] == [teacher.answer([r])[0].token_ids for r in requests]
    assert [r.shown.sample.length for r in requests] == [4, 11, 22, 25]
    assert all(r.shown.sample.length + len(a.token_ids) <= 26 for r, a in zip(requests, together, strict=True))


def test_a_student_with_too_few_positions_is_refused_before_the_first_step(tmp_path: Path) -> None:
    config = fit_config([LossSpec("cross_entropy")], tmp_path / "run", max_steps=1)
    short = copy_of(Path(config.student.model), tmp_path / "student", max_position_embeddings=16)
    with pytest.raises(ConfigError, match=r"16 positions, but \d+ of \d+ samples are longer.*sources\[0\]"):
        fit(replace(config, student=replace(config.student, model=str(short))), "quiet")
    assert not (tmp_path / "run" / "model").exists()


def test_a_question_that_does_not_fit_into_the_students_positions_is_not_asked(
    world: Path, short_teacher: Path
) -> None:
    with pytest.raises(ConfigError, match=r"do not fit into the student's 24 positions"):
        answer_questions(Student.load(short_teacher), world / "dev.json", world / "images")


def test_positions_are_read_from_the_text_part_and_may_be_without_limit() -> None:
    assert position_limit(load_llava(TEACHER).config) == 512
    assert position_limit(GPT2Config(n_positions=32)) == 32
    assert position_limit(BloomConfig()) is None, "distances are biases there"
