"""What is written in a format that trainers read is, read again, the same conversation; in every container."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.config import DataConfig
from teacher_cache.data.conversations import IMAGE_TAG, Conversation, Format, Image, parse_sample, pieces
from teacher_cache.data.formats import to_line, write_lines
from teacher_cache.data.sample_reader import read_conversations
from teacher_cache.errors import DataError

FORMATS: tuple[Format, ...] = get_args(Format)
TEXT = st.text(st.sampled_from("ab é\n{}\"'\u2028"), max_size=8)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    asked = draw(st.lists(st.lists(TEXT, min_size=1, max_size=4), min_size=1, max_size=3))
    questions = tuple(IMAGE_TAG.join(pieces(IMAGE_TAG.join(texts))) for texts in asked)
    count = sum(question.count(IMAGE_TAG) for question in questions)
    images = tuple(Image(f"{i}.png", path=f"{i}.png") for i in range(count))
    return Conversation("é", questions, tuple(draw(TEXT) for _ in questions), images, system=draw(TEXT).strip())


@pytest.mark.parametrize("form", FORMATS)
@given(sample=conversations())
def test_a_line_of_every_format_is_read_as_the_conversation_it_was(form: Format, sample: Conversation) -> None:
    assert parse_sample(to_line(sample, form), 0) == sample


SAMPLES = [
    Conversation("a", ("<image>what", "and"), ("a cat", ""), (Image("a.png", path="a.png"),), system="Be brief."),
    Conversation(
        "b", ("<image>or<image>",), ("both",), (Image("x/b.png", path="x/b.png"), Image("a.png", path="a.png"))
    ),
    Conversation("c", ("hello",), ("1 < 2\n",)),
]


@pytest.mark.parametrize("name", ["out.json", "out.jsonl", "out.parquet"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_file_of_every_format_is_read_as_it_was_written(tmp_path: Path, form: Format, name: str) -> None:
    assert write_lines((to_line(s, form) for s in SAMPLES), tmp_path / "deep" / name, form) == 3
    assert read_conversations(DataConfig(path=str(tmp_path / "deep" / name))) == SAMPLES


@pytest.mark.parametrize(("name", "embedded"), [("out.csv", False), ("out", False), ("out.jsonl", True)])
def test_a_name_says_which_container(tmp_path: Path, name: str, embedded: bool) -> None:
    with pytest.raises(DataError, match="expected a name as"):
        write_lines([], tmp_path / name, "llava", embedded)
    assert not list(tmp_path.iterdir())
