"""A step on one GPU at the papers' sizes, from a cache and with the teacher live; and what capturing costs there.

    python -m benchmarks.gpu --minutes 8    # 78 GiB of GPU memory, 4 GB of disk; lines are printed as they come
    python -m benchmarks.gpu --profile      # and a look into a step: waits of the host, copies that overlap with work
    python -m benchmarks.gpu --dry-run      # the same script with tiny shapes, on any machine, in seconds

Weights are random and made on the device, images are JPEGs that are decoded and preprocessed in every step, caches are
built by the real teacher class from original answers. Arms as in ``benchmarks.training``, one after another, each after
a warm-up; a step's time is that between ends of steps, so the loader counts where it is waited for. Peak memory of an
arm is that of its own: the teacher is in memory in the live arms only. What would begin after ``--minutes`` is left out
and named; a part once begun is finished (a minute at most).
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.head_loss import peak, reset_peak
from benchmarks.synthetic import Shape, WorldSize, clip, decoder, weights_on
from benchmarks.training import CACHED, LIVE, ONLINE, Case, Pair, arm, case_of, hardware, phase_one_table, set_steps
from student_train.studies.run_plan import plan_fit
from student_train.training.trainer import Run
from teacher_cache.build.build import build_cache
from teacher_cache.models.model_config import load_model_config
from teacher_cache.plan.cost import teacher_memory
from teacher_cache.teachers.torch_teacher import TorchTeacher
from tests.fixtures.host_reads import host_reads

WARM, STEPS = 2, 8
ONLINE_STEPS = 2
"""Answering takes a decoding step for every token of the longest answer."""


def qwen(width: int, layers: int, inner: int, heads: tuple[int, int], vocabulary: int, **more: Any) -> Shape:
    """Qwen2.5-VL with its tower of 1,280 channels; ``heads`` for queries and for keys."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = decoder(width, layers, inner, heads[0], vocabulary, num_key_value_heads=heads[1], rope_parameters=rope)
    tower = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": width}
    tower |= {"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
    pixels = {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}}
    return Shape("qwen2_5_vl", text | more, tower, pixels)


def papers() -> list[tuple[str, Pair]]:
    """(folder of the teacher's cache, pair): LLaVA-1.5-13B's shape with MobileLLaMA's, Qwen2.5-VL-7B's with 3B's."""
    tower, images = clip(1024, 24, 16, 336)
    world = WorldSize(320, 14, 25)  # LLaVA-Instruct's mean lengths

    def pair(name: str, teacher: Shape, student: Shape) -> Pair:
        return Pair(name, teacher, student, world, "bfloat16", batch=16, micro=8, scored=96, new_tokens=110)

    teacher = Shape("llava", decoder(5120, 40, 13824, 40, 32_064), tower, images)
    students = {"2.7B": decoder(2560, 32, 6912, 32, 32_064), "1.4B": decoder(2048, 24, 5632, 16, 32_064)}
    of_llava = [
        ("llava", pair(f"LLaVA, 13B to {name}", teacher, Shape("llava", text, tower, images)))
        for name, text in students.items()
    ]
    large = qwen(3584, 28, 18944, (28, 4), 152_064)
    small = qwen(2048, 36, 11008, (16, 2), 151_936, tie_word_embeddings=True)
    of_qwen = ("qwen", pair("Qwen2.5-VL, 7B to 3B", large, small))
    return [of_llava[0], of_qwen, of_llava[1]]


def tiny() -> list[tuple[str, Pair]]:
    tower, images = clip(32, 2, 2, 28)
    world = WorldSize(8, 2, 2)

    def pair(name: str, teacher: Shape, student: Shape) -> Pair:
        return Pair(name, teacher, student, world, "bfloat16", batch=4, micro=2, scored=4, new_tokens=2, top_k=8)

    sides = [Shape("llava", decoder(width, 2, 64, 2, 500), tower, images) for width in (48, 32)]
    eyes = [Shape("qwen2_5_vl", decoder(32, 2, 48, 4, n), {"out_hidden_size": 32}) for n in (520, 500)]
    return [
        ("llava", pair("LLaVA", *sides)),
        ("qwen", pair("Qwen2.5-VL", *eyes)),
    ]


