"""A student that answers in the teacher's place, and the teacher that scores what it said.

The pair is a :class:`~teachers.teacher.Teacher` itself, so nothing else of phase one knows about it. On-policy
data of this kind is what GKD (Agarwal et al., 2024) trains on; here it is made between two runs, not inside one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from teacher_cache.config import CacheConfig
from teacher_cache.data.vocabulary import compare
from teacher_cache.errors import TeacherError
from teacher_cache.models.chat import Chat
from teacher_cache.teachers.teacher import (
    Answer,
    AnswerRequest,
    SampleStates,
    Shown,
    Teacher,
    TeacherDescription,
    Then,
    Wanted,
)


@dataclass(frozen=True)
class AnsweringStudent:
    """``answers`` are the student's, everything else the teacher's."""

    teacher: Teacher
    student: Teacher
    one_pass: bool = False
    two_engines: bool = False

    @property
    def description(self) -> TeacherDescription:
        return self.teacher.description

    @property
    def tokenizer(self) -> Any:
        return self.teacher.tokenizer

    @property
    def chat(self) -> Chat:
        return self.teacher.chat

    @property
    def positions(self) -> int | None:
        limits = [limit for limit in (self.teacher.positions, self.student.positions) if limit is not None]
        return min(limits, default=None)

    def prove(self, requests: Sequence[AnswerRequest]) -> None:
        self.student.prove(requests)
        self.teacher.prove(requests)

    def answers(self, requests: Sequence[AnswerRequest], then: Then | None = None) -> Iterator[tuple[int, Answer]]:
        return self.student.answers(requests, then)

    def score(self, requests: Sequence[Shown], wanted: Wanted) -> Iterator[tuple[list[int], list[SampleStates]]]:
        return self.teacher.score(requests, wanted)

    def head(self) -> torch.Tensor:
        return self.teacher.head()

    def close(self) -> None:
        self.student.close()
        self.teacher.close()


def with_answerer(teacher: Teacher, config: CacheConfig) -> Teacher:
    """``teacher`` as it is, or behind the student that ``teacher.answerer`` names. The student runs with torch.

    Raises ``TeacherError``: the student has another tokenizer: its ids would mean other words to the teacher.
    """
    if not config.teacher.answerer:
        return teacher
    from teacher_cache.teachers.torch_teacher import TorchTeacher

    own = dataclasses.replace(config.teacher, model=config.teacher.answerer, revision="", answerer="", quantization="")
    student = TorchTeacher(own, config.generation, config.speed)
    if difference := _difference(teacher, student):
        student.close()
        raise TeacherError(
            f"teacher.answerer={config.teacher.answerer}: its tokenizer is not the teacher's, so the teacher cannot "
            f"score the ids it produces: {difference}. Use a student that was trained with the teacher's tokenizer"
        )
    return AnsweringStudent(teacher, student)


def _difference(teacher: Teacher, student: Teacher) -> str:
    """An id that only one of them has, or that means something else to the other; empty where there is none. Where
    their texts begin and end is the template's business."""
    ours, theirs = teacher.description.vocabulary, student.description.vocabulary
    found = compare(ours, theirs, "the student", begins=False)
    if found.never or found.foreign:
        return found.never or found.differences[0]
    more = compare(theirs, ours, "the teacher", begins=False).foreign
    return f"id {min(more)} is {theirs['added'][str(min(more))]!r} for the student alone" if more else ""


def answerer_facts(config: CacheConfig) -> dict[str, str]:
    """Who answers, for the manifest: nothing, or the student's name and the digest of its checkpoint."""
    name = config.teacher.answerer
    if not name:
        return {}
    from teacher_cache.models.checkpoint import checkpoint_digest

    shown = Path(name).name if Path(name).is_dir() else name
    return {"answerer": shown, "answerer_weights": checkpoint_digest(name)}
