"""``teacher-cache demo``: both phases on the tiny world, one table and two pages, in ``./runs``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pipelines.tiny import prepare
from student_train import cli as phase_two
from teacher_cache import cli as phase_one
from teacher_cache.terminal import say

FILES, RUNS = Path(__file__).parent, Path("runs")
SHORT_WORLD = {"train_images": 40, "dev_images": 4, "test_images": 16, "students": 1}
SHORT_TRAINING = ("base.train.max_steps=12", "seeds=[0]")


def demo(short: bool = False, sets: Sequence[str] = ()) -> None:
    """Render the world (unless it is there), cache the teacher, train a student of every arm, write the pages.

    short: a small world and a few steps, to see that everything runs; its figures say nothing. sets: KEY=VALUE over
    ``demo.yaml``. Each part goes on where an earlier run stopped.
    """
    world, cache, runs = RUNS / "tiny", str(RUNS / "tiny/cache"), RUNS / "demo"
    if short or not (world / "prepared.json").is_file():
        prepare.main(world, **SHORT_WORLD if short else {})
    teacher = os.path.relpath(prepare.TEACHER)  # in a clone what the files say, elsewhere where the wheel lies
    for name in ("cache.yaml", "cache_test.yaml"):
        phase_one.build(FILES / name, [f"teacher.model={teacher}"])
    phase_one.info(cache)
    phase_two.ablate(FILES / "demo.yaml", [*(SHORT_TRAINING if short else ()), *sets])
    images = str(world / "world/images")
    phase_one.view(cache, runs / "cache.html", image_folder=[images], tokenizer=teacher)
    phase_two.report([runs], runs / "report.html", images, cache)
    say(f"table: {runs}/table.md (.csv, .json, .svg); pages: {runs}/cache.html, {runs}/report.html")
