"""A student as a standard Hugging Face folder: loads in Transformers, vLLM and lmms-eval without this package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import LlavaForConditionalGeneration

from teacher_cache.weights import rename_vision_weights


def save_student(model: LlavaForConditionalGeneration, processor: Any, folder: Path) -> None:
    """Weights (safetensors, with the hub's names), processor, tokenizer, template; complete or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    rename_vision_weights(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
