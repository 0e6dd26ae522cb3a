"""The tiny world's ground truth as the measuring function of ablations: the truth is used here and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.tiny.evaluate import LONGEST_ANSWER, score
from pipelines.tiny.questions import VISUAL_QUESTIONS
from student_train.config import SourceConfig
from student_train.evaluation.agreement import agreement
from student_train.evaluation.answers import Student, answer_questions
from student_train.evaluation.certainty import certainty
from student_train.evaluation.evaluate import teacher_answers, write_predictions
from student_train.evaluation.metrics import yes_no
from student_train.evaluation.questions import read_questions


def measure_student(model: str, world: str, split: str, cache: str = "") -> dict[str, float]:
    """Percentages on ``split`` of the world at ``world``: VQA, each question type, POPE's figures on the existence
    questions, hallucinated objects of descriptions; nats of the true answers and calibration error over VQA; with a
    held-out ``cache`` also KL to the teacher on answers (its end tokens included) and captions, and top-1 of answers.

    Writes ``predictions.jsonl`` beside the model folder.
    """
    samples = json.loads((Path(world) / f"{split}.json").read_text(encoding="utf-8"))
    images = Path(world) / "images"
    student = Student.load(model)
    answers = answer_questions(student, Path(world) / f"{split}.json", images, max_new_tokens=LONGEST_ANSWER)
    known = teacher_answers(cache) if cache else None
    questions = read_questions(Path(world) / f"{split}.json")
    write_predictions(Path(model).parent / "predictions.jsonl", questions, answers, known)
    found = score(samples, answers)
    truths = [sample["conversations"][1]["value"] for sample in samples]
    kinds = [sample["question_type"] for sample in samples]
    asked = [i for i, kind in enumerate(kinds) if kind in VISUAL_QUESTIONS]
    exist = [i for i, kind in enumerate(kinds) if kind in ("exist", "exist_more")]
    pope = yes_no([answers[i] for i in exist], [truths[i] for i in exist])
    sure = certainty(student, [questions[i] for i in asked], [answers[i] for i in asked], images)
    facts = {
        "vqa": 100 * found.vqa,
        "pope_f1": 100 * pope.f1,
        "yes_ratio": 100 * pope.yes_ratio,
        "hallucination": 100 * found.hallucinated,
        "missed": 100 * found.missed,
        "nll": sure.nll,
        "ece": 100 * sure.ece,
        **{f"type_{name}": 100 * value for name, value in found.accuracy.items()},
    }
    if cache:
        source = SourceConfig(cache=cache, image_folder=str(images))
        caption, answer = (agreement(student, source, only=only) for only in (_is_caption, _is_answer))
        facts |= {"kl_answers": answer.kl, "kl_captions": caption.kl, "top1": answer.top1}
    return facts


def _is_caption(sample_id: str) -> bool:
    return sample_id.endswith("-describe")


def _is_answer(sample_id: str) -> bool:
    return sample_id.endswith(VISUAL_QUESTIONS)
