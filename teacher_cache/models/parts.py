"""Where the decoder, the vision tower and the projector of a model lie, for any class, by Transformers' own methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from teacher_cache.errors import TeacherError

_INSIDE_THE_TOWER = ("merger", "deepstack_merger_list")
"""Qwen-VL's projector: modules of its tower."""


@dataclass(frozen=True)
class Parts:
    """Names in the model, none for what it has not: a text model has no tower."""

    decoder: str
    tower: str = ""
    projector: tuple[str, ...] = ()
    """Modules."""
    parameters: tuple[str, ...] = ()
    """Parameters in no module of these, such as LLaVA-NeXT's ``image_newline``: they go with the projector."""


def parts_of(model: nn.Module) -> Parts:
    """The parts of a model with a head, ``LlavaForConditionalGeneration`` or ``LlamaForCausalLM`` and the like."""
    found: Any = model
    names = {id(module): name for name, module in model.named_modules()}
    base = found.base_model
    decoder, tower = found.get_decoder(), found.get_encoder(modality="image")
    if tower is found or tower is base or id(tower) not in names:
        return Parts(names[id(decoder)])
    prefix = names[id(base)]
    projector = [
        f"{prefix}.{name}"
        for name, child in base.named_children()
        if child is not decoder and child is not tower and any(True for _ in child.parameters())
    ] or [f"{names[id(tower)]}.{name}" for name in _INSIDE_THE_TOWER if hasattr(tower, name)]
    bare = tuple(f"{prefix}.{name}" for name, _ in base.named_parameters(recurse=False))
    return Parts(names[id(decoder)], names[id(tower)], tuple(projector), bare)


def lora_targets(model: nn.Module) -> list[str]:
    """The names of the decoder's linear layers. peft's ``all-linear`` would take the tower and the projector too."""
    decoder = parts_of(model).decoder
    return [f"{decoder}.{name}" for name, m in model.get_submodule(decoder).named_modules() if isinstance(m, nn.Linear)]


def other_layers(config: Any) -> list[str]:
    """The kinds of a configuration's layers that are no attention: convolutions, linear attention, Mamba."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    return sorted({kind for kind in kinds if kind not in ("full_attention", "sliding_attention", "chunked_attention")})


def check_head(setting: str, name: str, model: Any) -> None:
    """Refuse a model whose logits are not made by one matrix from the final states.

    Raises
    ------
    TeacherError
    """
    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        found = f"a {type(model).__name__}, which has no output head"
    elif getattr(head, "bias", None) is not None:
        found = f"a {type(model).__name__}, whose output head has a bias"
    else:
        return
    raise TeacherError(
        f"{setting}={name}: {found}; expected logits that are states @ head.T, times a scale, soft-capped, or as they "
        "are: a cache keeps the head as one matrix. Take another model"
    )


def media_tokens(config: Any) -> tuple[int, ...]:
    """The ids that stand for positions of an image, a video or a sound. A model that answers with one could not be read
    again: there would be nothing to put there."""
    names = [f"{kind}_token_{form}" for kind in ("image", "video", "audio") for form in ("id", "index")]
    found = (getattr(config, name, None) for name in names)
    return tuple(sorted({int(token) for token in found if isinstance(token, int) and token >= 0}))
