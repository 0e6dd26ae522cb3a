"""Which names out of a stranger's file may be used, and the one way from such a name to a file.

The digests of a cache are not signatures: whoever made it wrote them, so a manifest or an index may name anything. A
name is used only where it is one of a closed list (the side files, the files of the manifest's own arrays) and plain:
relative, ``/`` between its parts, no ``..``, nothing that a terminal or another system would read otherwise. What it
leads to must lie below the folder that the user named, links followed, and be a regular file: no device is read
without end and no pipe waited for.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from teacher_cache.errors import CacheError
from teacher_cache.files import open_checked

MANIFEST = "manifest.json"
LEDGER = "shards.parquet"
SAMPLES = "samples.parquet"
SKIPPED = "skipped.jsonl"
HEAD = "head.safetensors"
SCALES = "scales.safetensors"
GROUPS = ("zarr.json", "shards/zarr.json", "images/zarr.json")
SIDE_FILES = frozenset({LEDGER, SAMPLES, SKIPPED, HEAD, SCALES, *GROUPS})
"""All that ``manifest.files`` may name."""
INDEX = "index.parquet"
"""The index of a folder: written last, so a folder without it does not exist."""

_MOST_CHARACTERS = 255


def shard_name(number: int) -> str:
    return f"shards/{number:05d}"


def images_name(number: int) -> str:
    return f"images/{number:05d}"


def answers_name(number: int) -> str:
    return f"answers/part-{number:05d}.parquet"


def plain_name(name: object, where: str) -> str:
    """``name`` itself, where it is one that cannot lead out of a folder; ``where`` says which file it stands in.

    Raises ``CacheError``: not text, empty, absolute, with ``..``, an empty part, a backslash, a colon or a control
    character.
    """
    if not isinstance(name, str) or not 0 < len(name) <= _MOST_CHARACTERS:
        raise CacheError(f"{where}: {_shown(name)} is not the name of a file; {_FOREIGN}")
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or any(c in "\\:" or not c.isprintable() for c in name):
        raise CacheError(f"{where}: the name {_shown(name)} could lead out of its folder; {_FOREIGN}")
    return name


def known_names(names: Iterable[object], known: Iterable[str], where: str) -> None:
    """Refuse a name that is not one of ``known``."""
    known = set(known)
    for name in names:
        if plain_name(name, where) not in known:
            raise CacheError(f"{where}: names {_shown(name)}, which no cache has; {_FOREIGN}")


def array_files(name: str, axes: int) -> tuple[str, str]:
    """Metadata and data file of an array, relative to its folder: ``hidden/zarr.json``, ``hidden/c/0/0`` for 2 axes."""
    return f"{name}/zarr.json", "/".join([name, "c", *["0"] * axes])


def inside(root: Path, name: str) -> Path:
    """``root/name``, whether there is anything or not.

    Raises ``CacheError``: the name is not plain, or a link on the way leads out of ``root``.
    """
    path = root.joinpath(*plain_name(name, str(root)).split("/"))
    base, real = os.path.realpath(root), os.path.realpath(path)
    if not real.startswith(base.rstrip("/") + "/"):
        raise CacheError(
            f"{path}: a link that leads out of {root}; nothing outside it is read, written or deleted. Where the link "
            "is yours, put the files themselves there, or mount their folder in its place"
        )
    return path


def file_size(root: Path, name: str) -> int:
    """Bytes of the regular file ``name``; ``FileNotFoundError`` without one, ``CacheError`` for another thing."""
    path = inside(root, name)
    return _regular(path, path.stat())


def regular_file(root: Path, name: str) -> Path:
    """The path of a file that may be opened or mapped; errors as :func:`file_size`."""
    file_size(root, name)
    return inside(root, name)


def is_there(root: Path, name: str) -> bool:
    """Whether there is anything; a folder that may not be looked into is an error, which ``Path.exists`` hides in some
    versions of Python."""
    try:
        inside(root, name).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def entries(root: Path, name: str) -> list[str]:
    """What lies in a folder, sorted; nothing where there is none."""
    try:
        return sorted(entry.name for entry in inside(root, name).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def sizes_below(root: Path, name: str) -> dict[str, int]:
    """Bytes of each file below; a folder that may not be listed is an error, which ``Path.rglob`` leaves out."""
    top, found = inside(root, name), {}
    for folder, _, files in os.walk(top, onerror=_unless_absent):
        for path in (Path(folder, name) for name in files):
            if path.is_file():
                found[path.relative_to(top).as_posix()] = path.stat().st_size
    return found


def _unless_absent(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def open_inside(root: Path, name: str) -> BinaryIO:
    """The regular file ``name``, open for reading; errors as :func:`file_size`."""
    path = inside(root, name)
    return open_checked(path, functools.partial(_regular, path))


def read_inside(root: Path, name: str, at_most: int | None = None) -> bytes:
    """The whole file; with ``at_most`` a larger one is refused before it is read."""
    with open_inside(root, name) as file:
        size = os.fstat(file.fileno()).st_size
        if at_most is not None and size > at_most:
            raise too_large(f"{root}/{name}", size, at_most)
        return file.read(size)


def too_large(where: str, size: int | None, at_most: int) -> CacheError:
    found = "more" if size is None else f"{size:,}"
    return CacheError(f"{where}: expected at most {at_most:,} bytes, found {found}; {_FOREIGN}")


def _regular(path: Path, found: os.stat_result) -> int:
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a device, a pipe or a socket"
        raise CacheError(f"{path}: expected a file, found {kind}; {_FOREIGN}")
    return found.st_size


def _shown(name: object) -> str:
    text = ascii(name)
    return text if len(text) <= 120 else text[:117] + "…"


_FOREIGN = "this is not a cache as teacher-cache writes it: do not use it, and ask whoever gave it to you"
