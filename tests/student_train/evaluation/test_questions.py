"""Evaluation reads questions as training reads data, counts every yes and no, and asks as the student was taught."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from student_train.config import LossSpec
from student_train.evaluation.answers import Student
from student_train.evaluation.evaluate import evaluate_model
from student_train.evaluation.questions import read_questions
from student_train.training.trainer import fit
from teacher_cache.errors import ConfigError, DataError, EvaluationError, TemplateError
from tests.fixtures.online import TEACHER, fit_config

Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def yes_no(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Lines:
    """Questions that the tiny teacher answers right, half of them with yes."""
    lines = json.loads((world / "dev.json").read_text())
    by_answer = {
        answer: [s for s in lines if s["conversations"][1]["value"] == answer and s["question_type"] == "exist"][:3]
        for answer in ("yes", "no")
    }
    return by_answer["yes"] + by_answer["no"]


def second(line: dict[str, Any], text: str) -> dict[str, Any]:
    asked, answered = line["conversations"]
    return {**line, "conversations": [asked, {**answered, "value": text}]}


def answer(line: dict[str, Any]) -> str:
    return str(line["conversations"][1]["value"])


FORMS: dict[str, Callable[[Lines], str]] = {
    "plain": json.dumps,
    "the assistant first": lambda lines: json.dumps(
        [{**s, "conversations": [{"from": "gpt", "value": "Hello."}, *s["conversations"]]} for s in lines]
    ),
    "a space": lambda lines: json.dumps([second(s, answer(s) + " ") for s in lines]),
    "a full stop": lambda lines: json.dumps([second(s, answer(s).capitalize() + ".") for s in lines]),
    "half of them": lambda lines: json.dumps([second(s, answer(s) + " " * (n % 2)) for n, s in enumerate(lines)]),
    "no ids": lambda lines: json.dumps([{k: v for k, v in s.items() if k != "id"} for s in lines]),
}


@pytest.mark.parametrize("form", FORMS)
def test_questions_in_every_form_have_the_figures_of_the_plain_one(
    form: str, yes_no: Lines, world: Path, tmp_path: Path
) -> None:
    data = tmp_path / "own.json"
    data.write_text(FORMS[form](yes_no))
    facts = evaluate_model(TEACHER, data, world / "images", output=tmp_path / "said.jsonl", max_new_tokens=8)
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps(yes_no))
    expected = evaluate_model(TEACHER, plain, world / "images", "tiny", max_new_tokens=8)
    del facts["nll"], expected["nll"]  # of the truth as it is spelled
    assert facts == expected
    assert facts["yes/no questions"] == facts["questions"] == len(yes_no)
    assert facts["TP"] + facts["FP"] + facts["TN"] + facts["FN"] == len(yes_no)
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [line["id"] for line in said] == [c.sample_id for c in read_questions(data)]
    assert [line["image"] for line in said] == [s["image"] for s in yes_no]


def test_a_sample_that_cannot_be_asked_is_named(yes_no: Lines, tmp_path: Path) -> None:
    data = tmp_path / "own.json"
    data.write_text(json.dumps([*yes_no, {"id": "half", "conversations": yes_no[0]["conversations"][:1]}]))
    with pytest.raises(DataError, match=rf"1 of {len(yes_no) + 1} samples cannot be asked \(first: half, "):
        read_questions(data)


def test_a_students_folder_says_how_it_is_asked_and_another_template_is_refused(world: Path, tmp_path: Path) -> None:
    exported = fit(fit_config([LossSpec("cross_entropy")], tmp_path, max_steps=1), "quiet").model
    found = [Student.load(exported, chat_template=name).reader.chat for name in ("", "tiny")]
    assert [chat.original("yes") for chat in found] == [Student.load(TEACHER).reader.chat.original("yes")] * 2
    for name in ("vicuna_v1", "plain"):
        with pytest.raises(ConfigError, match=rf"chat_template={name}: the student's own .* writes .* another way"):
            Student.load(exported, chat_template=name)
    with pytest.raises(ConfigError, match=r"chat_template=vicuna_v1: "):
        evaluate_model(Path(exported), world / "dev.json", world / "images", "vicuna_v1")


def test_a_folder_whose_template_ends_no_answer_needs_to_be_told(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(TEACHER, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] }}{% endfor %}")
    with pytest.raises(TemplateError, match=r"set student.chat_template to .* \(evaluate --chat-template\)"):
        Student.load(folder)
    facts = evaluate_model(folder, world / "dev.json", world / "images", "tiny", max_new_tokens=8)
    assert facts == evaluate_model(TEACHER, world / "dev.json", world / "images", max_new_tokens=8)


def test_images_of_later_turns_are_not_shown(yes_no: Lines, world: Path, tmp_path: Path) -> None:
    """Only the first question is asked, with as many images as it has."""
    for name, more in (("one", False), ("more", True)):
        later = [{"from": "human", "value": "and this <image>"}, {"from": "gpt", "value": "no"}]
        lines = [
            {**line, "image": [line["image"]] * 2, "conversations": [*line["conversations"], *later]} if more else line
            for line in yes_no
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(lines))
    one, other = (
        evaluate_model(TEACHER, tmp_path / f"{name}.json", world / "images", max_new_tokens=8)
        for name in ("one", "more")
    )
    assert one == other


def test_a_question_that_the_student_cannot_be_asked_is_named(yes_no: Lines, world: Path, tmp_path: Path) -> None:
    system = [{"from": "system", "value": "be brief"}, *yes_no[0]["conversations"]]
    exported = fit(fit_config([LossSpec("cross_entropy")], tmp_path / "run", max_steps=1), "quiet").model
    (tmp_path / "own.json").write_text(json.dumps([{**yes_no[0], "id": "s", "conversations": system}]))
    with pytest.raises(EvaluationError, match=r"s: the student cannot be asked: the chat template refuses .*opening"):
        evaluate_model(Path(exported), tmp_path / "own.json", world / "images", max_new_tokens=8)
