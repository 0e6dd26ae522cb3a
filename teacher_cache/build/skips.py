"""How many samples a build may leave out, and how shards that left some out are made again."""

from __future__ import annotations

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from teacher_cache.config import CacheConfig
from teacher_cache.data.conversations import Conversation, Skipped
from teacher_cache.data.image_files import check_folder, read_image
from teacher_cache.data.sample_reader import SkipCount
from teacher_cache.data.skipped import Allowed, counted
from teacher_cache.data.spool import SampleFile
from teacher_cache.errors import ImageError
from teacher_cache.store.checksums import read_file_sums
from teacher_cache.store.manifest import Manifest, write_manifest
from teacher_cache.store.names import INDEX
from teacher_cache.store.storage import Storage
from teacher_cache.store.writer import committed_shards, images_name, shard_name

PROBED = 256
"""Images that are looked for before the teacher is opened, spread evenly over the samples."""
_AGAIN = " and run the same command again (committed shards stand)"


def allowed(config: CacheConfig, planned: int) -> Allowed:
    """How many of ``planned`` samples may be skipped."""
    return Allowed("data.max_skipped", config.data.max_skipped, planned)


def check_share(config: CacheConfig, planned: int, skips: SkipCount) -> None:
    """Stop a build that leaves out more than ``data.max_skipped``; what was committed stays.

    Raises
    ------
    DataError
        with the counted reasons.
    """
    allowed(config, planned).check(skips.skipped, skips, do=_AGAIN)


def check_inputs(config: CacheConfig, samples: SampleFile) -> None:
    """Before the teacher is opened: what reading skipped, and whether a sample of the images is there at all.

    Raises
    ------
    DataError
        The image folder is not there, or too much would be skipped, by an estimate that is high in one case of 30,000.
    """
    planned = len(samples)
    check_share(config, planned, samples.skips)
    chosen = np.unique(np.linspace(0, planned - 1, min(PROBED, planned)).astype(np.int64)).tolist()
    probed = [s for s in (samples[i] for i in chosen) if isinstance(s, Conversation)]
    probed = [s for s in probed if not all(image.embedded for image in s.images)]
    if not probed:
        return
    check_folder(config.data.image_folder)
    with ThreadPoolExecutor(config.speed.loader_threads) as threads:
        lost = [r for r in threads.map(lambda s: _reason(config, s), probed) if r is not None]
    reasons = counted(lost)
    share = len(lost) / len(chosen)
    margin = 0.0 if len(chosen) == planned else 4 * math.sqrt(share * (1 - share) / len(chosen))
    expected = planned * (share - margin) + samples.skips.skipped
    if len(chosen) < planned:  # that none is left is known only when all were tried
        expected = min(expected, planned - 1)
    tried = f"{len(lost)} of {len(probed)} images tried: {reasons}"
    allowed(config, planned).check(expected, tried, found="would be skipped", do=_AGAIN)


def forget_skipped(storage: Storage, manifest: Manifest, samples: SampleFile) -> list[int]:
    """Remove the shards that left out a sample which could be read as a conversation, so that they are made again.

    What the data file itself makes unusable stays so; images may have come back. Answers stay, where there are some.
    The manifest first says that the cache is not complete.
    """
    size, found = manifest.layout["shard_samples"], []
    for number in sorted(committed_shards(storage, manifest)):
        index = f"{shard_name(number)}/{INDEX}"
        _, metadata = read_file_sums(storage.read(index), f"{storage.url}/{index}")
        left_out = {s["sample_id"] for s in metadata["skipped"]}
        chosen = samples[number * size : (number + 1) * size] if left_out else []
        if any(isinstance(s, Conversation) and s.sample_id in left_out for s in chosen):
            found.append(number)
    if found:
        write_manifest(storage, dataclasses.replace(manifest, complete=False, files={}, counts={}))
    for number in found:
        storage.remove(shard_name(number), INDEX)
        storage.remove(images_name(number), INDEX)
    return found


def _reason(config: CacheConfig, sample: Conversation) -> Skipped | None:
    try:
        for image in sample.images:
            read_image(image, config.data.image_folder)
    except ImageError as error:
        return Skipped(sample.sample_id, str(error))
    return None
