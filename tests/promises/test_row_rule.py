"""Promises 1 and 3: a row is the teacher's distribution at the position that predicts its answer token."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.build.build import build_cache
from teacher_cache.config import CacheConfig, DataConfig
from teacher_cache.data.conversations import Conversation, Image
from teacher_cache.data.images import load_image, square
from teacher_cache.data.rows import (
    TokenizedSample,
    collapse,
    expand,
    expanded_length,
    positions_of,
    rows_among_text,
    text_positions,
)
from teacher_cache.data.sample_reader import read_conversations
from teacher_cache.store.codecs import decode
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.records import line_counts
from teacher_cache.teachers.teacher import Wanted
from teacher_cache.teachers.torch_teacher import TorchTeacher
from tests.fixtures.building import shown
from tests.fixtures.rounding import MODEL, within
from tests.fixtures.store import with_runs

IMAGE = 99


def dense(teacher: TorchTeacher, record, folder: Path) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Logits and final states of one unpadded forward pass, and the ids the model read: no code of ours but images."""
    model, token = teacher._model, teacher.description.image_token
    ids = [i for t in record.arrays["input_ids"].tolist() for i in [t] * (4 if t == token else 1)]
    inputs = {"input_ids": torch.tensor([ids])}
    if record.image_ids:
        image = square(load_image(Image(*record.image_ids, *record.image_ids), folder), (0.5, 0.5, 0.5), "pad")
        inputs["pixel_values"] = teacher.chat.processor.image_processor([image], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        out = model(**inputs, output_hidden_states=True)
    return out.logits[0].float(), out.hidden_states[-1][0], np.array(ids)


def test_rows_equal_a_dense_forward_pass_at_the_predicting_position(
    cache_folder: Path, teacher: TorchTeacher, world: Path
) -> None:
    with TeacherCache.open(cache_folder) as cache:
        for index in range(0, len(cache), 3):
            record = cache[index]
            logits, states, ids = dense(teacher, record, world / "images")
            extra = len(ids) - len(record.arrays["input_ids"])  # the image comes before every answer
            places = np.flatnonzero(record.arrays["loss_mask"]) + extra
            wanted = torch.log_softmax(logits[places - 1], -1)
            assert (ids[places] == record.arrays["input_ids"][record.arrays["loss_mask"]]).all()
            stored = torch.from_numpy(record.arrays["topk_logprobs"].astype(np.float32))
            at = torch.from_numpy(record.arrays["topk_ids"].astype(np.int64))
            torch.testing.assert_close(wanted.gather(-1, at), stored, **within(torch.float16, 2))
            assert (stored[:, 0] >= wanted.max(-1).values - 1e-2).all()
            lse = record.arrays["stats"][:, list(cache.manifest.stats_names).index("lse@1")]
            np.testing.assert_allclose(lse, torch.logsumexp(logits[places - 1], -1), **within(operations=MODEL))
            rows = rows_among_text(record.arrays["input_ids"], record.arrays["loss_mask"], cache.manifest.image_token)
            kept = record.arrays["hidden"][rows].astype(np.float32)
            np.testing.assert_allclose(kept, states[places - 1].numpy(), **within(torch.float16, 2))


def test_a_greedy_answer_is_the_argmax_of_its_rows(cache_folder: Path) -> None:
    """The teacher's own greedy answers must be what its rows predict, the end token included; one position off and
    almost none would be."""
    with TeacherCache.open(cache_folder) as cache:
        batch = cache.read(range(len(cache)))
        answers = batch.arrays["input_ids"][batch.arrays["loss_mask"]]
        assert (batch.arrays["topk_ids"][:, 0] == answers).mean() > 0.999


def test_logits_rebuilt_from_states_and_head_equal_the_teachers(
    cache_folder: Path, teacher: TorchTeacher, world: Path
) -> None:
    with TeacherCache.open(cache_folder) as cache:
        np.testing.assert_array_equal(cache.head, teacher.head().numpy())
        record = cache[1]
        logits, _, ids = dense(teacher, record, world / "images")
        rebuilt = record.arrays["hidden"].astype(np.float32) @ cache.head.T.astype(np.float32)
        text = np.flatnonzero(ids != cache.manifest.image_token)[:-1]
        np.testing.assert_allclose(rebuilt, logits[text].numpy(), atol=0.05)
        assert (rebuilt.argmax(-1) == logits[text].argmax(-1).numpy()).all()


@pytest.mark.parametrize("codec", ["int8", "int4", "bfloat16"])
def test_every_codec_rebuilds_the_states(
    codec: str, cache_config: CacheConfig, teacher: TorchTeacher, cache_folder: Path, tmp_path: Path
) -> None:
    signals = replace(cache_config.signals, codec=codec)
    data = replace(cache_config.data, max_samples=16)
    config = replace(cache_config, output=str(tmp_path / "c"), signals=signals, data=data)
    build_cache(config, teacher=teacher, style="quiet")
    with TeacherCache.open(tmp_path / "c") as cache, TeacherCache.open(cache_folder) as exact:
        mine, theirs = cache.read(range(16)).arrays, exact.read(range(16)).arrays
        scales = cache.scales.get("hidden") or next(iter(exact.scales.values()), None)
        if codec == "bfloat16":
            found = (mine["hidden"].astype(np.uint32) << 16).view(np.float32)
        else:
            assert scales is not None
            found = decode(mine["hidden"], mine["hidden_scale"], codec, scales)
        wanted = theirs["hidden"].astype(np.float32)
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert error < {"int8": 0.02, "int4": 0.15, "bfloat16": 0.005}[codec]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=5), st.booleans(), st.integers(1, 9)
)
def test_positions_equal_a_plain_loop(turns: list[tuple[int, int]], has_image: bool, image_tokens: int) -> None:
    ids: list[int] = []
    mask: list[bool] = []
    for turn, (prompt, answer) in enumerate(turns):
        start = [1, IMAGE] if has_image and turn == 0 else []
        ids += start + [2] * prompt + [3] * answer
        mask += [False] * (len(start) + prompt) + [True] * answer
    sample = with_runs(TokenizedSample("s", np.array(ids), np.array(mask)), IMAGE, image_tokens)
    expanded: list[tuple[int, int]] = []  # (placeholder index, id)
    for place, token in enumerate(ids):
        expanded += [(place, token)] * (image_tokens if token == IMAGE else 1)
    found = sample.positions(IMAGE)
    assert found.length == len(expanded)
    assert found.rows.tolist() == [p - 1 for p, (place, _) in enumerate(expanded) if mask[place]]
    assert found.text.tolist() == [p for p, (_, t) in enumerate(expanded[:-1]) if t != IMAGE]
    assert found.visual.tolist() == [p for p, (_, t) in enumerate(expanded) if t == IMAGE]
    counts = line_counts({"input_ids": sample.input_ids, "loss_mask": sample.loss_mask, "runs": sample.runs}, IMAGE)
    assert (counts["row"], counts["position"]) == (len(found.rows), len(found.text))
    assert (found.text[rows_among_text(sample.input_ids, sample.loss_mask, IMAGE)] == found.rows).all()


