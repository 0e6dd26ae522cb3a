"""What decides the result of a run: its settings and the content of its caches, and how two of them differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from student_train.config import FitConfig
from student_train.feed.raw import Source
from student_train.feed.sources import CacheSource
from teacher_cache.config import as_plain

_SPEED = (
    "micro_batch",
    "pack",
    "head_rows",
    "workers",
    "pixel_cache",
    "checkpoint_every",
    "log_every",
    "tracker",
    "threads",
)
_PLACE = (
    *("image_folder", "cache", "before", "onto", "prefetch_folder", "prefetch_gigabytes", "made_with", "expected"),
    "max_skipped",
)


def deciding_settings(config: FitConfig) -> dict[str, Any]:
    """Plain data: the settings, without those that say where or how fast it runs."""
    plain: dict[str, Any] = as_plain(config)
    plain.pop("output")
    for name in _SPEED:
        plain["train"].pop(name)
    for name in ("gradient_checkpointing", "vision_features"):
        plain["student"].pop(name)
    for source in plain["sources"]:
        for name in _PLACE:
            source.pop(name)
    return plain


def run_settings(config: FitConfig, sources: Sequence[Source]) -> dict[str, Any]:
    """The same, with each source's content: the fingerprints of its caches, the number of plain samples."""
    plain = deciding_settings(config)
    for settings, source in zip(plain["sources"], sources, strict=True):
        caches = source.caches if isinstance(source, CacheSource) else ()
        settings["content"] = [cache.manifest.fingerprint for cache in caches] or len(source)
    return plain


def differences(then: Any, now: Any, place: str = "") -> list[str]:
    """``train.max_steps was 20, is now 30``, for every leaf of two plain trees that differs."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        keys = [*then, *(key for key in now if key not in then)]
        named = [(f"{place}.{key}" if place else str(key), then.get(key), now.get(key)) for key in keys]
    elif _is_list(then) and _is_list(now) and len(then) == len(now):
        named = [(f"{place}[{n}]", *both) for n, both in enumerate(zip(then, now, strict=True))]
    else:
        return [] if then == now else [f"{place} was {_short(then)}, is now {_short(now)}"]
    return [text for name, one, other in named for text in differences(one, other, name)]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _short(value: Any) -> str:
    text = "not there" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
