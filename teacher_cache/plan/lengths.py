"""How many tokens conversations have, before any model has seen them.

With the teacher's tokenizer they are counted, up to ``COUNTED`` conversations; the others follow from their characters
at the rate found on those. Without a tokenizer all follow from their characters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from teacher_cache.data.conversations import Conversation
from teacher_cache.data.tokenization import Template, tokenize_answer, tokenize_prompt

COUNTED = 20_000
CHARACTERS_PER_TOKEN = 4.2
"""English prose under LLaMA's vocabulary; LLaVA-Instruct's answers. Code and other languages have fewer."""


@dataclass(frozen=True)
class Lengths:
    """(M,) token counts of conversations: prompt (one placeholder for an image), answers with their end tokens."""

    prompt: npt.NDArray[np.int64]
    answers: npt.NDArray[np.int64]
    counted: int
    """How many conversations were tokenised; the others are estimates."""


def conversation_lengths(
    conversations: Sequence[Conversation],
    template: Template,
    tokenizer: Any | None,
    *,
    answer_factor: float = 1.0,
    answered: Mapping[str, int] | None = None,
    most_a_turn: int | None = None,
) -> Lengths:
    """Token counts of ``conversations``. Answers that the teacher will write anew are taken ``answer_factor`` times as
    long as the original ones, at most ``most_a_turn`` tokens a turn; ``answered`` (by sample_id) are known already.
    """
    characters = np.array([_characters(c, template) for c in conversations], np.float64).reshape(-1, 2)
    turns = np.array([len(c.questions) for c in conversations], np.int64)
    tokens = characters / CHARACTERS_PER_TOKEN
    chosen = _chosen(len(conversations)) if tokenizer is not None else np.zeros(0, np.int64)
    counted = np.array([_count(conversations[i], template, tokenizer) for i in chosen], np.float64).reshape(-1, 2)
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


def load_tokenizer(model: str, revision: str = "") -> Any | None:
    """The tokenizer of a model's folder or repository, or None when there is none; nothing else is loaded."""
    from teacher_cache.models.pretrained import ModelError, read_tokenizer

    folder = Path(model)
    if folder.is_dir() and not any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model")):
        return None
    try:
        return read_tokenizer("teacher.model", model, revision)
    except ModelError:
        return None


def _characters(conversation: Conversation, template: Template) -> tuple[int, int]:
    around = len(template.user) + len(template.assistant) + len(template.separator)
    turns = len(conversation.questions)
    prompt = len(template.first) + turns * around + sum(map(len, conversation.texts))
    return prompt + 4 * (conversation.image is not None), sum(map(len, conversation.answers))


def _count(conversation: Conversation, template: Template, tokenizer: Any) -> tuple[int, int]:
    prompt = sum(map(len, tokenize_prompt(conversation, template, tokenizer).segments))
    return prompt, sum(len(tokenize_answer(a, template, tokenizer)) for a in conversation.answers)


def _chosen(conversations: int) -> npt.NDArray[np.int64]:
    """All of them, or ``COUNTED`` evenly spread ones."""
    if conversations <= COUNTED:
        return np.arange(conversations)
    return np.linspace(0, conversations - 1, COUNTED).astype(np.int64)
