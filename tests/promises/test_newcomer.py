"""A newcomer's path, typed and timed: clone, ``make demo``, open the pages, add a line to the ablation, see its row.

The world is smaller, the steps are fewer and there is one seed; the environment is the one that runs this test.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.chromium import NoChromiumError, open_browser

ROOT = Path(__file__).parents[2]
SHORT = (
    "WORLD=--train-images 40 --dev-images 4 --test-images 16 --students 1",
    "SET=--set base.train.max_steps=12 --set seeds=[0]",
)
NEW_ARM = "  mse: {note: + squared error of the states, set: {losses: [{name: cross_entropy}, {name: hidden_mse}]}}\n"


@contextmanager
def timed(step: str) -> Iterator[None]:
    begin = time.monotonic()
    yield
    print(f"{step:<40} {time.monotonic() - begin:6.1f} s")


def make(clone: Path, *words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(clone)}
    done = subprocess.run(
        ["make", "--assume-old=.venv/ready", *words], cwd=clone, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"make {words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def rows(clone: Path) -> dict[str, str]:
    """Arm → its line of the table."""
    lines = (clone / "runs/demo/table.md").read_text(encoding="utf-8").splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("|")}


@pytest.mark.slow
def test_clone_demo_pages_and_one_more_arm(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.fail("this test clones the project: run it in a git checkout")
    clone = tmp_path / "clone"
    with timed("git clone"):
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    (clone / ".venv").symlink_to(sys.prefix)
    with timed("make demo (12 steps, one seed)"):
        make(clone, "demo", *SHORT)
    first = rows(clone)
    assert {"original", "regenerated", "kl", "hidden", "kl-hidden"} <= first.keys()
    with timed("open both pages"):
        look(clone)
    file = clone / "pipelines/tiny/demo.yaml"
    file.write_text(file.read_text(encoding="utf-8") + NEW_ARM, encoding="utf-8")
    with timed("make demo again, one arm more"):
        said = make(clone, "demo", *SHORT)
    second = rows(clone)
    assert second.keys() - first.keys() == {"mse"}
    assert all(second[arm] == line for arm, line in first.items()), "what was done is not done again"
    assert "mse" in said


def look(clone: Path) -> None:
    try:
        with open_browser() as browser:
            page = browser.new_page()
            for name, heading in (("cache", "Overview"), ("report", "Where students disagree with the teacher")):
                page.goto((clone / f"runs/demo/{name}.html").as_uri())
                page.get_by_role("heading", name=heading).wait_for()
                shown = page.locator("img").evaluate_all("images => images.map(i => i.naturalWidth)")
                assert shown, name
                assert all(width == 32 for width in shown), name
            assert "compared with the teacher" in page.locator("main").inner_text()
    except NoChromiumError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(f"the pages were not opened: {error}")
