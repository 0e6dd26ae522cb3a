"""A micro-batch of samples with images anywhere, each as long as the student makes it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.feed.batch import NOTHING, collate
from student_train.feed.raw import RawBatch
from student_train.students.lines import Line
from teacher_cache.data.conversations import Image
from teacher_cache.data.rows import rows_among_text
from teacher_cache.store.reader import TeacherCache
from tests.fixtures.store import IMAGE_TOKEN, signals, synthetic_cache


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    made = synthetic_cache(tmp_path_factory.mktemp("c") / "c", 12, config=signals(), several=True)
    with TeacherCache(made.storage) as cache:
        batch = cache.read(range(len(cache)), ["input_ids", "loss_mask", "runs", "topk_ids"])
    ids, masks = batch.split("input_ids", "token"), batch.split("loss_mask", "token")
    return RawBatch(
        input_ids=[i.astype(np.int64) for i in ids],
        loss_mask=masks,
        images=[[Image(name) for name in names] for names in batch.image_ids],
        placeholders=[runs[:, 1].astype(np.int64) for runs in batch.split("runs", "run")],
        arrays={"topk_ids": batch.arrays["topk_ids"]},
        row_index=np.concatenate([rows_among_text(i, m, IMAGE_TOKEN) for i, m in zip(ids, masks, strict=True)]),
        visual={},
    )


def lines(raw, widths):
    read = zip(raw.input_ids, raw.loss_mask, widths, strict=True)
    return [Line(sample, *of_sample, IMAGE_TOKEN) for sample, of_sample in enumerate(read)]


@settings(max_examples=25, deadline=None)
@given(st.data(), st.booleans())
def test_rows_predict_the_answers_however_long_the_student_makes_each_image(raw, data, pack):
    widths = [np.array([data.draw(st.integers(1, 9)) for _ in shown], np.int64) for shown in raw.placeholders]
    batch = collate(raw, lines(raw, widths), [NOTHING] * len(widths), 0, pack=pack)
    predicted = batch.input_ids[batch.row_sample, batch.row_position + 1]
    assert predicted.tolist() == batch.answer_ids.tolist()
    assert (
        batch.answer_ids.tolist()
        == np.concatenate([i[m] for i, m in zip(raw.input_ids, raw.loss_mask, strict=True)]).tolist()
    )
    assert int((batch.input_ids == IMAGE_TOKEN).sum()) == int(sum(w.sum() for w in widths))
    assert (batch.input_ids[batch.visual_sample, batch.visual_start] == IMAGE_TOKEN).all()
    assert len(batch.visual_start) == sum(map(len, widths))


def test_ids_are_as_stored_until_they_are_used(raw):
    widths = [np.ones(len(shown), np.int64) for shown in raw.placeholders]
    batch = collate(raw, lines(raw, widths), [NOTHING] * len(raw.images), 0)
    assert batch.arrays["topk_ids"].numpy().dtype == raw.arrays["topk_ids"].dtype == np.uint16
    np.testing.assert_array_equal(batch.arrays["topk_ids"].long().numpy(), raw.arrays["topk_ids"].astype(np.int64))
