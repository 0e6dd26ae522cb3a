"""POPE: does the student see objects that are not there?

Source: Li et al., EMNLP 2023 (arXiv 2305.10355); files and figures as LLaVA has them: `llava/eval/eval_pope.py`, with
`llava_pope_test.jsonl` (questions with their category) and `coco/coco_pope_{random,popular,adversarial}.json` (labels).
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from student_train.scores.answers import by_question, check_answered, read_answers, read_json_lines
from student_train.scores.yes_no import YesNoScores, yes_no_scores


@dataclass(frozen=True)
class PopeScores:
    """One row of figures a category. `accuracy` and `f1`: mean over the categories, as result tables print POPE."""

    categories: dict[str, YesNoScores]

    @property
    def accuracy(self) -> float:
        return fmean(scores.accuracy for scores in self.categories.values())

    @property
    def f1(self) -> float:
        return fmean(scores.f1 for scores in self.categories.values())


def score_pope(answers_path: Path | str, annotations_dir: Path | str, questions_path: Path | str) -> PopeScores:
    """The figures of every category in `annotations_dir` (`coco_pope_<category>.json`).

    The label files number their questions from 1 again, so a label belongs to the question of the same rank in its
    category. The official script trusts that; here image and text must agree too.
    """
    answers = by_question(read_answers(answers_path), answers_path)
    questions = _questions_by_category(questions_path)
    asked = [question["question_id"] for rows in questions.values() for question in rows]
    check_answered(answers, asked, answers_path, questions_path)
    scores = {}
    for category, rows in questions.items():
        labels = _labels(category, rows, Path(annotations_dir), questions_path)
        scores[category] = yes_no_scores([answers[row["question_id"]].text for row in rows], labels)
    return PopeScores(scores)


def _questions_by_category(path: Path | str) -> dict[str, list[dict[str, Any]]]:
    """Category → its questions in file order, ids as text."""
    categories = defaultdict(list)
    for row in read_json_lines(path, ("question_id", "image", "text", "category")):
        categories[row["category"]].append({**row, "question_id": str(row["question_id"])})
    return dict(categories)


def _labels(category: str, questions: list[dict[str, Any]], folder: Path, questions_path: Path | str) -> list[str]:
    """The label of each question of a category, in the questions' order."""
    path = folder / f"coco_pope_{category}.json"
    if not path.exists():
        raise ValueError(f"{path}: not there; expected the labels of category '{category}'. Pass LLaVA's coco folder.")
    labels = read_json_lines(path, ("image", "text", "label"))
    if len(labels) != len(questions):
        raise ValueError(
            f"{path}: {len(labels)} labels, but {questions_path} has {len(questions)} questions of category "
            f"'{category}'. Take both from the same download."
        )
    for question, label in zip(questions, labels, strict=True):
        if question["image"] != label["image"] or not question["text"].startswith(label["text"]):
            raise ValueError(
                f"{path} line {label['line']}: '{label['text']}' on {label['image']}; expected question "
                f"{question['question_id']}, '{question['text'].splitlines()[0]}' on {question['image']}. "
                "Take both from the same download."
            )
    return [label["label"] for label in labels]
