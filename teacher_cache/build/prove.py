"""Whether an opened teacher is what a cache takes it for, tried on samples of the data before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice

from teacher_cache.build.inputs import ReadSample, pictures_or_reason
from teacher_cache.config import CacheConfig
from teacher_cache.data.conversations import Conversation, Skipped
from teacher_cache.data.images import Picture
from teacher_cache.data.spool import Sample
from teacher_cache.errors import ConversationError
from teacher_cache.models.probe import TOKENS
from teacher_cache.teachers.teacher import AnswerRequest, Teacher

LOOKED_AT = 512
"""Samples among which one of each kind is looked for."""
KINDS: tuple[Callable[[Conversation], bool], ...] = (
    lambda sample: len(sample.images) == 1,
    lambda sample: not sample.images,
    lambda sample: len(sample.images) > 1,
    lambda sample: bool(sample.system),
)


def prove(config: CacheConfig, teacher: Teacher, samples: Sequence[Sample]) -> None:
    """Try the teacher on the first usable sample of each kind: ``Chat.check``, then ``Teacher.prove`` on all of them.

    Raises
    ------
    TemplateError
        What it would read is not what its own processor and template write.
    TeacherError
        What it would be scored as is not what it says.
    """
    requests: dict[str, AnswerRequest] = {}
    for of_kind in KINDS:
        compared = asked = False
        for sample in islice(samples, LOOKED_AT):
            if isinstance(sample, Skipped) or not of_kind(sample):
                continue
            pictures = pictures_or_reason(sample, config.data.image_folder)
            if isinstance(pictures, Skipped):
                continue
            compared = compared or _compared(teacher, sample, pictures)
            if not asked and (request := _request(teacher, sample, pictures)) is not None:
                requests[sample.sample_id], asked = request, True
            if compared and asked:
                break
    teacher.prove(list(requests.values()))


def _compared(teacher: Teacher, sample: Conversation, pictures: tuple[Picture, ...]) -> bool:
    with suppress(ConversationError):
        return teacher.chat.check(sample, [picture.decoded() for picture in pictures])
    return False


def _request(teacher: Teacher, sample: Conversation, pictures: tuple[Picture, ...]) -> AnswerRequest | None:
    """Its first question; None where it cannot be shown, or no positions are left for an answer."""
    with suppress(ConversationError):
        shown = ReadSample.read(teacher.chat, sample, pictures, original=False).shown((), ask=True)
        if teacher.positions is None or shown.sample.length + TOKENS <= teacher.positions:
            return AnswerRequest(shown, 0)
    return None
