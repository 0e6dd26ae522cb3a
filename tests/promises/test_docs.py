"""The documents are true: commands parse, the tutorial runs, make targets and links exist."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from student_train.cli import app as student_app
from teacher_cache.cli import app as cache_app
from tests.fixtures.families import family_table

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
APPS = {"teacher-cache": cache_app, "student-train": student_app}


def commands(page: Path) -> list[str]:
    """Lines of the page's ``sh`` blocks, continued lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


CASES = [(page.name, line) for page in PAGES for line in commands(page)]


@pytest.mark.parametrize(("page", "line"), CASES)
def test_every_command_in_the_documents_parses(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    if not words:
        return
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert all(w in targets for w in words[1:] if "=" not in w), line
    elif words[0] in APPS:
        group = typer.main.get_command(APPS[words[0]])
        name, rest = words[1], words[2:]
        assert name in group.commands, line  # type: ignore[attr-defined]
        group.commands[name].make_context(name, list(rest))  # type: ignore[attr-defined]
    elif words[0] == "python":
        assert words[1] != "-m" or (ROOT / (words[2].replace(".", "/") + ".py")).is_file() or words[2] == "venv", line
    elif words[0] == "pytest":
        assert f'"{words[words.index("-m") + 1]}: ' in (ROOT / "pyproject.toml").read_text(), line
    else:
        assert words[0] in {"git", "cd", "pip", "accelerate", "open"}, f"{page}: a command nobody tests: {line}"


@pytest.mark.slow
def test_the_tutorial_runs_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = dict(os.environ, PATH=path, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    for line in commands(ROOT / "docs" / "tutorial.md"):
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    page = (tmp_path / "runs/tutorial/cache.html").read_text(encoding="utf-8")
    assert "<img" in page
    card = (tmp_path / "runs/tutorial/exported/README.md").read_text(encoding="utf-8")
    assert "hidden_cosine" in card


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http", "mailto")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_help_lists_every_target_users_type() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "cache-teacher", "distill", "ablate", "test", "check", "bench", "clean"):
        assert re.search(rf"^{target}:.*##", text, re.M), target


def test_the_walks_of_the_design_pass_what_is_there() -> None:
    """Each file of docs/design.md's two walks holds the functions and classes that are named behind it."""
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    stations = re.findall(r"`([a-z_/]+\.py)` ((?:`\w+`(?:, )?)+)", page.split("## Two walks")[1])
    assert len(stations) > 30
    for file, names in stations:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        defined = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        assert set(re.findall(r"\w+", names)) <= defined, (file, names)


def test_the_families_of_the_how_to_are_those_of_the_tests() -> None:
    assert family_table() in (ROOT / "docs" / "how-to.md").read_text(encoding="utf-8"), family_table()
