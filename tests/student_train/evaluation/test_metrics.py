"""The figures of the tiny world and of ``student-train evaluate``, on cases worked by hand from their rules."""

import pytest

from student_train.evaluation.metrics import hallucination, says_yes, vqa_accuracy, yes_no
from teacher_cache.errors import EvaluationError


def test_vqa_accuracy_ignores_case_punctuation_and_surrounding_spaces():
    found = vqa_accuracy([" Red.", "2", "left", ""], ["red", "3", "left", "yes"], ["color", "count", "where", "exist"])
    assert found.overall == 0.5
    assert found.per_type == {"color": 1.0, "count": 0.0, "exist": 0.0, "where": 1.0}


def test_vqa_accuracy_is_over_questions_not_over_types():
    found = vqa_accuracy(["a", "a", "a", "b"], ["a", "a", "a", "a"], ["x", "x", "x", "y"])
    assert (found.overall, found.per_type, found.questions) == (0.75, {"x": 1.0, "y": 0.0}, {"x": 3, "y": 1})


def test_sequences_of_different_length_are_refused():
    with pytest.raises(EvaluationError, match="2 predictions, 1 references, 1 question_types; expected as many"):
        vqa_accuracy(["a", "b"], ["a"], ["x"])
    with pytest.raises(EvaluationError, match="0 answers, 0 labels; expected as many of each, and at least one"):
        yes_no([], [])


def test_yes_no_by_hand():
    found = yes_no(["yes", "Yes, it is", "no", "No.", "yes"], ["yes", "no", "no", "yes", "yes"])
    assert (found.true_positives, found.false_positives) == (2, 1)
    assert (found.true_negatives, found.false_negatives) == (1, 1)
    assert (found.accuracy, found.yes_ratio) == (0.6, 0.6)
    assert found.precision == found.recall == pytest.approx(2 / 3)
    assert found.f1 == pytest.approx(2 / 3)


def test_a_model_that_never_says_yes_scores_zero_and_does_not_divide_by_zero():
    found = yes_no(["no", "no"], ["yes", "no"])
    assert (found.precision, found.recall, found.f1, found.yes_ratio) == (0.0, 0.0, 0.0, 0.0)


def test_other_labels_are_refused():
    with pytest.raises(EvaluationError, match="'maybe' at 1; expected 'yes' or 'no'"):
        yes_no(["yes", "yes"], ["no", "maybe"])


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("No, there is no car.", False),
        ("There is not any.", False),
        ("Yes. There is no doubt", True),  # only the first sentence counts
        ("nope", True),  # three words are known: No, no, not
        ("NO", True),
        ("", True),
        ("it is not,", False),  # commas go first
        ("no\nwell", True),  # words are split at spaces, not at line ends
    ],
)
def test_pope_reads_yes_and_no_as_published(text, yes):
    assert says_yes(text) is yes


def test_hallucinated_and_missed_objects_by_hand():
    stated = [["cat", "dog", "cat"], ["cup"], []]
    true = [["dog"], ["cup", "pen"], ["sofa"]]
    found = hallucination(stated, true)
    assert found.hallucinated == 0.5  # of cat, dog, cat, cup: the cat, each time that it is stated
    assert found.missed == 0.5  # of dog, cup, pen, sofa: the pen and the sofa


def test_saying_nothing_hallucinates_nothing_and_misses_all():
    found = hallucination([[]], [["cat"]])
    assert (found.hallucinated, found.missed) == (0.0, 1.0)
    assert hallucination([["cat"]], [[]]).missed == 0.0


def test_descriptions_without_their_truth_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        hallucination([["cat"], ["dog"]], [["cat"]])
