"""Creates a tiny student beside the teacher: same words, same vision tower, a smaller language model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from safetensors.torch import load_file

from pipelines.tiny.models import build_llava, llava_config, load_llava, save_llava

STUDENT_WIDTH, STUDENT_LAYERS = 64, 2
STARTS = Path(__file__).parent / "starts"


def write_student(
    folder: str | Path,
    *,
    teacher: str | Path,
    hidden_size: int = STUDENT_WIDTH,
    layers: int = STUDENT_LAYERS,
    seed: int = 0,
    pretrained: Literal["nothing", "language", "all"] = "nothing",
) -> None:
    """Write a LLaVA folder whose tower is the teacher's, as LLaVADI's students keep the teacher's CLIP.

    Projector and Llama are fresh, from ``seed`` alone, or ``pretrained``: one of the shipped starts (`train_start`),
    which the seeds take in turn, as the papers' students begin with MobileLLaMA; ``language`` leaves its projector out.
    ``hidden_size`` must be a multiple of 32, the width of a head.
    """
    student = build_llava(llava_config(hidden_size=hidden_size, layers=layers), seed=seed)
    if pretrained != "nothing":
        files = sorted(STARTS.glob("*.safetensors"))
        start = load_file(files[seed % len(files)])  # its names and shapes are this student's, or loading raises
        fresh = ("vision_tower", "multi_modal_projector") if pretrained == "language" else ("vision_tower",)
        kept = {name: value for name, value in student.state_dict().items() if any(part in name for part in fresh)}
        student.load_state_dict({name: value.float() for name, value in start.items()} | kept)
    student.model.vision_tower.load_state_dict(load_llava(Path(teacher)).model.vision_tower.state_dict())
    save_llava(student, Path(folder))
