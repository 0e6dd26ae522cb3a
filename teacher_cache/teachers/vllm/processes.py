"""Around the processes of a vLLM engine: their environment, where their output goes, and what it says when they die."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from teacher_cache.errors import TeacherError

_CAUSES = (
    (
        r"No available memory for the cache|available KV cache memory|less than (desired|requested)|out of memory"
        r"|requested memory for kv|CPU memory utilization|Cannot allocate memory|can't allocate memory",
        "there is no memory for the KV cache beside the weights. Raise speed.gpu_memory_share, lower "
        "teacher.max_length, spread the model with speed.tensor_parallel, or take a quantised checkpoint "
        "(teacher.quantization)",
    ),
    (
        r"There is no module or parameter named|not initialized from checkpoint",
        "the checkpoint has weight names that vLLM does not know. If Transformers 5 saved it, rename them in place: "
        "from teacher_cache.models.weights import rename_vision_weights; rename_vision_weights(FOLDER)",
    ),
    (
        r"are not supported for now|failed to be inspected|has no vLLM implementation",
        "vLLM does not run this model. Set teacher.backend=torch",
    ),
    (r"[Qq]uantization", "teacher.quantization does not fit this checkpoint or this device"),
)


def start_error(model: str, error: Exception, said: str) -> TeacherError:
    """The engine's processes say in their log why they die, the caller only hears "see stack trace": put together."""
    text = f"{said}\n{type(error).__name__}: {error}"
    cause = next((advice for pattern, advice in _CAUSES if re.search(pattern, text)), "the vLLM engine did not start")
    return TeacherError(f"teacher.model={model}: {cause}. vLLM says: {last_error(text)}")


def last_error(said: str) -> str:
    """The last line of a log that names an error, without the log's prefix."""
    lines = [re.sub(r"^(\([^)]*\)\s*)?(ERROR|WARNING|INFO)[^\]]*\]\s*", "", line).strip() for line in said.splitlines()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    causes = [line for line in named if "Engine core initialization failed" not in line]
    return (causes or named or ["nothing"])[-1][:500]


_GUARD = """
import os, sys
for pid in () if sys.stdin.read() else sys.argv[1:]:
    try:
        os.kill(int(pid), 9)
    except ProcessLookupError:
        pass
"""


def kill_when_orphaned(pids: Sequence[int]) -> subprocess.Popen[str]:
    """Start a small process that kills ``pids`` if this process dies without calling :func:`dismiss`.

    vLLM's EngineCore outlives a driver that was killed with signal 9, and keeps the device's memory: the run that
    resumes would find none. The guard waits for the end of a pipe that only this process holds open.
    """
    command = [sys.executable, "-S", "-c", _GUARD, *map(str, pids)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)


def dismiss(guard: subprocess.Popen[str]) -> None:
    """The processes have ended as they should: the guard goes without killing anything."""
    guard.communicate("done")


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for what is started inside; the caller's environment is restored."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Let processes that are started inside write their stdout and stderr to ``log``, for as long as they live."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, source in zip((1, 2), saved, strict=True):
            os.dup2(source, target)
            os.close(source)
