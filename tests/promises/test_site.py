"""The site is built strictly; its reference holds every key, command and name there is, and none is kept by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

import student_train
import teacher_cache
from pipelines import site
from teacher_cache.config import schema


@pytest.mark.parametrize("model", [model for model, _ in site.MODELS], ids=lambda m: m.__name__)
def test_every_key_of_a_configuration_stands_in_the_reference_with_its_meaning(model: type) -> None:
    page = site.configuration()
    tree = schema(model)
    for name, section in [(model.__name__, tree), *tree.get("$defs", {}).items()]:
        for key, value in section.get("properties", {}).items():
            assert f"| `{key}` |" in page
            known = value.get("description") or {"$ref", "const"} & value.keys()
            assert known, f"{name}.{key}: say in a docstring below it what it is for"


def test_every_command_stands_in_the_reference() -> None:
    page = site.command_lines()
    for app, name in ((site.phase_one, "teacher-cache"), (site.phase_two, "student-train")):
        commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
        assert [command for command in commands if f"### `{name} {command}`" not in page] == []


def test_every_public_name_stands_in_the_reference() -> None:
    page = site.python_names()
    for module in (teacher_cache, student_train):
        for name in getattr(module, "__all__", ()):
            assert name.startswith("__") or f"### {module.__name__}.{name}\n" in page, name


def test_every_page_is_in_the_navigation() -> None:
    named = {page for pages in site.NAVIGATION.values() for page in pages}
    assert {*site.page_places(), *site.reference()} - {p for p in named if p} == set(site.results())


def test_the_site_is_built_strictly_and_can_be_searched(tmp_path: Path) -> None:
    site.main(tmp_path / "site")
    html = tmp_path / "site/html"
    assert "teacher-cache" in (html / "index.html").read_text(encoding="utf-8")
    found = json.dumps(json.loads((html / "search.json").read_bytes()))
    for word in ("shard_samples", "export-answers", "renormalised"):
        assert word in found, word


def test_a_link_to_nothing_fails_the_build(tmp_path: Path) -> None:
    site.write_pages(tmp_path / "site/pages")
    page = tmp_path / "site/pages/inputs.md"
    page.write_text(page.read_text(encoding="utf-8") + "\n[nowhere](nowhere.md)\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="page does not exist"):
        site.build(tmp_path / "site")