@dataclass
class Clock:
    """The budget, and what was left out because it was spent."""

    end: float
    left_out: list[str] = field(default_factory=list)

    def allows(self, part: str) -> bool:
        if time.monotonic() < self.end:
            return True
        self.left_out.append(part)
        return False


@dataclass
class TimedRun(Run):
    """A run that notes when each of its steps ended, and how long it had waited for data by then."""

    marks: list[tuple[float, float]] = field(default_factory=list)

    def _after_step(self, agreed: Any) -> None:
        super()._after_step(agreed)
        self.marks.append((time.perf_counter(), self.waiting))


@dataclass(frozen=True)
class Steady:
    """Of an arm behind its warm-up: seconds and tokens of a step, share of waiting, peak bytes of all of it."""

    seconds: float
    tokens: float
    waiting: float
    peak: int


def steady(run: TimedRun, warm: int, steps: int) -> Steady:
    device = run.accelerator.device.type
    reset_peak(device)
    set_steps(run, 0, warm + steps)
    run.marks = []
    run.train("quiet")
    (begin, waited), (end, all_waited) = run.marks[warm - 1], run.marks[-1]
    tokens = sum(int(run.plan._lengths[run.plan.global_batch(n)].sum()) for n in range(warm, warm + steps))
    return Steady((end - begin) / steps, tokens / steps, (all_waited - waited) / (end - begin), peak(device))


@contextmanager
def teacher_of(case: Case) -> Iterator[TorchTeacher]:
    """Made on the device, and gone from it afterwards."""
    teacher = case.teacher()
    try:
        yield teacher
    finally:
        teacher.close()
        give_back()


