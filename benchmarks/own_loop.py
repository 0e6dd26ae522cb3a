"""A cache in one's own loop: how fast its Dataset reads beside our trainer's loader, and how long a loop waits for it.

    python -m benchmarks.own_loop                  # the tiny world, 2 CPU cores
    python -m benchmarks.own_loop --workers 0

Both read the same samples in the same order, in batches of one size, by as many loader processes, started anew in each
round; rounds of the two take turns and the ratio is the median over rounds. Beside them the plain loop of
``pipelines/examples`` trains, and says which share of its time it waited.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from transformers import AutoModelForImageTextToText, AutoProcessor

import teacher_cache as tc
from pipelines.tiny.prepare import TEACHER
from pipelines.tiny.student import write_student
from pipelines.tiny.world import write_world
from student_train.config import FitConfig, SourceConfig, StudentConfig, TrainConfig
from student_train.feed.loader import make_loader
from student_train.losses.catalogue import LossSpec
from student_train.training.trainer import Run
from teacher_cache.config import CacheConfig, DataConfig, GenerationConfig, LayoutConfig, SignalsConfig, TeacherConfig

BATCH = 16
LOSSES = [LossSpec("cross_entropy"), LossSpec("forward_kl", source="exact")]


def prepare(folder: Path, images: int) -> tuple[str, str, str]:
    """A world of so many images, a cache of it with states, and a student: (student, cache, images)."""
    write_world(folder / "world", train_images=images, dev_images=1, test_images=1, seed=0)
    write_student(folder / "student", teacher=TEACHER, seed=0)
    shown = str(folder / "world" / "images")
    config = CacheConfig(
        output=str(folder / "cache"),
        data=DataConfig(path=str(folder / "world" / "train.json"), image_folder=shown),
        teacher=TeacherConfig(model=str(TEACHER), chat_template="tiny", dtype="float32", max_length=256),
        generation=GenerationConfig(max_new_tokens=40),
        signals=SignalsConfig(top_k=16, hidden="rows", visual="none"),
        layout=LayoutConfig(shard_samples=64),
    )
    tc.build_cache(config, style="quiet")
    return str(folder / "student"), config.output, shown


def samples_per_second(batches: Callable[[], Iterable[Any]], samples: int, workers: int) -> float:
    """Once each loader process has given a batch: what starts it is no reading."""
    reading = iter(batches())
    first = sum(1 for _ in itertools.islice(reading, max(workers, 1)))
    begin = time.perf_counter()
    for _ in reading:
        pass
    return (samples - first * BATCH) / (time.perf_counter() - begin)


def waiting(student: Any, loader: Iterable[Any], workers: int) -> float:
    """Share of its time that the plain loop waits for a batch, once each loader process has given one."""
    optimizer = torch.optim.AdamW((p for p in student.parameters() if p.requires_grad), lr=1e-3)
    waited, begin, mark = 0.0, 0.0, time.perf_counter()
    for number, batch in enumerate(loader):
        started = number >= max(workers, 1)
        waited, begin = (waited + time.perf_counter() - mark, begin) if started else (0.0, time.perf_counter())
        states = student.base_model(**batch.inputs).last_hidden_state
        batch.teacher.head_loss(LOSSES, states, student).backward()
        optimizer.step()
        optimizer.zero_grad()
        mark = time.perf_counter()
    return waited / (time.perf_counter() - begin)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--images", type=int, default=100)
    options.add_argument("--epochs", type=int, default=20)
    options.add_argument("--rounds", type=int, default=3)
    asked = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder, cache, images = prepare(Path(made), asked.images)
        train = TrainConfig(global_batch=BATCH, micro_batch=BATCH, epochs=asked.epochs, threads=1)
        source = SourceConfig(cache=cache, image_folder=images)
        run = Run.prepare(FitConfig(f"{made}/run", (source,), StudentConfig(model=folder), tuple(LOSSES), train))
        steps = range(run.plan.steps)
        order = [int(number) for step in steps for number in run.plan.global_batch(step)]
        processor = AutoProcessor.from_pretrained(folder, backend="pil")
        with tc.open(cache) as opened:
            data = opened.torch(processor, images=images, signals=["exact"])

        def own() -> Iterable[Any]:
            return DataLoader(
                Subset(data, order),
                batch_size=BATCH,
                num_workers=asked.workers,
                collate_fn=data.collate,
                multiprocessing_context="spawn" if asked.workers else None,
                prefetch_factor=4 if asked.workers else None,  # as ours
            )

        def ours() -> Iterable[Any]:
            return make_loader(run.dataset, run.plan, steps, 0, 1, asked.workers, False)

        rates = lambda: [samples_per_second(batches, len(order), asked.workers) for batches in (own, ours)]  # noqa: E731
        rounds = [rates() for _ in range(asked.rounds)]
        student = AutoModelForImageTextToText.from_pretrained(folder).train()
        student.model.vision_tower.requires_grad_(False)
        share = waiting(student, own(), asked.workers)
    ratio = statistics.median(mine / theirs for mine, theirs in rounds)
    print(f"{len(order):,} samples, {asked.workers} workers, batches of {BATCH}, medians of {asked.rounds} rounds")
    for name, values in zip(("the Dataset", "our loader"), zip(*rounds, strict=True), strict=True):
        print(f"{name}: {statistics.median(values):,.0f} samples/s")
    print(f"Dataset over loader: {ratio:.2f}")
    print(f"the plain loop waited for data: {100 * share:.1f} % of its time")


if __name__ == "__main__":
    main()
