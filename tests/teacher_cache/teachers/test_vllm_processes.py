"""What surrounds a vLLM engine, without vLLM: the guard of its processes, and what is made of its last words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from teacher_cache.teachers.vllm.processes import dismiss, environment, kill_when_orphaned, last_error, start_error
from tests.fixtures.waiting import until

DRIVER = """
import os, signal, subprocess, sys
from teacher_cache.teachers.vllm.processes import kill_when_orphaned
os.environ.pop("PYTHONPATH", None)  # as where the package is installed: the guard must not need to find it
os.chdir("/")
engine = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
guard = kill_when_orphaned([engine.pid])
print(engine.pid, flush=True)
signal.pause()
"""


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_an_engine_does_not_outlive_a_killed_driver() -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    engine = int(driver.stdout.readline())
    assert is_running(engine)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    until(lambda: not is_running(engine))
    driver.stdout.close()


def test_a_dismissed_guard_kills_nothing() -> None:
    other = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    dismiss(kill_when_orphaned([other.pid]))
    assert other.poll() is None
    other.kill()
    other.wait()


def test_the_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT_HERE", "before")
    with environment({"KEPT_HERE": "inside", "NEW_HERE": "inside"}):
        assert os.environ["KEPT_HERE"] == os.environ["NEW_HERE"] == "inside"
    assert os.environ["KEPT_HERE"] == "before"
    assert "NEW_HERE" not in os.environ


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("(EngineCore pid=1) ERROR 11-22 [core.py:1] ValueError: No available memory for the cache blocks.", "memory"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "speed.gpu_memory_share"),
        ("ValueError: There is no module or parameter named 'vision_tower.x'", "rename_vision_weights"),
        ("Value error, Model architectures ['A'] failed to be inspected.", "teacher.backend=torch"),
    ],
)
def test_a_failed_start_says_what_to_set(said: str, expected: str) -> None:
    error = RuntimeError("Engine core initialization failed. See root cause above.")
    assert expected in str(start_error("folder", error, said))


def test_the_last_error_is_the_cause_not_what_followed_from_it() -> None:
    cause = "(Worker pid=3) ERROR 11-22 10:00:00 [a.py:1] KeyError: 'a'"
    assert last_error(f"x\n{cause}\nRuntimeError: Engine core initialization failed.") == "KeyError: 'a'"
    assert last_error("nothing of note") == "nothing"
