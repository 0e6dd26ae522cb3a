"""Visual advantage: two plain forward passes of the model, subtracted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from teacher_cache.build.advantage import blurred
from teacher_cache.build.build import build_cache
from teacher_cache.data.rows import turns
from teacher_cache.data.sample_reader import read_conversations
from teacher_cache.models.collate import collate
from teacher_cache.pages.view import write_view
from teacher_cache.plan.cache_plan import plan_cache
from teacher_cache.plan.cost import Throughput, measured_throughput
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.storage import Storage
from teacher_cache.teachers.torch_teacher import TorchTeacher
from teacher_cache.trust.verify import verify_cache
from tests.fixtures.rounding import within
from tests.teacher_cache.build.test_families import config_of


@pytest.mark.parametrize("how", ["blurred", "without"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "llava_onevision"])
def test_advantage_is_the_log_probability_with_the_image_less_that_without(
    name: str, how: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    config = config_of(name, family_folder(name), tmp_path, advantage=how)
    teacher = TorchTeacher(config.teacher, config.generation, config.speed)
    build_cache(config, teacher=teacher, style="quiet")
    assert verify_cache(Storage(config.output), deep=True).ok
    asked = {s.sample_id: s for s in read_conversations(config.data, by_turn=not teacher.chat.one_sequence)}
    unequal = 0
    with TeacherCache.open(config.output) as cache:
        for record in (cache[i] for i in range(len(cache))):
            sample = asked[record.sample_id]
            ids, mask = record.arrays["input_ids"].astype(np.int64), record.arrays["loss_mask"]
            answers = [tuple(ids[mask][part].tolist()) for part in turns(mask)]
            if not teacher.chat.one_sequence:
                answers = [*map(teacher.chat.original, record.answers[:-1]), *answers]
            opened = [PillowImage.open(Path(config.data.image_folder, i.path)).convert("RGB") for i in sample.images]
            if how == "blurred":
                less = sample, [blurred(image) for image in opened]
            else:
                texts = tuple(q.replace("<image>\n", "").replace("<image>", "") for q in sample.questions)
                less = dataclasses.replace(sample, questions=texts, images=()), []
            seen, unseen = (logprobs(teacher, s, answers, images) for s, images in ((sample, opened), less))
            found = torch.from_numpy(record.arrays["advantage"])
            assert found.dtype == torch.float16
            expected = seen - unseen
            torch.testing.assert_close(found.double(), expected, **within(torch.float16, 2), check_dtype=False)
            unequal += int((expected.abs() > 1e-3).sum())
    assert unequal, "the image changes nothing: the test would accept zeros"


def logprobs(teacher: TorchTeacher, sample: object, answers: list, images: list) -> torch.Tensor:
    """(R,) float64, by the model's own forward pass on one sample."""
    read = teacher.chat.sample(sample, answers, images)
    fields = collate([{"input_ids": torch.from_numpy(read.input_ids), **read.model}], 0, "right")
    with torch.inference_mode():
        logits = teacher._model(**fields).logits[0].double().log_softmax(-1)
    at = np.flatnonzero(read.loss_mask)
    return logits[at - 1, read.input_ids[at]]


def test_a_sample_without_an_image_has_no_advantage_and_is_not_scored_again(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    config = config_of("llama3", family_folder("llama3"), tmp_path, advantage="without")
    teacher = TorchTeacher(config.teacher, config.generation, config.speed)
    passes = []
    score = teacher.score
    teacher.score = lambda requests, wanted: passes.append(len(requests)) or score(requests, wanted)  # type: ignore[method-assign]
    build_cache(config, teacher=teacher, style="quiet")
    with TeacherCache.open(config.output) as cache:
        assert sum(passes) == len(cache)
        assert not any(cache[i].arrays["advantage"].any() for i in range(len(cache)))


@pytest.mark.parametrize("how", ["blurred", "without"])
def test_a_plan_counts_the_second_pass_and_a_finished_cache_tells_its_rate(
    how: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    config = config_of("qwen2_5_vl", family_folder("qwen2_5_vl"), tmp_path)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, regenerate="none"))
    more = dataclasses.replace(config, signals=dataclasses.replace(config.signals, advantage=how))
    rate = Throughput(1.0, 1.0)
    once, twice = (plan_cache(c, throughput=rate) for c in (config, more))
    build_cache(more, style="quiet")
    (tmp_path / "cache" / "cost.json").write_text(json.dumps({"answer_seconds": 1.0, "score_seconds": 1.0}))
    with TeacherCache.open(more.output) as cache:
        counts = cache.manifest.counts
        read = counts["tokens"] - counts["runs"] + counts["image_positions"]
    again = read if how == "blurred" else counts["tokens"] - counts["runs"]  # every sample has an image
    assert (twice.gpu_hours - once.gpu_hours) * 3600 == pytest.approx(again, rel=0.1)
    assert measured_throughput(Storage(more.output)).read_tokens_per_second == read + again
    assert twice.part_bytes["advantage"] >= 2 * twice.rows
    assert any(note.startswith("signals.advantage: 3 samples are scored a second time") for note in twice.notes)


def test_a_blurred_image_has_its_size_and_no_detail() -> None:
    pixels = np.zeros((48, 96, 3), np.uint8)
    pixels[::2] = 255
    image = blurred(PillowImage.fromarray(pixels))
    assert image.size == (96, 48)
    assert np.ptp(np.asarray(image)) <= 1


def test_the_page_says_which_words_the_teacher_reads_off_the_image(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    config = config_of("qwen2_5_vl", family_folder("qwen2_5_vl"), tmp_path, advantage="blurred")
    build_cache(config, style="quiet")
    with TeacherCache.open(config.output) as cache:
        values = np.concatenate([cache[i].arrays["advantage"] for i in range(len(cache))])
    page = write_view(config.output, tmp_path / "view.html", samples=5).read_text(encoding="utf-8")
    assert all(f"<td>{value:+.2f}</td>" in page for value in values.astype(float))
    assert page.count(" seen") >= np.count_nonzero(values >= 0.5)
