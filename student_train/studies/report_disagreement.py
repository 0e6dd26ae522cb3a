"""Where students go wrong: by type of question, and the questions that most of them miss, with their images."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from student_train.studies.report_data import Experiment
from teacher_cache.data.conversations import Image
from teacher_cache.pages.page import figure

SHOWN = 18


@dataclass(frozen=True)
class _Question:
    """A question that every run answered. ``target``: the teacher's answer, or the reference where there is none ·
    ``agreeing``: share of runs with that answer · ``likeness``: mean overlap of words, to rank those that all miss."""

    line: Mapping[str, Any]
    target: str
    answers: dict[str, list[str]]
    image_folder: str
    agreeing: float
    likeness: float


def disagreement(experiment: Experiment) -> dict[str, Any]:
    """What the section is made of; empty when no run has predictions."""
    questions = _questions(experiment)
    if not questions:
        return {}
    worst = sorted(questions, key=lambda q: (q.agreeing, q.likeness))[:SHOWN]
    types: dict[str, list[_Question]] = defaultdict(list)
    for question in questions:
        types[str(question.line.get("question_type") or "all questions")].append(question)
    return {
        "total": len(questions),
        "of_teacher": "teacher" in questions[0].line,
        "missed": sum(q.agreeing == 0 for q in questions),
        "shown": len(worst),
        "types": list(types),
        "counts": [len(group) for group in types.values()],
        "agreement": [(arm, [_share(arm, group) for group in types.values()]) for arm in experiment.arms],
        "worst": [_values(q, experiment.arms) for q in worst if q.agreeing < 1],
    }


def same_answer(one: str, other: str) -> bool:
    """Equal but for case, outer white space and a final full stop."""
    return _plain(one) == _plain(other)


def likeness(one: str, other: str) -> float:
    """Share of words in common, in [0, 1] (F1 of the word sets)."""
    a, b = set(_plain(one).split()), set(_plain(other).split())
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0


def _plain(text: str) -> str:
    return text.strip().lower().removesuffix(".")


def _questions(experiment: Experiment) -> list[_Question]:
    runs = [run for run in experiment.runs if run.predictions]
    if not runs:
        return []
    shared = [i for i in runs[0].predictions if all(i in run.predictions for run in runs)]
    questions = []
    for i in shared:
        line = runs[0].predictions[i]
        target = str(line.get("teacher", line["reference"]))
        answers: dict[str, list[str]] = defaultdict(list)
        for run in runs:
            answers[run.arm].append(str(run.predictions[i]["answer"]))
        given = [a for group in answers.values() for a in group]
        questions.append(
            _Question(
                line=line,
                target=target,
                answers=dict(answers),
                image_folder=runs[0].image_folder,
                agreeing=statistics.fmean(same_answer(a, target) for a in given),
                likeness=statistics.fmean(likeness(a, target) for a in given),
            )
        )
    return questions


def _share(arm: str, group: list[_Question]) -> str | None:
    """Percent of the arm's answers that agree."""
    given = [same_answer(a, q.target) for q in group for a in q.answers.get(arm, [])]
    return f"{100 * statistics.fmean(given):.0f}" if given else None


def _values(question: _Question, arms: list[str]) -> dict[str, Any]:
    """What the question's card is given: (who, answer, style) of the reference, the teacher and every arm."""
    line = question.line
    image = str(line.get("image") or "")
    rows = [(name, str(line[name]), "") for name in ("reference", "teacher") if name in line]
    for arm in arms:
        for answer, count in Counter(question.answers.get(arm, [])).most_common():
            css = "better" if same_answer(answer, question.target) else "worse"
            rows.append((f"{arm} (×{count})" if count > 1 else arm, answer or "(nothing)", css))
    return {
        "id": line["id"],
        "asked": str(line["question"]).replace("<image>", "").strip(),
        "image": image,
        "figure": figure(Image(image, path=image), question.image_folder) if image else None,
        "answers": rows,
    }
