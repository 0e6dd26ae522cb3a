"""GQA: exact-match accuracy over the balanced questions.

Source: Hudson and Manning, "GQA: A New Dataset for Real-World Visual Reasoning and Compositional Question Answering",
CVPR 2019 (arXiv 1902.09506); its `eval.py` compares with ==. LLaVA's `scripts/convert_gqa_for_eval.py` first takes the
full stops off the end of an answer and lower-cases it; nothing else is normalised.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student_train.scores.answers import (
    accuracy_by,
    by_question,
    check_answered,
    read_answers,
    read_json,
    require_columns,
)


@dataclass(frozen=True)
class GqaScores:
    """`accuracy` overall; `per_answer_type`: open (structural type "query") and binary (all others)."""

    accuracy: float
    per_answer_type: dict[str, float]
    per_structural_type: dict[str, float]
    per_semantic_type: dict[str, float]
    questions: int


def score_gqa(answers_path: Path | str, questions_path: Path | str) -> GqaScores:
    """Scores against GQA's own questions file (such as `testdev_balanced_questions.json`).

    Answers to questions outside the balanced subset may be there and do not count, as in the official script.
    """
    questions: dict[str, dict[str, Any]] = read_json(questions_path)
    for question in questions.values():
        require_columns(question, ("answer", "isBalanced", "types"), questions_path)
    answers = by_question(read_answers(answers_path), answers_path)
    balanced = {identity: question for identity, question in questions.items() if question["isBalanced"]}
    counted = [identity for identity in answers if identity in balanced or identity not in questions]
    check_answered(counted, balanced, answers_path, questions_path)
    if not balanced:
        raise ValueError(f"{questions_path}: no balanced question; the score is over these. Pass GQA's balanced file.")
    rows = [(question, _prediction(answers[key].text) == question["answer"]) for key, question in balanced.items()]
    return GqaScores(
        accuracy=sum(hit for _, hit in rows) / len(rows),
        per_answer_type=accuracy_by((_answer_type(question), hit) for question, hit in rows),
        per_structural_type=accuracy_by((question["types"]["structural"], hit) for question, hit in rows),
        per_semantic_type=accuracy_by((question["types"]["semantic"], hit) for question, hit in rows),
        questions=len(rows),
    )


def _prediction(text: str) -> str:
    return text.rstrip(".").lower()


def _answer_type(question: dict[str, Any]) -> str:
    return "open" if question["types"]["structural"] == "query" else "binary"
