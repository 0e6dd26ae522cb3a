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
from student_train.evaluation.questions import own_template, read_questions, template_name
from student_train.students.processor import chat_template
from student_train.training.trainer import fit
from teacher_cache.data.tokenization import TEMPLATES
from teacher_cache.errors import ConfigError, DataError
from teacher_cache.models.pretrained import read_processor
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
    facts = evaluate_model(TEACHER, data, world / "images", "", tmp_path / "said.jsonl", max_new_tokens=8)
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


def test_a_students_folder_says_how_it_is_asked_and_another_template_is_refused(tmp_path: Path) -> None:
    exported = fit(fit_config([LossSpec("cross_entropy")], tmp_path, max_steps=1), "quiet").model
    processor = Student.load(exported).processor
    assert template_name(processor) == "tiny"
    assert template_name(processor, "tiny") == "tiny"
    with pytest.raises(ConfigError, match=r"template=chatml: the student's own chat template writes .* as tiny"):
        template_name(processor, "chatml")
    with pytest.raises(ConfigError, match=r"template=vicuna_v1: "):
        evaluate_model(
            Path(exported), Path(fit_config([], "x").sources[0].image_folder).parent / "dev.json", tmp_path, "vicuna_v1"
        )


def test_every_template_is_known_by_what_it_writes() -> None:
    for name, template in TEMPLATES.items():
        processor = read_processor("student", str(TEACHER))
        if template.end not in processor.tokenizer.get_vocab():
            continue
        processor.chat_template = processor.tokenizer.chat_template = chat_template(template, processor.tokenizer)
        assert own_template(processor) == name


def test_a_folder_with_a_template_of_its_own_needs_to_be_told(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(TEACHER, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] }}{% endfor %}")
    processor = read_processor("student", str(folder))
    assert own_template(processor) == ""
    with pytest.raises(ConfigError, match=r"does not say how it is asked .* \(--template\)"):
        template_name(processor)
    assert template_name(processor, "vicuna_v1") == "vicuna_v1"
