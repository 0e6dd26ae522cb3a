"""How fast the cache is read and written, beside other ways to keep the same arrays: ``make bench``.

Every candidate keeps the same samples (``ROWS`` answer tokens each on average, d wide, k = 64) and hands out copies of
one sample's arrays, in random order, from a warm page cache: what is measured is the software. Rounds of all
candidates are interleaved and the best round of each counts, so that another load on the machine hits all alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from teacher_cache.config import CacheConfig, DataConfig, LayoutConfig, SignalsConfig, TeacherConfig
from teacher_cache.store.checksums import sha256
from teacher_cache.store.manifest import Manifest, new_manifest, write_manifest
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.records import TeacherRecord
from teacher_cache.store.storage import Storage
from teacher_cache.store.writer import LEDGER, SAMPLES, ImagePlace, finish, write_shard

ROWS, BATCH, ROUNDS = 200, 32, 5
SHARD = 128
NAMES = ("topk_ids", "topk_logprobs", "stats", "hidden", "hidden_scale")
Sample = dict[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--widths", type=int, nargs="+", default=[2048, 5120])
    parser.add_argument("--skip-open", action="store_true")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: a temporary folder")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for width in arguments.widths:
        with tempfile.TemporaryDirectory(prefix="bench-store-", dir=arguments.folder) as folder:
            results[f"d={width}"] = compare(Path(folder), width, arguments.samples)
    if not arguments.skip_open:
        results["open"] = opening()
    out = Path("runs/bench/store.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1))


def compare(folder: Path, width: int, count: int) -> dict[str, Any]:
    """Single reads, batch reads and writing at one width, in GB/s."""
    samples = make_samples(width, count)
    size = sum(a.nbytes for s in samples for a in s.values())
    print(f"\n## d = {width}, {count} samples, {size / 1e9:.2f} GB, {size / count / 1e3:.0f} KB a sample")
    written = writing(folder, samples, width)
    readers = open_all(folder, samples)
    single = _interleaved({n: r for n, (r, _) in readers.items()}, samples)
    batch = _interleaved({n: r for n, (_, r) in readers.items() if r is not None}, samples, BATCH)
    _table("reading single samples in random order", single, "numpy memmap")
    _table(f"reading batches of {BATCH}", batch, "numpy memmap")
    _table("writing (flushed to disk)", written, "tensorstore")
    return {"single": single, "batch": batch, "write": written}


def make_samples(width: int, count: int) -> list[Sample]:
    random = np.random.default_rng(0)
    block = random.integers(-127, 128, (2 * ROWS, width), np.int8)
    out = []
    for rows in random.integers(ROWS // 4, 2 * ROWS - ROWS // 4, count).tolist():
        logprobs = -np.sort(random.random((rows, 64), np.float32), -1).astype(np.float16)
        ids = random.integers(0, 32000, (rows, 64), np.uint16)
        scale = np.ones(rows, np.float16)
        hidden = np.roll(block[:rows], int(random.integers(width)), 1)
        stats = random.random((rows, 8), np.float32)
        out.append(dict(zip(NAMES, (ids, logprobs, stats, hidden, scale), strict=True)))
    return out


# --- the candidates: each returns (read one sample, read a batch or None)

One = Callable[[int], Sample]
Many = Callable[[list[int]], Any]


def open_all(folder: Path, samples: list[Sample]) -> dict[str, tuple[One, Many | None]]:
    readers: dict[str, tuple[One, Many | None]] = {}
    for name, opener in {
        "teacher_cache": _ours,
        "teacher_cache, unchecked": lambda f, s: _ours(f, s, checked=False),
        "numpy memmap": _memmap,
        "litdata": _litdata,
        "tensorstore": _tensorstore,
        "zarr-python": _zarr,
        "zarr with zarrs": lambda f, s: _zarr(f, s, "zarrs.ZarrsCodecPipeline"),
        "one torch file a sample": _torch_files,
        "Parquet": _parquet,
    }.items():
        try:
            readers[name] = opener(folder, samples)
        except ImportError as error:
            print(f"{name}: left out ({error})")
    return readers


def _ours(folder: Path, samples: list[Sample], checked: bool = True) -> tuple[One, Many]:
    cache = TeacherCache(Storage(folder / "ours"), checked=checked)

    def one(i: int) -> Sample:
        return cache.read((i,), NAMES).arrays

    return one, lambda indices: cache.read(indices, NAMES).arrays


def _memmap(folder: Path, samples: list[Sample]) -> tuple[One, Many]:
    root = folder / "memmap"
    root.mkdir()
    starts = np.concatenate([[0], np.cumsum([len(s["stats"]) for s in samples])]).tolist()
    maps = {}
    for name in NAMES:
        np.save(root / f"{name}.npy", np.concatenate([s[name] for s in samples]))
        maps[name] = np.load(root / f"{name}.npy", mmap_mode="r")

    def one(i: int) -> Sample:
        begin, end = starts[i], starts[i + 1]
        return {name: np.array(array[begin:end]) for name, array in maps.items()}

    def many(indices: list[int]) -> Sample:
        return {n: np.concatenate([a[starts[i] : starts[i + 1]] for i in indices]) for n, a in maps.items()}

    return one, many


def _litdata(folder: Path, samples: list[Sample]) -> tuple[One, Many | None]:
    import torch
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    root = folder / "litdata"
    writer = BinaryWriter(str(root), chunk_bytes="64MB")
    for i, sample in enumerate(samples):
        writer[i] = {n: torch.from_numpy(a.view(np.int16) if a.dtype == np.uint16 else a) for n, a in sample.items()}
    writer.done()
    writer.merge()
    data = StreamingDataset(str(root))
    # It hands out views of the mapped chunk; a copy is what everybody else gives, and what reads the bytes.
    return lambda i: {name: tensor.clone() for name, tensor in data[i].items()}, None


def _tensorstore(folder: Path, samples: list[Sample]) -> tuple[One, Many]:
    """On our own files; a batch is asked for at once."""
    import tensorstore

    arrays = [
        {
            name: tensorstore.open({"driver": "zarr3", "kvstore": f"file://{shard}/{name}/"}, open=True).result()
            for name in NAMES
        }
        for shard in sorted((folder / "ours/shards").glob("0*"))
    ]
    places = _places(samples)

    def ask(i: int) -> dict[str, Any]:
        shard, begin, end = places[i]
        return {name: array[begin:end].read() for name, array in arrays[shard].items()}

    def many(indices: list[int]) -> list[Sample]:
        return [{n: f.result() for n, f in asked.items()} for asked in [ask(i) for i in indices]]

    return lambda i: {n: f.result() for n, f in ask(i).items()}, many


def _zarr(folder: Path, samples: list[Sample], pipeline: str = "") -> tuple[One, None]:
    import zarr

    default = zarr.config.get("codec_pipeline.path")
    if pipeline:
        import zarrs  # noqa: F401

        zarr.config.set({"codec_pipeline.path": pipeline})
    arrays = [
        {name: zarr.open_array(str(shard / name), mode="r") for name in NAMES}
        for shard in sorted((folder / "ours/shards").glob("0*"))
    ]
    zarr.config.set({"codec_pipeline.path": default})
    places = _places(samples)

    def one(i: int) -> Sample:
        shard, begin, end = places[i]
        return {name: array[begin:end] for name, array in arrays[shard].items()}

    return one, None


def _torch_files(folder: Path, samples: list[Sample]) -> tuple[One, None]:
    import torch

    root = folder / "torch"
    root.mkdir()
    for i, sample in enumerate(samples):
        tensors = {n: torch.from_numpy(a.view(np.int16) if a.dtype == np.uint16 else a) for n, a in sample.items()}
        torch.save(tensors, root / f"{i}.pt")
    return lambda i: torch.load(root / f"{i}.pt", weights_only=True), None


def _parquet(folder: Path, samples: list[Sample]) -> tuple[One, None]:
    path = folder / "samples.parquet"
    table = pa.table({n: pa.array([s[n].tobytes() for s in samples], pa.large_binary()) for n in NAMES})
    pq.write_table(table, path, row_group_size=16, compression="none", use_dictionary=False)
    file = pq.ParquetFile(path, memory_map=True)

    def one(i: int) -> Sample:
        group = file.read_row_group(i // 16)
        return {n: np.frombuffer(group[n][i % 16].as_py(), samples[i][n].dtype) for n in NAMES}

    return one, None


def _places(samples: list[Sample]) -> list[tuple[int, int, int]]:
    places = []
    for i in range(0, len(samples), SHARD):
        ends = np.cumsum([len(s["stats"]) for s in samples[i : i + SHARD]]).tolist()
        places += [(i // SHARD, b, e) for b, e in zip([0, *ends], ends, strict=False)]
    return places


# --- measuring


def _interleaved(readers: dict[str, Any], samples: list[Sample], batch: int = 0) -> dict[str, float]:
    """GB/s over all samples (of a slow candidate: those of a second), each item at its best of ``ROUNDS`` rounds."""
    order = np.random.default_rng(1).permutation(len(samples)).tolist()
    sizes = [sum(a.nbytes for a in s.values()) for s in samples]
    asked = [order[i : i + batch] for i in range(0, len(order), batch)] if batch else order
    best: dict[str, list[float]] = {name: [] for name in readers}
    for item in asked:  # every block is touched once, so that pages and checksums are warm
        readers["teacher_cache"](item)
    for round_ in range(ROUNDS + 1):
        for name, reader in readers.items():
            times = _times(reader, asked)
            if round_ == 1:
                best[name] = times
            elif round_:
                best[name] = [min(pair) for pair in zip(best[name], times, strict=False)]
    done = {n: sum(sum(sizes[i] for i in (x if batch else [x])) for x in asked[: len(t)]) for n, t in best.items()}
    return {name: done[name] / sum(times) / 1e9 for name, times in best.items()}


def _times(reader: Any, asked: list[Any]) -> list[float]:
    """Seconds of each item, until a second is over."""
    gc.collect()
    times: list[float] = []
    total = 0.0
    begin = time.perf_counter()
    for item in asked:
        reader(item)
        end = time.perf_counter()
        times.append(end - begin)
        total += times[-1]
        if total > 1.0:
            break
        begin = time.perf_counter()
    return times


def writing(folder: Path, samples: list[Sample], width: int) -> dict[str, float]:
    """GB/s of whole shards, flushed to disk: ours with checksums and index, tensorstore with its defaults."""
    storage, manifest = Storage(folder / "ours"), synthetic_manifest(width, len(samples))
    write_manifest(storage, manifest)
    best = {"teacher_cache": 0.0, "tensorstore": 0.0}
    for number in range(manifest.planned_shards):
        chosen = samples[number * SHARD : (number + 1) * SHARD]
        records = [_record(number * SHARD + i, s) for i, s in enumerate(chosen)]
        size = sum(a.nbytes for s in chosen for a in s.values())
        for name, write in (("teacher_cache", _write_ours), ("tensorstore", _write_tensorstore)):
            os.sync()
            begin = time.perf_counter()
            write(storage, manifest, number, records)
            best[name] = max(best[name], size / (time.perf_counter() - begin) / 1e9)
    finish(storage, manifest)
    return best


def _write_ours(storage: Storage, manifest: Manifest, number: int, records: list[TeacherRecord]) -> None:
    write_shard(storage, manifest, number, records, [ImagePlace()] * len(records), [])


def _write_tensorstore(storage: Storage, manifest: Manifest, number: int, records: list[TeacherRecord]) -> None:
    import tensorstore

    assert storage.local is not None
    root = storage.local.parent / f"tensorstore-{number}"
    futures = []
    for name in (*NAMES, "input_ids", "loss_mask"):
        array = np.concatenate([r.arrays[name] for r in records])
        lines = max(1, min(len(array), (1 << 20) // max(array[:1].nbytes, 1)))
        metadata = {
            "shape": array.shape,
            "data_type": str(array.dtype),
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [lines, *array.shape[1:]]}},
        }
        spec = {"driver": "zarr3", "kvstore": f"file://{root}/{name}/", "metadata": metadata}
        store = tensorstore.open(spec, create=True).result()
        futures.append(store.write(array))
    for future in futures:
        future.result()
    shutil.rmtree(root)


def synthetic_manifest(width: int, samples: int, shard_samples: int = SHARD) -> Manifest:
    config = CacheConfig(
        data=DataConfig(path="synthetic"),
        teacher=TeacherConfig(model="synthetic"),
        signals=SignalsConfig(),
        layout=LayoutConfig(shard_samples=shard_samples),
    )
    teacher = {"model": "synthetic", "image_token": 32000, "end_token": 2, "tokenizer": "none", "vocabulary": {}}
    teacher |= {"processor": {}, "chat_template": "", "logit_rule": {"scale": 1.0, "cap": 0.0}}
    shape = {"hidden_size": width, "vocabulary": 32064}
    return new_manifest(config, teacher | {"shape": shape}, {"files": []}, samples)


def _record(number: int, sample: Sample) -> TeacherRecord:
    rows = len(sample["stats"])
    tokens = {"input_ids": np.arange(rows + 40, dtype=np.uint16), "loss_mask": np.arange(rows + 40) >= 40}
    tokens["runs"] = np.zeros((0, 2), np.uint32)
    return TeacherRecord(f"sample-{number}", (), ("what?",), ("that",), ("that",), "teacher", {**tokens, **sample})


def _table(title: str, rates: dict[str, float], reference: str) -> None:
    print(f"\n{title}\n\n| | GB/s | of {reference} |\n|---|---|---|")
    for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
        print(f"| {name} | {rate:.2f} | {rate / rates[reference]:.2f} |")


# --- opening


def opening() -> dict[str, Any]:
    """Seconds to open a cache and read one batch, and the memory that took, in a process of its own."""
    print("\n## opening\n\n| samples | open, ms | first batch of 32, ms | memory of both, MB |\n|---|---|---|---|")
    found = {}
    for count in (10**3, 10**5, 10**6):
        with tempfile.TemporaryDirectory(prefix="bench-open-") as folder:
            many_shards(Path(folder) / "c", count)
            done = subprocess.run(
                [sys.executable, "-c", _OPEN, str(Path(folder) / "c")], capture_output=True, text=True, check=True
            )
        found[count] = json.loads(done.stdout)
        numbers = found[count]
        print(f"| {count:,} | {numbers['open']:.1f} | {numbers['read']:.1f} | {numbers['memory']:.1f} |")
    return found


_OPEN = """
import json, sys, time
import numpy as np, pyarrow.parquet, zarr
from teacher_cache.store.reader import TeacherCache
def resident():
    return int(open('/proc/self/statm').read().split()[1]) * 4096 / 1e6
