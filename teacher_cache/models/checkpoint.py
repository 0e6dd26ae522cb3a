"""A digest of a checkpoint: two teachers with one digest are one teacher, to the last byte of every tensor."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from teacher_cache.models.weights import checkpoint_folder

WHOLE = "whole:"
"""What a digest of every byte begins with. """


def checkpoint_digest(model: str, revision: str = "") -> str:
    """A digest that differs for another checkpoint: of ``config.json`` and of every byte of each weight file.

    Files are read once a process, several at a time: 26 GB take about as long as loading them. The library's version,
    which stands in ``config.json`` too, does not enter.
    """
    folder = checkpoint_folder(model, revision)
    settings = _without_version(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    paths = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    with ThreadPoolExecutor(8) as threads:
        contents = list(threads.map(_content, paths))
    plain = [settings, [[path.name, content] for path, content in zip(paths, contents, strict=True)]]
    return WHOLE + hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _content(path: Path) -> str:
    found = path.stat()
    return _content_of(str(path.resolve()), found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1024)
def _content_of(path: str, size: int, changed: int) -> str:
    """``size`` and ``changed`` tell a file that was written again from the one that was read."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _without_version(plain: Any) -> Any:
    if not isinstance(plain, dict):
        return plain
    return {name: _without_version(value) for name, value in plain.items() if name != "transformers_version"}
