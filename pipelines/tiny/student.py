"""Creates an untrained tiny student beside the teacher: same words, same vision tower, a smaller language model."""

from __future__ import annotations

from pathlib import Path

from pipelines.tiny.models import build_llava, llava_config, load_llava, save_llava


def write_student(
    folder: str | Path, *, teacher: str | Path, hidden_size: int = 64, layers: int = 2, seed: int = 0
) -> None:
    """Write a LLaVA folder whose tower is the teacher's and whose projector and Llama are fresh, from `seed` alone.

    LLaVADI's students keep the teacher's CLIP too. `hidden_size` must be a multiple of 32, the width of a head.
    """
    student = build_llava(llava_config(hidden_size=hidden_size, layers=layers), seed=seed)
    student.model.vision_tower.load_state_dict(load_llava(Path(teacher)).model.vision_tower.state_dict())
    save_llava(student, Path(folder))
