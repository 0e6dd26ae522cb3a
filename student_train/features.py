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

from teacher_cache.conversations import Image


class ImageFeatures:
    """(images, N, d_vision) float16 in ``folder``, by image_id; picklable, so that loader processes share the map."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        facts = json.loads((folder / "features.json").read_text(encoding="utf-8"))
        self._line = {image_id: line for line, image_id in enumerate(facts["image_ids"])}
        self._array = np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)

    def __getstate__(self) -> dict[str, Path]:
        return {"folder": self._folder}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]

    def read(self, image_ids: Sequence[str]) -> torch.Tensor:
        """(I, N, d_vision) float16."""
        return torch.from_numpy(self._array[[self._line[i] for i in image_ids]])


def compute_features(
    folder: Path,
    images: Iterable[tuple[Image, str]],
    tower: Callable[[torch.Tensor], torch.Tensor],
    pixels: Callable[[Image, str], torch.Tensor],
    digest: str,
    batch: int = 32,
) -> ImageFeatures:
    """Features of all distinct ``images`` (with their folders), kept under a name that the tower's ``digest`` makes.

    A folder that is there is complete (it is renamed into place) and is used as it is.
    """
    distinct = {image.image_id: (image, where) for image, where in images}
    listed = hashlib.sha256(json.dumps([digest, sorted(distinct)]).encode()).hexdigest()[:16]
    target = folder / f"vision-features-{listed}"
    if target.is_dir():
        return ImageFeatures(target)
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
    (temporary / "features.json").write_text(json.dumps({"image_ids": ids, "digest": digest}), encoding="utf-8")
    try:
        temporary.rename(target)
    except OSError:  # another run of the same ablation was faster; its features are the same
        shutil.rmtree(temporary)
    return ImageFeatures(target)