def give_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def phase_one(case: Case, clock: Clock) -> Iterator[str]:
    """Build the cache, and what scoring, capturing, writing and answering take."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model_config(case.cache.teacher.model, "", "teacher.model")
    planned = teacher_memory(case.cache, model, case.cache.teacher.max_length)
    reset_peak(device)
    with teacher_of(case) as teacher:
        made = build_cache(case.cache, teacher=teacher, style="quiet")
        yield (
            f"cache: {made.samples} samples, {made.rows:,} rows, {made.bytes / 1e6:,.0f} MB in {made.seconds:.1f} s "
            f"(scoring {made.score_seconds:.1f} s); peak memory {peak(device) / 1e9:.1f} GB, planned "
            f"{(planned.weights + planned.step + planned.signals) / 1e9:.1f} GB"
        )
        if clock.allows(f"{case.name}: capture against bare scoring"):
            yield from ("", *phase_one_table(case, teacher))


def phase_two(case: Case, clock: Clock, profile: bool) -> Iterator[str]:
    """A row an arm: cached ones first, then, with the teacher in memory, the live ones."""
    shared = TimedRun.prepare(replace(case.fit, losses=CACHED["top-k"]))  # with projectors, without the teacher's head
    base: list[Steady] = []

    def row(name: str, live: TorchTeacher | None = None) -> str:
        counts = (1, ONLINE_STEPS) if name == ONLINE else (WARM, STEPS)
        try:
            cost = steady(arm(name, case, shared, live), *counts)
        except torch.cuda.OutOfMemoryError:
            return f"| {name} | out of memory | | | | |"
        finally:
            del shared.accelerator._models[1:]  # which would keep this arm's head of the teacher
            give_back()
        base.append(cost)
        return (
            f"| {name} | {cost.seconds * 1e3:,.0f} | {cost.seconds / base[0].seconds:.2f} | "
            f"{cost.tokens / cost.seconds:,.0f} | {cost.peak / 1e9:.1f} GB | {100 * cost.waiting:.1f} % |"
        )

    planned = plan_fit(replace(case.fit, losses=CACHED["plain"])).memory_bytes
    yield f"student: planned memory of the plain arm {planned / 1e9:.1f} GB"
    yield ""
    yield "| arm | ms a step | × plain | tokens/s | peak memory | waiting for data |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name in CACHED:
        if clock.allows(f"{case.name}: {name}"):
            yield row(name)
    live = [name for name in (LIVE, ONLINE) if clock.allows(f"{case.name}: {name}")]
    if live:
        with teacher_of(case) as teacher:
            for name in live:
                yield row(name, teacher)
    if profile and clock.allows(f"{case.name}: a look into a step"):
        yield from ("", *profiled(arm("exact", case, shared, None)))


def profiled(run: TimedRun) -> Iterator[str]:
    """A step of the run looked into: who waits for the device, and whether copies run beside kernels."""
    device = run.accelerator.device.type
    with host_reads(device) as places:
        steady(run, 1, STEPS)
    waits = ", ".join(f"{place} {times / (1 + STEPS):.1f}" for place, times in places.most_common(12))
    yield f"waits of the host a step: {waits}"
    if device == "cpu":
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        steady(run, 1, 2)
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = [(e.time_range.start, e.time_range.end, e.name) for e in events]
    kernels = merged([(a, b) for a, b, name in spans if not name.startswith("Mem")])
    copies = merged([(a, b) for a, b, name in spans if name.startswith("Memcpy HtoD")])
    whole = max(b for _, b, _ in spans) - min(a for a, _, _ in spans)
    beside = shared_length(copies, kernels) / max(length(copies), 1e-9)
    yield (
        f"kernels run {100 * length(kernels) / whole:.1f} % of the time; copies to the device take "
        f"{length(copies) / 3e3:.2f} ms a step, {100 * beside:.0f} % of it beside kernels"
    )


Span = tuple[float, float]


def merged(spans: Sequence[Span]) -> list[Span]:
    """The same stretches of time, none over another."""
    out: list[Span] = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        else:
            out.append((begin, end))
    return out


def length(spans: Sequence[Span]) -> float:
    return sum(end - begin for begin, end in spans)


def shared_length(one: Sequence[Span], other: Sequence[Span]) -> float:
    """How long both last at once; each is :func:`merged`."""
    return length(one) + length(other) - length(merged([*one, *other]))


def of_pair(case: Case, clock: Clock, profile: bool) -> Iterator[str]:
    if not Path(case.cache.output).exists() and clock.allows(f"{case.name}: everything"):
        yield from phase_one(case, clock)
        yield ""
    if Path(case.cache.output).exists():
        yield from phase_two(case, clock, profile)


def run(pairs: Sequence[tuple[str, Pair]], folder: Path, clock: Clock, profile: bool) -> Iterator[str]:
    yield hardware()
    for name, pair in pairs:
        yield from ("", f"### {pair.name}", "")
        case = case_of(pair, folder / name)
        student, train = replace(case.fit.student, gradient_checkpointing=True), replace(case.fit.train, pixel_cache=0)
        case = replace(case, fit=replace(case.fit, student=student, train=train))
        try:
            yield from of_pair(case, clock, profile)
        except torch.cuda.OutOfMemoryError as error:
            yield f"{pair.name}: {str(error).splitlines()[0]}"
        give_back()
    yield from ("", f"left out, the time was up: {', '.join(dict.fromkeys(clock.left_out)) or 'nothing'}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on any machine")
    parser.add_argument("--minutes", type=float, default=60, help="nothing is begun after these")
    parser.add_argument("--profile", action="store_true", help="look into a step of each student's exact arm")
    parser.add_argument("--folder", type=Path, help="where models' configurations and caches are written (4 GB)")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: torch sees no CUDA device; try --dry-run, or python -m benchmarks.training")
    clock = Clock(time.monotonic() + 60 * options.minutes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=options.folder) as scratch, weights_on(device):
        for line in run(tiny() if options.dry_run else papers(), Path(scratch), clock, options.profile):
            print(line, flush=True)


if __name__ == "__main__":
    main()
