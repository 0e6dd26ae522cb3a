"""A student's answers to questions, by the generator with which teachers answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from student_train.evaluation.questions import read_questions, template_name
from student_train.students.preprocessor import Preprocessor, preprocessor_of
from teacher_cache.data.conversations import Conversation
from teacher_cache.data.rows import expand
from teacher_cache.data.tokenization import Template, end_token_id, template_by_name, tokenize_prompt
from teacher_cache.errors import ConfigError, EvaluationError
from teacher_cache.models.generation import Decoding, generate
from teacher_cache.models.model_config import position_limit
from teacher_cache.models.pretrained import load_llava, read_processor


@dataclass(frozen=True)
class Student:
    """A student folder, loaded to be looked at."""

    model: LlavaForConditionalGeneration
    processor: Any
    preprocessor: Preprocessor

    @classmethod
    def load(cls, folder: str | Path, dtype: str = "float32", device: str = "cpu") -> Student:
        model = load_llava("student", str(folder), dtype=getattr(torch, dtype)).to(device).eval()
        processor = read_processor("student", str(folder))
        return cls(model, processor, preprocessor_of(model, processor))


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
    form = template_by_name(template_name(student.processor, template))
    answers: dict[int, str] = {}
    for has_image in (True, False):  # the vision tower runs on full batches
        group = [i for i, asked in enumerate(conversations) if (asked.image is not None) == has_image]
        for start in range(0, len(group), batch):
            places = group[start : start + batch]
            asked = [conversations[i] for i in places]
            given = _answer(student, asked, str(image_folder), form, max_new_tokens)
            answers.update(zip(places, given, strict=True))
    return [answers[i] for i in range(len(conversations))]


def _answer(student: Student, asked: Sequence[Conversation], image_folder: str, form: Template, most: int) -> list[str]:
    """The answers to one batch of first questions, all with an image or all without."""
    model, tokenizer, prepare = student.model, student.processor.tokenizer, student.preprocessor
    prompts = [_fields(student, question, image_folder, form) for question in asked]
    _check_positions(max(len(prompt["input_ids"]) for prompt in prompts), most, position_limit(model.config))
    without_token = range(len(tokenizer), model.get_output_embeddings().out_features)
    how = Decoding(end_token_id(tokenizer, form), prepare.pad, most, (prepare.image_token, *without_token))
    given = generate(model, prompts, how)
    for question, ids in zip(asked, given, strict=True):
        if ids is None:
            raise EvaluationError(
                f"{question.sample_id}: the student's logits are not finite, so that its answer means nothing. Load it "
                "in another dtype (float32), or take an earlier checkpoint of its training"
            )
    return [text.strip() for text in tokenizer.batch_decode(given, skip_special_tokens=True)]


def _fields(student: Student, asked: Conversation, image_folder: str, form: Template) -> dict[str, torch.Tensor]:
    """``input_ids`` (S,) of the first question and its ``pixel_values`` (1, 3, H, W)."""
    prepare = student.preprocessor
    segment = np.asarray(tokenize_prompt(asked, form, student.processor.tokenizer).segments[0])
    fields = {"input_ids": torch.from_numpy(expand(segment, prepare.image_token, prepare.image_tokens))}
    return fields if asked.image is None else fields | {"pixel_values": prepare.pixels(asked.image, image_folder)[None]}


def _check_positions(length: int, most: int, positions: int | None) -> None:
    if positions is not None and length + most > positions:
        raise ConfigError(
            f"a question of {length} tokens and an answer of {most} (max_new_tokens) do not fit into the student's "
            f"{positions} positions. Set max_new_tokens to at most {positions - length}, or leave that question out"
        )
