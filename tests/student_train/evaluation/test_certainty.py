"""How sure a model is of the truth and of itself, against a plain loop and by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipelines.tiny.tokenizer import prompt_text
from student_train.evaluation.answers import Student
from student_train.evaluation.certainty import answer_logprobs, calibration_error, certainty
from student_train.evaluation.questions import read_questions
from teacher_cache.data.images import load_image
from teacher_cache.errors import EvaluationError
from tests.fixtures.online import TEACHER
from tests.fixtures.rounding import MODEL, rounding


@pytest.mark.parametrize("batch", [1, 7, 64])
@torch.inference_mode()
def test_an_answers_nats_are_those_of_its_tokens_one_by_one(world: Path, batch: int) -> None:
    student, questions = Student.load(TEACHER), read_questions(world / "dev.json")[:20]
    truths = [question.answers[0] for question in questions]
    found = answer_logprobs(student, questions, truths, world / "images", batch)
    for question, truth, nats in zip(questions, truths, found, strict=True):
        shown = [load_image(image, world / "images") for image in question.images] or None
        prompt, whole = prompt_text(question.texts[0], image=bool(shown)), f" {truth}</s>"
        made = student.processor(text=[prompt + whole], images=shown, return_tensors="pt")
        answer = student.processor.tokenizer(whole)["input_ids"]
        logprobs = student.model(**made).logits[0].double().log_softmax(-1)
        begin = made["input_ids"].shape[1] - len(answer)
        expected = sum(float(logprobs[begin - 1 + i, token]) for i, token in enumerate(answer))
        assert nats == pytest.approx(expected, rel=rounding(torch.float32, MODEL), abs=rounding(torch.float32, MODEL))


def test_the_truth_costs_more_nats_where_a_model_is_wrong(world: Path) -> None:
    student, questions = Student.load(TEACHER), read_questions(world / "dev.json")[:20]
    truths = [question.answers[0] for question in questions]
    right = certainty(student, questions, truths, world / "images")
    student.model.get_output_embeddings().weight.data.mul_(-1)
    wrong = certainty(student, questions, truths, world / "images")
    assert wrong.nll > right.nll + 1
    assert 0 <= right.ece <= 1


def test_calibration_by_hand() -> None:
    assert calibration_error([1.0, 1.0, 0.05, 0.05], [True, True, False, False]) == pytest.approx(0.025)
    assert calibration_error([0.95, 0.95], [True, False]) == pytest.approx(0.45)
    assert calibration_error([0.91, 0.99, 0.31, 0.39], [True, False, True, False]) == pytest.approx(
        (abs(1 - 1.90) + abs(1 - 0.70)) / 4
    )
    assert calibration_error([0.25] * 4, [True, False, False, False]) == 0.0
    with pytest.raises(EvaluationError, match="expected one of each"):
        calibration_error([], [])
