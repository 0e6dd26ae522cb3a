"""Rooms may use the rooms before them, heavy libraries stay in their one file, and the data side needs no torch."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("teacher_cache", "student_train", "pipelines")
ORDER = {
    "teacher_cache": (
        *("errors", "files", "terminal", "stopping", "progress", "config", "data", "store", "models", "teachers"),
        *("build", "trust", "plan", "pages", "command_line", "cli", "door"),
    ),
    "student_train": (*("losses", "config", "students", "feed", "training", "evaluation", "studies", "cli"),),
}
"""The rooms and modules at the top of each package: one may import itself and what stands before it."""
STAND_ON_MODELS = {"plan", "pages"}
"""Rooms of ``teacher_cache`` that know nothing of how a cache is made or checked: not teachers, build or trust."""
SHARED = {
    *("errors", "files", "terminal", "stopping", "progress", "config", "command_line"),
    *("data", "store", "models", "pages"),
}
"""What phase two may know of phase one: how a cache is read, not how it is made."""
DOORS = {"teacher_cache", "student_train", "teacher_cache.door"}
"""The packages' faces, and a cache's way into PyTorch: they name what is imported when it is first used, of both
packages. Nothing else in ``teacher_cache`` knows of ``student_train``, and nobody imports ``teacher_cache.door``."""
AGAINST_THE_ORDER: set[tuple[str, str]] = set()
"""Imports that are still to be turned round; the list may only shrink."""
ONE_FILE = {
    "vllm": {f"teacher_cache/teachers/vllm/{n}.py" for n in ("session", "registry", "connector", "processes")},
    "ray": {"teacher_cache/build/cluster.py"},
}
MODULE_LINES, FUNCTION_LINES, PARAMETERS = 350, 60, 7
"""What a reader takes in at once: no module, no function is longer, and no function has more parameters."""
TOO_LARGE: set[str] = set()
"""What is still larger; whoever makes it small takes out its line, and none may be added."""
REFUSED_NAMES = {"utils", "helpers", "common", "manager", "handler", "engine", "base", "core", "misc"}


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for package in PACKAGES for path in files(package)}


def imports_of(path: Path) -> set[str]:
    """Names that ``path`` imports anywhere, inside functions too; of ours, the modules."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inner}
    return names


def test_rooms_import_what_stands_before_them() -> None:
    found = set()
    for module, path in MODULES.items():
        top, _, rest = module.partition(".")
        if top not in ORDER or not rest or module in DOORS:
            continue
        order, room = ORDER[top], rest.split(".")[0]
        for name in imports_of(path):
            there, _, inner = name.partition(".")
            other = inner.split(".")[0]
            if there == top and inner:
                after = order.index(other) > order.index(room)
                forbidden = after or (room in STAND_ON_MODELS and other in {"teachers", "build", "trust"})
            elif there == "teacher_cache" and top == "student_train" and inner:
                forbidden = other not in SHARED
            else:
                forbidden = there == "pipelines" or (there == "student_train" and top == "teacher_cache")
            if forbidden:
                found.add((module, name))
    assert found == AGAINST_THE_ORDER


def test_no_module_imports_itself_by_a_detour() -> None:
    inside = MODULES.keys() - DOORS
    graph = {m: {n for n in imports_of(MODULES[m]) if n in inside and n != m} for m in inside}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError and names the circle


def test_nothing_inside_goes_through_a_door() -> None:
    inside = [path for module, path in MODULES.items() if module not in DOORS and module.partition(".")[0] in ORDER]
    assert not [path for path in inside if "teacher_cache.door" in imports_of(path)]
    faces = {"from teacher_cache import", "from student_train import"}
    lines = [line.strip() for path in inside for line in path.read_text("utf-8").splitlines()]
    through = {line for line in lines if line.startswith(tuple(faces))}
    assert through <= {"from teacher_cache import __version__"}


@pytest.mark.parametrize("package", sorted(ORDER))
def test_the_top_of_a_package_shows_only_its_rooms(package: str) -> None:
    found = {p.stem for p in (ROOT / package).iterdir() if (p.suffix == ".py" or (p / "__init__.py").exists())}
    assert found == {"__init__", *ORDER[package]}


@pytest.mark.parametrize("library", sorted(ONE_FILE))
def test_heavy_libraries_stay_in_their_files(library: str) -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in MODULES.values()
        if any(name.split(".")[0] == library for name in imports_of(path))
    }
    assert found <= ONE_FILE[library]


def test_data_and_store_need_no_torch() -> None:
    names = [m for m in MODULES if m.startswith(("teacher_cache.data.", "teacher_cache.store."))]
    code = "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n" + "\n".join(
        f"import {name}" for name in names
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert not [path for path in MODULES.values() if path.stem in REFUSED_NAMES]


def parameters_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """``self`` and ``cls`` do not count, nor do the options of a command: nobody passes those by hand."""
    if any(ast.unparse(d).startswith("app.command(") for d in function.decorator_list):
        return 0
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"])) + (given.vararg is not None) + (given.kwarg is not None)


def too_large(path: Path) -> Iterator[str]:
    where, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    if len(text.splitlines()) > MODULE_LINES:
        yield f"{where}: lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            if node.end_lineno - node.lineno >= FUNCTION_LINES:
                yield f"{where} {node.name}: lines"
            if parameters_of(node) > PARAMETERS:
                yield f"{where} {node.name}: parameters"


def test_modules_and_functions_can_be_taken_in_at_once() -> None:
    found = {line for package in ORDER for path in files(package) for line in too_large(path)}
    assert not found - TOO_LARGE, "too large: split by what a reader looks for, not by length"
    assert not TOO_LARGE - found, "small enough by now: take these lines out of TOO_LARGE"


def test_nothing_unpickles() -> None:
    for path in MODULES.values():
        text = path.read_text(encoding="utf-8")
        assert "pickle.load" not in text, path
        assert "torch.load(" not in text, path
