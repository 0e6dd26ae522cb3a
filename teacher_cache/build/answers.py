"""Answering: the teacher writes the answers of a shard's conversations anew, turn by turn, and they are kept.

What is kept are the token ids the model produced, never text tokenised again. A shard's answers are one Parquet
file, written complete or not at all, so a killed run answers at most one shard twice.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from teacher_cache.data.conversations import Conversation
from teacher_cache.data.images import AnyImage
from teacher_cache.data.rows import expanded_length
from teacher_cache.data.tokenization import Ids, Prompt, Template, tokenize_answer
from teacher_cache.errors import CacheError, TeacherCrashed
from teacher_cache.progress import Style, note
from teacher_cache.store.manifest import Manifest, digest
from teacher_cache.store.storage import Storage
from teacher_cache.store.tables import INDEX_BYTES, json_object, parquet_file, read_table, text
from teacher_cache.store.writer import answers_name
from teacher_cache.teachers.teacher import OVERFLOW, AnswerRequest, Teacher

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
    """Of the image the answers are about; empty without one."""

    @property
    def overflowed(self) -> bool:
        """An answer of it was made from logits that are not finite."""
        return OVERFLOW in self.finish_reasons


def answer_conversations(
    teacher: Teacher,
    conversations: Sequence[Conversation],
    prompts: Sequence[Prompt],
    images: Sequence[AnyImage | None],
    template: Template,
    *,
    history: str,
    seed: int,
    capture: bool,
    max_length: int,
    source: str = "teacher",
    style: Style = "quiet",
) -> list[AnsweredSample]:
    """Answers for each conversation, in order; those that keep their original answers are only tokenised.

    The next question of a conversation is asked as soon as its last answer is there; what the teacher makes of that is
    its own business (torch: turn t of all conversations together). Where it crashes, it is started again, and only
    what had not come yet is asked again.
    ``history`` says whose earlier answers stand before a later question: the teacher's own or the original ones.
    With ``capture`` a one-pass teacher hands out the states of the whole conversation with its last answer. A
    conversation that outgrows ``max_length`` tokens is answered no further: it has fewer answers than questions.
    ``source`` is written beside new answers: teacher or student.
    """
    image_tokens = teacher.description.shape.image_tokens
    originals = [
        [tokenize_answer(a, template, teacher.tokenizer) for a in c.answers]
        if not c.regenerate or history == "original"
        else []
        for c in conversations
    ]
    samples = [
        AnsweredSample(c.sample_id, [], [], source)
        if c.regenerate
        else AnsweredSample(c.sample_id, original, ["original"] * len(original), "original")
        for c, original in zip(conversations, originals, strict=True)
    ]
    places = {c.sample_id: i for i, c in enumerate(conversations)}

    def ask(i: int) -> AnswerRequest | None:
        """The next question of conversation ``i``, if there is one that fits."""
        conversation, turn = conversations[i], len(samples[i].answers)
        if not conversation.regenerate or turn == len(conversation.questions) or samples[i].overflowed:
            return None
        ids = prompts[i].before(turn, originals[i] if history == "original" else samples[i].answers)
        shown = int(images[i] is not None)
        if expanded_length(len(ids), shown, shown * image_tokens) >= max_length:
            return None
        last = turn + 1 == len(conversation.questions)
        drawn = answer_seed(seed, conversation.sample_id, turn)
        captured = capture and last and history == "teacher"
        return AnswerRequest(conversation.sample_id, turn, ids, images[i], drawn, captured)

    for attempt in range(_TRIES):
        open_requests = [request for i in range(len(conversations)) if (request := ask(i)) is not None]
        try:
            for place, answer in teacher.answers(open_requests, lambda asked, _: ask(places[asked.sample_id])):
                sample = samples[places[open_requests[place].sample_id]]
                sample.answers.append(answer.token_ids)
                sample.finish_reasons.append(answer.finish_reason)
                sample.hidden = answer.hidden
            break
        except TeacherCrashed as error:
            if attempt + 1 == _TRIES:
                raise
            note(f"{error} Starting it again for the answers that had not come yet", style)
    return samples


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
    table = pa.Table.from_pylist(lines, schema=_SCHEMA.with_metadata({_KEY: metadata}))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    storage.write(answers_name(number), [sink.getvalue()])


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
        sample.image_checksum = line.get("image_checksum") or ""  # a column that caches of 0.1 lack
        sample.answers.append(tuple(line["token_ids"]))
        sample.finish_reasons.append(line["finish_reason"])
    return samples


def read_answer_lines(data: bytes, where: str) -> tuple[pa.Table, dict[str, Any]]:
    """The lines of an answers file, without nulls, and its metadata; ``CacheError`` names it where it is none."""
    file = parquet_file(data, where)
    metadata = json_object((file.metadata.metadata or {}).get(_KEY, b""), where)
    text(metadata.get("fingerprint"), "fingerprint", where)
    columns = {field.name: field.type for field in _SCHEMA if field.name not in ("turn", "text")}
    if "image_checksum" not in file.schema_arrow.names:  # 0.1
        del columns["image_checksum"]
    table = read_table(data, where, columns, checked=True)
    return table, metadata


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
