"""``pip install`` without a clone: the wheel holds every file, says what it needs, and runs the demo where nothing else
of the project is."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pipelines.locks import canonical
from pipelines.repair_torchvision import SHIM_NAME

ROOT = Path(__file__).parents[2]
PACKAGES = ("teacher_cache", "student_train", "pipelines")
OF_A_CLONE = ("pipelines/locks/", "pipelines/install_chromium.sh")
"""What only ``make`` reads."""


def tracked(*places: str) -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *places]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git knows: whatever lies about in the working tree is not in it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked(*PACKAGES, "pyproject.toml", "README.md", "LICENSE"):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(folder / "source")], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as opened:
        (name,) = (n for n in opened.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(opened.read(name).decode())


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        held = {name for name in opened.namelist() if ".dist-info/" not in name}
    assert held == {name for name in tracked(*PACKAGES) if not name.startswith(OF_A_CLONE)}
    assert wheel.stat().st_size < 10 << 20


def test_the_wheel_says_who_it_is(metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# teacher-cache")
    urls = {line.split(", ")[0] for line in metadata.get_all("Project-URL", [])}
    assert urls >= {"Repository", "Documentation", "Changelog"}
    assert metadata["Keywords"]
    classifiers = metadata.get_all("Classifier", [])
    for said in ("Development Status", "Intended Audience", "Topic", "Typing", "Operating System"):
        assert any(line.startswith(f"{said} ::") for line in classifiers), said
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)} <= set(classifiers)


def test_whatever_is_imported_is_asked_for(metadata: Message) -> None:
    """By the package itself or one of its extras, and what is installed fits."""
    asked = {canonical(r.name): r for r in map(Requirement, metadata.get_all("Requires-Dist", []))}
    givers = importlib.metadata.packages_distributions()
    wanted: set[str] = set()
    for path in (path for package in ("teacher_cache", "student_train") for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            wanted |= {name.split(".")[0] for name in names} - {*PACKAGES, *sys.stdlib_module_names}
    missing = {n for n in wanted if not {canonical(d) for d in [n, *givers.get(n, [])]} & asked.keys()}
    assert missing == NEEDED_BY_OTHERS
    for name, requirement in asked.items():
        if requirement.marker is None:
            assert requirement.specifier.contains(importlib.metadata.version(name)), requirement


NEEDED_BY_OTHERS = {
    "huggingface_hub",  # transformers asks for it
    "markupsafe",  # jinja2
    "pydantic_core",  # pydantic
    "lmms_eval",  # has an environment of its own
}


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    """In an environment that has what the wheel asks for (that of this test, found by a .pth) and of the project the
    wheel only, in an empty folder."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(pip, check=True)
    (site,) = (tmp_path / "venv/lib").glob("python3*/site-packages")
    others = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    repaired = Path(others[0], f"{SHIM_NAME}.pth")
    others += [repaired.read_text(encoding="utf-8")] if repaired.exists() else []  # .pth files of others are not read
    (site / "others.pth").write_text("\n".join(others))
    (tmp_path / "empty").mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    where = "import teacher_cache, student_train, pipelines; print(teacher_cache.__file__, *pipelines.__path__)"
    assert str(ROOT) not in run(str(python), "-c", where)
    said = run(str(tmp_path / "venv/bin/teacher-cache"), "demo", "--short")
    made = tmp_path / "empty/runs/demo"
    assert "pages: runs/demo/cache.html" in said
    assert "+ hidden states of all tokens" in (made / "table.md").read_text(encoding="utf-8")
    for page in ("cache.html", "report.html"):
        assert "<img" in (made / page).read_text(encoding="utf-8")
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {"runs"}
