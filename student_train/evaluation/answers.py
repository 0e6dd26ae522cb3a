"""A student's answers to questions, by the generator with which teachers answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from student_train.evaluation.questions import asked_images, own_chat, read_questions
from student_train.students.chat_reader import ChatReader, chat_reader
from student_train.students.student import read_own_processor
from teacher_cache.data.conversations import Conversation
from teacher_cache.data.images import load_image
from teacher_cache.errors import ConfigError, ConversationError, EvaluationError
from teacher_cache.models.collate import Fields
from teacher_cache.models.generation import Decoding, generate
from teacher_cache.models.model_config import position_limit
from teacher_cache.models.parts import media_tokens
from teacher_cache.models.pretrained import load_model


@dataclass(frozen=True)
class Student:
    """A student folder, loaded to be looked at: it reads as whoever loads it would show it."""

    model: PreTrainedModel
    processor: Any
    reader: ChatReader

    @classmethod
    def load(cls, folder: str | Path, dtype: str = "float32", device: str = "cpu", chat_template: str = "") -> Student:
        """``chat_template``: of a folder that does not say how it is asked; raises as ``questions.own_chat``."""
        model = load_model("student", str(folder), dtype=getattr(torch, dtype)).to(device).eval()
        processor = read_own_processor("student", str(folder), model)
        return cls(model, processor, chat_reader(model, processor, own_chat(model, processor, chat_template)))


def answer_questions(
    student: Student,
    data: str | Path,
    image_folder: str | Path,
    *,
    max_new_tokens: int = 64,
    batch: int = 64,
) -> list[str]:
    """Greedy answers to the first question of every sample of a LLaVA file, in order.

    Raises ``ConfigError``: the student has too few positions. ``EvaluationError``: it cannot be asked one of them, or
    its logits are not finite.
    """
    conversations = read_questions(data)
    answers: dict[int, str] = {}
    for has_image in (True, False):  # the vision tower runs on full batches
        group = [i for i, asked in enumerate(conversations) if bool(asked_images(asked)) == has_image]
        for start in range(0, len(group), batch):
            places = group[start : start + batch]
            asked = [conversations[i] for i in places]
            given = _answer(student, asked, str(image_folder), max_new_tokens)
            answers.update(zip(places, given, strict=True))
    return [answers[i] for i in range(len(conversations))]


def _answer(student: Student, asked: Sequence[Conversation], image_folder: str, most: int) -> list[str]:
    """The answers to one batch of first questions, all with an image or all without."""
    model, reader, tokenizer = student.model, student.reader, student.reader.tokenizer
    prompts = [_fields(reader, question, image_folder) for question in asked]
    _check_positions(max(len(prompt["input_ids"]) for prompt in prompts), most, position_limit(model.config))
    never = (*media_tokens(model.config), *range(len(tokenizer), model.get_output_embeddings().out_features))
    given = generate(model, prompts, Decoding(reader.chat.end, reader.pad, most, never))
    for question, ids in zip(asked, given, strict=True):
        if ids is None:
            raise EvaluationError(
                f"{question.sample_id}: the student's logits are not finite, so that its answer means nothing. Load it "
                "in another dtype (float32), or take an earlier checkpoint of its training"
            )
    return [text.strip() for text in tokenizer.batch_decode(given, skip_special_tokens=True)]


def _fields(reader: ChatReader, asked: Conversation, image_folder: str) -> Fields:
    """What the student reads of the first question: ``input_ids`` (S,), and its images' fields."""
    try:
        return reader.prompt(asked, [load_image(image, image_folder) for image in asked_images(asked)])
    except ConversationError as error:
        raise EvaluationError(f"{asked.sample_id}: the student cannot be asked: {error}. Take it out") from error


def _check_positions(length: int, most: int, positions: int | None) -> None:
    if positions is not None and length + most > positions:
        raise ConfigError(
            f"a question of {length} tokens and an answer of {most} (max_new_tokens) do not fit into the student's "
            f"{positions} positions. Set max_new_tokens to at most {positions - length}, or leave that question out"
        )
