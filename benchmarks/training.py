"""What a step and a cache cost: online against offline against plain fine-tuning, and capturing against scoring.

    python -m benchmarks.training                  # 2 CPU cores: the tiny world, then a 100M student with V = 32,000
    python -m benchmarks.training --only tiny
    python -m benchmarks.gpu                       # its parts on a GPU, at the papers' sizes

One process, one student, one optimiser and one data set serve all arms, whose blocks of steps take turns; a ratio is
the median over the rounds of (this arm's block / the cross-entropy block of the same round). A block is the trainer's
own loop with a loader of its own, so loading counts in full, the first batch's too. Peak memory and the share of time
spent waiting for data come from fresh processes, an arm each, of one longer run.

    plain           fine-tuning on the cached answers: cross-entropy alone
    top-k           + forward KL from the stored top-k + hidden MSE
    exact           + forward KL over the whole vocabulary, from the stored states + hidden MSE
    teacher live    as exact, answers cached, but the teacher is in memory and runs its forward pass in every step
    online          that, and the teacher answers the step's questions anew before it (on a GPU only)
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from benchmarks.head_loss import peak, reset_peak
from benchmarks.synthetic import Shape, WorldSize, clip, decoder, weights_on, write_data, write_model
from pipelines.tiny.prepare import TEACHER
from pipelines.tiny.student import write_student
from pipelines.tiny.world import write_world
from student_train.config import FitConfig, LossSpec, SourceConfig, StudentConfig, TrainConfig
from student_train.feed.batch import StudentBatch
from student_train.feed.loader import MicroBatches
from student_train.feed.sources import open_sources
from student_train.feed.step_plan import StepPlan
from student_train.losses.targets import RowTargets, TeacherSide, decoded
from student_train.training.inputs import side_of
from student_train.training.objective import DistilledStudent
from student_train.training.trainer import Run
from teacher_cache.build.build import build_cache
from teacher_cache.build.context import Build
from teacher_cache.build.inputs import ReadSample
from teacher_cache.build.signals import Extractor, wanted_states
from teacher_cache.config import (
    CacheConfig,
    DataConfig,
    GenerationConfig,
    LayoutConfig,
    SignalsConfig,
    SpeedConfig,
    TeacherConfig,
    as_plain,
    build_config,
)
from teacher_cache.data.conversations import Skipped
from teacher_cache.data.images import open_picture
from teacher_cache.data.spool import spool
from teacher_cache.models.collate import collate, to_model
from teacher_cache.store.manifest import Manifest, read_manifest
from teacher_cache.store.records import TeacherRecord
from teacher_cache.store.storage import Storage
from teacher_cache.store.writer import ImagePlace, write_shard
from teacher_cache.teachers.teacher import AnswerRequest, Shown, Wanted
from teacher_cache.teachers.torch_teacher import TorchTeacher

CE, TOPK, EXACT, MSE = (
    LossSpec("cross_entropy"),
    LossSpec("forward_kl"),
    LossSpec("forward_kl", source="exact"),
    LossSpec("hidden_mse"),
)
CACHED: dict[str, tuple[LossSpec, ...]] = {"plain": (CE,), "top-k": (CE, TOPK, MSE), "exact": (CE, EXACT, MSE)}
LIVE, ONLINE = "teacher live", "online"
BARE = "bare scoring: log-probabilities of the answers"


@dataclass(frozen=True)
class Case:
    """One student and its teacher's cache; ``folder`` holds all files. ``steps`` a block, ``rounds`` of blocks."""

    name: str
    folder: Path
    cache: CacheConfig
    fit: FitConfig
    scored: int
    """Samples of the phase-one measurement."""
    steps: int = 1
    rounds: int = 1
    long_steps: int = 1
    """Steps of the run in which memory and waiting are measured."""

    def teacher(self) -> TorchTeacher:
        return TorchTeacher(self.cache.teacher, self.cache.generation, self.cache.speed)


# The arms


