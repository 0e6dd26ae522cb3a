"""What a finished run was made from: recorded beside it, and compared before it is taken for done."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from student_train.config import SourceConfig
from teacher_cache.store.manifest import MANIFEST, digest, read_manifest
from teacher_cache.store.storage import Storage
from teacher_cache.terminal import without_secrets

Origin = dict[str, str]
"""What (in words, with its place) → a digest of its content; empty where it is not there."""


def sources_origin(sources: Sequence[SourceConfig]) -> Origin:
    """The fingerprint of each cache, the digest of each data file."""
    found: Origin = {}
    for n, source in enumerate(sources):
        content = cache_fingerprint(source.cache) if source.cache else _file_digest(Path(source.data))
        found[f"sources[{n}] ({without_secrets(source.cache or source.data)})"] = content
        for name in ("before", "onto"):
            if url := getattr(source, name):
                found[f"sources[{n}].{name} ({without_secrets(url)})"] = cache_fingerprint(url)
    return found


def cache_fingerprint(url: str) -> str:
    """The fingerprint in the manifest of the cache at ``url``; empty where there is none.

    Raises ``CacheError``: the manifest is damaged, or of another format.
    """
    storage = Storage(url)
    return read_manifest(storage).fingerprint if storage.exists(MANIFEST) else ""


def model_digest(folder: str) -> str:
    """A digest of a model folder's configuration and weights; empty where there is no such folder (a name on the hub
    is among the settings)."""
    files = sorted([*Path(folder).glob("config.json"), *Path(folder).glob("*.safetensors")]) if folder else []
    return digest([[path.name, _file_digest(path)] for path in files]) if files else ""


def changed(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of what is there now and was another, or was not recorded, when the run was made.

    What is gone by now is not among them: a cache may be deleted when its students are trained.
    """
    return [name for name, content in now.items() if content and then.get(name) != content]


def _file_digest(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
