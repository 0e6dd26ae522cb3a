"""LLaVA's instruction data, read into conversations: the one place that knows LLaVA's field names."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from teacher_cache.config import DataConfig
from teacher_cache.errors import DataError as DataError

IMAGE_TAG = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class StoredBytes:
    """A stretch of a file."""

    file: str
    start: int
    count: int

    def read(self) -> bytes:
        with Path(self.file).open("rb") as file:
            return os.pread(file.fileno(), self.count, self.start)


@dataclass(frozen=True)
class Image:
    """Where an image is found. ``image_id`` names it in the cache: its path, or a digest of embedded bytes."""

    image_id: str
    path: str = ""
    data: bytes = b""
    stored: StoredBytes | None = None
    """Embedded bytes that were laid down in a file, so that nobody holds them in memory."""
    checksum: str = ""
    """``image_files.image_checksum`` of the bytes that the teacher saw; empty where nobody knows it."""

    @property
    def embedded(self) -> bool:
        """Whether the bytes come with the data, and not from the image folder."""
        return bool(self.data) or self.stored is not None


@dataclass(frozen=True)
class Conversation:
    """One line of the data set.

    ``questions[t]`` and ``answers[t]`` are the user's and the assistant's t-th message. The image, if there is one,
    stands before the first question: as in LLaVA's training code, ``<image>`` is moved to the front of its turn.
    """

    sample_id: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    image: Image | None = None
    regenerate: bool = True


@dataclass(frozen=True)
class Skipped:
    """A sample that is not in the cache, and why."""

    sample_id: str
    reason: str


def read_conversations(data: DataConfig) -> list[Conversation | Skipped]:
    """Every sample of ``data.path`` in file order; a line that cannot be used comes as :class:`Skipped`.

    Raises
    ------
    DataError
        when a file is missing, is not JSON/JSONL/Parquet, or is not a list of samples; or when a sample_id comes
        twice and ``data.duplicate_ids`` is ``error``.
    """
    paths = [data.path] if isinstance(data.path, str) else list(data.path)
    regenerate = _regenerate_rule(data)
    samples: list[Conversation | Skipped] = []
    seen: dict[str, int] = {}
    for path in paths:
        for number, line in enumerate(_lines(Path(path))):
            if data.max_samples and len(samples) >= data.max_samples:
                return samples
            sample = parse_sample(line, number)
            sample = replace(sample, sample_id=_unique(sample.sample_id, seen, data, path, number))
            if isinstance(sample, Conversation):
                sample = replace(sample, regenerate=regenerate(sample.sample_id))
            samples.append(sample)
    if not samples:
        raise DataError(f"{', '.join(paths)}: no samples. Set data.path to a LLaVA JSON, JSONL or Parquet file.")
    return samples


def parse_sample(line: Any, number: int) -> Conversation | Skipped:
    """One line of LLaVA's JSON as a conversation, or the reason why it is none."""
    if not isinstance(line, Mapping):
        return Skipped(f"#{number}", f"expected an object with id and conversations, found {type(line).__name__}")
    sample_id = str(line.get("id", line.get("question_id", f"#{number}")))
    turns = line.get("conversations")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        return Skipped(sample_id, "no list of conversations in it")
    messages: list[tuple[str, str]] = []
    for turn in turns:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str) or turn.get("from") not in _ROLES:
            return Skipped(sample_id, f"a message without from (human or gpt) and value: {str(turn)[:80]}")
        messages.append((_ROLES[turn["from"]], turn["value"]))
    if messages[0][0] == "assistant":  # LLaVA drops a leading message that is not the user's
        messages = messages[1:]
    image = _image_of(line)
    for text in (sample_id, *(text for _, text in messages), image.image_id if image is not None else ""):
        if not _is_unicode(text):  # half of a surrogate pair, which JSON can spell and no tokenizer can read
            return Skipped(sample_id.encode("utf-8", "replace").decode(), f"not Unicode text: {ascii(text)[:80]}")
    return _conversation(sample_id, messages, image)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _conversation(sample_id: str, messages: list[tuple[str, str]], image: Image | None) -> Conversation | Skipped:
    for position, (role, _) in enumerate(messages):
        if role != ("user", "assistant")[position % 2]:
            return Skipped(sample_id, f"roles do not alternate: message {position + 1} is the {role}'s")
    if not messages or len(messages) % 2:
        return Skipped(sample_id, "the last question has no answer")
    questions = [text for _, text in messages[0::2]]
    answers = tuple(text for _, text in messages[1::2])
    tags = [question.count(IMAGE_TAG) for question in questions]
    if any(IMAGE_TAG in answer for answer in answers):
        return Skipped(sample_id, f"{IMAGE_TAG} inside an answer")
    if sum(tags) > 1:
        return Skipped(sample_id, f"{IMAGE_TAG} {sum(tags)} times; exactly one image a conversation is supported")
    if sum(tags) and image is None:
        return Skipped(sample_id, f"{IMAGE_TAG} in the text, but no image")
    if any(tags[1:]):
        return Skipped(sample_id, f"{IMAGE_TAG} in a later turn; it must stand in the first")
    if image is not None and not sum(tags):
        return Skipped(sample_id, f"an image, but no {IMAGE_TAG} in the first question")
    questions = [question.replace(IMAGE_TAG, "").strip() for question in questions]
    return Conversation(sample_id, tuple(questions), answers, image)


