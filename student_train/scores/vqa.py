"""Exact-match accuracy of short answers, whole and per question type.

An answer is right when it equals the reference after stripping spaces, lower-casing and removing ASCII punctuation.
That is `exact_match` of lmms-eval with `ignore_case` and `ignore_punctuation` (`lmms_eval/api/metrics.py`, as its GQA
task uses it), so the two give the same figure on the same answers.
"""

import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from student_train.scores.answers import accuracy_by

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class VqaAccuracy:
    """`overall` is over questions, not over types. `questions` counts each type."""

    overall: float
    per_type: dict[str, float]
    questions: dict[str, int]


def is_exact_match(prediction: str, reference: str) -> bool:
    """Equal but for case, ASCII punctuation and spaces around the answer."""
    return _plain(prediction) == _plain(reference)


def vqa_accuracy(predictions: Sequence[str], references: Sequence[str], question_types: Sequence[str]) -> VqaAccuracy:
    """Exact-match accuracy of M answers, overall and for each of their types.

    ValueError: the three sequences differ in length, or are empty.
    """
    check_lengths(predictions=predictions, references=references, question_types=question_types)
    hits = [is_exact_match(*pair) for pair in zip(predictions, references, strict=True)]
    return VqaAccuracy(
        overall=sum(hits) / len(hits),
        per_type=accuracy_by(zip(question_types, hits, strict=True)),
        questions=dict(sorted(Counter(question_types).items())),
    )


def check_lengths(**sequences: Sequence[object]) -> None:
    """ValueError where sequences that go together differ in length, or hold nothing."""
    lengths = {name: len(values) for name, values in sequences.items()}
    if len(set(lengths.values())) != 1 or not next(iter(lengths.values())):
        found = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"scores: {found}; expected as many of each, and at least one. Pass one of each a question.")


def _plain(text: str) -> str:
    return text.strip().lower().translate(_NO_PUNCTUATION)
