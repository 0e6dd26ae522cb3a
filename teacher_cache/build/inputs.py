"""The usable part of some samples: conversations with prompts and images, and what was left out, with reasons."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from teacher_cache.build.context import Build
from teacher_cache.data.conversations import Conversation, Skipped
from teacher_cache.data.images import Picture, open_picture
from teacher_cache.data.tokenization import Ids, Prompt, TokenizedSample, assemble, tokenize_prompt
from teacher_cache.errors import ImageError
from teacher_cache.teachers.teacher import Teacher

KEPT_BYTES = 256 << 20
"""Of decoded images in a shard; those beyond it are decoded again when they are shown to the teacher. 512 photographs
of 640 × 480 take 600 MB, of 12 megapixels 25 GB."""


class _Room:
    """What is left for decoded images, over all loader threads."""

    def __init__(self, size: int) -> None:
        self._left, self._lock = size, threading.Lock()

    def settle(self, found: Picture | Skipped | None) -> Picture | Skipped | None:
        """``found``, with its decoded image let go of where there is no room for it."""
        if isinstance(found, Picture) and found.kept is not None:
            width, height = found.kept.size
            with self._lock:
                self._left -= 4 * width * height  # Pillow's RGB
                if self._left < 0:
                    self._left += 4 * width * height
                    found.kept = None
        return found


@dataclass(frozen=True)
class ReadSample:
    """A conversation as the teacher will see it."""

    conversation: Conversation
    prompt: Prompt
    picture: Picture | None

    @property
    def sample_id(self) -> str:
        return self.conversation.sample_id

    @property
    def image_id(self) -> str:
        """Empty without an image."""
        return self.conversation.image.image_id if self.conversation.image is not None else ""


@dataclass
class ShardInput:
    """The usable ``samples`` of a shard, and those that were left out."""

    samples: list[ReadSample] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    left_out: list[Conversation] = field(default_factory=list)
    """Conversations that were read but cannot be cached; their images may serve other shards."""

    @classmethod
    def load(cls, build: Build, chosen: Sequence[Conversation | Skipped]) -> ShardInput:
        shard, room, folder = cls(), _Room(KEPT_BYTES), build.config.data.image_folder
        with ThreadPoolExecutor(build.config.speed.loader_threads) as threads:
            images = list(threads.map(lambda c: room.settle(image_or_reason(c, folder)), chosen))
        for sample, image in zip(chosen, images, strict=True):
            if isinstance(sample, Skipped) or isinstance(image, Skipped):
                shard.skipped.append(sample if isinstance(sample, Skipped) else image)  # type: ignore[arg-type]
            else:
                prompt = tokenize_prompt(sample, build.template, build.teacher.tokenizer)
                shard.samples.append(ReadSample(sample, prompt, image))
        shard.skip(lambda sample: _unfit_prompt(build, sample.prompt))
        return shard

    def skip(self, reason_of: Callable[[ReadSample], str]) -> None:
        """Move the samples that have a reason to ``skipped``."""
        samples, self.samples = self.samples, []
        for sample in samples:
            if reason := reason_of(sample):
                self.skipped.append(Skipped(sample.sample_id, reason))
                self.left_out.append(sample.conversation)
            else:
                self.samples.append(sample)


def image_or_reason(sample: Conversation | Skipped, folder: str) -> Picture | Skipped | None:
    """The sample's image, or why it cannot be read; a folder that does not answer is an error, not a reason."""
    if isinstance(sample, Skipped) or sample.image is None:
        return None
    try:
        return open_picture(sample.image, folder)
    except ImageError as error:
        return Skipped(sample.sample_id, str(error))


def _unfit_prompt(build: Build, prompt: Prompt) -> str:
    """Why a conversation cannot be answered, or an empty text."""
    length, (limit, what) = sum(map(build.length, prompt.segments)), build.limit
    return f"questions alone take {length} tokens, {what}: {length - limit + 1} over" if length >= limit else ""


def tokenized_sample(teacher: Teacher, prompt: Prompt, answers: Sequence[Ids]) -> TokenizedSample:
    """Prompt and answers as the teacher reads them, each image a run."""
    description = teacher.description
    return assemble(prompt, answers).with_runs(description.image_token, description.image_tokens)


def unfit_sample(build: Build, sample: TokenizedSample) -> str:
    """Why an answered conversation cannot be cached, or an empty text."""
    length, (limit, what) = build.length(sample.input_ids), build.limit
    if length > limit:
        return f"{length} tokens with answers, {what}: {length - limit} over"
    if np.count_nonzero(sample.input_ids == build.teacher.description.image_token) > 1:
        return "the text of a question or an answer holds the image token"
    return ""
