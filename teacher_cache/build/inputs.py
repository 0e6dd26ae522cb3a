"""The usable part of one shard's input: conversations with prompts and images, and what was left out, with reasons."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from teacher_cache.config import CacheConfig
from teacher_cache.data.conversations import Conversation, Skipped
from teacher_cache.data.images import Picture, open_picture
from teacher_cache.data.rows import expanded_length
from teacher_cache.data.tokenization import Prompt, TokenizedSample, template_by_name, tokenize_prompt
from teacher_cache.errors import ImageError
from teacher_cache.teachers.teacher import Teacher

Samples = Sequence[Conversation | Skipped]
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


@dataclass
class ShardInput:
    """One shard's usable conversations with their prompts and images, and the samples left out with the reason."""

    conversations: list[Conversation]
    prompts: list[Prompt]
    images: list[Picture | None]
    skipped: list[Skipped]
    left_out: list[Conversation] = field(default_factory=list)
    """Conversations that were read but cannot be cached; their images may serve other shards."""

    @classmethod
    def load(cls, config: CacheConfig, teacher: Teacher, chosen: Samples) -> ShardInput:
        shard = cls([], [], [], [])
        template = template_by_name(config.teacher.template)
        room = _Room(KEPT_BYTES)
        with ThreadPoolExecutor(config.speed.loader_threads) as threads:
            images = list(threads.map(lambda c: room.settle(image_or_reason(c, config.data.image_folder)), chosen))
        for sample, image in zip(chosen, images, strict=True):
            if isinstance(sample, Skipped) or isinstance(image, Skipped):
                shard.skipped.append(sample if isinstance(sample, Skipped) else image)  # type: ignore[arg-type]
                continue
            prompt = tokenize_prompt(sample, template, teacher.tokenizer)
            shard.conversations.append(sample)
            shard.prompts.append(prompt)
            shard.images.append(image)
        shard.skip(lambda i: _unfit_prompt(config, teacher, shard.prompts[i]))
        return shard

    def skip(self, reason_of: Any) -> list[int]:
        """Move samples with a reason to ``skipped``; returns the kept places."""
        reasons = [reason_of(i) for i in range(len(self.conversations))]
        self.skipped += [Skipped(c.sample_id, r) for c, r in zip(self.conversations, reasons, strict=True) if r]
        self.left_out += [c for c, r in zip(self.conversations, reasons, strict=True) if r]
        kept = [i for i, reason in enumerate(reasons) if not reason]
        self.conversations = [self.conversations[i] for i in kept]
        self.prompts = [self.prompts[i] for i in kept]
        self.images = [self.images[i] for i in kept]
        return kept


def image_or_reason(sample: Conversation | Skipped, folder: str) -> Picture | Skipped | None:
    """The sample's image, or why it cannot be read; a folder that does not answer is an error, not a reason."""
    if isinstance(sample, Skipped) or sample.image is None:
        return None
    try:
        return open_picture(sample.image, folder)
    except ImageError as error:
        return Skipped(sample.sample_id, str(error))


def _unfit_prompt(config: CacheConfig, teacher: Teacher, prompt: Prompt) -> str:
    """Why a conversation cannot be answered, or an empty text."""
    length = sum(_expanded_length(teacher, np.asarray(segment)) for segment in prompt.segments)
    limit, what = length_limit(config, teacher)
    if length >= limit:
        return f"questions alone take {length} tokens, {what}: {length - limit + 1} over"
    return ""


def length_limit(config: CacheConfig, teacher: Teacher) -> tuple[int, str]:
    """Tokens of the longest conversation that can be cached (image expanded), and what sets that limit."""
    limit, positions = config.teacher.max_length, teacher.positions
    if positions is not None and positions < limit:
        return positions, f"the model has {positions} positions"
    return limit, f"teacher.max_length is {limit}"


def unfit_sample(config: CacheConfig, teacher: Teacher, sample: TokenizedSample) -> str:
    """Why an answered conversation cannot be cached, or an empty text."""
    length = _expanded_length(teacher, sample.input_ids)
    limit, what = length_limit(config, teacher)
    if length > limit:
        return f"{length} tokens with answers, {what}: {length - limit} over"
    if np.count_nonzero(sample.input_ids == teacher.description.image_token) > 1:
        return "the text of a question or an answer holds the image token"
    return ""


def _expanded_length(teacher: Teacher, ids: np.ndarray[Any, Any]) -> int:
    images = int(np.count_nonzero(ids == teacher.description.image_token))
    return int(expanded_length(len(ids), images, images * teacher.description.shape.image_tokens))
