"""What is decided before a vLLM engine starts: whether it can serve a configuration, in how many passes, and whether it
knows the checkpoint's weight names. No weights are loaded.

What a family comes to follows from vLLM's own registry, in which this module looks its class up; no list of families is
kept here. A class that hands out inner layers makes a cache in one pass; any other that vLLM has of its own answers
first, and gives states in a second pass; what it would run by Transformers' modules goes to torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from teacher_cache.config import CacheConfig, TeacherConfig
from teacher_cache.errors import TeacherError
from teacher_cache.models.open_chat import read_teacher_config
from teacher_cache.models.parts import other_layers
from teacher_cache.models.pretrained import model_class
from teacher_cache.models.weights import unknown_vision_names
from teacher_cache.teachers.vllm import registry


@dataclass(frozen=True)
class BackendChoice:
    """What ``teacher.backend`` comes to for one configuration, and a line for the user that says why."""

    use_vllm: bool
    one_pass: bool
    reason: str


def choose(config: CacheConfig) -> BackendChoice:
    """Decide between vLLM and torch, and between one pass and two; no weights are loaded.

    Raises ``TeacherError``: ``teacher.backend`` is ``vllm``, but it is not installed, does not know the architecture,
    or cannot give a signal that was asked for.
    """
    backend = config.teacher.backend
    if backend == "torch":
        return BackendChoice(False, False, "torch answers, then scores: teacher.backend=torch")
    if problem := why_not_vllm(config):
        if backend == "vllm":
            raise TeacherError(f"teacher.backend=vllm: {problem}. Set teacher.backend=torch.")
        return BackendChoice(False, False, f"torch answers, then scores: {problem}")
    architecture = architecture_of(config.teacher)
    if not registry.can_capture(architecture):
        return BackendChoice(True, False, f"vLLM answers, then scores: its {architecture} hands out no inner states")
    if not samples_rightly(config):
        return BackendChoice(True, False, "vLLM answers, then scores: its CPU build cannot sample and hand out states")
    if config.data.regenerate == "none":
        return BackendChoice(True, False, "vLLM scores: data.regenerate=none, so there is nothing to answer")
    if config.data.history == "original":
        return BackendChoice(
            True, False, "vLLM answers, then scores: history=original scores another text than it read"
        )
    if config.signals.second_last:
        return BackendChoice(True, False, "vLLM answers, then scores: signals.second_last comes with a scoring pass")
    return BackendChoice(True, True, f"one pass: vLLM's {architecture} answers and hands out its states as it does")


def why_not_vllm(config: CacheConfig) -> str:
    """Why vLLM cannot do what is asked, '' if it can, as far as the configurations tell."""
    version = registry.installed_version()
    if not version:
        return "vLLM is not installed here (on a GPU: pip install '.[vllm]'; on a CPU: pipelines/install_vllm_cpu.py)"
    architecture = architecture_of(config.teacher)
    if not registry.knows(architecture):
        return f"vLLM {version} does not know the architecture {architecture} of teacher.model={config.teacher.model}"
    if (other := other_layers(read_teacher_config(config.teacher))) and registry.on_cpu():
        return f"the CPU build of vLLM {version} dies on layers of {', '.join(other)}, which {architecture} has"
    if config.signals.attention:
        return "signals.attention needs attention maps, which vLLM does not hand out"
    if registry.can_capture(architecture):
        return ""
    none = f"which vLLM {version} does not hand out for {architecture}"
    if config.signals.second_last:
        return f"signals.second_last needs inner states, {none}"
    if config.teacher.quantization:
        return (
            f"teacher.quantization={config.teacher.quantization} needs inner states, {none}: a second pass's are "
            "compared with torch's, and torch does not apply it"
        )
    return ""


def samples_rightly(config: CacheConfig) -> bool:
    """Whether answers can be drawn while states are handed out.

    Not on vLLM 0.32's CPU build: beside any speculation its kernels convert the temperature to an integer in a copy
    that nobody reads (``cpu_triton_utils._expand_kernel_impl``), and the answers are of no distribution at all.
    """
    return config.generation.temperature == 0 or not registry.on_cpu()


def architecture_of(config: TeacherConfig) -> str:
    """The name of its class, by which vLLM has one of its own."""
    model = read_teacher_config(config)
    return str((model.architectures or [model_class("teacher.model", config.model, model).__name__])[0])


def check_context(name: str, tokens: int, limit: int) -> None:
    """Refuse a request of ``tokens``, images and room for the answer included, where the engine takes ``limit``."""
    if tokens > limit:
        raise TeacherError(
            f"context too short: {name} ({tokens - limit} over) can need more than the {limit} tokens there are. Set "
            f"teacher.max_length to at most {limit - 1}, which skips longer samples, or lower generation.max_new_tokens"
        )


def check_weight_names(config: TeacherConfig, folder: Path) -> None:
    if unknown := unknown_vision_names(folder):
        raise TeacherError(
            f"teacher.model={config.model}: vLLM does not know {len(unknown)} of its weight names (first: "
            f"{unknown[0]}; expected vision_tower.vision_model.…): Transformers 5 saved it. Rename them, in place: "
            f"from teacher_cache.models.weights import rename_vision_weights; rename_vision_weights({str(folder)!r})"
        )
