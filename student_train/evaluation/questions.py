"""Questions with known answers, by the reader of the training data, and the template in which a student is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from student_train.students.chat_reader import make_chat
from teacher_cache.config import DataConfig
from teacher_cache.data.conversations import IMAGE_TAG, Conversation, Image, Skipped
from teacher_cache.data.sample_reader import read_conversations
from teacher_cache.errors import ConfigError, DataError, TemplateError
from teacher_cache.models.chat import Chat


def read_questions(data: str | Path) -> list[Conversation]:
    """Every sample of a LLaVA file: its first question is asked, its first answer is the reference.

    Raises ``DataError``: a sample cannot be asked: an accuracy over fewer questions than the file has would be another
    one.
    """
    samples = list(read_conversations(DataConfig(path=str(data), duplicate_ids="number")))
    skipped = [s for s in samples if isinstance(s, Skipped)]
    if skipped:
        raise DataError(
            f"{data}: {len(skipped):,} of {len(samples):,} samples cannot be asked (first: {skipped[0].sample_id}, "
            f"{skipped[0].reason}). Take them out"
        )
    return [s for s in samples if isinstance(s, Conversation)]


def asked_images(question: Conversation) -> tuple[Image, ...]:
    """Those of its first question."""
    return question.images[: question.questions[0].count(IMAGE_TAG)]


def own_chat(model: Any, processor: Any, template: str = "") -> Chat:
    """How a student is asked: as its folder's chat template has it, or, where that cannot be used, as ``template`` has.

    Raises ``ConfigError``: ``template`` writes conversations in another way than the folder's, in which the student was
    trained. ``TemplateError``: none can be used.
    """
    try:
        own = make_chat(model, processor)
    except TemplateError as error:
        if template:
            return make_chat(model, processor, template)
        raise TemplateError(f"{error} (evaluate --chat-template)") from error
    if template and _written(make_chat(model, processor, template)) != _written(own):
        raise ConfigError(
            f"chat_template={template}: the student's own chat template writes conversations in another way, in which "
            "it was trained. Leave it out"
        )
    return own


def _written(chat: Chat) -> tuple[int, ...]:
    image = f"{IMAGE_TAG}\n" if chat.image_token >= 0 else ""
    asked = Conversation("", (f"{image}What is it?", "And here?"), ("A cat.", ""), ())
    return chat.unexpanded(asked, [chat.original("A cat.")], ask=True)[0]
