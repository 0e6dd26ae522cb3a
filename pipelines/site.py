"""The site: every page of ``docs``, and a reference made of the code itself. Nothing of it is kept.

    make site            # then: python -m http.server --directory runs/site/html

Configuration keys come from the pydantic models, Python names from ``__all__`` and docstrings, commands from typer.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import typer.cli

from student_train.cli import app as phase_two
from student_train.config import FitConfig
from student_train.studies.rounds import RoundsConfig
from student_train.studies.runs import AblationConfig
from student_train.training.stages import StagesConfig
from teacher_cache.cli import app as phase_one
from teacher_cache.config import CacheConfig, schema

ROOT = Path(__file__).parents[1]
TITLE, ADDRESS = "teacher-cache", "https://example.org/teacher-cache"
MODELS = (
    (CacheConfig, "a cache: `teacher-cache build FILE`"),
    (FitConfig, "a student: `student-train fit FILE`"),
    (StagesConfig, "a student in stages: `student-train fit FILE`"),
    (RoundsConfig, "a student in rounds: `student-train rounds FILE`"),
    (AblationConfig, "many students: `student-train ablate FILE`"),
)
NAVIGATION: dict[str, tuple[str, ...]] = {
    "Start": ("README.md", "docs/tutorial.md", "docs/how-to.md", "docs/inputs.md", "docs/silent-failures.md"),
    "Reference": ("reference/configuration.md", "reference/command-line.md", "reference/python.md"),
    "Inside": ("docs/design.md", "docs/cache-format.md", "docs/decisions.md", "docs/benchmarks.md"),
    "Results": (),
    "Project": ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"),
}


def main(folder: Path = Path("runs/site")) -> None:
    """Write the pages below ``folder`` and build them strictly: a link to nothing is an error."""
    shutil.rmtree(folder, ignore_errors=True)
    write_pages(folder / "pages")
    build(folder)
    typer.echo(f"{folder}/html: python -m http.server --directory {folder}/html")


def write_pages(folder: Path) -> None:
    """The pages of ``docs``, their pictures, and the reference."""
    places = page_places()
    for source, place in places.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(relinked(source, places), encoding="utf-8")
    shutil.copytree(ROOT / "docs/images", folder / "images")
    for name, text in reference().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def page_places() -> dict[str, str]:
    """Each Markdown page of the project, by its path, and where it lies in the site."""
    pages = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    places = {"README.md": "index.md"} | {page: page.removeprefix("docs/") for page in pages}
    return places | {name: name.lower() for name in NAVIGATION["Project"]}


def relinked(source: str, places: dict[str, str]) -> str:
    """The page's text; links to pages and pictures as they lie in the site, those to code at the repository."""

    def link(found: re.Match[str]) -> str:
        target, mark, part = found[1].partition("#")
        if not target or re.match(r"\w+:", target):
            return found[0]
        path = os.path.normpath(Path(source).parent / target)
        there = places.get(path) or (path.removeprefix("docs/") if path.startswith("docs/images/") else None)
        here = f"{ADDRESS}/blob/main/{path}" if there is None else os.path.relpath(there, Path(places[source]).parent)
        return f"]({here}{mark}{part})"

    return re.sub(r"\]\(([^)\s]+)\)", link, (ROOT / source).read_text(encoding="utf-8"))


def reference() -> dict[str, str]:
    """The generated pages, by where they lie in the site."""
    return {
        "reference/configuration.md": configuration(),
        "reference/command-line.md": command_lines(),
        "reference/python.md": python_names(),
    }


def configuration() -> str:
    """Every key of every configuration file: type, default and meaning."""
    parts = [
        "# Configuration",
        "A file is YAML; `--set KEY=VALUE` lies over it. Unknown keys are refused with the nearest one.",
    ]
    seen: set[str] = set()
    for model, what in MODELS:
        tree = schema(model)
        parts += [f"## {model.__name__}", f"The file of {what}.", *_section(tree)]
        for name, section in tree.get("$defs", {}).items():
            if name not in seen and section.get("properties"):
                parts += [f"### {name}", *_section(section)]
            seen.add(name)
    return "\n\n".join(parts) + "\n"


def _section(section: dict[str, Any]) -> Iterator[str]:
    yield from filter(None, [_flowing(section.get("description", ""))])
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, value in section["properties"].items():
        default = f"`{json.dumps(value['default'], ensure_ascii=False)}`" if "default" in value else ""
        meaning = _flowing(value.get("description", ""))
        rows.append(
            "| " + " | ".join(c.replace("|", "\\|") for c in (f"`{key}`", _type(value), default, meaning)) + " |"
        )
    yield "\n".join(rows)


