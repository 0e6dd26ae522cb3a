"""The face: some ten names a package, imported when first used, each with its shapes, its errors and a true example."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import fsspec
import pytest
from torch.utils.data import DataLoader
from transformers import AutoProcessor, LlavaForConditionalGeneration, Trainer, TrainingArguments

import student_train
import teacher_cache as tc
from pipelines.tiny.prepare import TEACHER
from pipelines.tiny.student import write_student
from tests.fixtures.s3_server import S3Server

ROOT = Path(__file__).parents[2]
FACES = {
    "teacher_cache": {
        *("__version__", "CacheConfig", "TeacherCache", "build_cache", "distillation", "errors", "load_config"),
        *("open", "plan_cache", "verify_cache"),
    },
    "student_train": {
        *("Batch", "CacheDataset", "FitConfig", "LossSpec", "SourceConfig", "StudentConfig", "Teacher"),
        *("TrainConfig", "distillation", "fit"),
    },
}
NAMES = [(package, name) for package, names in FACES.items() for name in sorted(names - {"__version__"})]
HEAVY = ("torch", "transformers", "zarr", "pyarrow", "numpy", "pydantic", "yaml", "PIL")


@pytest.fixture(scope="module")
def tiny(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the examples are true: the tiny world, a student and the cache of pipelines/tiny/cache.yaml."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "pipelines").symlink_to(ROOT / "pipelines")
    (folder / "runs" / "tiny").mkdir(parents=True)
    (folder / "runs" / "tiny" / "world").symlink_to(world)
    write_student(folder / "runs" / "tiny" / "students" / "0", teacher=TEACHER, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        few = ["data.max_samples=24", "layout.shard_samples=8"]
        tc.build_cache(tc.load_config(tc.CacheConfig, "pipelines/tiny/cache.yaml", few), style="quiet")
    return folder


@pytest.fixture
def known(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What examples may take for granted: a student, its data set and a batch."""
    monkeypatch.chdir(tiny)
    processor = AutoProcessor.from_pretrained("runs/tiny/students/0", backend="pil")
    with tc.open("runs/tiny/cache") as cache:
        data = cache.torch(processor, images="runs/tiny/world/images")
    student = LlavaForConditionalGeneration.from_pretrained("runs/tiny/students/0")
    names = {name: getattr(student_train, name) for name in FACES["student_train"]}
    names |= {"CacheConfig": tc.CacheConfig, "load_config": tc.load_config}
    return {**names, "student": student, "data": data, "batch": data.collate([0, 1]), "DataLoader": DataLoader}


def test_a_face_shows_these_names_and_no_others() -> None:
    for package in (tc, student_train):
        assert set(dir(package)) == set(package.__all__) == FACES[package.__name__]
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = package.nothing


def test_type_checkers_see_the_names_that_are_imported() -> None:
    for package in (tc, student_train):
        tree = ast.parse(Path(str(package.__file__)).read_text("utf-8"))
        (typed,) = (node for node in tree.body if isinstance(node, ast.If))
        lines = [node for node in typed.body if isinstance(node, ast.ImportFrom)]
        assert {alias.asname: node.module for node in lines for alias in node.names} == package._PLACES


def test_importing_the_faces_loads_nothing_heavy() -> None:
    code = f"import sys, teacher_cache, student_train; sys.exit(str([n for n in {HEAVY} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.strip() == "[]"


def test_a_cache_is_opened_and_read_where_there_is_no_torch(tiny: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import teacher_cache as tc\n"
        "print(tc.open('runs/tiny/cache')[0].arrays['topk_ids'].shape[1])"
    )
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tiny, env=environment)
    assert done.stdout.strip() == "16", done.stderr


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_every_name_says_what_it_gives_and_its_example_is_true(package: str, name: str, known: dict[str, Any]) -> None:
    thing = getattr(sys.modules[package], name)
    text = inspect.getdoc(thing) or ""
    assert ">>> " in text, "no example"
    assert inspect.isclass(thing) or inspect.ismodule(thing) or "Raises" in text, "no errors"
    methods = [thing.torch] if name == "TeacherCache" else []
    for documented in (thing, *methods):
        example = doctest.DocTestParser().get_doctest(inspect.getdoc(documented) or "", dict(known), name, None, 0)
        report: list[str] = []
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=report.append)
        assert not report, "".join(report)


def test_the_readme_s_own_loop_runs_as_it_is_printed(
    known: dict[str, Any], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine lines, from an object store."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"## Use the cache in your own loop\n\n```python\n(.*?)```", text, re.S)
    assert len([line for line in code.splitlines() if line]) <= 9
    server = S3Server()
    try:
        server.by_environment(monkeypatch)
        store = fsspec.filesystem("s3", **server.options)
        store.put("runs/tiny/cache", f"{server.bucket('lab')}/qwen-7b", recursive=True)
        (tiny / "data").mkdir()
        (tiny / "data" / "images").symlink_to(tiny / "runs" / "tiny" / "world" / "images")
        args = TrainingArguments("runs/trainer", max_steps=1, report_to="none", save_strategy="no")
        names = {"processor": known["data"].processor, "student": known["student"], "args": args, "Trainer": Trainer}
        exec(compile(code, "README.md", "exec"), {**names, "DataLoader": DataLoader})
    finally:
        server.close()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in known["student"].parameters())


def test_both_packages_are_marked_as_typed_and_the_mark_is_packed() -> None:
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    assert all("py.typed" in packed[package] and (ROOT / package / "py.typed").is_file() for package in FACES)
