"""How a student reads samples: what its LLaVA-1.5 teacher read, or by its own chat template and processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from student_train.config import FitConfig
from student_train.students.chat_reader import ChatReader, chat_reader, make_chat
from student_train.students.preprocessor import Preprocessor, preprocessor_of
from student_train.students.processor import prepare_processor
from teacher_cache.data.tokenization import TEMPLATES, end_token_id
from teacher_cache.models.chat import TEMPLATES as JINJA
from teacher_cache.store.manifest import read_manifest
from teacher_cache.store.storage import Storage

Reader = Preprocessor | ChatReader


def prepare_reader(model: Any, processor: Any, config: FitConfig) -> tuple[Reader, list[int]]:
    """How this run's student reads, which its ``processor`` is made to do too, and the tokens that end its answers.

    Raises ``ConfigError``, ``CacheError``, ``TemplateError``: it cannot read so.
    """
    student = config.student
    if model.config.model_type == "llava" and not student.chat_template and _llava_templates(config):
        template = prepare_processor(processor, config)
        return preprocessor_of(model, processor), [end_token_id(processor.tokenizer, template)]
    chat = make_chat(model, processor, student.chat_template, student.template_kwargs)
    _write_template(processor, student.chat_template, student.template_kwargs)
    losses = config.losses
    compares = {
        "compares_text": any(loss.tokens != "answer" for loss in losses),
        "compares_images": any(loss.on_images for loss in losses),
    }
    return chat_reader(model, processor, chat, **compares), [chat.end, *sorted(chat.ends - {chat.end})]


def _llava_templates(config: FitConfig) -> bool:
    """Whether all sources are written in one of LLaVA's templates, which the student then reads as they are."""
    names = [s.template if s.data else read_manifest(Storage(s.cache)).teacher.get("template") for s in config.sources]
    return all(name in TEMPLATES for name in names)


def _write_template(processor: Any, name: str, kwargs: dict[str, Any]) -> None:
    """Into ``processor``, so that whoever loads the exported folder asks as in training: the template of this ``name``,
    with ``kwargs`` set in it."""
    tokenizer = getattr(processor, "tokenizer", processor)
    own = getattr(processor, "chat_template", None) or tokenizer.chat_template
    text = JINJA.get(name, Path(name)).read_text("utf-8") if name else own
    settings = "".join(f"{{%- set {key} = {_literal(value)} %}}" for key, value in kwargs.items())
    if name or settings:
        processor.chat_template = tokenizer.chat_template = settings + text


def _literal(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