class LiveStudent(DistilledStudent):
    """The same student and losses with a live teacher: its forward pass in every step, nothing from a cache.

    Before each micro-batch it answers what ``asked`` gives next, if anything.
    """

    live: TorchTeacher
    asked: Iterator[list[AnswerRequest]]

    def _row_targets(self, batch: StudentBatch, teacher: TeacherSide | None) -> RowTargets:
        assert teacher is not None
        if prompts := next(self.asked):
            self.live.answer(prompts)
        model: Any = self.live._model
        with torch.no_grad():
            out = model.base_model(**to_model(batch.fields, model), use_cache=False)
        states = out.last_hidden_state[batch.row_sample, batch.row_position]
        return RowTargets(
            answer_ids=batch.answer_ids,
            hidden=decoded(states),
            head=teacher.head,
            vocabulary=teacher.vocabulary,
            rule=teacher.rule,
        )


def arm(name: str, case: Case, shared: Run | None, live: TorchTeacher | None) -> Run:
    """A run of the arm's losses over the model and the optimiser of ``shared``, or over its own."""
    losses = CACHED.get(name, CACHED["exact"])
    config = replace(case.fit, output=str(case.folder / "runs" / name), losses=losses)
    run = Run.prepare(config) if shared is None else shared
    sources = open_sources(config, run.dataset.reader)
    if live is not None:  # the teacher is asked, not the cache
        sources = open_sources(replace(config, losses=CACHED["plain"]), run.dataset.reader)
    model = run.accelerator.unwrap_model(run.student).model
    teachers = [side_of(config, source, model, run.accelerator.device) for source in sources]
    kind = DistilledStudent if live is None else LiveStudent
    tokens = run.dataset.reader.image_tokens
    student = kind(model, losses, teachers, head_rows=config.train.head_rows, image_tokens=tokens)
    if live is not None:  # not a submodule: nothing of it is trained
        student.__dict__.update(live=live, asked=asked(case, live) if name == ONLINE else itertools.repeat([]))
    if len(student.projectors):
        student.projectors = run.student.projectors
    student = run.accelerator.prepare_model(student)  # products in the same numbers as in training
    Path(config.output).mkdir(parents=True, exist_ok=True)
    dataset = MicroBatches(sources, run.dataset.reader, None, config.train.pixel_cache)
    return replace(run, config=config, student=student, dataset=dataset, folder=Path(config.output))


