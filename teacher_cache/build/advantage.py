"""Visual advantage: how much likelier its image makes each answer token (Li et al., 2026, arXiv:2605.21924).

advantage_r = log p(token r | question, image, answer before r) − log p(the same without the image's details), in nats.

The teacher scores the same answer a second time. From the paper: the definition, with and without access to fine visual
detail. How it is taken away is ours: ``blurred`` leaves :data:`DETAIL` pixels of the longer side, in an image of the
same size, so that every position stays; ``without`` leaves the image out of the conversation. A text-only sample has
advantage 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL.Image import Image, Resampling

from teacher_cache.build.context import Build
from teacher_cache.build.inputs import ReadSample
from teacher_cache.build.signals import finite_arrays, finite_states
from teacher_cache.data.images import Picture
from teacher_cache.errors import ConversationError, TeacherError
from teacher_cache.store.records import Array
from teacher_cache.teachers.teacher import Shown, Wanted

DETAIL = 8
"""Pixels of the longer side that a blurred image keeps: colours and a rough layout."""


def advantages(
    build: Build, samples: Sequence[ReadSample], shown: Sequence[Shown], seen: Sequence[Array]
) -> list[Array | None]:
    """(R,) float16 of each sample; ``seen``: log p(token r) with the image. None where a number is not finite."""
    found: list[Array | None] = [np.zeros(len(logprobs), np.float16) for logprobs in seen]
    places = [place for place, whole in enumerate(shown) if whole.sees]
    requests = [_blind(samples[place], shown[place], build.config.signals.advantage) for place in places]
    for batch, states in build.teacher.score(requests, Wanted()) if requests else ():
        unseen = build.extractor.answer_logprobs([requests[i].sample for i in batch], states)
        for i, state, logprobs in zip(batch, states, unseen, strict=True):
            with np.errstate(over="ignore", invalid="ignore"):
                difference = (seen[places[i]] - logprobs).astype(np.float16)
            usable = finite_states(state) and finite_arrays({"advantage": difference})
            found[places[i]] = difference if usable else None
    return found


def _blind(sample: ReadSample, shown: Shown, how: str) -> Shown:
    """The same answers behind the same questions, without the image or its details."""
    if how == "blurred":
        pictures = (Blurred(picture.image, picture.folder, picture.kept) for picture in sample.pictures)
        return dataclasses.replace(shown, images=tuple(pictures))
    plain = dataclasses.replace(sample.conversation, questions=sample.conversation.texts, images=())
    try:
        return ReadSample.read(sample.chat, plain, (), original=False).shown(shown.answers, shown.ask)
    except ConversationError as error:
        raise TeacherError(
            f"signals.advantage=without: sample {sample.sample_id} cannot be shown without its image: {error}. Set "
            "signals.advantage=blurred"
        ) from error


class Blurred(Picture):
    """Decoded when it is shown, as its picture is."""

    def decoded(self) -> Image:
        return blurred(super().decoded())


def blurred(image: Image) -> Image:
    """Of the same size, with the details of one whose longer side has :data:`DETAIL` pixels."""
    longest = max(image.size)
    width, height = (max(1, round(DETAIL * side / longest)) for side in image.size)
    return image.resize((width, height), Resampling.BOX).resize(image.size, Resampling.BILINEAR)
