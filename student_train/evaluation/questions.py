"""Questions with known answers, by the reader of the training data, and the template in which a student is asked."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from student_train.students.processor import chat_template
from teacher_cache.config import DataConfig
from teacher_cache.data.conversations import Conversation, Skipped, one_image_first
from teacher_cache.data.sample_reader import read_conversations
from teacher_cache.data.tokenization import TEMPLATES
from teacher_cache.errors import ConfigError, DataError


def read_questions(data: str | Path) -> list[Conversation]:
    """Every sample of a LLaVA file: its first question is asked, its first answer is the reference.

    Raises ``DataError``: a sample cannot be asked: an accuracy over fewer questions than the file has would be another
    one.
    """
    samples = read_conversations(DataConfig(path=str(data), duplicate_ids="number"))
    faults = {s.sample_id: one_image_first(s) for s in samples if isinstance(s, Conversation)}
    samples = [Skipped(s.sample_id, faults[s.sample_id]) if faults.get(s.sample_id) else s for s in samples]
    skipped = [s for s in samples if isinstance(s, Skipped)]
    if skipped:
        raise DataError(
            f"{data}: {len(skipped):,} of {len(samples):,} samples cannot be asked (first: {skipped[0].sample_id}, "
            f"{skipped[0].reason}). Take them out"
        )
    return [s for s in samples if isinstance(s, Conversation)]


def template_name(processor: Any, asked: str = "") -> str:
    """The template in which a student is asked: the one that its folder's chat template writes.

    Raises ``ConfigError``: ``asked`` is another one, or the folder's is none of ours and none is asked for.
    """
    own = own_template(processor)
    if asked and own and asked != own:
        raise ConfigError(
            f"template={asked}: the student's own chat template writes conversations as {own}, in which it was "
            f"trained. Leave the template out"
        )
    if not (asked or own):
        raise ConfigError(
            f"the student's folder does not say how it is asked (its chat template is none of {', '.join(TEMPLATES)}). "
            "Name the template of its training (--template)"
        )
    return asked or own


def own_template(processor: Any) -> str:
    """Which of our templates writes what the folder's chat template does; empty for none of them."""
    stored = processor.chat_template or processor.tokenizer.chat_template
    if not isinstance(stored, str) or (written := _written(processor.tokenizer, stored)) is None:
        return ""
    for name, template in TEMPLATES.items():
        tokenizer = copy.deepcopy(processor.tokenizer)  # which may be told to write no begin token
        try:
            if _written(tokenizer, chat_template(template, tokenizer)) == written:
                return name
        except ConfigError:  # this tokenizer cannot write it
            continue
    return ""


_PROBE = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": [{"type": "text", "text": "And here?"}]},
]


def _written(tokenizer: Any, jinja: str) -> str | None:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(_PROBE, chat_template=jinja, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError):
        return None
    return str(text)
