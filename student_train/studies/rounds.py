"""``student-train rounds``: the student answers, the teacher scores, training goes on, K times.

LLAVADI (arXiv 2407.19409), section 4.4, lets the student that is being trained answer half of the data inside the
training loop, too slow for all of it. Between rounds it is a cache like any other. Phase one runs in a process of its
own: no teacher is in memory while a student is trained, and it may be another environment's (vLLM).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from student_train.config import FitConfig, FitTree
from student_train.training.output import FitSummary
from student_train.training.stages import merge
from student_train.training.trainer import fit
from teacher_cache.config import CHECKED, AtLeast1, Share, build_config
from teacher_cache.errors import ConfigError
from teacher_cache.progress import Style, note
from teacher_cache.stopping import Stop


@dataclass(frozen=True)
class RoundsConfig:
    """Round 0 is ``fit`` as it stands; each later one trains on from the student before it, on what that student
    answered and the teacher scored."""

    __pydantic_config__ = CHECKED
    output: str = ""
    """Folder of all rounds; ``round-n`` holds the cache of a round and its run."""
    fit: FitTree = field(default_factory=dict)
    """Settings of every round; its first source says where the images lie."""
    cache: str = ""
    """The phase-one file whose questions are answered and whose teacher scores."""
    cache_set: tuple[str, ...] = ()
    """``KEY=VALUE`` over that file."""
    rounds: AtLeast1 = 1
    """Rounds after the first."""
    share: Share = 0.5
    """Part of the questions that the student answers, the same in every round; the others keep the data's answers."""
    python: str = ""
    """Interpreter of the environment that runs phase one (``.venv-vllm/bin/python``); empty: this one."""


def train_rounds(config: RoundsConfig, style: Style = "auto", stop: Stop | None = None) -> list[FitSummary]:
    """Train all rounds; what is done stands, and a round goes on where an earlier run stopped.

    Raises as ``fit``, and ``ConfigError``: nothing to train, or phase one failed (it says why on standard error).
    """
    if not config.output or not config.cache or not config.fit.get("sources"):
        raise ConfigError("a file of rounds needs output, fit (with its sources) and cache, a phase-one file")
    summaries: list[FitSummary] = []
    for number in range(config.rounds + 1):
        here = Path(config.output) / f"round-{number}"
        over: dict[str, object] = {"output": str(here)}
        if summaries:
            student, cache = summaries[-1].model, str(here / "cache")
            note(f"round {number}: {student} answers", style)
            student_cache(config.cache, student, cache, config.share, config.cache_set, number, config.python)
            over |= {"student": {"model": student, "layers_from": "", "layers": 0}}
            over |= {"sources": [{**config.fit["sources"][0], "cache": cache, "data": "", "answers": "cached"}]}
        summaries.append(fit(build_config(FitConfig, merge(config.fit, over), f"round {number}"), style, stop))
    return summaries


def student_cache(
    config: str, model: str, output: str, share: float = 0.5, sets: Sequence[str] = (), seed: int = 0, python: str = ""
) -> None:
    """The cache of the phase-one file ``config``, at ``output``, a ``share`` of its answers by the student ``model``.

    The other samples keep the data set's own answers, as in the paper; all are scored by the teacher. ``sets`` are
    ``KEY=VALUE`` over the file, ``seed`` is that of sampled decoding. A finished cache is left as it is.

    Raises ``ConfigError``: phase one failed.
    """
    own = {"output": output, "data.regenerate_share": share, "teacher.answerer": model, "generation.seed": seed}
    given = [*sets, *(f"{key}={json.dumps(value)}" for key, value in own.items())]
    command = [python or sys.executable, "-m", "teacher_cache.cli", "build", str(config), "--json"]
    command += [word for one in given for word in ("--set", one)]
    if code := subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        raise ConfigError(
            f"{output}: phase one ended with exit code {code}; what it said stands above. Mend {config} or its --set, "
            "and run the same command again: committed shards stand"
        )
