"""The portable suite is complete, and its variants reach the libraries."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import portable

TESTS = Path(__file__).parents[1]
FILES = {p.stem.removeprefix("test_"): p for p in TESTS.rglob("test_*.py") if p.parent.name not in ("vllm", "lmms")}
NUMERIC = re.compile(r"tests\.rounding|allclose|assert_close|torch\.equal|approx\(|TorchTeacher\(|Run\.prepare")


@pytest.mark.parametrize("name", [name for names in portable.LEFT_OUT.values() for name in names])
def test_what_is_left_out_is_there_and_compares_no_numbers(name: str) -> None:
    text = FILES[name].read_text(encoding="utf-8")
    if name not in ("portable", "remote_training"):  # the one spells what it looks for, the other counts shards
        assert not NUMERIC.search(text), NUMERIC.search(text)


def test_every_other_file_runs() -> None:
    left_out = {name for names in portable.LEFT_OUT.values() for name in names}
    files = {Path(file).stem.removeprefix("test_") for file in portable.files()}
    assert files | left_out == set(FILES)
    assert not files & left_out


@pytest.mark.parametrize("variant", portable.here())
def test_torch_takes_the_instructions_and_threads_that_a_variant_asks_for(variant: str) -> None:
    code = "import torch, tests.fixtures.threads as t; print(torch.backends.cpu.get_cpu_capability(), t.THREADS)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=TESTS.parent,
        env={**os.environ, **portable.environment(variant)},
        capture_output=True,
        text=True,
        check=True,
    )
    capability, threads = done.stdout.split()
    instructions, wanted = portable.VARIANTS[variant]
    assert int(threads) == wanted
    assert instructions in ("own", capability.lower().replace("no avx", "default"))
