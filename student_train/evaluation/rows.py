"""A student's states in the answer rows of a source, by the batches and the forward pass of its training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from student_train.evaluation.answers import Student
from student_train.feed.batch import StudentBatch
from student_train.feed.loader import MicroBatches
from student_train.feed.raw import Source
from student_train.losses.targets import RowTargets, TeacherSide
from student_train.training.objective import DistilledStudent
from teacher_cache.data.logit_rule import LogitRule


@torch.inference_mode()
def answer_rows(
    student: Student, source: Source, batches: Sequence[Sequence[int]], teacher: TeacherSide | None = None
) -> Iterator[tuple[StudentBatch, Tensor, RowTargets]]:
    """For each of the ``batches`` of sample numbers: what was read, the student's logits (R, V) in float32, and what
    its ``teacher`` has in those rows."""
    image_tokens = student.reader.image_tokens
    distilled = DistilledStudent(student.model, [], [teacher], head_rows=0, image_tokens=image_tokens)
    read = MicroBatches([source], student.reader, features=None, pixel_cache=0)
    head, rule = student.model.get_output_embeddings(), LogitRule.of(student.model.config)
    for samples in batches:
        made = read.batch(samples).to(student.model.device)
        states, targets = distilled.rows(made, 0)  # (R, d)
        yield made, rule.apply(head(states).float()), targets


def in_batches(samples: Sequence[int], batch: int) -> list[Sequence[int]]:
    """``batch`` of them at a time, in order."""
    return [samples[start : start + batch] for start in range(0, len(samples), batch)]