def _type(value: dict[str, Any]) -> str:
    """A key's type as its schema says it, with the bounds of a number."""
    if reference := value.get("$ref"):
        name = reference.rpartition("/")[2].removesuffix(".json")
        return f"[{name}](#{name.lower()})" if name != "fit" else "[FitConfig](#fitconfig)"
    if options := value.get("anyOf") or value.get("oneOf"):
        return " or ".join(map(_type, options))
    if "enum" in value or "const" in value:
        return ", ".join(f"`{option}`" for option in value.get("enum", [value.get("const")]))
    if value.get("type") == "array":
        items = value.get("items") or {}
        return f"list of {_type(items)}" if items else "list"
    if value.get("type") == "object":
        inner = value.get("additionalProperties")
        return f"mapping of {_type(inner)}" if isinstance(inner, dict) and inner else "mapping"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {value[name]:g}" for name, sign in signs.items() if name in value]
    return " ".join([str(value.get("type", "anything")), *bounds])


def command_lines() -> str:
    """What ``--help`` says, of every command."""
    parts = ["# Command line"]
    for app, name in ((phase_one, "teacher-cache"), (phase_two, "student-train")):
        command = typer.main.get_command(app)
        text = typer.cli.get_docs_for_click(obj=command, ctx=typer.Context(command), name=name)
        parts.append(re.sub(r"^#", "##", text, flags=re.M))
    return "\n\n".join(parts)


def python_names() -> str:
    """Signature and docstring of every name in ``__all__`` of both packages, and of their public methods."""
    parts = ["# Python"]
    for package in ("teacher_cache", "student_train"):
        module = importlib.import_module(package)
        parts += [f"## {package}", _markdown(inspect.getdoc(module) or "")]
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            if not isinstance(thing, str):
                parts += _described(thing, f"{package}.{name}", "###")
    return "\n\n".join(parts) + "\n"


def _described(thing: Any, name: str, mark: str) -> Iterator[str]:
    yield f"{mark} {name}"
    with contextlib.suppress(TypeError, ValueError):  # a module has none, nor has a subclass of dict
        yield f"```python\n{name.rpartition('.')[2]}{inspect.signature(thing)}\n```"
    yield _markdown(inspect.getdoc(thing) or "")
    for inner, value in vars(thing).items() if inspect.isclass(thing) or inspect.ismodule(thing) else ():
        if inspect.ismodule(thing) and getattr(value, "__module__", "") != thing.__name__:
            continue
        value = value.fget if isinstance(value, property) else getattr(thing, inner)
        if not inner.startswith("_") and callable(value) and inspect.getdoc(value):
            yield from _described(value, f"{name}.{inner}", mark + "#")


def _markdown(text: str) -> str:
    """reStructuredText as our docstrings use it, in Markdown: sections, errors and when they are raised, examples."""
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", text.replace("``", "`"))
    text = re.sub(r"^(\w[\w ]*)\n-{3,}$", r"**\1**\n", text, flags=re.M)
    text = re.sub(r"^([A-Z]\w*(?:, \w+)*)\n    (?=\S)", r"\n`\1`: ", text, flags=re.M)
    return re.sub(r"^>>> .*?(?=\n\n|\Z)", r"```pycon\n\g<0>\n```", text, flags=re.M | re.S)


def _flowing(text: str) -> str:
    """One paragraph, without the examples."""
    return " ".join(_markdown(text.partition(">>>")[0]).split())


def results() -> list[str]:
    return [page for page in page_places() if page.startswith("docs/results")]


def build(folder: Path) -> None:
    """Zensical's strict build of ``folder/pages`` into ``folder/html``; exits with what it says of a bad link."""
    places, sections = page_places(), NAVIGATION | {"Results": tuple(results())}
    navigation = [{title: [places.get(page, page) for page in pages]} for title, pages in sections.items()]
    project = {
        "site_name": TITLE,
        "site_url": ADDRESS,
        "repo_url": ADDRESS,
        "docs_dir": "pages",
        "site_dir": "html",
        "nav": navigation,
        "theme": {"features": ["navigation.sections", "navigation.top", "search.highlight", "content.code.copy"]},
        "markdown_extensions": {"tables": {}, "toc": {"permalink": True}, "pymdownx.superfences": {}},
    }
    (folder / "mkdocs.yml").write_text(json.dumps(project, indent=1, ensure_ascii=False), encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(folder / "mkdocs.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"zensical: {done.stdout}{done.stderr}")


if __name__ == "__main__":
    typer.run(main)
