"""docs/inputs.md speaks of tests that exist, and of every reason for which a sample is skipped while it is read."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "inputs.md").read_text(encoding="utf-8")


def reasons(path: Path) -> list[list[str]]:
    """The fixed parts of each text that an ``ImageError`` or ``_UnfitError`` is raised with."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("ImageError", "_UnfitError"):
            text = node.args[0]
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            found.append([str(p.value) for p in parts if isinstance(p, ast.Constant)])
    return found


def test_every_test_that_the_page_names_exists() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", PAGE)
    assert len(named) > 20
    assert [name for name in named if f"def {name}(" not in tests] == []


def test_every_reason_for_a_skip_is_on_the_page() -> None:
    phrases = re.findall(r'"([^"]+)"', PAGE)
    for name in ("conversations.py", "images.py", "image_files.py"):
        found = reasons(ROOT / "teacher_cache" / "data" / name)
        assert found, name
        for parts in found:
            text = " ".join(parts)
            fixed = re.sub(r"^image |^: |^\s+", "", text)
            assert not fixed.strip(" :") or any(p in text for p in phrases), (name, text)
