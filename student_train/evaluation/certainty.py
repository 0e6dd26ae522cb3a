"""What a model's probabilities are worth where the truth is known: nats of the true answer, calibration error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from student_train.evaluation.answers import Student
from student_train.evaluation.metrics import plain_answer
from student_train.evaluation.questions import asked_images
from student_train.evaluation.rows import answer_rows, in_batches
from student_train.feed.plain import PlainSource
from teacher_cache.data.conversations import Conversation
from teacher_cache.errors import EvaluationError

Floats = npt.NDArray[np.float64]
BINS = 10


@dataclass(frozen=True)
class Certainty:
    """Over M questions. nll: mean of -log q(true answer), nats an answer, its end token included · ece: expected
    calibration error of the model's own answers, a fraction (Guo et al., ICML 2017, arXiv 1706.04599, equation 3)."""

    nll: float
    ece: float

    def as_facts(self) -> dict[str, float]:
        """For tables."""
        return {"nll": self.nll, "ece": self.ece}


def certainty(
    student: Student,
    questions: Sequence[Conversation],
    answers: Sequence[str],
    image_folder: str | Path,
    batch: int = 64,
) -> Certainty:
    """How sure the student is of the truth (each question's first answer) and of what it said itself (``answers``).

    An answer is right as `vqa_accuracy` counts it, and as certain as the product of its tokens' probabilities.
    """
    truths = [question.answers[0] for question in questions]
    of_truth = answer_logprobs(student, questions, truths, image_folder, batch)
    of_own = answer_logprobs(student, questions, answers, image_folder, batch)
    right = [plain_answer(said) == plain_answer(truth) for said, truth in zip(answers, truths, strict=True)]
    return Certainty(float(-of_truth.mean()), calibration_error(np.exp(of_own), right))


def calibration_error(confidence: npt.ArrayLike, right: Sequence[bool], bins: int = BINS) -> float:
    """Σ over ``bins`` equal bins of confidence of |share that is right - mean confidence|, weighted by their size.

    ``confidence`` (M,) in [0, 1], ``right`` (M,). EvaluationError: not as many of both, or none.
    """
    sure, hits = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    if sure.shape != hits.shape or not len(sure):
        raise EvaluationError(f"calibration: {sure.shape} confidences of {hits.shape} answers; expected one of each")
    of = np.minimum((sure * bins).astype(np.int64), bins - 1)  # (M,) which bin
    gaps = np.bincount(of, hits - sure, minlength=bins)  # (bins,) sums of right - confidence
    return float(np.abs(gaps).sum() / len(sure))


def answer_logprobs(
    student: Student,
    questions: Sequence[Conversation],
    answers: Sequence[str],
    image_folder: str | Path,
    batch: int = 64,
) -> Floats:
    """(M,) log-probability, in nats, of each of ``answers`` as the whole answer to its first question.

    Raises ``EvaluationError``: it cannot be written so.
    """
    asked = [
        replace(question, questions=question.questions[:1], answers=(answer,), images=asked_images(question))
        for question, answer in zip(questions, answers, strict=True)
    ]
    source = PlainSource(asked, student.reader.chat, str(image_folder))
    for sample in source.skipped:
        raise EvaluationError(f"{sample.sample_id}: the answer cannot be measured: {sample.reason}. Take it out")
    batches, sums = in_batches(range(len(asked)), batch), np.zeros(len(asked))
    for samples, (made, logits, _) in zip(batches, answer_rows(student, source, batches), strict=True):
        logprobs = logits.log_softmax(-1).gather(-1, made.answer_ids[:, None]).squeeze(-1)  # (R,)
        owner = made.row_sample.cpu().numpy()
        sums[list(samples)] = np.bincount(owner, logprobs.double().cpu().numpy(), len(samples))
    return sums
