"""Answering: the teacher writes the answers of a shard's conversations anew, turn by turn, and they are kept.

What is kept are the token ids the model produced, never text tokenised again. A shard's answers are one Parquet
file, written complete or not at all, so a killed run answers at most one shard twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from teacher_cache.build.context import Build
from teacher_cache.build.inputs import ReadSample
from teacher_cache.errors import CacheError, ConversationError, TeacherCrashed
from teacher_cache.models.slots import Ids
from teacher_cache.progress import note
from teacher_cache.store.manifest import Manifest, digest
from teacher_cache.store.storage import Storage
from teacher_cache.store.tables import INDEX_BYTES, json_object, parquet_file, read_table, table_bytes, text
from teacher_cache.store.writer import answers_name
from teacher_cache.teachers.teacher import OVERFLOW, AnswerRequest

_KEY = b"teacher_cache"


@dataclass
class AnsweredSample:
    """The answers of one conversation: ids, why each ended (``stop``, ``length``, ``overflow``; ``original``: it was
    not generated) and who gave them.

    ``hidden`` (S, d): states of the whole expanded sequence but its last token, from a one-pass teacher.
    """

    sample_id: str
    answers: list[Ids]
    finish_reasons: list[str]
    source: str
    hidden: torch.Tensor | None = None
    image_checksum: str = ""
    """Of the images the answers are about; empty without one."""

    @property
    def overflowed(self) -> bool:
        """An answer of it was made from logits that are not finite."""
        return OVERFLOW in self.finish_reasons


def answer_conversations(build: Build, samples: Sequence[ReadSample]) -> list[AnsweredSample]:
    """Answers for each conversation, in order; those that keep their original answers are only tokenised.

    The next question of a conversation is asked as soon as its last answer is there; what the teacher makes of that is
    its own business (torch: turn t of all conversations together). Where it crashes, it is started again, and only
    what had not come yet is asked again. A conversation that outgrows the build's limit is answered no further: it
    has fewer answers than questions.
    """
    talks = {sample.sample_id: _Talk(build, sample) for sample in samples}
    teacher = build.teacher
    for attempt in range(_TRIES):
        open_requests = [request for talk in talks.values() if (request := talk.ask()) is not None]
        try:
            for place, answer in teacher.answers(open_requests, lambda asked, _: talks[asked.sample_id].ask()):
                answered = talks[open_requests[place].sample_id].answered
                answered.answers.append(answer.token_ids)
                answered.finish_reasons.append(answer.finish_reason)
                answered.hidden = answer.hidden
            break
        except TeacherCrashed as error:
            if attempt + 1 == _TRIES:
                raise
            note(f"{error} Starting it again for the answers that had not come yet", build.style)
    return [talk.answered for talk in talks.values()]


class _Talk:
    """One conversation while it is answered. ``data.history`` says whose earlier answers stand before a later
    question: the teacher's own or the original ones."""

    def __init__(self, build: Build, sample: ReadSample) -> None:
        self._build, self._sample = build, sample
        conversation = sample.conversation
        self._original = build.config.data.history == "original"
        source = "student" if build.config.teacher.answerer else "teacher"
        self.answered = AnsweredSample(sample.sample_id, [], [], source, image_checksum=sample.image_checksum)
        if not conversation.regenerate:
            self.answered.answers, self.answered.source = list(sample.original), "original"
            self.answered.finish_reasons = ["original"] * len(sample.original)

    def ask(self) -> AnswerRequest | None:
        """The next question, if there is one that fits. With its last answer a one-pass teacher hands out the states
        of the whole conversation, where those are all that is stored."""
        build, conversation, answered = self._build, self._sample.conversation, self.answered
        turn, signals = len(answered.answers), build.config.signals
        if not conversation.regenerate or turn == len(conversation.questions) or answered.overflowed:
            return None
        before = self._sample.original[:turn] if self._original else answered.answers
        try:
            shown = self._sample.shown(before, ask=True)
        except ConversationError:  # an answer cannot be shown again: it has fewer answers than questions
            return None
        if shown.sample.length >= build.limit[0]:
            return None
        drawn = answer_seed(build.config.generation.seed, conversation.sample_id, turn)
        capture = build.teacher.one_pass and not (signals.second_last or signals.attention)
        last = turn + 1 == len(conversation.questions)
        return AnswerRequest(shown, drawn, capture and last and not self._original)


