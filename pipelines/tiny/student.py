"""Creates a tiny student beside the teacher: same words, same vision tower, a smaller language model."""

from __future__ import annotations

from pathlib import Path

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
    pretrained: bool = False,
) -> None:
    """Write a LLaVA folder whose tower is the teacher's, as LLaVADI's students keep the teacher's CLIP.

    Projector and Llama are fresh, from ``seed`` alone, or ``pretrained``: the start of that seed (`train_start`), as
    the papers' students begin with MobileLLaMA. ``hidden_size`` must be a multiple of 32, the width of a head.
    """
    student = build_llava(llava_config(hidden_size=hidden_size, layers=layers), seed=seed)
    if pretrained:
        files = sorted(STARTS.glob("*.safetensors"))
        start = load_file(files[seed % len(files)])  # its names and shapes are this student's, or loading raises
        tower = {name: value for name, value in student.state_dict().items() if "vision_tower" in name}
        student.load_state_dict({name: value.float() for name, value in start.items()} | tower)
    student.model.vision_tower.load_state_dict(load_llava(Path(teacher)).model.vision_tower.state_dict())
    save_llava(student, Path(folder))
