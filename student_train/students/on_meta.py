"""Students without weights: their shapes, and what is trained of them, from configurations alone."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from student_train.config import StudentConfig
from student_train.students.student import choose_trainable, composed_config, composed_vocabulary, keep_layers
from teacher_cache.models.model_config import load_model_config
from teacher_cache.models.pretrained import check_tower, without_weights


@lru_cache(maxsize=8)
def student_on_meta(config: StudentConfig) -> PreTrainedModel:
    """The student without weights: shapes, and what is trained of it. To be read only: arms of one shape share it."""
    architecture = student_architecture(config)
    model = without_weights("student", config.model or config.layers_from, architecture)
    if getattr(model.config, "tie_word_embeddings", False):
        model.tie_weights()
    choose_trainable(model, config)
    return model


def student_architecture(config: StudentConfig) -> Any:
    """The student's configuration, by the rules of ``student.load_student``."""
    if config.layers_from:
        model = load_model_config(config.layers_from, setting="student.layers_from")
        keep_layers(model, config)
        return model
    if not config.language_model or (config.model and (Path(config.model) / "config.json").is_file()):
        return load_model_config(config.model, setting="student.model")
    text = load_model_config(config.language_model, setting="student.language_model")
    vision = load_model_config(config.vision_tower, setting="student.vision_tower")
    check_tower("student.vision_tower", config.vision_tower, vision)
    taken = load_model_config(config.tokenizer) if config.tokenizer else None
    token = taken.image_token_id if taken is not None else text.vocab_size
    if taken is None and text.vocab_size > 100_000:  # Qwen's tables are padded beyond the tokenizer: there is room
        token = text.vocab_size - 1
    text.vocab_size = composed_vocabulary(text, taken, token)
    return composed_config(text, vision, token)
