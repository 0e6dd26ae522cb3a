"""What of the road through lmms-eval needs no lmms-eval: the task folder, reading results, refusals before the start.

The run itself is tested with the real program, in tests/lmms.
"""

import json

import pytest
import yaml
from PIL import Image

from pipelines.lmms_eval.local_task import write_local_task
from student_train.evaluation.lmms import LmmsAnswer, LmmsSettings, read_results, run_lmms_eval
from teacher_cache.errors import DataError, EvaluationError


def sample(identity, question, answer, **fields):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": identity, "conversations": turns, **fields}


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "a.png")
    return tmp_path / "images"


def write_questions(tmp_path, *samples):
    path = tmp_path / "test.json"
    path.write_text(json.dumps(samples))
    return path


def test_task_holds_every_question_with_and_without_image(tmp_path, images):
    questions = write_questions(
        tmp_path,
        sample("1", "<image>\nwhat is it", "a cup", image="a.png"),
        sample("2", "what color is grass", "green"),
    )
    write_local_task(questions, images, tmp_path / "task", name="mine", max_new_tokens=5)
    rows = [json.loads(line) for line in (tmp_path / "task" / "questions.jsonl").read_text().splitlines()]
    assert rows == [
        {"question_id": "1", "image": str(images / "a.png"), "question": "what is it", "answer": "a cup"},
        {"question_id": "2", "image": "", "question": "what color is grass", "answer": "green"},
    ]
    text = (tmp_path / "task" / "mine.yaml").read_text().replace("!function ", "")
    task = yaml.safe_load(text)
    assert task["task"] == "mine"
    assert task["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / "task" / "questions.jsonl")
    assert task["generation_kwargs"] == {"max_new_tokens": 5, "temperature": 0, "do_sample": False}
    assert (tmp_path / "task" / f"{task['doc_to_visual'].split('.')[0]}.py").exists()


def test_conversations_of_several_turns_are_refused(tmp_path, images):
    two_turns = sample("7", "what", "this")
    two_turns["conversations"] *= 2
    with pytest.raises(DataError, match="sample 7: 4 messages; expected a question and its answer"):
        write_local_task(write_questions(tmp_path, two_turns), images, tmp_path / "task")


@pytest.mark.parametrize("name", ["../secret.png", "missing.png"])
def test_images_outside_the_folder_are_refused(tmp_path, images, name):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    questions = write_questions(tmp_path, sample("7", "<image>\nwhat", "this", image=name))
    with pytest.raises(DataError, match=f"sample 7: image '{name}'; expected a file inside"):
        write_local_task(questions, images, tmp_path / "task")


def test_results_are_read_with_answers_in_the_task_s_order(tmp_path):
    row = {"alias": "mine", "exact_match,none": 0.5, "exact_match_stderr,none": "N/A"}
    path = tmp_path / "20260101_000000_results.json"
    path.write_text(json.dumps({"results": {"mine": row, "group": {"alias": "group"}}}))
    rows = [{"doc_id": 1, "target": 2, "filtered_resps": "b"}, {"doc_id": 0, "target": "a", "filtered_resps": "a"}]
    (tmp_path / "20260101_000000_samples_mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = read_results(path)
    assert results.metrics == {"mine": {"exact_match": 0.5}, "group": {}}
    assert results.answers == {"mine": [LmmsAnswer("a", "a"), LmmsAnswer("2", "b")]}


def test_refused_before_the_start(tmp_path):
    python = tmp_path / "python"
    with pytest.raises(
        EvaluationError, match=r"python: not there; expected the Python of .* pipelines/install_lmms_eval\.py"
    ):
        run_lmms_eval(tmp_path, ["gqa"], tmp_path / "out", LmmsSettings(python=python))
    python.touch()
    with pytest.raises(EvaluationError, match=r"no config\.json; expected a Hugging Face folder"):
        run_lmms_eval(tmp_path, ["gqa"], tmp_path / "out", LmmsSettings(python=python))
    model = tmp_path / "a,b=c"
    model.mkdir()
    (model / "config.json").touch()
    with pytest.raises(EvaluationError, match="has ',' or '='"):
        run_lmms_eval(model, ["gqa"], tmp_path / "out", LmmsSettings(python=python))