def test_padding_and_batch_do_not_change_a_samples_states(
    teacher: TorchTeacher, cache_folder: Path, world: Path
) -> None:
    with TeacherCache.open(cache_folder) as cache:
        records = [cache[i] for i in range(12)]
    data = read_conversations(DataConfig(path=str(world / "train.json")))
    by_id = {s.sample_id: s for s in data if isinstance(s, Conversation)}
    requests = [shown(teacher, by_id[r.sample_id], folder=world / "images") for r in records]
    together = {
        i: s for places, states in teacher.score(requests, Wanted()) for i, s in zip(places, states, strict=True)
    }
    assert sorted(together) == list(range(12))
    for i, request in enumerate(requests):
        [(_, [alone])] = list(teacher.score([request], Wanted()))
        torch.testing.assert_close(together[i].rows, alone.rows, **within(operations=MODEL))


def test_visual_states_do_not_depend_on_the_conversation(
    cache_folder: Path, teacher: TorchTeacher, world: Path
) -> None:
    with TeacherCache.open(cache_folder) as cache:
        batch = cache.read(range(len(cache)))
        stored = {}
        for index, (image_ids, place) in enumerate(zip(batch.image_ids, batch.image_places, strict=True)):
            if not image_ids:
                continue
            record = cache[index]
            _, states, ids = dense(teacher, record, world / "images")
            mine = states[ids == cache.manifest.image_token].numpy()
            line = stored.setdefault(*image_ids, cache.read_images(place[None]).arrays["visual"].astype(np.float32))
            np.testing.assert_allclose(line, mine, **within(torch.float16, 2))
        assert len(stored) < sum(bool(i) for i in batch.image_ids)  # some images have several conversations


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([-1, -1, 0, 1]), st.integers(1, 5)), min_size=1, max_size=9), st.randoms())
def test_a_collapsed_sample_expands_to_what_the_model_reads(
    parts: list[tuple[int, int]], chance: random.Random
) -> None:
    """Images side by side, in several runs, at the very end: ids, mask, rows and text are those of the whole."""
    image = np.array([number for number, count in parts for _ in range(count)])
    ids = np.where(image >= 0, IMAGE, [chance.randrange(50) for _ in image])
    mask = np.array([chance.random() < 0.5 for _ in image]) & (image < 0)
    mask[0] = False
    kept, marks, runs = collapse(ids, mask, image)
    np.testing.assert_array_equal(expand(kept, IMAGE, runs[:, 0]), ids)
    found = TokenizedSample("s", kept, marks, runs).positions(IMAGE)
    assert found.rows.tolist() == (np.flatnonzero(mask) - 1).tolist()
    assert found.visual.tolist() == np.flatnonzero(image >= 0).tolist()
    assert found.text.tolist() == np.flatnonzero(image[:-1] < 0).tolist()
    owner = np.repeat(runs[:, 1], runs[:, 0])
    np.testing.assert_array_equal(owner, image[image >= 0])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.integers(1, 4)), min_size=1, max_size=12),
    st.lists(st.integers(1, 9), min_size=12, max_size=12),
)
def test_rows_and_text_do_not_depend_on_how_many_positions_an_image_has(
    runs: list[int | None], widths: list[int]
) -> None:
    """Images anywhere, each of its own width: a plain loop over the expanded sequence finds the same positions."""
    ids, mask = [1], [False]
    for run in runs:
        ids += [IMAGE, 2] if run is None else [3] * run + [4]
        mask += [False, False] if run is None else [True] * run + [False]
    ids_, mask_ = np.array(ids), np.array(mask)
    each = np.array(widths[: int((ids_ == IMAGE).sum())], np.int64)
    found = positions_of(ids_, mask_, IMAGE, each)
    rows, text, visual, place, image = [], [], [], 0, 0
    for token, answer in zip(ids, mask, strict=True):
        if answer:
            rows.append(place - 1)
        if token == IMAGE:
            visual += range(place, place + each[image])
            place, image = place + int(each[image]), image + 1
        else:
            text.append(place)
            place += 1
    assert found.length == place == len(expand(ids_, IMAGE, each))
    assert found.rows.tolist() == rows
    assert found.visual.tolist() == visual
    assert found.text.tolist() == [p for p in text if p < place - 1]
    assert found.text[rows_among_text(ids_, mask_, IMAGE)].tolist() == rows
    assert len(found.text) == text_positions(len(ids), image)
    assert found.length == expanded_length(len(ids), image, int(each.sum()))


def test_the_shift_is_done_in_one_file() -> None:
    """A state before an answer token, or an image's width less its placeholder, anywhere else is a second row rule."""
    root = Path(__file__).parents[2]
    before = r"(mask\w*\]|nonzero\([^)]*mask[^)]*\)|answers|start\w*\[\w+\]) - 1"
    spelled = re.compile(before + r"|image_tokens\)? - 1")
    found = [
        f"{path.relative_to(root)}: {line.strip()}"
        for package in ("teacher_cache", "student_train")
        for path in sorted((root / package).rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if spelled.search(line)
    ]
    assert found == [
        "teacher_cache/data/rows.py: return Positions(answers - 1, text[text < length - 1], "
        "np.flatnonzero(expanded), start[is_image], length)"
    ]