def asked(case: Case, teacher: TorchTeacher) -> Iterator[list[AnswerRequest]]:
    """The questions of a step all at once, before its first micro-batch, for ever."""
    prompts, train = PhaseOne.prepare(case, teacher).prompts, case.fit.train
    for start in itertools.cycle(range(0, len(prompts), train.global_batch)):
        yield prompts[start : start + train.global_batch]
        yield from itertools.repeat([], -(-train.global_batch // train.micro_batch) - 1)


@dataclass(frozen=True)
class Cost:
    wall: float
    cpu: float


def set_steps(run: Run, first: int, steps: int) -> None:
    """Let ``run.train`` make steps ``first`` …, its clocks at zero."""
    train = replace(run.config.train, max_steps=first + steps)
    sources = run.dataset.sources
    run.plan = StepPlan(sources, run.config.sources, train, run.dataset.reader.image_tokens)
    run.step, run.seconds, run.waiting = first, 0.0, 0.0


def block(run: Run, first: int, steps: int) -> Cost:
    """Steps ``first`` … of the trainer's own loop, its loader included."""
    set_steps(run, first, steps)
    wall, cpu = time.perf_counter(), time.process_time()
    run.train("quiet")
    return Cost((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps)


def step_costs(case: Case) -> dict[str, list[Cost]]:
    """By arm, the cost of one step in each round; the first round warms up and is left out."""
    live = case.teacher()
    shared = Run.prepare(replace(case.fit, losses=CACHED["exact"]))
    runs = {name: arm(name, case, shared, live if name == LIVE else None) for name in (*CACHED, LIVE)}
    costs: dict[str, list[Cost]] = {name: [] for name in runs}
    for number in range(case.rounds + 1):
        for name, run in runs.items():
            cost = block(run, number * case.steps, case.steps)
            if number:
                costs[name].append(cost)
    live.close()
    return costs


def long_run(name: str, case: Case) -> dict[str, float]:
    """Peak memory and the share of waiting of one arm alone; for a process of its own."""
    run = arm(name, case, None, case.teacher() if name == LIVE else None)
    block(run, 0, 1)
    reset_peak("cpu")
    block(run, 1, case.long_steps)
    return {"megabytes": peak("cpu") / 2**20, "waiting": run.waiting / run.seconds}


def in_fresh_process(case: Case, name: str) -> dict[str, float]:
    """:func:`long_run` in a new interpreter."""
    path = case.folder / "case.json"
    plain = {**as_plain(case), "folder": str(case.folder)}
    path.write_text(json.dumps(plain), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.training", "--measure", str(path), name]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def read_case(path: Path) -> Case:
    plain = json.loads(path.read_text(encoding="utf-8"))
    plain["cache"] = build_config(CacheConfig, plain["cache"], str(path))
    plain["fit"] = build_config(FitConfig, plain["fit"], str(path))
    return Case(**{**plain, "folder": Path(plain["folder"])})


def training_table(case: Case) -> Iterator[str]:
    """Lines of Markdown: a row an arm."""
    costs = step_costs(case)
    base, batch = costs["plain"], case.fit.train.global_batch
    yield "| arm | ms a step | samples/s | ratio (wall) | ratio (CPU time) | peak memory | waiting for data |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, mine in costs.items():
        wall, alone = statistics.median(c.wall for c in mine), in_fresh_process(case, name)
        yield (
            f"| {name} | {wall * 1e3:,.0f} | {batch / wall:,.1f} | {ratio(mine, base, 'wall'):.2f} | "
            f"{ratio(mine, base, 'cpu'):.2f} | {alone['megabytes']:,.0f} MiB | {100 * alone['waiting']:.1f} % |"
        )


def ratio(mine: Sequence[Cost], base: Sequence[Cost], kind: str) -> float:
    """The median over the rounds of ``mine`` to ``base``."""
    return statistics.median(getattr(c, kind) / getattr(b, kind) for c, b in zip(mine, base, strict=True))


# Phase one


@dataclass
class PhaseOne:
    """The teacher, some samples, and the four ways to run them that are compared."""

    config: CacheConfig
    teacher: TorchTeacher
    manifest: Manifest
    extractor: Extractor
    requests: list[Shown]
    prompts: list[AnswerRequest]
    scratch: Storage

    @classmethod
    def prepare(cls, case: Case, teacher: TorchTeacher) -> PhaseOne:
        config = case.cache
        samples = spool(config.data, None)
        storage = Storage(config.output)
        manifest = read_manifest(storage)
        requests, prompts = [], []
        for sample in samples[: case.scored]:
            assert not isinstance(sample, Skipped)
            pictures = tuple(open_picture(image, config.data.image_folder) for image in sample.images)
            read = ReadSample.read(teacher.chat, sample, pictures, original=True)
            requests.append(read.shown(read.original))
            prompts.append(AnswerRequest(read.shown((), ask=True), 0))
        extractor = Build(config, storage, manifest, samples, teacher).extractor
        return cls(config, teacher, manifest, extractor, requests, prompts, Storage(case.folder / "scratch"))

    @property
    def tokens(self) -> int:
        """Positions of all samples, image tokens counted."""
        return sum(r.sample.positions(self.manifest.image_token).length for r in self.requests)

    def ways(self) -> dict[str, Callable[[], object]]:
        return {
            "Transformers' forward, all logits": self.whole_forward,
            BARE: self.bare,
            "scoring and capturing": self.capture,
            "scoring, capturing and writing": self.write,
        }

    def whole_forward(self) -> float:
        """Transformers' own forward pass on the same batches: logits of every position, log-probability of the next."""
        total = 0.0
        with torch.inference_mode():
            for places, _ in self._batches():
                chosen = [self.requests[i] for i in places]
                samples = [self.teacher._fields(shown) for shown in chosen]
                inputs = to_model(collate(samples, self.teacher._pad, "right"), self.teacher._model)
                logits = self.teacher._model(**inputs, use_cache=False).logits
                picked = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, inputs["input_ids"][:, 1:, None])
                total += picked.sum().item()
        return total

    def bare(self) -> float:
        """The answers' log-probabilities: what any scoring must compute, the head only where answers are."""
        head, total = self.teacher.head(), 0.0
        for places, states in self.teacher.score(self.requests, Wanted()):
            rows = torch.cat([s.rows for s in states])
            ids = torch.cat([self._answer_ids(i) for i in places]).to(rows.device)
            with torch.inference_mode():
                for chunk, wanted in zip(rows.split(2048), ids.split(2048), strict=True):
                    logits = (chunk @ head.T).float()
                    picked = logits.gather(-1, wanted[:, None]).squeeze(-1)
                    total += float((picked - torch.logsumexp(logits, -1)).sum())
        return total

    def capture(self) -> list[TeacherRecord]:
        records: list[TeacherRecord] = []
        for places, states in self.teacher.score(self.requests, wanted_states(self.config.signals)):
            names = [self.requests[i].sample.sample_id for i in places]
            for i, arrays in zip(places, self.extractor.records(names, states), strict=True):
                sample = self.requests[i].sample
                ids = sample.input_ids.astype(self.manifest.shape.id_dtype)
                runs = sample.runs.astype(np.uint32)
                images = ("an image",) * len(runs)
                arrays = {"input_ids": ids, "loss_mask": sample.loss_mask, "runs": runs, **arrays}
                records.append(TeacherRecord(sample.sample_id, images, ("",), ("",), ("",), "original", arrays, images))
        return records

    def write(self) -> None:
        records = self.capture()
        write_shard(self.scratch, self.manifest, 0, records, [ImagePlace()] * len(records), [])

    def answer(self) -> int:
        return sum(len(a.token_ids) for a in self.teacher.answer(self.prompts))

    def _answer_ids(self, place: int) -> Tensor:
        sample = self.requests[place].sample
        return torch.from_numpy(sample.input_ids[sample.loss_mask])

    def _batches(self) -> Iterator[tuple[list[int], object]]:
        """The batches that scoring makes, without running it."""
        from teacher_cache.teachers.torch_teacher import _token_batches

        positions = [r.sample.positions(self.manifest.image_token) for r in self.requests]
        order = sorted(range(len(positions)), key=lambda i: (not self.requests[i].sees, positions[i].length, i))
        for places in _token_batches(order, self.requests, positions, self.config.speed.score_batch_tokens):
            yield places, None


def phase_one_table(case: Case, teacher: TorchTeacher) -> Iterator[str]:
    phase = PhaseOne.prepare(case, teacher)
    ways = phase.ways()
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for number in range(case.rounds + 1):
        for name, run in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if number:
                costs[name].append(Cost(time.perf_counter() - wall, time.process_time() - cpu))
    rows = int(sum(r.sample.loss_mask.sum() for r in phase.requests))
    yield f"{len(phase.requests)} samples, {phase.tokens:,} tokens, {rows:,} answer rows"
    yield ""
    yield "| pass | tokens/s | ratio (wall) | ratio (CPU time) |"
    yield "| --- | --- | --- | --- |"
    for name, mine in costs.items():
        wall, cpu = (ratio(mine, costs[BARE], kind) for kind in ("wall", "cpu"))
        yield f"| {name} | {phase.tokens / statistics.median(c.wall for c in mine):,.0f} | {wall:.2f} | {cpu:.2f} |"
    begin = time.perf_counter()
    produced = phase.answer()
    yield f"| answering ({produced:,} new tokens) | {produced / (time.perf_counter() - begin):,.1f} | | |"
    shutil.rmtree(case.folder / "scratch", ignore_errors=True)


# Cases


@dataclass(frozen=True)
class Pair:
    """A teacher and a student with random weights over one random world; ``batch`` samples a step, ``micro`` at once;
    ``scored`` samples for phase one, answers of ``new_tokens``."""

    name: str
    teacher: Shape
    student: Shape
    world: WorldSize
    dtype: str
    batch: int
    micro: int
    scored: int
    new_tokens: int
    top_k: int = 64


def case_of(pair: Pair, folder: Path, **blocks: int) -> Case:
    """The files of a pair but for its cache, which keeps original answers: a random teacher's have random length."""
    if not (folder / "data.json").is_file():
        write_data(folder, pair.world)
        write_model(folder / "teacher", pair.teacher)
    write_model(folder / pair.name, pair.student)
    llava = pair.teacher.family == "llava"
    cache = CacheConfig(
        output=str(folder / "cache"),
        data=DataConfig(str(folder / "data.json"), str(folder / "images"), regenerate="none"),
        teacher=TeacherConfig(
            str(folder / "teacher"), backend="torch", dtype=pair.dtype, chat_template="vicuna_v1" if llava else ""
        ),
        generation=GenerationConfig(max_new_tokens=pair.new_tokens),
        signals=SignalsConfig(top_k=pair.top_k),
        speed=SpeedConfig(score_batch_tokens=16384 if torch.cuda.is_available() else 2048),
    )
    fit = FitConfig(
        output=str(folder / "runs" / pair.name),
        sources=(SourceConfig(cache=cache.output, image_folder=cache.data.image_folder),),
        student=StudentConfig(model=str(folder / pair.name), dtype=pair.dtype),
        train=TrainConfig(
            global_batch=pair.batch,
            micro_batch=pair.micro,
            log_every=1000,
            pixel_cache=0,
            threads=torch.get_num_threads(),
        ),
    )
    return Case(pair.name, folder, cache, fit, pair.scored, **blocks)


def tiny_case(folder: Path, *, images: int = 120, rounds: int = 7, steps: int = 20, long_steps: int = 300) -> Case:
    """The shipped tiny world: its trained teacher, a fresh student, images of 32 × 32 pixels."""
    write_world(folder, train_images=images, dev_images=1, test_images=1, seed=0)
    write_student(folder / "student", teacher=TEACHER, seed=0)
    cache = CacheConfig(
        output=str(folder / "cache"),
        data=DataConfig(str(folder / "train.json"), str(folder / "images"), regenerate="none"),
        teacher=TeacherConfig(str(TEACHER), backend="torch", dtype="float32", chat_template="tiny", max_length=256),
        generation=GenerationConfig(max_new_tokens=16),
        signals=SignalsConfig(top_k=16),
        layout=LayoutConfig(shard_samples=64),
    )
    fit = FitConfig(
        output=str(folder / "runs" / "shared"),
        sources=(SourceConfig(cache=cache.output, image_folder=cache.data.image_folder),),
        student=StudentConfig(model=str(folder / "student")),
        train=TrainConfig(global_batch=32, micro_batch=32, log_every=1000, threads=torch.get_num_threads()),
    )
    return Case("tiny", folder, cache, fit, images, steps, rounds, long_steps)


def hundred_million(folder: Path, *, rounds: int = 5) -> Case:
    """A 100M-parameter student and a teacher of 500M, both with V = 32,000, on a CPU."""
    tower, images = clip(128, 2, 2, 168)
    pair = Pair(
        "100M",
        teacher=Shape("llava", decoder(1280, 21, 3456, 20, 32_000), tower, images),
        student=Shape("llava", decoder(640, 12, 1728, 10, 32_000), tower, images),
        world=WorldSize(samples=48, question=6, answer=9),
        dtype="float32",
        batch=4,
        micro=4,
        scored=12,
        new_tokens=8,
    )
    return case_of(pair, folder, steps=2, rounds=rounds, long_steps=10)


def report(case: Case) -> Iterator[str]:
    build_cache(case.cache, style="quiet")
    yield f"### {case.name}"
    yield ""
    yield from training_table(case)
    yield ""
    yield from phase_one_table(case, case.teacher())
    yield ""


def hardware() -> str:
    """What ran this, in a line."""
    if torch.cuda.is_available():
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        ).stdout.strip()
        where = f"{torch.cuda.get_device_name()}, driver {driver}, CUDA {torch.version.cuda}"
    else:
        load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
        where = f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads, load {load}"
    today = datetime.datetime.now(datetime.UTC).date()
    return f"{today}, {where}, torch {torch.__version__}, transformers {transformers.__version__}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("tiny", "100M"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "ARM"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if torch.cuda.is_available():
        raise SystemExit("benchmarks.training: for a CPU (CUDA_VISIBLE_DEVICES=''); a GPU has python -m benchmarks.gpu")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch, weights_on("cpu"):
        if options.measure:
            path, name = options.measure
            print(json.dumps(long_run(name, read_case(Path(path)))))
            return
        cases: dict[str, Callable[[], Case]] = {
            "tiny": lambda: tiny_case(Path(scratch) / "tiny", rounds=options.rounds),
            "100M": lambda: hundred_million(Path(scratch) / "100M", rounds=options.rounds),
        }
        print(hardware())
        for name, make in cases.items():
            for line in report(make()) if options.only in (None, name) else ():
                print(line, flush=True)


if __name__ == "__main__":
    main()
