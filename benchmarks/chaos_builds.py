"""Builds killed at random moments, flipped bits, a full disk. Every promise is checked, none timed.

A run is a process that builds the tiny world's cache (real teacher, real store, some of its images broken) and gets
``kill -9``: half of them at a random moment, half at a random file operation (writing, syncing, renaming, uploading),
so that commits and resumes are hit as often as they deserve. After each, what is committed must be byte for byte what
the uninterrupted build has; a run that reaches its end must have given the same cache; then the next one starts from
nothing. Locally and on S3 (moto on the loopback).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils.logging import disable_progress_bar

from pipelines.tiny.prepare import TEACHER
from pipelines.tiny.world import write_world
from teacher_cache.build.build import build_cache
from teacher_cache.config import CacheConfig, DataConfig, GenerationConfig, LayoutConfig, SignalsConfig, TeacherConfig
from teacher_cache.errors import CacheError, StorageError
from teacher_cache.store import storage as storage_module
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.storage import Storage
from teacher_cache.teachers.torch_teacher import TorchTeacher
from teacher_cache.trust.verify import verify_cache

Files = dict[str, bytes]
NOT_CONTENT = "cost.json"


BREAKS: tuple[Callable[[Path], object], ...] = (
    Path.unlink,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"<html>not found</html>"),
    lambda path: path.write_bytes(path.read_bytes()[:60]),
)
"""What happens to every sixth image: each of its samples is then left out, with the same reason in every run."""


@dataclass
class Stage:
    """The tiny world, its teacher (loaded once, shared by the forked runs) and the uninterrupted cache."""

    folder: Path
    config: CacheConfig
    teacher: TorchTeacher
    reference: Files
    random: random.Random
    skipped: int

    @classmethod
    def make(cls, folder: Path, seed: int, images: int = 24) -> Stage:
        disable_progress_bar()  # tqdm's lock is shared with forked processes: one killed under it stops all others
        write_world(folder / "world", train_images=images, dev_images=1, test_images=1, seed=7)
        for number, path in enumerate(sorted((folder / "world/images").glob("train-*"))[::6]):
            BREAKS[number % len(BREAKS)](path)
        config = CacheConfig(
            output=str(folder / "reference"),
            data=DataConfig(
                path=str(folder / "world/train.json"), image_folder=str(folder / "world/images"), max_skipped=0.5
            ),
            teacher=TeacherConfig(str(TEACHER), backend="torch", dtype="float32", chat_template="tiny", max_length=256),
            generation=GenerationConfig(max_new_tokens=32),
            signals=SignalsConfig(preset="full", top_k=8, hidden="text", visual="states", calibration_samples=8),
            layout=LayoutConfig(shard_samples=8),
        )
        teacher = TorchTeacher(config.teacher, config.generation, config.speed)
        skipped = build_cache(config, teacher=teacher, style="quiet").skipped
        assert skipped, "no sample has a broken image"
        files = content(local_files(folder / "reference"))
        return cls(folder, config, teacher, files, random.Random(seed), skipped)


@dataclass(frozen=True)
class Place:
    """Where a run writes: its address, all its files, and how to empty it."""

    url: str
    options: dict[str, Any]
    files: Callable[[], Files]
    clear: Callable[[], None]


@dataclass
class Tally:
    """What happened to the runs of one place."""

    where: str
    killed: int = 0
    finished: int = 0
    caches: int = 0
    resumed_from: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        least, most = min(self.resumed_from, default=0), max(self.resumed_from, default=0)
        return (
            f"{self.where}: {self.killed} runs killed, {self.finished} reached their end, {self.caches} caches "
            f"completed, all byte-identical to the uninterrupted one; resumed from {least} to {most} committed shards; "
            "no committed sample lost, none twice"
        )


def kills(stage: Stage, place: Place, runs: int, where: str) -> Tally:
    """``runs`` builds that are killed; raises ``AssertionError`` at the first broken promise."""
    tally, committed = Tally(where), 0
    place.clear()
    begin = time.monotonic()
    _run(stage, place, 0)
    seconds = time.monotonic() - begin
    assert content(place.files()) == stage.reference, f"{where} has other bytes than the local reference"
    place.clear()
    while tally.killed < runs:
        tally.resumed_from.append(committed)
        if _run(stage, place, seconds):
            tally.finished += 1
            assert content(place.files()) == stage.reference, "the finished cache is not the uninterrupted one"
            tally.caches += 1
            committed = 0
            place.clear()
            continue
        tally.killed += 1
        files = content(place.files())
        now = _check_committed(files, stage.reference)
        assert now >= committed, f"{committed} shards were committed before the run, {now} after it"
        committed = now
    while not _run(stage, place, 0):
        raise AssertionError("a run that nobody kills does not finish")
    assert content(place.files()) == stage.reference, "the cache that was resumed is not the uninterrupted one"
    tally.caches += 1
    return tally


def _run(stage: Stage, place: Place, seconds: float) -> bool:
    """Build in a forked process, killed within ``seconds`` or at an operation (0: not); whether it reached its end."""
    operation = stage.random.randrange(1, 200) if seconds and stage.random.random() < 0.5 else 0
    process = multiprocessing.get_context("fork").Process(target=_build, args=(stage, place, operation))
    process.start()
    if seconds and not operation:
        process.join(stage.random.uniform(0, 1.1 * seconds))
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"the run ended by itself with {process.exitcode}"
    return process.exitcode == 0


def _build(stage: Stage, place: Place, operation: int) -> None:
    if operation:
        die_at(operation)
    config = replace(stage.config, output=place.url)
    build_cache(config, teacher=stage.teacher, style="quiet", options=place.options)


def die_at(operation: int) -> None:
    """Kill this process at its n-th file operation: a written file is then cut in half, a rename not done."""
    left = [operation]

    def deadly(function: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                if function.__name__ == "_write_file":
                    data = b"".join(bytes(p) for p in arguments[1])
                    arguments[0].write_bytes(data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return counted

    for name in ("_write_file", "flush"):
        setattr(storage_module, name, deadly(getattr(storage_module, name)))
    for owner, name in ((Path, "rename"), (Path, "replace")):
        setattr(owner, name, deadly(getattr(owner, name)))
    storage_module.Storage._retry = deadly(storage_module.Storage._retry)  # type: ignore[method-assign]


def _check_committed(files: Files, reference: Files) -> int:
    """Committed folders are whole and right, the manifest does not claim too much; returns the committed shards."""
    if "manifest.json" in files:
        claimed = json.loads(files["manifest.json"])["complete"]
        assert not claimed or files == reference, "the manifest says complete, but the cache is not"
    folders = {n.rpartition("/")[0] for n in files if n.endswith("/index.parquet") and "/." not in n}
    for folder in folders:
        for name, data in reference.items():
            if name.startswith(f"{folder}/"):
                assert files.get(name) == data, f"{name} of a committed folder is not that of the uninterrupted build"
    return sum(folder.startswith("shards/") for folder in folders)


def flips(stage: Stage, count: int) -> str:
    """Single bits of single files: found by a deep check, never handed out by a reader."""
    root = Path(stage.config.output)
    names = sorted(n for n, data in local_files(root).items() if data and n != NOT_CONTENT)
    wanted, found, refused = _read_all(root), 0, 0
    assert verify_cache(Storage(root), deep=True).ok
    for _ in range(count):
        path = root / stage.random.choice(names)
        whole = path.read_bytes()
        place, bit = stage.random.randrange(len(whole)), 1 << stage.random.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        report = verify_cache(Storage(root), deep=True)
        assert any(p.file == str(path.relative_to(root)) for p in report.problems), f"{path}, byte {place}: not found"
        found += 1
        try:
            assert _same(_read_all(root), wanted), f"{path}, byte {place}: read as data"
        except CacheError:
            refused += 1
        path.write_bytes(whole)
    return (
        f"{found} of {count} flipped bits found by deep verify; {refused} met by a reader and refused, none returned "
        "as data"
    )


def _read_all(root: Path) -> list[Mapping[str, np.ndarray]]:
    with TeacherCache(Storage(root)) as cache:
        batch = cache.read(range(len(cache)))
        images = cache.read_images(batch.image_places[batch.image_places[:, 0] >= 0]).arrays
        side = {"head": cache.head, "rows": cache.counts("row"), "scale": cache.scales["hidden"].channel_scale}
        texts = {"texts": np.array([str(cache[i].answers) for i in range(0, len(cache), 8)])}
    return [batch.arrays, images, side, texts]


def _same(found: list[Mapping[str, np.ndarray]], wanted: list[Mapping[str, np.ndarray]]) -> bool:
    pairs = zip(found, wanted, strict=True)
    return all(np.array_equal(a[name], array) for a, b in pairs for name, array in b.items())


def full_disk(stage: Stage) -> str:
    """A real file system of 200 kB: a clear error, committed shards intact, and the run goes on once there is room."""
    place = stage.folder / "small-disk"
    place.mkdir(exist_ok=True)
    size = sum(map(len, stage.reference.values()))
    if subprocess.call(
        ["mount", "-t", "tmpfs", "-o", f"size={size // 2}", "tmpfs", str(place)], stderr=subprocess.DEVNULL
    ):
        return "full disk: left out, this user cannot mount a file system"
    try:
        config = replace(stage.config, output=str(place / "cache"))
        try:
            build_cache(config, teacher=stage.teacher, style="quiet")
            raise AssertionError("the cache fitted into half its size")
        except StorageError as error:
            message = str(error)
        committed = _check_committed(content(local_files(place / "cache")), stage.reference)
        subprocess.check_call(["mount", "-o", f"remount,size={4 * size}", str(place)])
        build_cache(config, teacher=stage.teacher, style="quiet")
        assert content(local_files(place / "cache")) == stage.reference
    finally:
        subprocess.check_call(["umount", "-l", str(place)])
    return f"full disk: {committed} shards stood, the rest followed once there was room; the error: {message[:150]} …"


def content(files: Files) -> Files:
    """Files by name without what differs from run to run: times, and what a killed run left under temporary names."""
    kept = {n: d for n, d in files.items() if n != NOT_CONTENT and not any(p.startswith(".") for p in n.split("/"))}
    if "manifest.json" in kept:
        manifest = json.loads(kept["manifest.json"])
        for name in ("created_at", "digest"):
            manifest.pop(name)
        kept["manifest.json"] = json.dumps(manifest, sort_keys=True).encode()
    return kept


def local_files(root: Path) -> Files:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def local_place(stage: Stage) -> Place:
    import shutil

    root = stage.folder / "killed"
    return Place(str(root), {}, lambda: local_files(root), lambda: shutil.rmtree(root, ignore_errors=True))


@contextmanager
def s3_server() -> Iterator[dict[str, Any]]:
    """A moto server in a process of its own, so that no run's death touches it."""
    code = (
        "from moto.server import DomainDispatcherApplication, create_backend_app\n"
        "from werkzeug.serving import make_server\n"
        "import logging; logging.getLogger('werkzeug').setLevel('ERROR')\n"
        "s = make_server('127.0.0.1', 0, DomainDispatcherApplication(create_backend_app), threaded=True)\n"
        "print(s.server_port, flush=True); s.serve_forever()\n"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield {
            "key": "test",
            "secret": "test",
            "client_kwargs": {
                "endpoint_url": f"http://127.0.0.1:{int(server.stdout.readline())}",
                "region_name": "us-east-1",
            },
        }
    finally:
        server.kill()
        server.wait()


def s3_place(options: dict[str, Any]) -> Place:
    """Looked at through boto3: the file system of fsspec would bring a thread into the process that forks."""
    import boto3

    client = boto3.client("s3", aws_access_key_id="test", aws_secret_access_key="test", **options["client_kwargs"])
    client.create_bucket(Bucket="chaos")

    def keys() -> list[str]:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket="chaos")
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def files() -> Files:
        return {k.removeprefix("cache/"): client.get_object(Bucket="chaos", Key=k)["Body"].read() for k in keys()}

    def clear() -> None:
        for key in keys():
            client.delete_object(Bucket="chaos", Key=key)

    return Place("s3://chaos/cache", options, files, clear)
