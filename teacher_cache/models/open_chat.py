"""The processor of a configured teacher, and how it is shown conversations; no weights are read."""

from __future__ import annotations

from typing import Any

from teacher_cache.config import TeacherConfig
from teacher_cache.errors import TeacherError
from teacher_cache.models.chat import Chat
from teacher_cache.models.pretrained import model_class, read_config, read_processor, read_tokenizer
from teacher_cache.models.processor_settings import set_image_processor


def load_processor(config: TeacherConfig) -> tuple[Any, Any]:
    """The processor, set as ``teacher.image_processor`` says, and the tokenizer of the teacher's folder or repository;
    twice the tokenizer for a language model by itself.

    Raises
    ------
    TeacherError
    """
    if reads_text_alone(read_teacher_config(config)):
        tokenizer = read_tokenizer("teacher.model", config.model, config.revision)
        return tokenizer, tokenizer
    processor = read_processor("teacher.model", config.model, config.revision, config.trust_remote_code)
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise TeacherError(
            f"teacher.model={config.model}: found a {type(processor).__name__}, expected a processor with an image "
            "processor and a tokenizer. Put its processor_config.json and tokenizer.json into the folder"
        )
    set_image_processor("teacher.image_processor", processor, config.image_processor)
    return processor, tokenizer


def read_teacher_config(config: TeacherConfig) -> Any:
    """The Transformers configuration of the teacher, of a type that can be run here.

    Raises
    ------
    TeacherError
    """
    model = read_config("teacher.model", config.model, config.revision, config.trust_remote_code)
    model_class("teacher.model", config.model, model)
    return model


def reads_text_alone(model: Any) -> bool:
    """Whether a Transformers configuration is that of a language model by itself."""
    return model.get_text_config() is model


def open_chat(config: TeacherConfig, processor: Any = None) -> Chat:
    """How the teacher is shown conversations; its processor is read where it is not given.

    Raises
    ------
    TeacherError, TemplateError
    """
    processor = processor if processor is not None else load_processor(config)[0]
    return Chat(processor, read_teacher_config(config), (), config.chat_template, config.template_kwargs)
