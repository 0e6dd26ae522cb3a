"""Both command lines print errors that a user can mend calmly, and show every other one with its traceback."""

from __future__ import annotations

import builtins
import os
import re
import signal
from pathlib import Path

import pytest
import typer

from teacher_cache import errors
from teacher_cache.command_line import calm_errors

ROOT = Path(__file__).parents[2]
OURS = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.UserError)]


@pytest.mark.parametrize("error", [e for e in OURS if e is not errors.UserError])
def test_an_error_of_ours_is_shown_calmly_and_is_a_builtin_too(error: type[Exception], capsys) -> None:
    assert any(getattr(builtins, base.__name__, None) is base for base in error.__mro__[1:-3])
    with pytest.raises(typer.Exit) as ended, calm_errors(""):
        raise error("data.json: expected a list, found a number [bold]; write one")
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == "error: data.json: expected a list, found a number [bold]; write one\n"


def test_no_error_is_named_outside_the_one_set() -> None:
    """One that is would be a traceback at both command lines."""
    ours = {error.__name__ for error in OURS}
    for path in [*(ROOT / "teacher_cache").rglob("*.py"), *(ROOT / "student_train").rglob("*.py")]:
        for name, bases in re.findall(r"^class ([A-Z]\w*Error)\((.*)\):", path.read_text(encoding="utf-8"), re.M):
            assert name in ours or ours & set(bases.split(", ")), f"{path}: {name} is none of errors.py"
            ours.add(name)


def test_a_file_that_may_not_be_opened_is_shown_calmly(tmp_path, capsys) -> None:
    with pytest.raises(typer.Exit), calm_errors(""):
        (tmp_path / "none.yaml").read_text()
    assert "none.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError, OSError])
def test_a_fault_of_ours_is_a_traceback(error: type[Exception]) -> None:
    with pytest.raises(error, match="operands"), calm_errors(""):
        raise error("operands could not be broadcast together")


def test_a_signal_says_that_the_work_stands(capsys) -> None:
    with pytest.raises(typer.Exit) as ended, calm_errors("run it again"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.exit_code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "stopped by SIGTERM; run it again\n"
