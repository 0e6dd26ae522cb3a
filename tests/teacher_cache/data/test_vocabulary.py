"""Cached ids mean to a student what they mean to the teacher, and what differs is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from pipelines.tiny.prepare import TEACHER
from student_train.config import LossSpec
from student_train.feed.tokenizer import check_ids, check_tokenizer
from student_train.training.trainer import fit
from teacher_cache.build.build import build_cache
from teacher_cache.config import CacheConfig
from teacher_cache.data.vocabulary import compare, describe_vocabulary, tokenizer_fingerprint
from teacher_cache.errors import CacheError, TeacherError
from teacher_cache.pages.token_text import TokenText
from teacher_cache.store.reader import TeacherCache
from teacher_cache.teachers.answerer import with_answerer
from teacher_cache.teachers.torch_teacher import TorchTeacher
from tests.fixtures.online import fit_config
from tests.fixtures.tiny_tokenizers import SPECIAL, byte_level, metaspace


def copy_of(folder: Path, added: tuple[str, ...] = (), **settings: Any) -> Path:
    """The tiny teacher with more tokens, and other settings of its tokenizer."""
    shutil.copytree(TEACHER, folder)
    if added:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(list(added), special_tokens=True)
        tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def opened(cache_folder: Path) -> Any:
    with TeacherCache.open(cache_folder) as cache:
        yield cache


def test_a_token_that_the_student_has_in_addition_is_no_difference(opened: TeacherCache, tmp_path: Path) -> None:
    check_tokenizer(opened, tokenizer_of(copy_of(tmp_path / "more", ("<unused>",))), same_ids=False)


def test_another_end_token_is_named_with_the_setting_that_allows_it(opened: TeacherCache, tmp_path: Path) -> None:
    base = tokenizer_of(copy_of(tmp_path / "base", eos_token="<pad>"))
    words = r"end token is </s> \(2\) for the teacher, <pad> \(0\) for the student.*sources\[…\]\.tokenizer=same_ids"
    with pytest.raises(CacheError, match=words):
        check_tokenizer(opened, base, same_ids=False)
    check_tokenizer(opened, base, same_ids=True)


def test_a_begin_token_that_is_written_must_be_the_teachers(opened: TeacherCache, tmp_path: Path) -> None:
    other = tokenizer_of(copy_of(tmp_path / "other", bos_token="<unk>"))
    for same_ids in (False, True):
        with pytest.raises(CacheError, match=r"begin with <s> \(1\) for the teacher, with <unk> \(3\)"):
            check_tokenizer(opened, other, same_ids=same_ids)


@pytest.mark.parametrize("same_ids", [False, True])
def test_another_base_vocabulary_is_refused_whatever_the_setting(same_ids: bool, opened: TeacherCache) -> None:
    with pytest.raises(CacheError, match=r"another base vocabulary \(\d+ tokens, the teacher 68\).*Use a student"):
        check_tokenizer(opened, byte_level(SPECIAL), same_ids=same_ids)


def test_merges_are_part_of_the_description() -> None:
    one, same, other = (describe_vocabulary(t(SPECIAL)) for t in (byte_level, byte_level, metaspace))
    assert one == same
    assert compare(one, other, "the student").never
    cut = compare(one, one | {"merges": "others"}, "the student")
    assert not cut.never
    assert "cuts text into other tokens" in cut.differences[0]


@pytest.fixture(scope="module")
def cache_of_more(cache_config: CacheConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small cache whose teacher has one token more, id 68, which no sample holds."""
    folder = tmp_path_factory.mktemp("more")
    model = copy_of(folder / "teacher", ("<extra>",))
    config = replace(
        cache_config,
        output=str(folder / "cache"),
        teacher=replace(cache_config.teacher, model=str(model)),
        data=replace(cache_config.data, max_samples=4),
    )
    build_cache(config, style="quiet")
    return folder / "cache"


def test_an_added_token_of_the_teacher_is_allowed_where_no_cached_id_is_it(cache_of_more: Path, tmp_path: Path) -> None:
    student = tokenizer_of(TEACHER)
    with TeacherCache.open(cache_of_more) as cache:
        with pytest.raises(CacheError, match="id 68 is '<extra>' for the teacher and 'no token' for the student"):
            check_tokenizer(cache, student, same_ids=False)
        check_tokenizer(cache, student, same_ids=True)


@pytest.mark.parametrize(
    ("array", "meaning", "refused"),
    [("input_ids", (), True), ("topk_ids", ("<other>",), True), ("topk_ids", (), False)],
)
def test_an_id_in_the_cache_that_means_something_else_is_refused(
    array: str, meaning: tuple[str, ...], refused: bool, opened: TeacherCache
) -> None:
    """Ids in use are taken for the teacher's own tokens. One in a top-k costs nothing where the student has none."""
    sample = opened.read(range(len(opened)), ["input_ids", "topk_ids"]).arrays
    used = int(np.setdiff1d(sample[array], sample["input_ids"] if array == "topk_ids" else [])[-1])
    teacher = {**opened.manifest.teacher["vocabulary"], "added": {str(used): "<mine>"}}
    found = compare(teacher, {**teacher, "added": {str(used): name for name in meaning}}, "the student")
    if not refused:
        check_ids(opened, teacher["added"], found, [array])
        return
    with pytest.raises(CacheError, match=rf"{array} holds id {used}, '<mine>', which is not the student's \(id {used}"):
        check_ids(opened, teacher["added"], found, [array])


def test_a_base_student_trains_on_an_instruct_teachers_cache_when_told_so(tmp_path: Path) -> None:
    config = fit_config([LossSpec("cross_entropy"), LossSpec("forward_kl")], tmp_path / "run", max_steps=1)
    base = copy_of(tmp_path / "base", eos_token="<pad>")
    config = replace(config, student=replace(config.student, model=str(base)))
    with pytest.raises(CacheError, match="same_ids"):
        fit(config, "quiet")
    told = replace(config, sources=tuple(replace(s, tokenizer="same_ids") for s in config.sources))
    assert fit(told, "quiet").steps == 1


def test_words_are_shown_with_a_tokenizer_of_the_same_ids(opened: TeacherCache, tmp_path: Path) -> None:
    assert TokenText.open(str(copy_of(tmp_path / "base", eos_token="<pad>")), opened).known


def test_a_student_that_can_say_what_its_teacher_cannot_read_does_not_answer(
    cache_config: CacheConfig, teacher: TorchTeacher, tmp_path: Path
) -> None:
    base, more = copy_of(tmp_path / "base", eos_token="<pad>"), copy_of(tmp_path / "more", ("<unused>",))
    config = replace(cache_config, teacher=replace(cache_config.teacher, answerer=str(base)))
    assert with_answerer(teacher, config).tokenizer is teacher.tokenizer
    config = replace(cache_config, teacher=replace(cache_config.teacher, answerer=str(more)))
    with pytest.raises(TeacherError, match="id 68 is '<unused>' for the student alone"):
        with_answerer(teacher, config)


def test_fingerprint_tells_vocabularies_apart() -> None:
    assert tokenizer_fingerprint(byte_level(SPECIAL)) == tokenizer_fingerprint(byte_level(SPECIAL))
    assert tokenizer_fingerprint(byte_level(SPECIAL)) != tokenizer_fingerprint(metaspace(SPECIAL))
