"""A student that is evaluated answers as teachers answer, and is compared with them as in its training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipelines.tiny.tokenizer import IMAGE_TOKENS
from student_train.config import SourceConfig
from student_train.evaluation.agreement import agreement
from student_train.evaluation.answers import Student, answer_questions
from student_train.evaluation.questions import read_questions
from teacher_cache.data.conversations import Image
from teacher_cache.data.images import load_image
from teacher_cache.data.rows import expand
from teacher_cache.store.reader import TeacherCache
from teacher_cache.teachers.torch_teacher import TorchTeacher
from tests.fixtures.building import asked
from tests.fixtures.online import TEACHER
from tests.fixtures.rounding import MODEL, rounding


@pytest.mark.parametrize("batch", [1, 64])
def test_a_folder_answers_alike_as_a_teacher_and_as_a_student(teacher: TorchTeacher, world: Path, batch: int) -> None:
    data = world / "dev.json"
    requests = [asked(teacher, question, folder=world / "images") for question in read_questions(data)]
    taught = [teacher.tokenizer.decode(a.token_ids, skip_special_tokens=True).strip() for a in teacher.answer(requests)]
    said = answer_questions(Student.load(TEACHER), data, world / "images", max_new_tokens=32, batch=batch)
    assert said == taught
    assert len(set(said)) > 3


@torch.inference_mode()
def test_agreement_is_that_of_a_plain_loop_over_all_rows(cache_folder: Path, world: Path) -> None:
    """Sample by sample without padding, row by row over the whole vocabulary in float64."""
    student, images = Student.load(TEACHER), str(world / "images")
    student.model.get_output_embeddings().weight.mul_(0.5)  # another model than the teacher
    found = agreement(student, SourceConfig(cache=str(cache_folder), image_folder=images), batch=7)
    kl, top1, top5, rows = 0.0, 0, 0, 0
    with TeacherCache.open(str(cache_folder)) as cache:
        head = torch.from_numpy(cache.head.copy()).double()
        for number in range(len(cache)):
            sample = cache.read([number], ["hidden", "loss_mask", "input_ids"])
            ids, mask = sample.arrays["input_ids"].astype("int64"), sample.arrays["loss_mask"]
            places = [i for i in range(len(ids)) if ids[i] != student.reader.image_token]
            wide = expand(ids, student.reader.image_token, IMAGE_TOKENS)
            shown = [load_image(Image(name, path=name), images) for name in sample.image_ids[0]]
            pixels = student.processor.image_processor(shown, return_tensors="pt")["pixel_values"] if shown else None
            own = student.model(input_ids=torch.from_numpy(wide)[None], pixel_values=pixels).logits[0].double()
            for i in (i for i in places if mask[i]):  # the token before an answer token is text
                state = torch.from_numpy(sample.arrays["hidden"][places.index(i - 1)]).double()
                teacher = (head @ state).log_softmax(-1)
                logits = own[i - 1 + len(wide) - len(ids)]  # its image stands before its answers
                best = int(teacher.argmax())
                kl += float((teacher.exp() * (teacher - logits.log_softmax(-1))).sum())
                top1 += best == int(logits.argmax())
                top5 += best in logits.topk(5).indices.tolist()
                rows += 1
    assert (found.rows, found.top1, found.top5) == (rows, top1 / rows, top5 / rows)
    assert found.kl == pytest.approx(kl / rows, rel=rounding(torch.float32, MODEL))
