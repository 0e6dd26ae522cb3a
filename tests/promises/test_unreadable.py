"""Places that cannot be read, hold no cache or half of one: a sentence says so, and ``--repair`` destroys nothing."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from teacher_cache.cli import app
from teacher_cache.store.storage import Storage
from teacher_cache.trust.verify import repair_cache, verify_cache
from tests.fixtures.store import synthetic_cache

ROOT = Path(__file__).parents[2]
READERS = {
    "info": ["info", "{}"],
    "verify": ["verify", "{}", "--deep"],
    "view": ["view", "{}", "--output", "{}.html"],
    "plan": ["plan", str(ROOT / "pipelines/tiny/cache.yaml"), "--like", "{}"],
}
RUNNER = """
import sys
from typer.testing import CliRunner
from teacher_cache.cli import app
for line in sys.stdin:
    result = CliRunner().invoke(app, line.split())
    calm = result.exception is None or isinstance(result.exception, SystemExit)
    print(result.exit_code, calm, " ".join(result.output.split()) if calm else repr(result.exception), flush=True)
"""
LOCKED = ["", "manifest.json", "shards", "shards/00001", "shards.parquet", "samples.parquet", "skipped.jsonl"]


def as_anybody() -> None:
    """Give up what lets root read everything (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH); others do not have it."""
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def said(commands: list[list[str]]) -> list[tuple[int, bool, str]]:
    """(status, whether it was calm, output) of commands run without root's rights."""
    run = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input="".join(" ".join(command) + "\n" for command in commands),
        preexec_fn=as_anybody,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    lines = [line.split(" ", 2) for line in run.stdout.splitlines()]
    return [(int(status), calm == "True", text) for status, calm, text in lines]


@pytest.fixture
def locked(tmp_path: Path):
    """A cache a place, in which that place may not be read."""
    folders = {name: tmp_path / (name.replace("/", "-") or "all") for name in LOCKED}
    for name, folder in folders.items():
        synthetic_cache(folder)
        (folder / name).chmod(0)
    yield folders
    for name, folder in folders.items():
        (folder / name).chmod(0o755)


def test_a_place_that_may_not_be_read_is_named_calmly_and_repaired_by_nobody(locked: dict[str, Path]) -> None:
    looks = [[part.format(folder) for part in READERS["verify"]] for folder in locked.values()]
    repairs = [["verify", str(folder), "--repair"] for folder in locked.values()]
    others = [[part.format(locked[n]) for part in READERS[c]] for c in ("info", "view") for n in ("", "shards")]
    others.append([part.format(locked[""]) for part in READERS["plan"]])
    for status, calm, text in said([*looks, *repairs, *others]):
        assert calm, text
        assert status == 1
        assert "Permission denied" in text
        assert "removed" not in text
    for name, folder in locked.items():
        (folder / name).chmod(0o755)
        assert verify_cache(Storage(folder), deep=True).ok


def test_beside_what_may_not_be_read_the_rest_is_repaired(tmp_path: Path) -> None:
    synthetic_cache(tmp_path / "cache")
    (tmp_path / "cache/shards/00000").chmod(0)
    (tmp_path / "cache/shards/00001/index.parquet").write_bytes(b"")
    ((status, calm, text),) = said([["verify", str(tmp_path / "cache"), "--repair"]])
    (tmp_path / "cache/shards/00000").chmod(0o755)
    assert (status, calm) == (0, True)
    assert "removed 1 shards" in text
    assert sorted(p.name for p in (tmp_path / "cache/shards").iterdir() if p.is_dir()) == ["00000", "00002"]


def empty(folder: Path) -> None:
    folder.mkdir()


def foreign(folder: Path) -> None:
    folder.mkdir()
    (folder / "manifest.json").write_text('{"name": "a web page", "icons": []}')


def half(folder: Path) -> None:
    synthetic_cache(folder)
    (folder / "shards.parquet").unlink()
    shutil.rmtree(folder / "shards/00001")


def nothing(_: Path) -> None:
    return


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nothing, "no teacher cache here"),
        (empty, "no teacher cache here"),
        (foreign, "not a manifest"),
        (half, "shards.parquet: missing"),
    ],
)
def test_what_is_no_cache_or_half_of_one_is_said_in_a_sentence(
    tmp_path: Path, command: str, make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / "place")
    result = CliRunner().invoke(app, [part.format(tmp_path / "place") for part in READERS[command]])
    if (command, make) == ("info", half):  # it counts what is there
        assert re.search(r"not whole .*, 2 of 3 shards", " ".join(result.output.split()))
        return
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize("make", [nothing, empty, foreign])
def test_repair_changes_nothing_where_no_cache_is(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "place")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "place"), "--repair"])
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert "no cache here" in result.output
    storage = Storage(tmp_path / "place")
    assert repair_cache(storage, verify_cache(storage)) == []
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert (tmp_path / "place").exists() is (make is not nothing)
