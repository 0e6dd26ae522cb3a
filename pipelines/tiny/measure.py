"""The tiny world's ground truth as the measuring function of ablations: the truth is used here and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.tiny.evaluate import LONGEST_ANSWER, score
from student_train.config import SourceConfig
from student_train.evaluation.agreement import agreement
from student_train.evaluation.answers import Student, answer_questions
from student_train.evaluation.evaluate import teacher_answers, write_predictions
from student_train.evaluation.metrics import yes_no
from student_train.evaluation.questions import read_questions


def measure_student(model: str, world: str, split: str, cache: str = "") -> dict[str, float]:
    """Percentages on ``split`` of the world at ``world``: VQA, each question type, POPE's figures on the existence
    questions, hallucinated objects of descriptions; with a held-out ``cache`` also KL and top-1 to the teacher.

    Writes ``predictions.jsonl`` beside the model folder.
    """
    samples = json.loads((Path(world) / f"{split}.json").read_text(encoding="utf-8"))
    images = Path(world) / "images"
    student = Student.load(model)
    answers = answer_questions(student, Path(world) / f"{split}.json", images, "tiny", max_new_tokens=LONGEST_ANSWER)
    known = teacher_answers(cache) if cache else None
    questions = read_questions(Path(world) / f"{split}.json")
    write_predictions(Path(model).parent / "predictions.jsonl", questions, answers, known)
    found = score(samples, answers)
    exist = [(a, s["conversations"][1]["value"]) for s, a in zip(samples, answers, strict=True) if _is_exist(s)]
    pope = yes_no([a for a, _ in exist], [truth for _, truth in exist])
    facts = {
        "vqa": 100 * found.vqa,
        "pope_f1": 100 * pope.f1,
        "yes_ratio": 100 * pope.yes_ratio,
        "hallucination": 100 * found.hallucinated,
        "missed": 100 * found.missed,
        **{f"type_{name}": 100 * value for name, value in found.accuracy.items()},
    }
    if cache:
        facts |= agreement(student, SourceConfig(cache=cache, image_folder=str(images))).as_facts()
    return facts


def _is_exist(sample: dict[str, object]) -> bool:
    return sample["question_type"] in ("exist", "exist_more")
