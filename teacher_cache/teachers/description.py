"""Everything the manifest says of a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from teacher_cache.config import TeacherConfig
from teacher_cache.data.logit_rule import LogitRule
from teacher_cache.data.vocabulary import describe_vocabulary, tokenizer_fingerprint
from teacher_cache.models.chat import TEMPLATES, Chat
from teacher_cache.models.checkpoint import checkpoint_digest
from teacher_cache.models.open_chat import read_teacher_config, reads_text_alone
from teacher_cache.models.processor_settings import processor_settings
from teacher_cache.store.records import TeacherShape
from teacher_cache.teachers.teacher import TeacherDescription


def describe_teacher(config: TeacherConfig, processor: Any, chat: Chat) -> TeacherDescription:
    """Needs its configuration files, not its weights in memory."""
    model = read_teacher_config(config)
    text = model.get_text_config()
    sees = not reads_text_alone(model)
    tokenizer = processor.tokenizer if sees else processor
    return TeacherDescription(
        model=Path(config.model).name if Path(config.model).is_dir() else config.model,
        weights=checkpoint_digest(config.model, config.revision),
        tokenizer=tokenizer_fingerprint(tokenizer),
        shape=TeacherShape(text.hidden_size, text.vocab_size),
        layers=text.num_hidden_layers,
        dtype=config.dtype,
        image_token=chat.image_token,
        end_token=chat.end,
        processor=processor_settings(processor) if sees else {},
        template=config.chat_template if config.chat_template in TEMPLATES else "",
        chat_template=chat.text,
        one_sequence=chat.one_sequence,
        vocabulary=describe_vocabulary(tokenizer),
        logit_rule=LogitRule.of(model),
    )
