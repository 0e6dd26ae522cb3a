"""The benchmark of ``benchmarks/training.py`` on one GPU, at the sizes of the papers.

    python -m benchmarks.gpu                           # 80 GB: a 13B-shaped teacher in memory beside the student
    python -m benchmarks.gpu --folder /data/benchmark  # keep and reuse nothing, but write its 40 GB there
    python -m benchmarks.gpu --dry-run                 # the same script with tiny shapes, on a CPU, in seconds

Teacher: LLaVA-1.5-13B's shape. Students: MobileLLaMA's 2.7B and 1.4B. Weights are random, in bfloat16; images are JPEGs
that are decoded and preprocessed for CLIP ViT-L/14 at 336 pixels; k = 64, states in int8, and exact mode.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.synthetic import Llm, Tower, WorldSize
from benchmarks.training import hardware, report, synthetic_case


@dataclass(frozen=True)
class Plan:
    teacher: Llm
    students: dict[str, Llm]
    tower: Tower
    world: WorldSize
    dtype: str
    batch: int
    top_k: int
    steps: int
    rounds: int
    long_steps: int
    scored: int
    new_tokens: int


FULL = Plan(
    teacher=Llm(5120, 40, 13824, 40),
    students={"2.7B": Llm(2560, 32, 6912, 32), "1.4B": Llm(2048, 24, 5632, 16)},
    tower=Tower(1024, 24, 16, 336, 14),
    world=WorldSize(32_064, 512, 60, 110),  # LLaVA-Instruct's means
    dtype="bfloat16",
    batch=16,
    top_k=64,
    steps=4,
    rounds=5,
    long_steps=20,
    scored=128,
    new_tokens=64,
)
DRY = Plan(
    teacher=Llm(64, 3, 96, 2),
    students={"small": Llm(32, 2, 64, 1)},
    tower=Tower(32, 2, 1, 28, 14),
    world=WorldSize(300, 12, 4, 4),
    dtype="bfloat16",
    batch=4,
    top_k=8,
    steps=1,
    rounds=1,
    long_steps=2,
    scored=6,
    new_tokens=2,
)


def run(plan: Plan, folder: Path, *, memory: bool) -> list[str]:
    """Lines of Markdown for all students."""
    lines = [hardware(), ""]
    for name, student in plan.students.items():
        case = synthetic_case(
            name,
            folder / name,
            teacher=plan.teacher,
            student=student,
            tower=plan.tower,
            world=plan.world,
            dtype=plan.dtype,
            batch=plan.batch,
            top_k=plan.top_k,
            steps=plan.steps,
            rounds=plan.rounds,
            long_steps=plan.long_steps,
            scored=plan.scored,
            new_tokens=plan.new_tokens,
            gradient_checkpointing=True,
        )
        lines += report(case, memory=memory)
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on any machine")
    parser.add_argument("--folder", type=Path, help="where models and cache are written (about 70 GB)")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: torch sees no CUDA device; try --dry-run, or python -m benchmarks.training")
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=options.folder) as scratch:
        plan = DRY if options.dry_run else FULL
        print("\n".join(run(plan, Path(scratch), memory=not options.dry_run)))


if __name__ == "__main__":
    main()