def _image_of(line: Mapping[str, Any]) -> Image | None:
    value = line.get("image")
    if value is None or value == "":
        return None
    if isinstance(value, Mapping):  # the Hugging Face image feature: bytes, path or both
        data = value.get("bytes") or b""
        if not data:
            return _image_of({"image": value.get("path")})
        return Image(hashlib.sha256(data).hexdigest()[:32], data=data)
    if isinstance(value, bytes):
        return Image(hashlib.sha256(value).hexdigest()[:32], data=value)
    return Image(str(value), path=str(value))


def _lines(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise DataError(f"{path}: no such data file. Set data.path to a LLaVA JSON, JSONL or Parquet file.")
    if path.suffix == ".parquet":
        try:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
                yield from batch.to_pylist()
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a readable Parquet file ({error})") from error
        return
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        yield from (_json(line, path, number) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        return
    lines = _json(text, path, 1)
    if not isinstance(lines, list):
        raise DataError(f"{path}: expected a list of samples (LLaVA's JSON), found {type(lines).__name__}")
    if lines and not any(isinstance(line, Mapping) and "conversations" in line for line in lines):
        raise DataError(f"{path}: no sample has 'conversations'; expected LLaVA's JSON (id, image, conversations)")
    yield from lines


def _json(text: str, path: Path, number: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: line {number + error.lineno - 1}: not JSON ({error.msg})") from error


def _unique(sample_id: str, seen: dict[str, int], data: DataConfig, path: str, number: int) -> str:
    seen[sample_id] = seen.get(sample_id, 0) + 1
    if seen[sample_id] == 1:
        return sample_id
    if data.duplicate_ids == "error":
        raise DataError(
            f"{path}: sample {number} has the id {sample_id!r} of an earlier one. "
            "Make ids unique, or set data.duplicate_ids=number to cache it as "
            f"{sample_id}#{seen[sample_id]}."
        )
    return _unique(f"{sample_id}#{seen[sample_id]}", seen, data, path, number)


def _regenerate_rule(data: DataConfig) -> Callable[[str], bool]:
    ids = _regenerate_ids(data) if data.regenerate == "ids" else frozenset()
    if not 0 <= data.regenerate_share <= 1:
        raise DataError(f"data.regenerate_share: expected a share between 0 and 1, found {data.regenerate_share:g}")
    limit = int(data.regenerate_share * 2**32)

    def rule(sample_id: str) -> bool:
        picked = data.regenerate == "all" or sample_id in ids
        return picked and int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:4], "little") < limit

    return rule


def _regenerate_ids(data: DataConfig) -> frozenset[str]:
    if not data.regenerate_ids:
        raise DataError("data.regenerate is 'ids', but data.regenerate_ids names no file (one sample_id a line)")
    path = Path(data.regenerate_ids)
    if not path.is_file():
        raise DataError(f"data.regenerate_ids: {path}: no such file")
    return frozenset(path.read_text(encoding="utf-8").split("\n")) - {""}


def to_llava_json(conversations: Iterable[Conversation]) -> list[dict[str, Any]]:
    """Conversations as LLaVA's JSON lines, for ``export-answers`` and for a student's own data."""
    lines = []
    for conversation in conversations:
        turns = []
        for turn, (question, answer) in enumerate(zip(conversation.questions, conversation.answers, strict=True)):
            tag = f"{IMAGE_TAG}\n" if conversation.image is not None and turn == 0 else ""
            turns += [{"from": "human", "value": tag + question}, {"from": "gpt", "value": answer}]
        line: dict[str, Any] = {"id": conversation.sample_id}
        if conversation.image is not None:
            line["image"] = conversation.image.path or conversation.image.image_id
        lines.append({**line, "conversations": turns})
    return lines
