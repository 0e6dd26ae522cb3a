"""MMBench: multiple choice, each question asked again with its options rotated.

Source: Liu et al., "MMBench: Is Your Multi-modal Model an All-around Player?", ECCV 2024 (arXiv 2307.06281). Letters
are read as VLMEvalKit reads them under its `exact_matching` policy (`can_infer` of `vlmeval/utils/matching_util.py`,
circular groups of `vlmeval/dataset/utils/multiple_choice.py`): no language model judges, and what names no option
counts as wrong. The official leaderboard asks a judge there, so its figure can only be higher. The submission table is
that of LLaVA's `scripts/convert_mmbench_for_submission.py`.
"""

import csv
import string
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow.csv as arrow_csv

from student_train.scores.answers import accuracy_by, by_question, check_answered, read_answers, require_columns

_ROTATION = 1_000_000
"""Index i + r · 1,000,000 is rotation r of question i."""
_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SIGNS_TO_SPACES = str.maketrans(".()[],:;!*#{}", " " * 13)
_BLOCK_BYTES = 1 << 26
"""The reader's block; a line, image included, must fit."""


@dataclass(frozen=True)
class MMBenchScores:
    """`vanilla`: questions asked once. `circular`: right under every rotation; None where the table has no rotations.

    `per_category` and `per_l2_category` are circular where there are rotations. `unmatched` answers name no option.
    """

    vanilla: float
    circular: float | None
    per_category: dict[str, float]
    per_l2_category: dict[str, float]
    unmatched: int


def score_mmbench(answers_path: Path | str, annotations_path: Path | str) -> MMBenchScores:
    """Scores of the dev split (`mmbench_dev_20230712.tsv` and its kin); an answer's `question_id` is the table's index.

    ValueError: no `answer` column (the test split: write a submission instead), missing, doubled or unknown answers.
    """
    rows = _read_table(annotations_path)
    require_columns(next(iter(rows.values())), ("question", "A", "B", "answer"), annotations_path)
    texts = _answers(answers_path, annotations_path, rows)
    letters = {index: can_infer(texts[index], options(row)) for index, row in rows.items()}
    right = {index: letters[index] == row["answer"] for index, row in rows.items()}
    groups: dict[int, list[bool]] = defaultdict(list)
    for index, hit in right.items():
        groups[int(index) % _ROTATION].append(hit)
    main = {index: row for index, row in rows.items() if int(index) < _ROTATION}
    circular = {index: all(groups[int(index)]) for index in main}
    return MMBenchScores(
        vanilla=sum(right[index] for index in main) / len(main),
        circular=sum(circular.values()) / len(main) if len(rows) > len(main) else None,
        per_category=accuracy_by((row.get("category", ""), circular[index]) for index, row in main.items()),
        per_l2_category=accuracy_by((row.get("l2-category", ""), circular[index]) for index, row in main.items()),
        unmatched=sum(letters[index] not in options(row) for index, row in rows.items()),
    )


def write_mmbench_submission(answers_path: Path | str, annotations_path: Path | str, output: Path | str) -> None:
    """The table the evaluation server takes, as .xlsx (needs openpyxl) or .tsv: questions with their `prediction`."""
    rows = _read_table(annotations_path)
    texts = _answers(answers_path, annotations_path, rows)
    columns = [name for name in next(iter(rows.values())) if name not in _DROPPED]
    columns.insert(6, "prediction")
    table = [columns]
    for index, row in rows.items():
        cells = {**row, "prediction": texts[index]}
        table.append([cells[name] for name in columns])
    writers = {".xlsx": _write_xlsx, ".tsv": _write_tsv}
    if Path(output).suffix not in writers:
        raise ValueError(f"{output}: expected a name ending in .xlsx or .tsv. The server takes .xlsx.")
    writers[Path(output).suffix](table, Path(output))


def options(row: Mapping[str, str]) -> dict[str, str]:
    """Letter → option text, for the options a question has."""
    return {letter: row[letter] for letter in string.ascii_uppercase if not _is_empty(row.get(letter, ""))}


def can_infer(text: str, choices: Mapping[str, str]) -> str | None:
    """The option an answer names: by its letter, else by its text; "Z" where it refuses, None where it names no one."""
    return _infer_letter(text, choices) or _infer_text(text, choices)


def _infer_letter(text: str, choices: Mapping[str, str]) -> str | None:
    """The one option letter among the answer's words, signs aside. ("A dog" names A, a known weakness of the rule.)"""
    if any(refusal in text for refusal in _REFUSALS):
        return "Z"
    words = text.translate(_SIGNS_TO_SPACES).split()
    named = [letter for letter in choices if letter in words]
    if len(named) == 1:
        return named[0]
    return "Z" if not named and "Z" in words else None


def _infer_text(text: str, choices: Mapping[str, str]) -> str | None:
    """The one option whose text is part of the answer, case aside."""
    named = [letter for letter, choice in choices.items() if choice.lower() in text.lower()]
    return named[0] if len(named) == 1 else None


def _answers(answers_path: Path | str, annotations_path: Path | str, rows: Mapping[str, object]) -> dict[str, str]:
    answers = by_question(read_answers(answers_path), answers_path)
    check_answered(answers, rows, answers_path, annotations_path)
    return {index: answers[index].text for index in rows}


def _read_table(path: Path | str) -> dict[str, dict[str, str]]:
    """Index → row of an MMBench table, all as text, the image left out."""
    with Path(path).open(encoding="utf-8") as file:
        columns = [name for name in file.readline().rstrip("\r\n").split("\t") if name != "image"]
    require_columns(dict.fromkeys(columns), ("index",), path)
    read = arrow_csv.ReadOptions(block_size=_BLOCK_BYTES)
    parse = arrow_csv.ParseOptions(delimiter="\t", newlines_in_values=True)
    convert = arrow_csv.ConvertOptions(column_types=dict.fromkeys(columns, "string"), include_columns=columns)
    rows = arrow_csv.read_csv(path, read, parse, convert).to_pylist()
    if not rows:
        raise ValueError(f"{path}: no rows; expected MMBench's table. Download it again.")
    return {row["index"]: row for row in rows}


def _is_empty(option: str) -> bool:
    """An option that is not there, as LLaVA tells it (`is_none`)."""
    return option.lower() in ("", "nan", "none")


def _write_tsv(table: list[list[str]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(table)


def _write_xlsx(table: list[list[str]], path: Path) -> None:
    try:
        from openpyxl import Workbook
    except ImportError as error:
        raise ImportError(f"{path}: writing .xlsx needs openpyxl: pip install openpyxl. Or write a .tsv.") from error
    book = Workbook()
    sheet = book.active
    for row in table:
        sheet.append(row)
    book.save(path)