_TRIES = 3
"""How often a shard's answers are begun before a teacher that dies again and again is given up."""


def answer_seed(seed: int, sample_id: str, turn: int) -> int:
    """A seed of its own for every answer, so that no answer depends on its batch or on a resume."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{sample_id}:{turn}".encode()).digest()[:4], "little")


def answers_fingerprint(manifest: Manifest) -> str:
    """Answers depend on teacher, data, generation and shard layout, not on the signals that are stored beside them."""
    return digest([manifest.teacher, manifest.data, manifest.generation, manifest.layout["shard_samples"]])


def write_answers(
    storage: Storage, manifest: Manifest, number: int, samples: Sequence[AnsweredSample], tokenizer: Any
) -> None:
    """``answers/part-{number:05d}.parquet``: a line per answer."""
    lines = [
        {
            "sample_id": sample.sample_id,
            "turn": turn,
            "token_ids": list(ids),
            "text": answer_text(tokenizer, ids),
            "finish_reason": reason,
            "source": sample.source,
            "image_checksum": sample.image_checksum,
        }
        for sample in samples
        for turn, (ids, reason) in enumerate(zip(sample.answers, sample.finish_reasons, strict=True))
    ]
    metadata = json.dumps({"fingerprint": answers_fingerprint(manifest)}).encode()
    table = pa.Table.from_pylist(lines, schema=_SCHEMA)
    storage.write(answers_name(number), [table_bytes(table, {_KEY: metadata})])


def read_answers(storage: Storage, manifest: Manifest, number: int) -> dict[str, AnsweredSample] | None:
    """The shard's answers by sample_id, or None when they are not there yet.

    Raises
    ------
    CacheError
        They were made with another teacher, other data or other generation settings, or the file is damaged.
    """
    name = answers_name(number)
    if not storage.exists(name):
        return None
    table, metadata = read_answer_lines(storage.read(name, INDEX_BYTES), f"{storage.url}/{name}")
    if metadata["fingerprint"] != answers_fingerprint(manifest):
        raise CacheError(
            f"{storage.url}/{name}: answers of another teacher, other data or other generation settings "
            f"(fingerprint {metadata['fingerprint'][:12]}, expected {answers_fingerprint(manifest)[:12]}). "
            "Delete the folder answers/ to answer anew, or choose another output"
        )
    samples: dict[str, AnsweredSample] = {}
    for line in table.to_pylist():
        sample = samples.setdefault(line["sample_id"], AnsweredSample(line["sample_id"], [], [], line["source"]))
        sample.image_checksum = line["image_checksum"]
        sample.answers.append(tuple(line["token_ids"]))
        sample.finish_reasons.append(line["finish_reason"])
    return samples


def read_answer_lines(data: bytes, where: str) -> tuple[pa.Table, dict[str, Any]]:
    """The lines of an answers file, without nulls, and its metadata; ``CacheError`` names it where it is none."""
    file = parquet_file(data, where)
    metadata = json_object((file.metadata.metadata or {}).get(_KEY, b""), where)
    text(metadata.get("fingerprint"), "fingerprint", where)
    columns = {field.name: field.type for field in _SCHEMA if field.name not in ("turn", "text")}
    return read_table(data, where, columns, checked=True), metadata


def answer_text(tokenizer: Any, ids: Ids) -> str:
    """What the ids say, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("turn", pa.int32()),
        ("token_ids", pa.list_(pa.uint32())),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("source", pa.string()),
        ("image_checksum", pa.string()),
    ]
)
