"""lmms-eval, in its own environment and offline, gives the score of our own evaluation on the same model and questions.

python3 -m venv .venv-lmms && .venv-lmms/bin/python pipelines/install_lmms_eval.py
.venv/bin/python -m pytest -o addopts="" tests/lmms
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from pipelines.lmms_eval.local_task import write_local_task
from pipelines.tiny.evaluate import answer
from pipelines.tiny.models import load_llava, save_llava
from pipelines.tiny.tokenizer import build_processor
from pipelines.tiny.world import write_world
from student_train.evaluation.lmms import LmmsSettings, run_lmms_eval
from student_train.evaluation.metrics import vqa_accuracy
from teacher_cache.errors import EvaluationError

PROJECT = Path(__file__).parents[2]
PYTHON = PROJECT / ".venv-lmms" / "bin" / "python"
TEACHER = PROJECT / "pipelines" / "tiny" / "teacher"

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-lmms: run pipelines/install_lmms_eval.py in it")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """lmms-eval's data set cache stays out of the home folder; one thread, so that two cores can run two tests."""
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "huggingface"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, train_images=1, dev_images=1, test_images=24, seed=7)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The tiny teacher with noise on its weights, so that right and wrong answers of every type occur."""
    model = load_llava(TEACHER)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.6 * weight.std(correction=0) * torch.randn(weight.shape, generator=generator)
    folder = tmp_path_factory.mktemp("student")
    save_llava(model, folder)
    return folder


@pytest.fixture
def task(world, tmp_path):
    write_local_task(world / "test.json", world / "images", tmp_path / "task", max_new_tokens=24)
    return tmp_path / "task"


def test_what_is_installed_is_what_is_locked():
    code = "from pipelines import locks; print(*locks.differences('lmms'), sep='\\n', end='')"
    done = subprocess.run([PYTHON, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout == "", "rm .venv-lmms/ready; make test-lmms"


def test_lmms_eval_scores_what_our_evaluation_scores(world, student, task, tmp_path):
    samples = json.loads((world / "test.json").read_text())
    ours = answer(load_llava(student), build_processor(), samples, world / "images")
    references = [sample["conversations"][1]["value"] for sample in samples]
    expected = vqa_accuracy(ours, references, [sample["question_type"] for sample in samples])
    assert 0 < expected.overall < 1, "an all-right or all-wrong model would prove little"

    how = LmmsSettings(PYTHON, include=task, dtype="float32")
    theirs = run_lmms_eval(student, ["tiny_world"], tmp_path / "out", how)

    assert [row.text for row in theirs.answers["tiny_world"]] == ours
    assert theirs.metrics["tiny_world"]["exact_match"] == expected.overall


def test_answers_that_failed_inside_lmms_eval_are_an_error(student, task, tmp_path):
    """Plain `llava_hf` fails on questions without an image, logs it, scores "" and exits with 0."""
    with pytest.raises(EvaluationError, match=r"Error .* in generating; expected one results file and no failed"):
        run_lmms_eval(student, ["tiny_world"], tmp_path / "out", LmmsSettings(PYTHON, include=task, model="llava_hf"))


def test_a_run_that_ends_early_is_an_error_that_names_its_reason(student, tmp_path):
    with pytest.raises(EvaluationError, match=r"Tasks not found: no_such_task.*lmms_eval\.log"):
        run_lmms_eval(student, ["no_such_task"], tmp_path / "out", LmmsSettings(PYTHON))


def test_the_official_tasks_are_known(student, tmp_path):
    """Offline, GQA's data set is not here: the run ends on the data, not on the task's name or a missing package."""
    with pytest.raises(EvaluationError, match="lmms-lab-encoder/GQA"):
        run_lmms_eval(student, ["gqa"], tmp_path / "out", LmmsSettings(PYTHON))
