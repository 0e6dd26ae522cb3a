"""How many tokens conversations have, before any model has seen them.

With the teacher's processor they are counted, up to ``COUNTED`` conversations; the others follow from their characters
at the rate found on those. Without it all follow from their characters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as PillowImage

from teacher_cache.config import CacheConfig
from teacher_cache.data.conversations import IMAGE_TAG, Conversation, Image
from teacher_cache.data.images import image_tokens_of, load_image
from teacher_cache.errors import ConfigError, ConversationError, ImageError, TeacherError
from teacher_cache.models.chat import Chat
from teacher_cache.models.open_chat import open_chat, reads_text_alone

COUNTED = 20_000
MEASURED = 32
"""Images whose positions are counted; the others are taken to have as many on average."""
OPENING, AROUND = 160, 20
"""Characters that a template writes before everything, and around a turn: vicuna_v1's."""
CHARACTERS_PER_TOKEN = 4.2
"""English prose under LLaMA's vocabulary; LLaVA-Instruct's answers. Code and other languages have fewer."""


@dataclass(frozen=True)
class Lengths:
    """(M,) token counts of conversations: prompt (one placeholder an image), answers with their end tokens."""

    prompt: npt.NDArray[np.int64]
    answers: npt.NDArray[np.int64]
    counted: int
    """How many conversations were tokenised; the others are estimates."""


def conversation_lengths(
    conversations: Sequence[Conversation],
    chat: Chat | None,
    *,
    answer_factor: float = 1.0,
    answered: Mapping[str, int] | None = None,
    most_a_turn: int | None = None,
) -> Lengths:
    """Token counts of ``conversations``. Answers that the teacher will write anew are taken ``answer_factor`` times as
    long as the original ones, at most ``most_a_turn`` tokens a turn; ``answered`` (by sample_id) are known already.
    """
    characters = np.array([_characters(c) for c in conversations], np.float64).reshape(-1, 2)
    turns = np.array([len(c.questions) for c in conversations], np.int64)
    tokens = characters / CHARACTERS_PER_TOKEN
    chosen, counts = [], []
    for i in _chosen(len(conversations)):
        if chat is None:
            break
        try:
            counts.append(_count(conversations[i], chat))
            chosen.append(int(i))
        except ConversationError:  # it will be skipped, as a build does
            continue
    counted = np.array(counts, np.float64).reshape(-1, 2)
    if len(chosen):
        rate = counted.sum(0) / np.maximum(characters[chosen].sum(0), 1)
        tokens = characters * rate
    else:
        tokens[:, 1] += turns  # the end tokens
    tokens[chosen] = counted
    anew = np.array([c.regenerate for c in conversations], np.bool_)
    tokens[anew, 1] *= answer_factor
    if most_a_turn is not None:
        tokens[anew, 1] = np.minimum(tokens[anew, 1], (turns * most_a_turn)[anew])
    for i, conversation in enumerate(conversations):
        if answered and conversation.sample_id in answered:
            tokens[i, 1] = answered[conversation.sample_id]
    whole = np.maximum(np.rint(tokens), 1).astype(np.int64)
    return Lengths(whole[:, 0], whole[:, 1], len(chosen))


@dataclass(frozen=True)
class ImageLength:
    """What an image takes on average: ``tokens`` of a cache (runs, and text that the processor writes around them),
    ``runs`` among them, and ``positions`` in the model."""

    tokens: float = 0.0
    runs: float = 0.0
    positions: float = 0.0


def read_chat(config: CacheConfig) -> Chat | None:
    """How the teacher is shown conversations, or None where its processor is not there.

    Raises ``TemplateError``: the processor is there, its chat template cannot be used.
    """
    try:
        return open_chat(config.teacher)
    except TeacherError:
        return None


def image_length(config: CacheConfig, model: Any, chat: Chat | None, images: Sequence[Image]) -> ImageLength:
    """Counted on up to :data:`MEASURED` of ``images``, or on one of 640 × 480 where none can be read.

    Raises ``ConfigError``: the processor, which alone knows, is not there.
    """
    if reads_text_alone(model) or not images:
        return ImageLength()
    if chat is None:
        if model.model_type != "llava":
            raise ConfigError(
                f"teacher.model={config.teacher.model}: how many positions an image takes in a {model.model_type} "
                "model is known to its processor alone: put its processor's files beside config.json (weights are not "
                "needed)"
            )
        return ImageLength(1, 1, image_tokens_of(model))
    shown = []
    for image in images[:MEASURED]:
        try:
            shown.append(load_image(image, config.data.image_folder))
        except (ImageError, OSError):
            continue
    shown = shown or [PillowImage.new("RGB", (640, 480))]
    asked = Conversation("", (IMAGE_TAG,), ("",), (Image("", ""),))
    bare = len(chat.unexpanded(asked, (), ask=True)[0])
    samples = [chat.tokenized(asked, (), [picture], ask=True) for picture in shown]
    return ImageLength(
        *np.mean([(len(s.input_ids) - bare + 1, len(s.runs), s.runs[:, 0].sum()) for s in samples], 0).tolist()
    )


def _characters(conversation: Conversation) -> tuple[int, int]:
    prompt = OPENING + AROUND * len(conversation.questions) + sum(map(len, conversation.texts))
    return prompt + 4 * len(conversation.images), sum(map(len, conversation.answers))


def _count(conversation: Conversation, chat: Chat) -> tuple[int, int]:
    answers = [chat.original(answer) for answer in conversation.answers]
    ids, mask = chat.unexpanded(conversation, answers)
    return len(ids) - int(mask.sum()), int(mask.sum())


def _chosen(conversations: int) -> npt.NDArray[np.int64]:
    """All of them, or ``COUNTED`` evenly spread ones."""
    if conversations <= COUNTED:
        return np.arange(conversations)
    return np.linspace(0, conversations - 1, COUNTED).astype(np.int64)
