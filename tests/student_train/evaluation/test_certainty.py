"""How sure a model is of the truth and of itself, against a plain loop and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from student_train.evaluation.answers import Student
from student_train.evaluation.certainty import answer_logprobs, calibration_error, certainty
from student_train.evaluation.questions import read_questions
from teacher_cache.data.rows import expand
from teacher_cache.data.tokenization import template_by_name, tokenize_answer, tokenize_prompt
from teacher_cache.errors import EvaluationError
from tests.fixtures.online import TEACHER
from tests.fixtures.rounding import MODEL, rounding


@pytest.mark.parametrize("batch", [1, 7, 64])
@torch.inference_mode()
def test_an_answers_nats_are_those_of_its_tokens_one_by_one(world: Path, batch: int) -> None:
    student, questions, form = Student.load(TEACHER), read_questions(world / "dev.json")[:20], template_by_name("tiny")
    prepare, tokenizer = student.preprocessor, student.processor.tokenizer
    truths = [question.answers[0] for question in questions]
    found = answer_logprobs(student, questions, truths, world / "images", "tiny", batch)
    for question, truth, nats in zip(questions, truths, found, strict=True):
        prompt = expand(
            np.asarray(tokenize_prompt(question, form, tokenizer).segments[0]),
            prepare.image_token,
            prepare.image_tokens,
        )
        answer = tokenize_answer(truth, form, tokenizer)
        shown = {}
        if question.image is not None:
            shown["pixel_values"] = prepare.pixels(question.image, str(world / "images"))[None]
        ids = torch.from_numpy(np.concatenate([prompt, answer]))[None]
        logprobs = student.model(input_ids=ids, **shown).logits[0].double().log_softmax(-1)
        expected = sum(float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
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
