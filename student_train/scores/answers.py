"""Answer files, read once and checked once.

The format is LLaVA's (`llava/eval/model_vqa_loader.py`): a JSON object a line with `question_id`, `prompt` and `text`.
Ids are compared as text, because LLaVA writes numbers for POPE and MMBench and strings for GQA and ScienceQA.
"""

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Answer:
    """A model's answer to a benchmark question. `prompt` is the question as asked, "" where the file has none."""

    question_id: str
    text: str
    prompt: str
    line: int


def read_json_lines(path: Path | str, keys: Iterable[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, every one with `keys`; blank lines do not count. ValueError names the line."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} line {number}: not JSON ({error.msg} at column {error.colno}); expected one JSON object a "
                "line. Was the run that wrote the file cut short? Write it again."
            ) from error
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            raise ValueError(
                f"{path} line {number}: no field '{missing[0]}'; expected an object with {', '.join(keys)}. "
                "Write the answers in LLaVA's format."
            )
        rows.append({**row, "line": number})
    if not rows:
        raise ValueError(f"{path}: empty; expected one JSON object a line. Write the answers before scoring them.")
    return rows


def read_json(path: Path | str) -> Any:
    """A whole JSON file; ValueError names file and place where it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} line {error.lineno}: not JSON ({error.msg}); expected the benchmark's annotation file. "
            "Download it again."
        ) from error


def read_answers(path: Path | str) -> list[Answer]:
    """The answers of a file in their order. ValueError: not JSON, no `question_id` or `text`, `text` not a string."""
    answers = []
    for row in read_json_lines(path, ("question_id", "text")):
        if not isinstance(row["text"], str):
            raise ValueError(
                f"{path} line {row['line']}: 'text' is {type(row['text']).__name__}; expected a string. "
                "Write an empty string where the model said nothing."
            )
        answers.append(Answer(str(row["question_id"]), row["text"], str(row.get("prompt", "")), row["line"]))
    return answers


def by_question(
    answers: Iterable[Answer], path: Path | str, key: Callable[[Answer], Hashable] = lambda answer: answer.question_id
) -> dict[Hashable, Answer]:
    """Question key → its one answer. ValueError where a question is answered twice."""
    table: dict[Hashable, Answer] = {}
    for answer in answers:
        first = table.setdefault(key(answer), answer)
        if first is not answer:
            raise ValueError(
                f"{path} line {answer.line}: question {key(answer)!r} is answered again (first in line {first.line}); "
                "expected one answer a question. Remove one of the two, or score the runs one by one."
            )
    return table


def check_answered(
    answered: Iterable[Hashable],
    asked: Iterable[Hashable],
    answers_path: Path | str,
    questions_path: Path | str,
) -> None:
    """Every question answered, as often as it was asked, and no other. ValueError names the first that differs."""
    found, expected = Counter(iter(answered)), Counter(iter(asked))
    unknown, missing = list(found - expected), list(expected - found)
    if unknown:
        raise ValueError(
            f"{answers_path}: question {unknown[0]!r} is not in {questions_path} ({len(unknown)} such answers); "
            f"expected answers to its {expected.total()} questions. Score them with the questions they were made from."
        )
    if missing:
        raise ValueError(
            f"{answers_path}: no answer to question {missing[0]!r} of {questions_path} ({len(missing)} missing); found "
            f"{found.total()} answers, expected {expected.total()}. Answer the rest: a score over a part compares with "
            "nothing."
        )


def ratio(part: float, whole: float) -> float:
    """part / whole, and 0.0 where there is nothing to count (the official scripts divide by zero there)."""
    return part / whole if whole else 0.0


def accuracy_by(hits: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """(group, hit) pairs → share of hits in each group, groups in alphabetical order."""
    total: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for group, hit in hits:
        total[group] += 1
        right[group] += hit
    return {group: right[group] / total[group] for group in sorted(total)}


def require_columns(row: Mapping[str, Any], columns: Iterable[str], path: Path | str) -> None:
    """ValueError where an annotation row lacks a column the score needs."""
    for column in columns:
        if column not in row:
            raise ValueError(
                f"{path}: no column '{column}'; found {', '.join(map(str, row))}. Is this the benchmark's own file?"
            )
