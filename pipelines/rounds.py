"""Rounds of data from the student: it answers a share of the questions, the teacher scores them, training goes on.

    python -m pipelines.rounds FIT.yaml CACHE.yaml --output runs/rounds --rounds 2

LLAVADI, section 4.4, lets the student that is being trained answer half of the data inside the training loop, which was
too slow to do for all. Between rounds it is a cache like any other. An ablation calls :func:`student_cache` by its
``prepare``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from student_train.config import FitConfig
from student_train.training.output import FitSummary
from student_train.training.trainer import fit
from teacher_cache.build.build import BuildSummary, build_cache
from teacher_cache.config import CacheConfig, load_config


def student_cache(
    config: str, model: str, output: str, share: float = 0.5, sets: Sequence[str] = (), seed: int = 0
) -> BuildSummary:
    """The cache of the phase-one file ``config``, at ``output``, a ``share`` of its answers by the student ``model``.

    The other samples keep the data set's own answers, as in the paper; all are scored by the teacher. ``sets`` are
    ``KEY=VALUE`` over the file, ``seed`` is that of sampled decoding. A cache that is there already is left as it is.
    """
    settings = load_config(CacheConfig, config, sets)
    return build_cache(
        dataclasses.replace(
            settings,
            output=output,
            data=dataclasses.replace(settings.data, regenerate_share=share),
            teacher=dataclasses.replace(settings.teacher, answerer=model),
            generation=dataclasses.replace(settings.generation, seed=seed),
        ),
        style="quiet",
    )


def train_rounds(
    config: FitConfig, cache: str, output: str | Path, *, rounds: int, share: float = 0.5, sets: Sequence[str] = ()
) -> list[FitSummary]:
    """Train on ``config``, then ``rounds`` times: cache the student's own answers with ``cache``, and train on from it.

    Round n lies in ``output/round-n`` (its cache, and the run); round 0 is ``config`` itself. Every part resumes.
    """
    folder = Path(output)
    summaries = [fit(dataclasses.replace(config, output=str(folder / "round-0")))]
    for number in range(1, rounds + 1):
        here = folder / f"round-{number}"
        student_cache(cache, summaries[-1].model, str(here / "cache"), share, sets, seed=number)
        source = dataclasses.replace(config.sources[0], cache=str(here / "cache"), answers="cached")
        student = dataclasses.replace(config.student, model=summaries[-1].model, layers_from="", layers=0)
        summaries.append(fit(dataclasses.replace(config, output=str(here), sources=(source,), student=student)))
    return summaries


def main(
    config: Annotated[Path, typer.Argument(help="phase-two file; its sources give the first round's data")],
    cache: Annotated[Path, typer.Argument(help="phase-one file whose questions the student answers")],
    output: Annotated[Path, typer.Option(help="folder for all rounds")],
    rounds: int = 1,
    share: Annotated[float, typer.Option(help="part of the questions that the student answers")] = 0.5,
) -> None:
    """Train, then K rounds of student answers scored by the teacher."""
    for number, summary in enumerate(
        train_rounds(load_config(FitConfig, config), str(cache), output, rounds=rounds, share=share)
    ):
        typer.echo(f"round {number}: loss {summary.loss:.4f}, {summary.steps} steps, {summary.model}")


if __name__ == "__main__":
    typer.run(main)
