"""Imports point one way, heavy libraries stay in their one file, and the data side needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("teacher_cache", "student_train", "pipelines")
# What phase two may know of phase one: how a cache is read, not how it is made.
SHARED = {
    *("arrays", "charts", "checksums", "codecs", "command_line", "config", "conversations", "data", "errors", "folder"),
    *("images", "manifest", "model_config", "models", "page", "prefetch", "progress", "reader", "records", "storage"),
    *("stopping", "store", "terminal", "tokenization", "weights", "writer"),
}
ONE_FILE = {
    "vllm": {f"teacher_cache/{n}.py" for n in ("teacher_vllm", "vllm_session", "vllm_connector", "vllm_processes")},
    "ray": {"teacher_cache/cluster.py"},
}
REFUSED_NAMES = {"utils", "helpers", "common", "manager", "handler", "engine", "base", "core", "misc"}


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_imports_point_one_way() -> None:
    for path in files("teacher_cache"):
        assert not [n for n in imports_of(path) if n.split(".")[0] in ("student_train", "pipelines")], path
    for path in files("student_train"):
        names = imports_of(path)
        assert not [n for n in names if n.split(".")[0] == "pipelines"], path
        modules = {n.split(".")[1] for n in names if n.startswith("teacher_cache.")}
        assert modules <= SHARED, (path, modules - SHARED)


@pytest.mark.parametrize("library", sorted(ONE_FILE))
def test_heavy_libraries_stay_in_their_files(library: str) -> None:
    found = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in files(package)
        if any(n.split(".")[0] == library for n in imports_of(path))
    }
    assert found <= ONE_FILE[library]


def test_the_cache_is_read_and_written_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "import teacher_cache.records, teacher_cache.manifest, teacher_cache.writer, teacher_cache.reader\n"
        "import teacher_cache.codecs, teacher_cache.conversations, teacher_cache.tokenization, teacher_cache.images"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert not [p for package in PACKAGES for p in files(package) if p.stem in REFUSED_NAMES]


def test_nothing_unpickles() -> None:
    for package in PACKAGES:
        for path in files(package):
            text = path.read_text(encoding="utf-8")
            assert "pickle.load" not in text, path
            assert "torch.load(" not in text, path
