"""What a manifest may say: every size that anything is allocated, read or looped by is bounded here, once."""

from __future__ import annotations

import re
from typing import Any

from teacher_cache.config import GenerationConfig, LayoutConfig, SignalsConfig, build_config
from teacher_cache.errors import CacheError, ConfigError
from teacher_cache.store.names import SIDE_FILES, known_names
from teacher_cache.store.tables import mapping, text, whole

MOST_SAMPLES = 1 << 40
_SHAPE = {"hidden_size": (1, 1 << 20), "vocabulary": (2, 1 << 24)}
_TEACHER_TEXTS = ("model", "tokenizer", "dtype", "template", "chat_template")
_COUNTS = (
    *("samples", "skipped", "rows", "tokens", "positions", "runs", "image_positions", "images", "bytes"),
    *("least_image", "most_image"),
)
_NEEDED = {
    "generation": ("temperature", "top_p", "max_new_tokens", "seed"),
    "signals": ("preset", "top_k", "hidden", "codec", "pca", "sampled", "visual"),
    "layout": ("shard_samples", "chunk_kilobytes", "compression"),
}
"""Settings that are written always; others have their defaults."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_manifest(plain: dict[str, Any], where: str) -> None:
    """Raises ``CacheError`` with the field, what it may be and what was found; unknown fields are let through here."""
    for name in ("teacher", "data", "generation", "signals", "layout", "files", "counts", "made_with"):
        if name not in plain:
            raise CacheError(f"{where}: {name} is missing")
        mapping(plain[name], name, where)
    _teacher(plain["teacher"], where)
    _settings(plain, where)
    samples = whole(plain.get("planned_samples"), 0, MOST_SAMPLES, "planned_samples", where)
    shards = -(-samples // plain["layout"]["shard_samples"])
    whole(plain.get("planned_shards"), shards, shards, "planned_shards", where)
    if not isinstance(plain.get("complete"), bool):
        raise CacheError(f"{where}: complete: expected true or false, found {ascii(plain.get('complete'))[:80]}")
    text(plain.get("created_at"), "created_at", where)
    for name, version in plain["made_with"].items():
        text(version, f"made_with.{ascii(name)[:80]}", where)
    _files(plain["data"].get("files"), where)
    text(plain["data"].get("regenerate"), "data.regenerate", where)
    known_names(plain["files"], SIDE_FILES, where)
    for name, value in plain["files"].items():
        if not _SHA256.fullmatch(text(value, f"files.{name}", where)):
            raise CacheError(f"{where}: files.{name}: expected a SHA-256, found {ascii(value)[:80]}")
    for name in _COUNTS if plain["complete"] else ():
        whole(plain["counts"].get(name), 0, 1 << 62, f"counts.{name}", where)


def _teacher(teacher: dict[str, Any], where: str) -> None:
    shape = mapping(teacher.get("shape"), "teacher.shape", where)
    for name, (least, most) in _SHAPE.items():
        whole(shape.get(name), least, most, f"teacher.shape.{name}", where)
    for name in _TEACHER_TEXTS:
        text(teacher.get(name), f"teacher.{name}", where)
    whole(teacher.get("layers"), 0, 1 << 16, "teacher.layers", where)
    for name in ("image_token", "end_token"):
        whole(teacher.get(name), -1, 1 << 32, f"teacher.{name}", where)
    whole(teacher.get("max_length"), 1, 1 << 24, "teacher.max_length", where)

    mapping(teacher.get("processor"), "teacher.processor", where)
    rule = mapping(teacher.get("logit_rule"), "teacher.logit_rule", where)
    scale, cap = (_number(rule.get(name)) for name in ("scale", "cap"))
    if set(rule) != {"scale", "cap"} or not (scale > 0 and cap >= 0):
        raise CacheError(
            f"{where}: teacher.logit_rule: expected a scale above 0 and a cap of 0 or more, found {ascii(rule)[:80]}"
        )
    if vocabulary := mapping(teacher.get("vocabulary"), "teacher.vocabulary", where):
        _vocabulary(vocabulary, f"{where}: teacher.vocabulary")


def _number(value: object) -> float:
    """``value`` where it is a number of sober size, else one that is below every bound."""
    sober = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
    return float(value) if sober else -1.0  # type: ignore[arg-type]


def _vocabulary(vocabulary: dict[str, Any], where: str) -> None:
    for name in ("base", "merges"):
        text(vocabulary.get(name), name, where)
    whole(vocabulary.get("ids"), 0, 1 << 24, "ids", where)
    for number, token in mapping(vocabulary.get("added"), "added", where).items():
        if not number.isdecimal() or len(number) > 10:
            raise CacheError(f"{where}: added: expected an id, found {ascii(number)[:80]}")
        text(token, f"added.{number}", where)
    for name in ("begin", "end"):
        special = vocabulary.get(name)
        if special is not None and not (isinstance(special, list) and [type(v) for v in special] == [int, str]):
            raise CacheError(f"{where}: {name}: expected an id and its token, or null, found {ascii(special)[:80]}")


def _settings(plain: dict[str, Any], where: str) -> None:
    """The sections that are configurations have their types; sizes in them are bounded."""
    try:
        build_config(GenerationConfig, plain["generation"], f"{where}: generation")
        signals = build_config(SignalsConfig, plain["signals"], f"{where}: signals")
        layout = build_config(LayoutConfig, plain["layout"], f"{where}: layout")
    except ConfigError as error:
        raise CacheError(str(error)) from error
    for section, names in _NEEDED.items():
        for name in names:
            if name not in plain[section]:
                raise CacheError(f"{where}: {section}.{name} is missing")
    for name, most in {"top_k": 1 << 16, "visual_top_k": 1 << 16, "pca": 1 << 16, "sampled": 255}.items():
        whole(getattr(signals, name), 0, most, f"signals.{name}", where)
    if len(signals.temperatures) > 64 or not all(t > 0 for t in signals.temperatures):
        raise CacheError(f"{where}: signals.temperatures: expected at most 64 numbers above 0")
    whole(layout.shard_samples, 1, 1 << 24, "layout.shard_samples", where)
    whole(layout.chunk_kilobytes, 1, 1 << 18, "layout.chunk_kilobytes", where)


def _files(files: object, where: str) -> None:
    if not isinstance(files, list):
        raise CacheError(f"{where}: data.files: expected a list, found {ascii(files)[:80]}")
    for number, file in enumerate(files):
        for name, value in mapping(file, f"data.files[{number}]", where).items():
            if name in ("name", "sha256"):
                text(value, f"data.files[{number}].{name}", where)