before, begin = resident(), time.perf_counter()
cache = TeacherCache.open(sys.argv[1])
opened = time.perf_counter()
random = np.random.default_rng(0)
cache.read(random.integers(len(cache), size=32))
read = time.perf_counter()
print(json.dumps({'open': 1e3 * (opened - begin), 'read': 1e3 * (read - opened), 'memory': resident() - before}))
"""


def many_shards(root: Path, samples: int, shard_samples: int = 500) -> None:
    """A cache of ``samples`` samples whose shards are all links to one, with a true ledger and sample list."""
    small = [
        {n: a[:4, :16] if n == "hidden" else a[:4] for n, a in s.items()} for s in make_samples(16, 1) * shard_samples
    ]
    storage, manifest = Storage(root), synthetic_manifest(16, shard_samples, shard_samples)
    write_manifest(storage, manifest)
    _write_ours(storage, manifest, 0, [_record(i, s) for i, s in enumerate(small)])
    one = finish(storage, manifest)
    shards = samples // shard_samples
    for number in range(1, shards):
        (root / f"shards/{number:05d}").symlink_to(root / "shards/00000")
    digests = dict(one.files)
    for name in (LEDGER, SAMPLES):
        table = pq.read_table(root / name)
        column = "shard"
        repeated = pa.concat_tables([table] * shards).set_column(
            table.column_names.index(column), column, pa.array(np.repeat(np.arange(shards), table.num_rows))
        )
        pq.write_table(repeated, root / name, compression="zstd")
        digests[name] = sha256((root / name).read_bytes())
    whole = synthetic_manifest(16, samples, shard_samples)
    counts = {n: c * shards for n, c in one.counts.items()}
    write_manifest(storage, dataclasses.replace(whole, complete=True, files=digests, counts=counts))


if __name__ == "__main__":
    main()
