"""ScienceQA: the letter of a multiple-choice answer.

Source: Lu et al., "Learn to Explain", NeurIPS 2022 (arXiv 2209.09513); `llava/eval/eval_science_qa.py` on
`problems.json` and `pid_splits.json`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student_train.scores.answers import Answer, by_question, check_answered, ratio, read_answers, read_json

_LETTERS = ("A", "B", "C", "D", "E")
_SENTENCE = re.compile(r"The answer is ([A-E])")


@dataclass(frozen=True)
class ScienceQaScores:
    """`image_accuracy` (IMG, the column most papers report) is over questions asked with an image: `<image>` stands in
    their prompt. `unparsed` answers named no letter and count as wrong."""

    accuracy: float
    image_accuracy: float
    questions: int
    image_questions: int
    unparsed: int


def score_science_qa(
    answers_path: Path | str, problems_path: Path | str, splits_path: Path | str, split: str = "test"
) -> ScienceQaScores:
    """Accuracy over the problems of a split. A missing answer is refused; the official script counts it as wrong.

    ValueError: an unknown split, a missing, doubled or unknown answer.
    """
    problems: dict[str, dict[str, Any]] = read_json(problems_path)
    splits: dict[str, list[str]] = read_json(splits_path)
    if split not in splits:
        raise ValueError(f"{splits_path}: no split '{split}'; found {', '.join(splits)}. Choose one of these.")
    answers = by_question(read_answers(answers_path), answers_path)
    check_answered(answers, splits[split], answers_path, f"{splits_path}, split '{split}'")
    rows = [(answers[identity], problems[identity]) for identity in splits[split]]
    hits = [_is_right(answer, problem) for answer, problem in rows]
    image_hits = [hit for hit, (answer, _) in zip(hits, rows, strict=True) if "<image>" in answer.prompt]
    return ScienceQaScores(
        accuracy=sum(hits) / len(hits),
        image_accuracy=ratio(sum(image_hits), len(image_hits)),
        questions=len(hits),
        image_questions=len(image_hits),
        unparsed=sum(parse_letter(answer.text) is None for answer, _ in rows),
    )


def parse_letter(text: str) -> str | None:
    """The letter an answer names, as LLaVA reads it: a lone "A", "A. …" at the start, or "The answer is A".

    Line ends count as ". ". So "A" and "A\\nbecause" name A, but "A.", "(A)" and "a" name nothing.
    """
    text = text.replace("\n", ". ")
    if text.strip() in _LETTERS:
        return text.strip()
    if text[:1] in _LETTERS and text[1:3] == ". ":
        return text[0]
    # The official script looks for "The answer is A." before "The answer is A": a later match with a full stop wins.
    sentence = re.search(_SENTENCE.pattern + r"\.", text) or _SENTENCE.search(text)
    return sentence.group(1) if sentence else None


def _is_right(answer: Answer, problem: dict[str, Any]) -> bool:
    letter = parse_letter(answer.text)
    return letter in _LETTERS[: len(problem["choices"])] and _LETTERS.index(letter) == problem["answer"]
