"""One entry for every official answer file: the benchmark by name, its own files in the order its scorer takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from student_train.scores.gqa import score_gqa
from student_train.scores.mmbench import score_mmbench
from student_train.scores.mme import score_mme
from student_train.scores.pope import score_pope
from student_train.scores.science_qa import score_science_qa
from student_train.scores.textvqa import score_textvqa

BENCHMARKS: dict[str, tuple[Callable[..., Any], tuple[str, ...], tuple[str, ...]]] = {
    "pope": (score_pope, ("folder with coco_pope_*.json", "LLaVA's question file"), ("accuracy", "f1")),
    "textvqa": (score_textvqa, ("TextVQA_0.5.1_val.json",), ()),
    "gqa": (score_gqa, ("testdev_balanced_questions.json",), ()),
    "science_qa": (score_science_qa, ("problems.json", "pid_splits.json"), ()),
    "mme": (score_mme, ("MME_Benchmark_release_version folder",), ("perception", "cognition")),
    "mmbench": (score_mmbench, ("mmbench_dev_*.tsv",), ()),
}
"""name → (scorer, the annotation files it takes, figures that are properties of its result)."""


def score_file(benchmark: str, answers: Path, annotations: Sequence[Path]) -> dict[str, Any]:
    """Every figure of the benchmark for an answer file.

    Raises
    ------
    ValueError
        An unknown benchmark, other files than it takes, or an answer file that does not fit them.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark {benchmark!r}: expected one of {', '.join(BENCHMARKS)}")
    scorer, wanted, figures = BENCHMARKS[benchmark]
    if len(annotations) != len(wanted):
        found = f"found {len(annotations)} files"
        raise ValueError(f"{benchmark}: expected {' and '.join(wanted)} after the answers, {found}")
    scores = scorer(answers, *annotations)
    facts = {figure: getattr(scores, figure) for figure in figures}
    for field in dataclasses.fields(scores):
        value = getattr(scores, field.name)
        if not isinstance(value, (tuple, list)):
            facts[field.name] = _plain(value)
    return facts


def _plain(value: Any) -> Any:
    if hasattr(value, "as_dict"):
        return value.as_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return value
