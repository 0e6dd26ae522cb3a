"""A frozen vision tower's features, computed once per image and read from a mapped file ever after.

A run that is killed leaves ``.vision-features-….part`` with what it had; the next one checks that (a CRC-32C for each
image, kept in order in ``features.crc``) and goes on from there. One run computes at a time, others wait for it.
The features of an image that is damaged are NaN, and ``features.json`` says why.
"""

from __future__ import annotations

import hashlib
import json
import os
import tokenize
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch

from teacher_cache.data.conversations import Image
from teacher_cache.errors import DataError, ImageError
from teacher_cache.files import flush
from teacher_cache.store.locks import waiting_for

_FACTS, _FEATURES, _SUMS = "features.json", "features.npy", "features.crc"


def image_key(image: Image, folder: str) -> str:
    """What tells two images of a run apart: the digest of embedded bytes, else where the file lies. A relative path
    alone does not: two image folders may each hold a ``000.png``."""
    return image.image_id if image.embedded else str(Path(folder) / image.path)


class ImageFeatures:
    """(images, N, d_vision) float16 in ``folder``, by :func:`image_key`; picklable, so that loader processes share the
    map. An image's features are compared with their checksum when they are first read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            facts = json.loads((folder / _FACTS).read_bytes())
            if facts["sha256"] != _facts_digest(facts):
                raise ValueError(f"{_FACTS} was changed after it was written")
            self._line = {key: line for line, key in enumerate(facts["images"])}
            self.damaged: dict[str, str] = facts.get("damaged", {})
            self._array = _mapped(folder / _FEATURES, "r")
            self._sums = np.fromfile(folder / _SUMS, "<u4")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(self._damaged(f"damaged ({error})")) from error
        self._checked = bytearray(len(self._sums))
        if not len(self._line) == len(self._array) == len(self._sums):
            raise DataError(self._damaged("its files list other numbers of images"))

    def __getstate__(self) -> dict[str, Path]:
        return {"folder": self._folder}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]

    def read(self, keys: Sequence[str]) -> torch.Tensor:
        """(I, N, d_vision) float16.

        Raises ``ImageError`` with its reason for a damaged image, ``DataError`` where they were changed after they
        were written.
        """
        if reason := next((self.damaged[key] for key in keys if key in self.damaged), ""):
            raise ImageError(reason)
        lines = [self._line[key] for key in keys]
        found = self._array[lines]
        for key, line, values in zip(keys, lines, found, strict=True):
            if not self._checked[line] and google_crc32c.value(values.tobytes()) != self._sums[line]:
                raise DataError(self._damaged(f"the features of {key} were changed after they were written"))
            self._checked[line] = 1
        return torch.from_numpy(found)

    def blank(self) -> torch.Tensor:
        """(N, d_vision): what stands in for the features of a damaged image."""
        return torch.zeros(self._array.shape[1:], dtype=torch.float16)

    def _damaged(self, what: str) -> str:
        return f"{self._folder}: {what}. Delete that folder: the next run computes it anew"


def compute_features(
    folder: Path,
    images: Iterable[tuple[Image, str]],
    tower: Callable[[torch.Tensor], torch.Tensor],
    pixels: Callable[[Image, str], torch.Tensor],
    digest: str,
    batch: int = 32,
    blank: Callable[[], torch.Tensor] | None = None,
) -> Path:
    """The folder of the features of all distinct ``images`` (with their folders): its name is made of the tower's
    ``digest`` and of each image's key, bytes, time of change and (from a cache) checksum, so an image that was written
    again is looked at again.

    A folder that is there is complete (it is renamed into place) and is used as it is. With ``blank``, which stands in
    for the pixels of a damaged image, such an image is written down with its reason.

    Raises ``DataError``: an image file is missing. ``ImageError``: without ``blank``: an image is damaged.
    """
    distinct = {image_key(image, where): (image, where) for image, where in images}
    keys = sorted(distinct)
    versions = [(key, *_version(key, distinct[key][0]), distinct[key][0].checksum) for key in keys]
    listed = hashlib.sha256(json.dumps([digest, versions]).encode()).hexdigest()[:16]
    target = folder / f"vision-features-{listed}"
    damaged: dict[str, str] = {}

    def shown(key: str) -> torch.Tensor:
        try:
            return pixels(*distinct[key])
        except ImageError as error:
            if blank is None:
                raise
            damaged[key] = str(error)
            return blank()

    with waiting_for(folder / f".{target.name}.lock"):
        if not target.is_dir():
            part = folder / f".{target.name}.part"
            part.mkdir(exist_ok=True)
            _compute(part, keys, shown, damaged, tower, batch)
            facts = {"images": keys, "digest": digest} | ({"damaged": damaged} if damaged else {})
            (part / _FACTS).write_text(json.dumps({**facts, "sha256": _facts_digest(facts)}), encoding="utf-8")
            flush(part / _FACTS)
            part.rename(target)
    return target


def _compute(
    part: Path,
    keys: Sequence[str],
    pixels: Callable[[str], torch.Tensor],
    damaged: Mapping[str, str],
    tower: Callable[[torch.Tensor], torch.Tensor],
    batch: int,
) -> None:
    """Fill ``part`` from where an earlier run stopped; ``pixels`` notes the ``damaged`` images."""
    out, done = _begun(part, len(keys))
    for key, values in zip(keys[:done], () if out is None else out, strict=False):
        if np.isnan(values.flat[0]):  # damaged, or of a tower that overflows: reading it again tells
            pixels(key)
    with (part / _SUMS).open("r+b" if done else "wb") as sums:
        sums.truncate(4 * done)
        sums.seek(4 * done)
        for start in range(done, len(keys), batch):
            chunk = keys[start : start + batch]
            with torch.inference_mode():
                values = tower(torch.stack([pixels(key) for key in chunk])).to(torch.float16).cpu().numpy()
            if lost := [place for place, key in enumerate(chunk) if key in damaged]:
                values = values.copy()
                values[lost] = np.nan
            if out is None:
                shape = (len(keys), *values.shape[1:])
                out = np.lib.format.open_memmap(part / _FEATURES, "w+", np.float16, shape)
            out[start : start + len(chunk)] = values
            sums.write(np.array([google_crc32c.value(v.tobytes()) for v in values], "<u4").tobytes())
            sums.flush()
        os.fsync(sums.fileno())
    if out is None:
        np.save(part / _FEATURES, np.zeros((0, 0, 0), np.float16))
    else:
        out.flush()


def _begun(part: Path, images: int) -> tuple[np.memmap[Any, np.dtype[np.float16]] | None, int]:
    """What an earlier run left: its array, and how many images of it, from the first on, are as it wrote them."""
    try:
        out = _mapped(part / _FEATURES, "r+")
        sums = np.fromfile(part / _SUMS, "<u4")
    except (OSError, ValueError):  # none, or no more than its beginning
        return None, 0
    if len(out) != images:
        return None, 0
    for line, expected in enumerate(sums[:images]):
        if google_crc32c.value(out[line].tobytes()) != expected:
            return out, line
    return out, min(len(sums), images)


def _mapped(path: Path, mode: str) -> np.memmap[Any, np.dtype[np.float16]]:
    """The array that lies in ``path``; ``ValueError`` where its header is damaged, ``OSError`` where it is not there.

    The checksums are of bytes alone, so that the header must say how they are to be read: bytes that are swapped or
    taken for integers have the same sums.
    """
    try:
        array = np.lib.format.open_memmap(path, mode)
    except (SyntaxError, tokenize.TokenError, OverflowError) as error:  # what numpy's reading of a header may raise
        raise ValueError(f"{path.name} has a damaged header: {error}") from error
    if array.dtype != np.dtype("<f2"):
        raise ValueError(f"{path.name} holds {array.dtype.str}, expected <f2")
    return array


def _facts_digest(facts: dict[str, Any]) -> str:
    plain = json.dumps([facts["images"], facts["digest"], *([facts["damaged"]] if "damaged" in facts else [])])
    return hashlib.sha256(plain.encode()).hexdigest()


def _version(path: str, image: Image) -> tuple[int, int]:
    """(bytes, nanoseconds of the last change) of an image file; embedded bytes are named by their digest already."""
    if image.embedded:
        return 0, 0
    try:
        found = Path(path).stat()
    except OSError as error:
        raise DataError(
            f"{path}: an image of the training data cannot be found ({error.strerror}). Set "
            "sources[…].image_folder to the folder the cache was made from"
        ) from error
    return found.st_size, found.st_mtime_ns
