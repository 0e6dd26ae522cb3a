"""LLaVA's instruction data, read into conversations: the one place that knows LLaVA's field names."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from teacher_cache.config import DataConfig
from teacher_cache.data.data_files import DataFile, data_files
from teacher_cache.errors import DataError
from teacher_cache.terminal import without_secrets

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
    kind: str = ""
    """``question_type`` of a line, by which an evaluation is split up."""


@dataclass(frozen=True)
class Skipped:
    """A sample that is not in the cache, and why."""

    sample_id: str
    reason: str


class SampleReader:
    """The samples of ``data``, one at a time, in file order; a line that cannot be used comes as :class:`Skipped`.

    ``advance`` is told of bytes as they are read. :attr:`files` are the facts of what was parsed (sha256, bytes), known
    once the iteration has ended.

    Raises
    ------
    DataError
        When a file is missing, damaged or no list of samples; when none of all samples can be used; or when a sample_id
        comes twice and ``data.duplicate_ids`` is ``error``.
    """

    def __init__(self, data: DataConfig, advance: Callable[[int], None] = lambda count: None) -> None:
        self._data, self._advance = data, advance
        self.paths = data_files(data.path)
        self.files: list[dict[str, Any]] = []
        self.skips = SkipCount()

    def __iter__(self) -> Iterator[Conversation | Skipped]:
        self.files, self.skips = [], SkipCount()
        regenerate, skipped = self._regenerate_rule(), self.skips
        seen: dict[str, int] = {}
        for path in self.paths:
            for line in self._lines(path, lambda: self._data.max_samples - skipped.samples):
                sample = parse_sample(line, skipped.samples)
                unique = _unique(sample.sample_id, seen, self._data, path, skipped.samples)
                sample = replace(sample, sample_id=unique)
                if isinstance(sample, Conversation):
                    sample = replace(sample, regenerate=regenerate(unique))
                skipped.add(sample)
                yield sample
        names = ", ".join(map(str, self.paths[:3]))
        if not skipped.samples:
            raise DataError(f"{names}: no samples. Set data.path to a LLaVA JSON, JSONL or Parquet file.")
        if skipped.skipped == skipped.samples:
            raise DataError(f"{names}: none of {skipped.samples:,} samples can be used: {skipped}")

    def _lines(self, path: Path, left: Callable[[], int]) -> Iterator[Any]:
        """The file's records, no more than ``data.max_samples`` of all files together."""
        if self._data.max_samples and left() <= 0:
            return
        file = DataFile(path)
        with contextlib.closing(file.records(_is_read, self._advance)) as lines:
            for line in lines:
                yield line
                if self._data.max_samples and left() <= 0:
                    break
        self.files.append(file.facts)

    def _regenerate_rule(self) -> Callable[[str], bool]:
        data = self._data
        ids = self._regenerate_ids() if data.regenerate == "ids" else frozenset()
        if not 0 <= data.regenerate_share <= 1:
            raise DataError(f"data.regenerate_share: expected a share between 0 and 1, found {data.regenerate_share:g}")
        limit = int(data.regenerate_share * 2**32)

        def rule(sample_id: str) -> bool:
            picked = data.regenerate == "all" or sample_id in ids
            return picked and int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:4], "little") < limit

        return rule

    def _regenerate_ids(self) -> frozenset[str]:
        if not self._data.regenerate_ids:
            raise DataError("data.regenerate is 'ids', but data.regenerate_ids names no file (one sample_id a line)")
        path = Path(self._data.regenerate_ids)
        if not path.is_file():
            raise DataError(f"data.regenerate_ids: {path}: no such file")
        content = path.read_bytes()
        self.files.append({"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)})
        return frozenset(content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")) - {""}


def read_conversations(data: DataConfig) -> list[Conversation | Skipped]:
    """Every sample of ``data`` in memory; raises as :class:`SampleReader`. For all of a large file: ``data.spool``."""
    return list(SampleReader(data))


@dataclass
class SkipCount:
    """How many samples were seen, how many were skipped, and for which kinds of reasons."""

    samples: int = 0
    skipped: int = 0
    kinds: dict[str, int] = field(default_factory=dict)

    def add(self, sample: Conversation | Skipped) -> None:
        self.samples += 1
        if isinstance(sample, Skipped):
            self.skipped += 1
            kind = kind_of(sample.reason)
            self.kinds[kind] = self.kinds.get(kind, 0) + 1

    def merge(self, other: SkipCount) -> None:
        self.samples += other.samples
        self.skipped += other.skipped
        for kind, count in other.kinds.items():
            self.kinds[kind] = self.kinds.get(kind, 0) + count

    def __str__(self) -> str:
        listed = sorted(self.kinds.items(), key=lambda item: (-item[1], item[0]))
        text = "; ".join(f"{count:,} × {kind}" for kind, count in listed[:4])
        return text + (f"; {len(listed) - 4} more kinds" if len(listed) > 4 else "")


def kind_of(reason: str) -> str:
    """``reason`` without what tells one sample from another: the image's name, numbers, quoted text."""
    kind = re.sub(r"^image .*: (?=[^:]*$)", "an image: ", reason, flags=re.DOTALL)
    return re.sub(r"\d[\d,]*", "N", re.sub(r"(?<=value): .*", "", kind, flags=re.DOTALL))[:120]


class _UnfitError(ValueError):
    """Why a line is no conversation."""


def parse_sample(line: Any, number: int) -> Conversation | Skipped:
    """One line of LLaVA's JSON as a conversation, or the reason why it is none. Sample ``number`` without an id is
    called ``#number``."""
    if not isinstance(line, Mapping):
        return Skipped(f"#{number}", f"expected an object with id and conversations, found {type(line).__name__}")
    ids = [line[key] for key in ("id", "question_id") if not _nothing(line.get(key))]
    sample_id = str(ids[0]) if ids else f"#{number}"
    try:
        messages, image = _messages(line), _image_of(line)
        for text in (sample_id, *(text for _, text in messages), image.image_id if image is not None else ""):
            if not _is_unicode(text):  # half of a surrogate pair, which JSON can spell and no tokenizer can read
                raise _UnfitError(f"not Unicode text: {ascii(text)[:80]}")
        kind = str(line.get("question_type") or "")
        return replace(_conversation(sample_id, messages, image), kind=kind)
    except _UnfitError as error:
        return Skipped(*(text.encode("utf-8", "replace").decode() for text in (sample_id, without_secrets(str(error)))))


def _messages(line: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(role, text) of each message; LLaVA's ``conversations`` (from, value) or ``messages`` (role, content)."""
    turns = line.get("conversations")
    turns = line.get("messages") if turns is None else turns
    if not isinstance(turns, Sequence) or isinstance(turns, str | bytes) or not turns:
        raise _UnfitError("no list of conversations (or messages) in it")
    messages = []
    for turn in turns:
        role, text = _first(turn, "from", "role"), _first(turn, "value", "content")
        if not isinstance(role, str) or role not in _ROLES or not isinstance(text, str):
            raise _UnfitError(
                "a message without from (human or gpt) and value, or role (user or assistant) and content as text, "
                f"in its value: {str(turn)[:80]}"
            )
        messages.append((_ROLES[role], text))
    return messages[1:] if messages[0][0] == "assistant" else messages  # LLaVA drops it, too


def _first(turn: Any, *keys: str) -> Any:
    return next((turn[key] for key in keys if turn.get(key) is not None), None) if isinstance(turn, Mapping) else None


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _conversation(sample_id: str, messages: list[tuple[str, str]], image: Image | None) -> Conversation:
    for position, (role, _) in enumerate(messages):
        if role != ("user", "assistant")[position % 2]:
            raise _UnfitError(f"roles do not alternate: message {position + 1} is the {role}'s")
    if not messages or len(messages) % 2:
        raise _UnfitError("the last question has no answer")
    questions = [text for _, text in messages[0::2]]
    answers = tuple(text for _, text in messages[1::2])
    tags = [question.count(IMAGE_TAG) for question in questions]
    if any(IMAGE_TAG in answer for answer in answers):
        raise _UnfitError(f"{IMAGE_TAG} inside an answer")
    if sum(tags) > 1:
        raise _UnfitError(f"{IMAGE_TAG} {sum(tags)} times; exactly one image a conversation is supported")
    if sum(tags) and image is None:
        raise _UnfitError(f"{IMAGE_TAG} in the text, but no image")
    if any(tags[1:]):
        raise _UnfitError(f"{IMAGE_TAG} in a later turn; it must stand in the first")
    if image is not None and not sum(tags):
        raise _UnfitError(f"an image, but no {IMAGE_TAG} in the first question")
    questions = [question.replace(IMAGE_TAG, "").strip() for question in questions]
    return Conversation(sample_id, tuple(questions), answers, image)


_IMAGE_KEYS = ("image", "images")
_OTHER_IMAGE_KEYS = re.compile(
    r"(images?|img|imgs|pictures?|photos?|pics?|frames?|videos?|audios?)"
    r"([_-]?(paths?|files?|file_?names?|names?|urls?|list|data|bytes|base64|b64))?",
    re.IGNORECASE,
)
"""Keys under which others keep pictures (LLaMA-Factory, ms-swift, VoRA): a line that has one is no text-only sample."""


def _is_read(column: str) -> bool:
    """Whether a column of a Parquet file matters."""
    return column in ("id", "question_id", "conversations", "messages") or bool(_OTHER_IMAGE_KEYS.fullmatch(column))


def _image_of(line: Mapping[str, Any]) -> Image | None:
    found: list[Any] = []
    for key in _IMAGE_KEYS:
        found += [value for value in _values(line.get(key)) if value not in found]
    if len(found) > 1:
        raise _UnfitError(f"{len(found)} images; exactly one image a conversation is supported")
    if found:
        return _one_image(found[0])
    for key, value in line.items():
        if _OTHER_IMAGE_KEYS.fullmatch(str(key)) and str(key) not in _IMAGE_KEYS and _values(value):
            raise _UnfitError(f"{key!r} holds a picture, but pictures are read from image (or images): rename the key")
    return None


def _values(value: Any) -> list[Any]:
    """What a key names: nothing, one thing or several."""
    feature = isinstance(value, Mapping) and value.keys() <= {"bytes", "path"}  # Hugging Face's: null, or empty bytes
    if _nothing(value) or (feature and not any(value.values())):
        return []
    if isinstance(value, list | tuple):
        return [one for part in value for one in _values(part)]
    return [value]


def _nothing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and value != value)  # NaN: what pandas writes


def _one_image(value: Any) -> Image:
    if isinstance(value, Mapping):  # the Hugging Face image feature: bytes, path or both
        value = value.get("bytes") or value.get("path") or value
    if isinstance(value, bytes):
        return Image(hashlib.sha256(value).hexdigest()[:32], data=value)
    if isinstance(value, str):
        return Image(without_secrets(value) if "://" in value else value, path=value)  # the id is kept in the cache
    raise _UnfitError(f"image: expected a path or the image's bytes, found {type(value).__name__}")


def _unique(sample_id: str, seen: dict[str, int], data: DataConfig, path: Path, number: int) -> str:
    while True:
        seen[sample_id] = seen.get(sample_id, 0) + 1
        if seen[sample_id] == 1:
            return sample_id
        if data.duplicate_ids == "error":
            raise DataError(
                f"{path}: sample {number} has the id {sample_id!r} of an earlier one. "
                "Make ids unique, or set data.duplicate_ids=number to cache it as "
                f"{sample_id}#{seen[sample_id]}."
            )
        sample_id = f"{sample_id}#{seen[sample_id]}"


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
