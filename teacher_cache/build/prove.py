"""Whether an opened teacher is what a cache takes it for, tried on prompts of the data before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from teacher_cache.build.inputs import image_or_reason
from teacher_cache.config import CacheConfig
from teacher_cache.data.conversations import Skipped
from teacher_cache.data.spool import Sample
from teacher_cache.data.tokenization import template_by_name, tokenize_prompt
from teacher_cache.teachers.teacher import AnswerRequest, Teacher

LOOKED_AT = 512
"""Samples among which a prompt with an image, and one without, are looked for."""


def prove(config: CacheConfig, teacher: Teacher, samples: Sequence[Sample]) -> None:
    """Try the teacher on the first usable prompt with an image and on the first without: ``Teacher.prove``.

    Raises
    ------
    TeacherError
        What it would be scored as is not what it says.
    """
    template = template_by_name(config.teacher.template)
    for sees in (True, False):
        for sample in islice(samples, LOOKED_AT):
            if isinstance(sample, Skipped) or (sample.image is not None) != sees:
                continue
            picture = image_or_reason(sample, config.data.image_folder)
            if isinstance(picture, Skipped):
                continue
            ids = tokenize_prompt(sample, template, teacher.tokenizer).segments[0]
            if teacher.prove(AnswerRequest(sample.sample_id, 0, ids, picture, 0)):
                break
