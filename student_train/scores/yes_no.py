"""Yes/no questions: what POPE counts.

Source: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023 (arXiv 2305.10355);
official script as LLaVA packages it, `llava/eval/eval_pope.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from student_train.scores.answers import ratio
from student_train.scores.vqa import check_lengths


@dataclass(frozen=True)
class YesNoScores:
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
        return ratio(self.true_positives + self.true_negatives, self.questions)

    @property
    def precision(self) -> float:
        return ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        return ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def f1(self) -> float:
        return ratio(2 * self.precision * self.recall, self.precision + self.recall)

    @property
    def yes_ratio(self) -> float:
        """Share of questions answered with yes: far from the share of yes labels, the model has a bias."""
        return ratio(self.true_positives + self.false_positives, self.questions)

    def as_dict(self) -> dict[str, float]:
        """The figures under the names that `eval_pope.py` prints."""
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

    So "nope", "NO" and an empty answer count as yes: the official script splits at single spaces and knows three words.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def yes_no_scores(answers: Sequence[str], labels: Sequence[str]) -> YesNoScores:
    """Counts over M free-text answers and their labels ("yes" or "no").

    ValueError: another label, or as many answers as labels are not there.
    """
    check_lengths(answers=answers, labels=labels)
    wrong = sorted(set(labels) - {"yes", "no"})
    if wrong:
        raise ValueError(f"labels: {wrong[0]!r} at {list(labels).index(wrong[0])}; expected 'yes' or 'no'. Convert it.")
    pairs = [(says_yes(answer), label == "yes") for answer, label in zip(answers, labels, strict=True)]
    return YesNoScores(
        true_positives=pairs.count((True, True)),
        false_positives=pairs.count((True, False)),
        true_negatives=pairs.count((False, False)),
        false_negatives=pairs.count((False, True)),
    )
