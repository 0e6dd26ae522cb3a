"""``student-train``: phase two from the command line. Every command is a few lines over functions of this package."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from teacher_cache.command_line import calm_errors
from teacher_cache.config import load_config, schema
from teacher_cache.terminal import say

app = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)

Sets = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE over the file, for example train.seed=1")]
_LAUNCHERS = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}
"""Set by ``accelerate launch`` and ``torchrun`` in the processes that they start."""
Json = Annotated[bool, typer.Option("--json", help="print JSON, for machines")]


@app.command()
def fit(config: Path, sets: Sets = None, as_json: Json = False) -> None:
    """Train one student (one stage, or all stages of a file that has ``stages``) and export it."""
    from student_train.training.stages import fit_file

    with calm_errors() as stop:
        if _LAUNCHERS & os.environ.keys():
            stop.follow_parent()  # accelerate launch leaves its process behind when it is ended itself
        summaries = fit_file(config, sets or [], "json" if as_json else "auto", stop)
    for summary in summaries:
        _show(dataclasses.asdict(summary), as_json)


@app.command()
def rounds(config: Path, sets: Sets = None, as_json: Json = False) -> None:
    """Train, let the student answer and the teacher score, train on: distillation on the student's answers, cached."""
    from student_train.studies.rounds import RoundsConfig, train_rounds

    with calm_errors() as stop:
        found = train_rounds(load_config(RoundsConfig, config, sets or []), "json" if as_json else "auto", stop)
    for summary in found:
        _show(dataclasses.asdict(summary), as_json)


def _printed(command: Callable[..., Any]) -> Callable[..., None]:
    """``command`` with an option ``--json`` more: the facts that it returns are printed."""

    def run(*, as_json: bool, **options: Any) -> None:
        with calm_errors():
            facts = command(**options)
        _show(facts, as_json)

    signature = inspect.signature(command, eval_str=True)
    json_option = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
    parameters = [*signature.parameters.values(), json_option]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


@app.command()
@_printed
def plan(config: Path, sets: Sets = None) -> Any:
    """Steps, memory and time of a run or an ablation, from configurations alone: no weights are needed."""
    from student_train.studies.plan_file import plan_file

    return plan_file(config, sets or [])


@app.command()
def ablate(config: Path, sets: Sets = None, as_json: Json = False) -> None:
    """Train every arm and seed of an ablation file that is not done yet, and write its table."""
    from student_train.studies.ablate import ablate as run
    from student_train.studies.runs import AblationConfig
    from student_train.studies.table import as_text

    with calm_errors():
        table = run(load_config(AblationConfig, config, sets or []), "json" if as_json else "auto")
    say(json.dumps(table, indent=1) if as_json else as_text(table))


@app.command()
@_printed
def evaluate(
    model: Path,
    data: Annotated[Path, typer.Option(help="questions with known answers, LLaVA JSON")],
    image_folder: Annotated[Path, typer.Option(help="where its images lie")],
    chat_template: Annotated[str, typer.Option(help="of a student whose folder does not say how it is asked")] = "",
    output: Annotated[Path | None, typer.Option(help="predictions, a JSON line each")] = None,
    cache: Annotated[str, typer.Option(help="held-out teacher cache: agreement with the teacher")] = "",
    max_new_tokens: int = 64,
) -> Any:
    """A student's accuracy by question type, figures of yes/no questions, and its agreement with the teacher."""
    from student_train.evaluation.evaluate import evaluate_model

    return evaluate_model(model, data, image_folder, chat_template, output, cache, max_new_tokens)


@app.command()
@_printed
def lmms_eval(
    model: Path,
    tasks: Annotated[str, typer.Option(help="comma-separated, for example gqa,pope,mme")],
    output: Path = Path("runs/lmms-eval"),
    python: Annotated[Path, typer.Option(help="interpreter of the environment that has lmms-eval")] = Path(
        ".venv-lmms/bin/python"
    ),
    include: Annotated[Path | None, typer.Option(help="folder with task files of your own")] = None,
    device: str = "cuda",
    offline: bool = False,
) -> Any:
    """Run lmms-eval on an exported student: the one road to GQA, ScienceQA, TextVQA, POPE, MME, MMBench."""
    from student_train.evaluation.lmms import LmmsSettings, run_lmms_eval

    how = LmmsSettings(python, include, device, offline=offline)
    return run_lmms_eval(model, tasks.split(","), output, how).metrics


@app.command()
def export(run: Path, output: Path) -> None:
    """A finished run as a Hugging Face folder with a model card."""
    from student_train.students.export import export_run

    with calm_errors():
        folder = export_run(run, output)
    say(f"{folder}: load it with LlavaForConditionalGeneration.from_pretrained, vLLM or lmms-eval")


@app.command()
def report(
    runs: list[Path],
    output: Path = Path("report.html"),
    image_folder: Annotated[str, typer.Option(help="where the images of the predictions lie")] = "",
    cache: Annotated[str, typer.Option(help="the cache that the runs read, for the bytes of one pass")] = "",
) -> None:
    """A page to look at: loss curves, table, quality against cost, where students disagree with the teacher."""
    from student_train.studies.report import write_report

    with calm_errors():
        written = write_report(runs, output, image_folder, cache)
    say(f"{written}: open it in any browser")


class ConfigFile(enum.StrEnum):
    FIT = "fit"
    STAGES = "stages"
    ROUNDS = "rounds"
    ABLATION = "ablation"


@app.command(name="schema")
def print_schema(file: ConfigFile = ConfigFile.FIT) -> None:
    """The JSON schema of configuration files, with which editors complete and check them."""
    from student_train.config import FitConfig
    from student_train.studies.rounds import RoundsConfig
    from student_train.studies.runs import AblationConfig
    from student_train.training.stages import StagesConfig

    of = dict(zip(ConfigFile, (FitConfig, StagesConfig, RoundsConfig, AblationConfig), strict=True))
    say(json.dumps(schema(of[file]), indent=1))


def _show(facts: Any, as_json: bool) -> None:
    if as_json:
        say(json.dumps(facts, indent=1, default=str))
        return
    rows = facts.items() if isinstance(facts, dict) else facts
    for name, value in rows:
        say(f"{str(name).replace('_', ' '):<28} {f'{value:,.4g}' if isinstance(value, float) else value}")


if __name__ == "__main__":  # accelerate launch -m student_train.cli
    app()
