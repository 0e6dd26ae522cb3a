"""What ``student-train evaluate`` finds: the answers to questions with known answers, and the file of predictions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from student_train.config import SourceConfig
from student_train.evaluation.agreement import agreement
from student_train.evaluation.answers import Student, answer_questions
from student_train.evaluation.certainty import certainty
from student_train.evaluation.metrics import YES_NO, plain_answer, vqa_accuracy, yes_no
from student_train.evaluation.questions import read_questions
from teacher_cache.data.conversations import IMAGE_TAG, Conversation
from teacher_cache.store.reader import TeacherCache


def evaluate_model(
    model: Path,
    data: Path,
    image_folder: Path,
    chat_template: str = "",
    output: Path | None = None,
    cache: str = "",
    max_new_tokens: int = 64,
) -> dict[str, Any]:
    """What ``student-train evaluate`` prints: accuracy by ``question_type``, POPE's figures on yes/no questions, nats
    of the truth and calibration error, and with a held-out ``cache`` the agreement with its teacher. ``data``: one
    question a sample, with its true answer."""
    questions, student = read_questions(data), Student.load(model, chat_template=chat_template)
    answers = answer_questions(student, data, image_folder, max_new_tokens=max_new_tokens)
    if output is not None:
        write_predictions(output, questions, answers, teacher_answers(cache) if cache else None)
    references = [question.answers[0] for question in questions]
    found = vqa_accuracy(answers, references, [question.kind or "all" for question in questions])
    facts: dict[str, Any] = {"questions": len(questions), "accuracy": found.overall}
    facts |= {f"accuracy of {name}": value for name, value in found.per_type.items()}
    closed = [(a, plain_answer(r)) for a, r in zip(answers, references, strict=True) if plain_answer(r) in YES_NO]
    if closed:
        facts |= {"yes/no questions": len(closed)}
        facts |= yes_no([a for a, _ in closed], [r for _, r in closed]).as_dict()
    facts |= certainty(student, questions, answers, image_folder).as_facts()
    if cache:
        facts |= agreement(student, SourceConfig(cache=cache, image_folder=str(image_folder))).as_facts()
    return facts


TeacherAnswers = Mapping[tuple[str, str], str]
"""(sample_id, first question without the image tag) → what the teacher answered."""


def teacher_answers(cache: str) -> TeacherAnswers:
    """The first answers of a cache that its teacher gave itself."""
    with TeacherCache.open(cache) as opened:
        return {(t.sample_id, _bare(t.questions[0])): t.answers[0] for t in opened.texts() if t.source == "teacher"}


def write_predictions(
    path: Path, questions: Sequence[Conversation], answers: Sequence[str], teacher: TeacherAnswers | None = None
) -> None:
    """One JSON line per sample: id, question, reference, answer, and the teacher's answer where it is known."""
    lines = []
    for question, answer in zip(questions, answers, strict=True):
        asked, image = question.texts[0], question.image
        line = {
            "id": question.sample_id,
            "question": asked if image is None else f"{IMAGE_TAG}\n{asked}",
            "reference": question.answers[0],
            "answer": answer,
            "question_type": question.kind,
            "image": "" if image is None else image.image_id,
        }
        said = (teacher or {}).get((question.sample_id, asked))
        lines.append(json.dumps(line if said is None else line | {"teacher": said}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _bare(question: str) -> str:
    return question.replace(IMAGE_TAG, "").strip()
