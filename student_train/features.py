"""A frozen vision tower's features, computed once per image and read from a mapped file ever after."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from teacher_cache.conversations import DataError, Image


def image_key(image: Image, folder: str) -> str:
    """What tells two images of a run apart: the digest of embedded bytes, else where the file lies. A relative path
    alone does not: two image folders may each hold a ``000.png``."""
    return image.image_id if image.data else str(Path(folder) / image.path)


class ImageFeatures:
    """(images, N, d_vision) float16 in ``folder``, by :func:`image_key`; picklable, so that loader processes share the
    map."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        facts = json.loads((folder / "features.json").read_text(encoding="utf-8"))
        self._line = {key: line for line, key in enumerate(facts["images"])}
        self._array = np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)

    def __getstate__(self) -> dict[str, Path]:
        return {"folder": self._folder}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]

    def read(self, keys: Sequence[str]) -> torch.Tensor:
        """(I, N, d_vision) float16."""
        return torch.from_numpy(self._array[[self._line[key] for key in keys]])


def compute_features(
    folder: Path,
    images: Iterable[tuple[Image, str]],
    tower: Callable[[torch.Tensor], torch.Tensor],
    pixels: Callable[[Image, str], torch.Tensor],
    digest: str,
    batch: int = 32,
) -> Path:
    """The folder of the features of all distinct ``images`` (with their folders): its name is made of the tower's
    ``digest`` and of each image's key, bytes and time of change, so an image that was written again is looked at again.

    A folder that is there is complete (it is renamed into place) and is used as it is.

    Raises
    ------
    DataError
        An image file is missing.
    """
    distinct = {image_key(image, where): (image, where) for image, where in images}
    versions = [(key, *_version(key, distinct[key][0])) for key in sorted(distinct)]
    listed = hashlib.sha256(json.dumps([digest, versions]).encode()).hexdigest()[:16]
    target = folder / f"vision-features-{listed}"
    if target.is_dir():
        return target
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True, exist_ok=True)
    ids = sorted(distinct)
    out: np.memmap[Any, np.dtype[np.float16]] | None = None
    for start in range(0, len(ids), batch):
        chunk = ids[start : start + batch]
        with torch.inference_mode():
            values = tower(torch.stack([pixels(*distinct[i]) for i in chunk])).to(torch.float16).cpu().numpy()
        if out is None:
            shape = (len(ids), *values.shape[1:])
            out = np.lib.format.open_memmap(temporary / "features.npy", "w+", np.float16, shape)
        out[start : start + len(chunk)] = values
    if out is None:
        np.save(temporary / "features.npy", np.zeros((0, 0, 0), np.float16))
    else:
        out.flush()
    (temporary / "features.json").write_text(json.dumps({"images": ids, "digest": digest}), encoding="utf-8")
    try:
        temporary.rename(target)
    except OSError:  # another run of the same ablation was faster; its features are the same
        shutil.rmtree(temporary)
    return target


def _version(path: str, image: Image) -> tuple[int, int]:
    """(bytes, nanoseconds of the last change) of an image file; embedded bytes are named by their digest already."""
    if image.data:
        return 0, 0
    try:
        found = Path(path).stat()
    except OSError as error:
        raise DataError(
            f"{path}: an image of the training data cannot be found ({error.strerror}). Set "
            "sources[…].image_folder to the folder the cache was made from"
        ) from error
    return found.st_size, found.st_mtime_ns
