"""Measures an exported student with lmms-eval, which has an environment of its own (pipelines/install_lmms_eval.py).

lmms-eval logs its errors and exits with 0: a run that crashed looks like one that went well, and an answer that failed
counts as "". So success is a new results file and no logged error, and everything else is raised.
"""

import json
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher_cache.errors import EvaluationError

_MODEL_SCRIPT = Path(__file__).with_name("lmms_model.py")
_FAILURE = re.compile(r"Error during evaluation: .*|Error .* in generating|^\w*Error: .*", re.MULTILINE)
_COLOUR = re.compile(r"\x1b\[\d+m")


@dataclass(frozen=True)
class LmmsAnswer:
    """What the model said to a question of a task, in the task's order."""

    target: str
    text: str


@dataclass(frozen=True)
class LmmsResults:
    """`metrics`: task → metric → value · `answers`: task → answers · `path`: lmms-eval's own results file."""

    metrics: dict[str, dict[str, float]]
    answers: dict[str, list[LmmsAnswer]]
    path: Path


@dataclass(frozen=True)
class LmmsSettings:
    """How lmms-eval is run. ``python``: the interpreter of its environment · ``include``: a folder of local tasks ·
    ``offline`` keeps it to data sets that are on this machine · ``model``: lmms-eval's name of a model class."""

    python: Path = Path(".venv-lmms/bin/python")
    include: Path | None = None
    device: str = "cpu"
    dtype: str = "auto"
    offline: bool = True
    model: str = "llava_student"


def run_lmms_eval(
    model_folder: Path, tasks: Sequence[str], output: Path, how: LmmsSettings = LmmsSettings()
) -> LmmsResults:
    """Run lmms-eval's `tasks` on a Hugging Face LLaVA folder; results, samples and its log go under `output`.

    EvaluationError: no such environment, a path that lmms-eval's `key=value,…` arguments cannot hold, or the
    run failed, or a single answer did; the log is named.
    """
    _check(how.python, model_folder)
    output.mkdir(parents=True, exist_ok=True)
    before = set(output.rglob("*_results.json"))
    command: list[str | Path] = [how.python.absolute(), _MODEL_SCRIPT, "--model", how.model, "--device", how.device]
    # device_map too: with "" (the class's default) Transformers 5 refuses to load.
    command += ["--model_args", f"pretrained={model_folder.resolve()},dtype={how.dtype},device_map={how.device}"]
    command += ["--tasks", ",".join(tasks), "--batch_size", "1", "--log_samples", "--output_path", output.resolve()]
    command += ["--include_path", how.include.resolve()] if how.include else []
    log = _run(command, output / "lmms_eval.log", how.offline)
    created = set(output.rglob("*_results.json")) - before
    failure = _FAILURE.search(log)
    if failure or len(created) != 1:
        raise EvaluationError(
            f"lmms-eval on {model_folder}, tasks {', '.join(tasks)}: "
            f"{failure.group(0) if failure else f'{len(created)} results files'}; expected one results file and no "
            f"failed answer. See {output / 'lmms_eval.log'}."
        )
    return read_results(created.pop())


def read_results(path: Path) -> LmmsResults:
    """A results file of lmms-eval (`*_results.json`) with the samples beside it. Numbers only: "N/A" is left out."""
    tasks: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["results"]
    metrics = {
        task: {name.removesuffix(",none"): value for name, value in row.items() if isinstance(value, int | float)}
        for task, row in tasks.items()
    }
    stamp = path.name.removesuffix("_results.json")
    answers = {}
    for task in tasks:
        samples = path.with_name(f"{stamp}_samples_{task}.jsonl")
        if samples.exists():  # a group of tasks has none
            answers[task] = _read_answers(samples)
    return LmmsResults(metrics, answers, path)


def _read_answers(path: Path) -> list[LmmsAnswer]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        LmmsAnswer(str(row["target"]), row["filtered_resps"]) for row in sorted(rows, key=lambda row: row["doc_id"])
    ]


def _check(python: Path, model_folder: Path) -> None:
    if not python.exists():
        raise EvaluationError(
            f"{python}: not there; expected the Python of lmms-eval's environment. Make it: python3 -m venv .venv-lmms "
            "&& .venv-lmms/bin/python pipelines/install_lmms_eval.py"
        )
    if not (model_folder / "config.json").is_file():
        raise EvaluationError(f"{model_folder}: no config.json; expected a Hugging Face folder. Export one first.")
    if set(",=") & set(str(model_folder.resolve())):
        raise EvaluationError(
            f"{model_folder.resolve()}: has ',' or '='; lmms-eval's model_args cannot hold such a path. Rename it."
        )


def _run(command: Sequence[str | Path], log: Path, offline: bool) -> str:
    """Run to the end with all output in `log`; the log's text, colours off."""
    # PYTHONSAFEPATH: our folder must not come first on the other environment's import path.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if offline:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
    text = _COLOUR.sub("", log.read_text(encoding="utf-8", errors="replace"))
    if done.returncode:
        lines = text.strip().splitlines() or ["(no output)"]
        raise EvaluationError(f"lmms-eval ended with {done.returncode}: {lines[-1]}. See {log}.")
    return text
