"""A student's answers to questions, by the generator with which teachers answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from student_train.evaluation.questions import own_template, read_questions, template_name
from student_train.students.chat_reader import ChatReader, chat_reader, make_chat
from student_train.students.preprocessor import Preprocessor, preprocessor_of
from student_train.students.reader import Reader
from student_train.students.student import read_own_processor
from teacher_cache.data.conversations import Conversation
from teacher_cache.data.images import load_image
from teacher_cache.data.rows import expand
from teacher_cache.data.tokenization import Template, end_token_id, template_by_name, tokenize_prompt
from teacher_cache.errors import ConfigError, EvaluationError, TemplateError
from teacher_cache.models.collate import Fields
from teacher_cache.models.generation import Decoding, generate
from teacher_cache.models.model_config import position_limit
from teacher_cache.models.parts import media_tokens
from teacher_cache.models.pretrained import load_model


@dataclass(frozen=True)
class Student:
    """A student folder, loaded to be looked at."""

    model: PreTrainedModel
    processor: Any
    reader: Reader

    @classmethod
    def load(cls, folder: str | Path, dtype: str = "float32", device: str = "cpu") -> Student:
        model = load_model("student", str(folder), dtype=getattr(torch, dtype)).to(device).eval()
        processor = read_own_processor("student", str(folder), model)
        return cls(model, processor, _reader(model, processor))

    @property
    def preprocessor(self) -> Preprocessor:
        """Of a student that reads as LLaVA-1.5."""
        assert isinstance(self.reader, Preprocessor)
        return self.reader


def _reader(model: PreTrainedModel, processor: Any) -> Reader:
    """A LLaVA-1.5 folder says by one of our templates that it reads as its teacher did; any other has its own."""
    if model.config.model_type == "llava":
        try:
            chat = None if own_template(processor) else make_chat(model, processor)
        except TemplateError:  # the hub's ends no answer: whoever asks names another
            chat = None
        return preprocessor_of(model, processor) if chat is None else chat_reader(model, processor, chat)
    return chat_reader(model, processor, make_chat(model, processor))


def answer_questions(
    student: Student,
    data: str | Path,
    image_folder: str | Path,
    template: str = "",
    *,
    max_new_tokens: int = 64,
    batch: int = 64,
) -> list[str]:
    """Greedy answers to the first question of every sample of a LLaVA file, in order. ``template``: to be compared with
    the student's own, in which it is asked.

    Raises ``ConfigError``: the student has too few positions, or another template. ``EvaluationError``: its logits are
    not finite.
    """
    conversations = read_questions(data)
    form = asked_in(student, template)
    answers: dict[int, str] = {}
    for has_image in (True, False):  # the vision tower runs on full batches
        group = [i for i, asked in enumerate(conversations) if (asked.image is not None) == has_image]
        for start in range(0, len(group), batch):
            places = group[start : start + batch]
            asked = [conversations[i] for i in places]
            given = _answer(student, asked, str(image_folder), form, max_new_tokens)
            answers.update(zip(places, given, strict=True))
    return [answers[i] for i in range(len(conversations))]


def asked_in(student: Student, template: str = "") -> Template | None:
    """The template in which a student is asked that reads as LLaVA-1.5; None for any other, which has its own.

    Raises ``ConfigError``: ``template`` is another than the student's.
    """
    if not isinstance(student.reader, ChatReader):
        return template_by_name(template_name(student.processor, template))
    if template:
        raise ConfigError(f"template={template}: the student has a chat template of its own. Leave the template out")
    return None


def _answer(
    student: Student, asked: Sequence[Conversation], image_folder: str, form: Template | None, most: int
) -> list[str]:
    """The answers to one batch of first questions, all with an image or all without."""
    model, reader, tokenizer = student.model, student.reader, student.reader.tokenizer
    prompts = [_fields(student, question, image_folder, form) for question in asked]
    _check_positions(max(len(prompt["input_ids"]) for prompt in prompts), most, position_limit(model.config))
    never = (*media_tokens(model.config), *range(len(tokenizer), model.get_output_embeddings().out_features))
    if isinstance(reader, ChatReader):
        end = reader.chat.end
    else:
        assert form is not None
        end = end_token_id(tokenizer, form)
    how = Decoding(end, reader.pad, most, never)
    given = generate(model, prompts, how)
    for question, ids in zip(asked, given, strict=True):
        if ids is None:
            raise EvaluationError(
                f"{question.sample_id}: the student's logits are not finite, so that its answer means nothing. Load it "
                "in another dtype (float32), or take an earlier checkpoint of its training"
            )
    return [text.strip() for text in tokenizer.batch_decode(given, skip_special_tokens=True)]


def _fields(student: Student, asked: Conversation, image_folder: str, form: Template | None) -> Fields:
    """What the student reads of the first question: ``input_ids`` (S,), and its images' fields."""
    prepare = student.reader
    if isinstance(prepare, ChatReader):
        return prepare.prompt(asked, [load_image(image, image_folder) for image in asked.images])
    assert form is not None
    segment = np.asarray(tokenize_prompt(asked, form, prepare.tokenizer).segments[0])
    fields = {"input_ids": torch.from_numpy(expand(segment, prepare.image_token, prepare.image_tokens))}
    return fields if asked.image is None else fields | {"pixel_values": prepare.pixels(asked.image, image_folder)[None]}


def _check_positions(length: int, most: int, positions: int | None) -> None:
    if positions is not None and length + most > positions:
        raise ConfigError(
            f"a question of {length} tokens and an answer of {most} (max_new_tokens) do not fit into the student's "
            f"{positions} positions. Set max_new_tokens to at most {positions - length}, or leave that question out"
        )
