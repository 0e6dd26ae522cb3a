"""Where students go wrong: by type of question, and the questions that most of them miss, with their images."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from student_train.report_data import Experiment
from teacher_cache.page import card, escape, image_element

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


def disagreement(experiment: Experiment) -> str:
    """The section as HTML; empty when no run has predictions."""
    questions = _questions(experiment)
    if not questions:
        return ""
    versus = "the teacher’s answers" if "teacher" in questions[0].line else "the reference answers"
    worst = sorted(questions, key=lambda q: (q.agreeing, q.likeness))[:SHOWN]
    missed = sum(q.agreeing == 0 for q in questions)
    lead = (
        f"{len(questions):,} questions that every run answered, compared with {versus}; no run agrees on {missed:,} of "
        f"them. Below are the {len(worst)} with the least agreement."
    )
    by_type = _by_type(experiment, questions)
    cards = "".join(_card(q, experiment.arms) for q in worst if q.agreeing < 1)
    return (
        f'<h2>Where students disagree with the teacher</h2><p class="lead">{escape(lead)}</p>{by_type}'
        f'<div class="worst">{cards}</div>'
    )


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


def _by_type(experiment: Experiment, questions: list[_Question]) -> str:
    """Share of agreeing answers, arms × types of question."""
    types: dict[str, list[_Question]] = defaultdict(list)
    for question in questions:
        types[str(question.line.get("question_type") or "all questions")].append(question)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in types)
    rows = []
    for arm in experiment.arms:
        cells = "".join(_cell(arm, group) for group in types.values())
        rows.append(f'<tr><th scope="row">{escape(arm)}</th>{cells}</tr>')
    counts = "".join(f"<td>{len(group):,}</td>" for group in types.values())
    table = (
        '<div class="scroll" tabindex="0" role="region" aria-label="Agreement by type of question"><table><thead><tr>'
        f'<th scope="col">agreeing answers, %</th>{head}</tr></thead><tbody>{"".join(rows)}'
        f'<tr><th scope="row">questions</th>{counts}</tr></tbody></table></div>'
    )
    return card("By type of question", table)


def _cell(arm: str, group: list[_Question]) -> str:
    given = [same_answer(a, q.target) for q in group for a in q.answers.get(arm, [])]
    if not given:
        return "<td>–</td>"
    share = 100 * statistics.fmean(given)
    return f'<td class="heat" style="--p:{share:.0f}">{share:.0f}</td>'


def _card(question: _Question, arms: list[str]) -> str:
    line = question.line
    image = str(line.get("image") or "")
    asked = str(line["question"]).replace("<image>", "").strip()
    picture = f"<div>{image_element(image, question.image_folder, f'Image {image}')}</div>" if image else ""
    rows = [("reference", str(line["reference"]), "")]
    if "teacher" in line:
        rows.append(("teacher", str(line["teacher"]), ""))
    for arm in arms:
        for answer, count in _counted(question.answers.get(arm, [])):
            css = "better" if same_answer(answer, question.target) else "worse"
            times = f" (×{count})" if count > 1 else ""
            rows.append((arm + times, answer or "(nothing)", css))
    answers = "".join(
        f"<div><dt>{escape(n)}</dt><dd{f' class={css}' if css else ''}>{_mark(css)}{escape(text)}</dd></div>"
        for n, text, css in rows
    )
    return (
        f'<article class="card{"" if image else " text-only"}">{picture}<div><h3>{escape(line["id"])}</h3>'
        f'<p class="question">{escape(asked)}</p></div><dl class="answers">{answers}</dl></article>'
    )


def _mark(css: str) -> str:
    """A sign beside the colour, for those who do not see the colour."""
    return {"better": "✓ ", "worse": "✗ "}.get(css, "")


def _counted(answers: list[str]) -> list[tuple[str, int]]:
    """Different answers of an arm's seeds, most frequent first."""
    return sorted(((a, answers.count(a)) for a in dict.fromkeys(answers)), key=lambda pair: -pair[1])
