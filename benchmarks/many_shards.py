"""What a warm batch costs over 500 and over 5,000 shards: random batches, in turns, in one run.

    python -m benchmarks.many_shards [--shards 5000] [--folder /dev/shm/many-shards]

Small shards of the arrays of ``standard``, so that only the number of folders is seen, not the disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from teacher_cache.store.maps import MAPS
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.storage import Storage
from teacher_cache.store.writer import ImagePlace, finish, write_shard
from tests.fixtures.store import SHAPE, signals, synthetic_cache

SAMPLES = 4
WIDTH = 1024
BATCH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=5000)
    parser.add_argument("--few", type=int, default=500)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="many-shards-", dir=_memory()))
    try:
        write(folder, arguments.shards)
        print(measure(folder, arguments.few, arguments.batches))
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)


def write(folder: Path, shards: int) -> None:
    """``shards`` shards with the same samples in each."""
    if (folder / "manifest.json").exists():
        return
    small = synthetic_cache(
        folder / "small",
        SAMPLES,
        shard_samples=SAMPLES,
        skipped=(),
        config=signals("standard"),
        shape=dataclasses.replace(SHAPE, hidden_size=WIDTH),
    )
    storage = Storage(folder)
    manifest = dataclasses.replace(
        small.manifest, planned_samples=SAMPLES * shards, planned_shards=shards, complete=False, counts={}, files={}
    )
    for name in small.manifest.files:
        if name.endswith(".safetensors"):
            storage.write(name, [small.storage.read(name)])
    for number in range(manifest.planned_shards):
        write_shard(storage, manifest, number, small.records, [ImagePlace()] * SAMPLES, [])
    finish(storage, manifest)
    shutil.rmtree(folder / "small")


def measure(folder: Path, few: int, batches: int) -> str:
    """CPU milliseconds a batch, after every shard was read once."""
    random, caches = np.random.default_rng(0), []
    for _ in range(2):
        caches.append(TeacherCache.open(folder))
    counts = [few * SAMPLES, len(caches[1])]
    for cache, count in zip(caches, counts, strict=True):
        for start in range(0, count, SAMPLES * BATCH):
            cache.read(range(start, min(start + SAMPLES * BATCH, count), SAMPLES))
    times: list[list[float]] = [[], []]
    for _ in range(batches):
        for cache, count, took in zip(caches, counts, times, strict=True):
            numbers = random.integers(count, size=BATCH)
            begin = time.process_time()
            cache.read(numbers)
            took.append(1e3 * (time.process_time() - begin))
    small, large = map(statistics.median, times)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return (
        f"a warm batch of {BATCH}: {small:.2f} ms over {few:,} shards, {large:.2f} ms over {counts[1] // SAMPLES:,} "
        f"(ratio {large / small:.2f}); {len(MAPS):,} arrays mapped, at most {MAPS.limit:,}; peak {memory:,} MB"
    )


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


if __name__ == "__main__":
    main()
