"""Students without weights: their shapes, and what is trained of them, from configurations alone."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from student_train.config import StudentConfig
from student_train.students.student import choose_trainable, composed_config, composed_vocabulary, keep_layers
from teacher_cache.models.model_config import load_model_config
from teacher_cache.models.pretrained import check_llava, check_tower


@lru_cache(maxsize=8)
def student_on_meta(config: StudentConfig) -> LlavaForConditionalGeneration:
    """The student without weights: shapes, and what is trained of it. To be read only: arms of one shape share it."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(student_architecture(config))
    if model.config.tie_word_embeddings:
        model.tie_weights()
    choose_trainable(model, config)
    return model


def student_architecture(config: StudentConfig) -> Any:
    """The student's LLaVA configuration, by the rules of ``student.load_student``."""
    if config.layers_from:
        llava = load_model_config(config.layers_from, setting="student.layers_from")
        check_llava("student.layers_from", config.layers_from, llava)
        keep_layers(llava, config)
        return llava
    if not config.language_model or (config.model and (Path(config.model) / "config.json").is_file()):
        llava = load_model_config(config.model, setting="student.model")
        check_llava("student.model", config.model, llava)
        return llava
    text = load_model_config(config.language_model, setting="student.language_model")
    vision = load_model_config(config.vision_tower, setting="student.vision_tower")
    check_tower("student.vision_tower", config.vision_tower, vision)
    taken = load_model_config(config.tokenizer) if config.tokenizer else None
    token = taken.image_token_id if taken is not None else text.vocab_size
    if taken is None and text.vocab_size > 100_000:  # Qwen's tables are padded beyond the tokenizer: there is room
        token = text.vocab_size - 1
    text.vocab_size = composed_vocabulary(text, taken, token)
    return composed_config(text, vision, token)
