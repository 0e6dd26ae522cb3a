"""What answers are worth whose truth is known: exact match, yes/no, hallucinated objects. None of this needs torch.

They are what the tiny world and ``student-train evaluate`` need, as fractions between 0 and 1. Official benchmarks are
lmms-eval's alone (``student-train lmms-eval``), with its images, prompts and scorers.
"""

import string
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass

from teacher_cache.errors import EvaluationError

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class VqaAccuracy:
    """`overall` is over questions, not over types. `questions` counts each type."""

    overall: float
    per_type: dict[str, float]
    questions: dict[str, int]


def vqa_accuracy(predictions: Sequence[str], references: Sequence[str], question_types: Sequence[str]) -> VqaAccuracy:
    """Exact-match accuracy of M answers, overall and for each of their types, in alphabetical order.

    Case, ASCII punctuation and spaces around an answer do not count: `exact_match` of lmms-eval with `ignore_case` and
    `ignore_punctuation` (`lmms_eval/api/metrics.py`, as its GQA task uses it), so the two give the same figure on the
    same answers. ValueError: the three sequences differ in length, or are empty.
    """
    _check_lengths(predictions=predictions, references=references, question_types=question_types)
    hits = [
        plain_answer(prediction) == plain_answer(reference)
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    asked = Counter(question_types)
    right = Counter(kind for kind, hit in zip(question_types, hits, strict=True) if hit)
    return VqaAccuracy(
        overall=sum(hits) / len(hits),
        per_type={kind: right[kind] / asked[kind] for kind in sorted(asked)},
        questions=dict(sorted(asked.items())),
    )


@dataclass(frozen=True)
class YesNo:
    """Counts with "yes" as the positive class, and what follows from them."""

    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int

    @property
    def questions(self) -> int:
        return self.true_positives + self.false_positives + self.true_negatives + self.false_negatives

    @property
    def accuracy(self) -> float:
        return _ratio(self.true_positives + self.true_negatives, self.questions)

    @property
    def precision(self) -> float:
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def f1(self) -> float:
        return _ratio(2 * self.precision * self.recall, self.precision + self.recall)

    @property
    def yes_ratio(self) -> float:
        """Share of questions answered with yes: far from the share of yes labels, the model has a bias."""
        return _ratio(self.true_positives + self.false_positives, self.questions)

    def as_dict(self) -> dict[str, float]:
        """The figures under the names that POPE's script prints."""
        return {
            "TP": self.true_positives,
            "FP": self.false_positives,
            "TN": self.true_negatives,
            "FN": self.false_negatives,
            "Accuracy": self.accuracy,
            "Precision": self.precision,
            "Recall": self.recall,
            "F1 score": self.f1,
            "Yes ratio": self.yes_ratio,
        }


def says_yes(text: str) -> bool:
    """How POPE reads an answer: the first sentence, and yes unless one of its words is No, no or not.

    So "nope", "NO" and an empty answer count as yes: its script splits at single spaces and knows three words.
    Source: Li et al., EMNLP 2023 (arXiv 2305.10355), as LLaVA packages it in `llava/eval/eval_pope.py`.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def yes_no(answers: Sequence[str], labels: Sequence[str]) -> YesNo:
    """Counts over M free-text answers and their labels ("yes" or "no").

    ValueError: another label, or as many answers as labels are not there.
    """
    _check_lengths(answers=answers, labels=labels)
    wrong = sorted(set(labels) - {"yes", "no"})
    if wrong:
        raise EvaluationError(
            f"labels: {wrong[0]!r} at {list(labels).index(wrong[0])}; expected 'yes' or 'no'. Convert."
        )
    pairs = Counter((says_yes(answer), label == "yes") for answer, label in zip(answers, labels, strict=True))
    return YesNo(
        true_positives=pairs[True, True],
        false_positives=pairs[True, False],
        true_negatives=pairs[False, False],
        false_negatives=pairs[False, True],
    )


@dataclass(frozen=True)
class Hallucination:
    """Over all descriptions together (one of many objects weighs more), 0.0 where there is nothing to count.

    `hallucinated`: share of the stated objects that are not there · `missed`: share of the true ones not stated.
    """

    hallucinated: float
    missed: float


def hallucination(stated: Iterable[Collection[Hashable]], true: Iterable[Collection[Hashable]]) -> Hallucination:
    """What M descriptions state against what their images hold; an object stated twice counts twice.

    Source: CHAIR_i of Rohrbach et al., EMNLP 2018 (arXiv 1809.02156). ValueError: not as many statements as truths.
    """
    pairs = list(zip(stated, true, strict=True))
    invented = sum(thing not in there for said, there in pairs for thing in said)
    missed = sum(thing not in said for said, there in pairs for thing in there)
    return Hallucination(
        hallucinated=_ratio(invented, sum(len(said) for said, _ in pairs)),
        missed=_ratio(missed, sum(len(there) for _, there in pairs)),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


YES_NO = ("yes", "no")


def plain_answer(text: str) -> str:
    """As answers are compared: without case, ASCII punctuation and spaces around ("Yes. " is "yes")."""
    return text.strip().lower().translate(_NO_PUNCTUATION)


def _check_lengths(**sequences: Sequence[object]) -> None:
    lengths = {name: len(values) for name, values in sequences.items()}
    if len(set(lengths.values())) != 1 or not next(iter(lengths.values())):
        found = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise EvaluationError(f"metrics: {found}; expected as many of each, and at least one. Pass one a question.")
