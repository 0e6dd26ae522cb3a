"""Run a multimodal teacher once and cache what its students need: answers, top-k log-probabilities, hidden states.

    import teacher_cache as tc

Ten names, each imported when it is first used, so that ``import teacher_cache`` itself loads nothing: reading a cache
needs no torch. ``student_train`` has those that train.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from student_train.feed.distillation import distillation as distillation
    from teacher_cache import errors as errors
    from teacher_cache.build.build import build_cache as build_cache
    from teacher_cache.config import CacheConfig as CacheConfig
    from teacher_cache.config import load_config as load_config
    from teacher_cache.door import TeacherCache as TeacherCache
    from teacher_cache.door import open as open
    from teacher_cache.plan.cache_plan import plan_cache as plan_cache
    from teacher_cache.trust.verify import verify_cache as verify_cache

__version__ = "0.1.0"

_PLACES = {
    "CacheConfig": "teacher_cache.config",
    "TeacherCache": "teacher_cache.door",
    "build_cache": "teacher_cache.build.build",
    "distillation": "student_train.feed.distillation",
    "errors": "teacher_cache",
    "load_config": "teacher_cache.config",
    "open": "teacher_cache.door",
    "plan_cache": "teacher_cache.plan.cache_plan",
    "verify_cache": "teacher_cache.trust.verify",
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "errors":
        return importlib.import_module("teacher_cache.errors")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
