"""Data sets of Hugging Face: by name through ``datasets`` (an extra), or a folder that its ``save_to_disk`` wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from teacher_cache.errors import DataError
from teacher_cache.terminal import without_secrets

SCHEME = "hf://datasets/"
_HOW = f"{SCHEME}OWNER/NAME[@REVISION][?subset=NAME&split=NAME]"


def hub_files(name: str) -> list[Path]:
    """The Arrow files of one split (``train``, unless it is named) of a data set, which ``datasets`` fetches and keeps.

    name: ``hf://datasets/OWNER/NAME@REVISION?subset=…&split=…``; a folder in the place of OWNER/NAME is loaded by the
    same rules, its README's ``configs`` among them.

    Raises ``DataError``: ``datasets`` is not installed, no such data set, subset or split, or a part of a split.
    """
    place, _, query = name.removeprefix(SCHEME).partition("?")
    options = dict(parse_qsl(query))
    split, subset = options.pop("split", "train"), options.pop("subset", None)
    repository, _, revision = place.partition("@")
    if options or not repository or not re.fullmatch(r"[\w.-]+", split):
        raise DataError(f"data.path: expected {_HOW} with one whole split, found {without_secrets(name)}")
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"{name}: needs the package datasets: pip install 'teacher-cache[datasets]'") from None
    try:
        found: Any = load_dataset(repository, subset, split=split, revision=revision or None, keep_in_memory=False)
    except Exception as error:  # of its own kinds, of the hub's, of every reader's
        why = without_secrets(str(error)).strip()[:400]
        raise DataError(f"{name}: datasets cannot load it ({type(error).__name__}: {why})") from error
    return [Path(file["filename"]) for file in found.cache_files]


def saved_files(folder: Path) -> list[Path] | None:
    """The Arrow files of a folder that ``save_to_disk`` wrote, None for any other folder; other Arrow files beside them
    are left by ``map``.

    Raises ``DataError``: it holds several splits, each in a folder of its own, or its list cannot be read.
    """
    if (folder / "dataset_dict.json").is_file():
        raise DataError(
            f"{folder}: a data set of several splits. Set data.path to one of them, for example {folder / 'train'}"
        )
    if not (folder / "state.json").is_file():
        return None
    try:
        state = json.loads((folder / "state.json").read_bytes())
        return [folder / Path(file["filename"]).name for file in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}/state.json: not as save_to_disk writes it ({error}). Save it again") from error
