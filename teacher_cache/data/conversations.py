"""Lines of instruction data as conversations: the one place that knows the field names of LLaVA's ``conversations`` and
of the ``messages`` of TRL, ms-swift and LLaMA-Factory."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from teacher_cache.terminal import without_secrets

IMAGE_TAG = "<image>"
Format = Literal["llava", "messages", "sharegpt", "trl"]
"""``llava``: ``conversations`` of from and value, ``image`` beside them, ``<image>`` and a new line for each in front ·
``messages`` (ms-swift, LLaMA-Factory): role and content, ``images`` beside them, ``<image>`` where each stands ·
``sharegpt`` (LLaMA-Factory): the same of from and value · ``trl``: ``messages`` whose contents are lists of parts."""
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


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

    ``questions[t]`` and ``answers[t]`` are the user's and the assistant's t-th message. Where an image stands,
    a question has :data:`IMAGE_TAG`; ``images`` are those of all questions, in their order.
    """

    sample_id: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    images: tuple[Image, ...] = ()
    regenerate: bool = True
    kind: str = ""
    """``question_type`` of a line, by which an evaluation is split up."""
    system: str = ""

    @classmethod
    def with_image(
        cls, sample_id: str, texts: Sequence[str], answers: Sequence[str], image: Image | None
    ) -> Conversation:
        """Questions without tags, and the one image, if there is one, before the first."""
        images = (image,) if image is not None else ()
        return cls(sample_id, (IMAGE_TAG * len(images) + texts[0], *texts[1:]), tuple(answers), images)

    @property
    def image(self) -> Image | None:
        """The first image."""
        return self.images[0] if self.images else None

    @property
    def texts(self) -> tuple[str, ...]:
        """The questions without their images."""
        return tuple("".join(pieces(question)).strip() for question in self.questions)


def turn_by_turn(conversation: Conversation) -> list[Conversation]:
    """A conversation for each of its turns, which ends with it: for templates that write earlier turns in another way
    than the last one, so that no sequence shows all answers as they were given. The first keeps the id."""
    found, shown = [], 0
    for turn, question in enumerate(conversation.questions):
        shown += question.count(IMAGE_TAG)
        found.append(
            replace(
                conversation,
                sample_id=f"{conversation.sample_id}@{turn + 1}" if turn else conversation.sample_id,
                questions=conversation.questions[: turn + 1],
                answers=conversation.answers[: turn + 1],
                images=conversation.images[:shown],
            )
        )
    return found


def pieces(question: str) -> tuple[str, ...]:
    """The texts of a question, an image between each two. White space beside a tag that begins or ends the question is
    the tag's, as in LLaVA's ``<image>\\n``; inside a text everything stays as it is written."""
    texts = question.strip().split(IMAGE_TAG)
    last = len(texts) - 1
    for ends in (range(last), range(last, 0, -1)):
        for i in ends:
            if texts[i].strip():
                break
            after = i + 1 if ends.step > 0 else i - 1
            texts[i], texts[after] = "", texts[after].lstrip() if ends.step > 0 else texts[after].rstrip()
    return tuple(texts)


@dataclass(frozen=True)
class Skipped:
    """A sample that is not in the cache, and why."""

    sample_id: str
    reason: str


class _UnfitError(ValueError):
    """Why a line is no conversation."""


def parse_sample(line: Any, number: int) -> Conversation | Skipped:
    """One line of the data as a conversation, or the reason why it is none. Sample ``number`` without an id is
    called ``#number``."""
    if not isinstance(line, Mapping):
        return Skipped(f"#{number}", f"expected an object with id and conversations, found {type(line).__name__}")
    ids = [line[key] for key in ("id", "question_id") if not _nothing(line.get(key))]
    sample_id = str(ids[0]) if ids else f"#{number}"
    try:
        messages, inline = _messages(line)
        images = _images_of(line, inline)
        if "messages" in line and images and not any(IMAGE_TAG in text for _, text in messages):
            place = next((i for i, (role, _) in enumerate(messages) if role == "user"), 0)
            messages[place] = (messages[place][0], IMAGE_TAG * len(images) + messages[place][1])  # as TRL and ms-swift
        for text in (sample_id, *(text for _, text in messages), *(image.image_id for image in images)):
            if not _is_unicode(text):  # half of a surrogate pair, which JSON can spell and no tokenizer can read
                raise _UnfitError(f"not Unicode text: {ascii(text)[:80]}")
        kind = str(line.get("question_type") or "")
        return replace(_conversation(sample_id, messages, images), kind=kind)
    except _UnfitError as error:
        return Skipped(*(text.encode("utf-8", "replace").decode() for text in (sample_id, without_secrets(str(error)))))


def _messages(line: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[Any]]:
    """(role, text) of each message, :data:`IMAGE_TAG` where an image stands, and the images that stand in the messages
    themselves; LLaVA's ``conversations`` (from, value) or ``messages`` (role, content: a text, or TRL's parts)."""
    turns = line.get("conversations")
    turns = line.get("messages") if turns is None else turns
    if isinstance(turns, Mapping) and all(isinstance(column, list) for column in turns.values()):
        turns = [dict(zip(turns, row, strict=False)) for row in zip(*turns.values(), strict=False)]  # of datasets < 4
    if not isinstance(turns, Sequence) or isinstance(turns, str | bytes) or not turns:
        raise _UnfitError("no list of conversations (or messages) in it")
    messages: list[tuple[str, str]] = []
    images: list[Any] = []
    for turn in turns:
        role, content = _first(turn, "from", "role"), _first(turn, "value", "content")
        text = content if isinstance(content, str) else _parts(content, images)
        if not isinstance(role, str) or role not in _ROLES or text is None:
            raise _UnfitError(
                "a message without from (human or gpt) and value, or role (user or assistant) and content as text or "
                f"parts, in its value: {str(turn)[:80]}"
            )
        messages.append((_ROLES[role], text))
    objects = line.get("objects")
    boxes = (
        [objects.get(key) for key in ("ref", "bbox")] if isinstance(objects, Mapping) else []
    )  # ms-swift's grounding
    for key, value in (("tools", line.get("tools")), ("objects", boxes)):
        if not _empty(value):
            raise _UnfitError(f"{key!r} changes what the model is asked, and is not read")
    system = "" if _nothing(line.get("system")) else line["system"]
    if system and messages[0] != ("system", system):
        if not isinstance(system, str) or messages[0][0] == "system":
            raise _UnfitError("a system text beside the messages that is no text, or another than in them")
        messages.insert(0, ("system", system))
    opening = 1 if messages[0][0] == "system" else 0
    if len(messages) > opening and messages[opening][0] == "assistant":
        del messages[opening]  # LLaVA drops it, too
    return messages, images


def _parts(content: Any, images: list[Any]) -> str | None:
    """The text of TRL's list of parts, or None. Images that are given in a part are added to ``images``."""
    if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
        return None
    text = ""
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in ("image", "image_url"):
            images += [value for key in ("image", "path", "url") for value in _values(part.get(key))][:1]
            text += IMAGE_TAG
        elif kind in ("video", "audio", "video_url", "audio_url", "input_audio"):
            raise _UnfitError(f"a part of type {kind}: only text and images are read")
        else:
            return None
    return text


def _first(turn: Any, *keys: str) -> Any:
    return next((turn[key] for key in keys if turn.get(key) is not None), None) if isinstance(turn, Mapping) else None


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _conversation(sample_id: str, messages: list[tuple[str, str]], images: tuple[Image, ...]) -> Conversation:
    system = messages.pop(0)[1].strip() if messages and messages[0][0] == "system" else ""
    for position, (role, _) in enumerate(messages):
        if role != ("user", "assistant")[position % 2]:
            raise _UnfitError(f"roles do not alternate: message {position + 1} is the {role}'s")
    if not messages or len(messages) % 2:
        raise _UnfitError("the last question has no answer")
    questions = [IMAGE_TAG.join(pieces(text)) for _, text in messages[0::2]]
    answers = tuple(text for _, text in messages[1::2])
    tags = sum(question.count(IMAGE_TAG) for question in questions)
    if any(IMAGE_TAG in text for text in (*answers, system)):
        raise _UnfitError(f"{IMAGE_TAG} inside an answer or a system text")
    if any(other in text for other in _OTHER_TAGS for text in questions):
        raise _UnfitError("a <video> or <audio> tag: only text and images are read")
    if tags and not images:
        raise _UnfitError(f"{IMAGE_TAG} in the text, but no image")
    if images and not tags:
        raise _UnfitError(f"an image, but no {IMAGE_TAG} in a question")
    if tags != len(images):
        raise _UnfitError(f"{IMAGE_TAG} {tags} times, but {len(images)} images")
    return Conversation(sample_id, tuple(questions), answers, images, system=system)


_OTHER_TAGS = ("<video>", "<audio>")
_IMAGE_KEYS = ("image", "images")
_OTHER_IMAGE_KEYS = re.compile(
    r"(images?|img|imgs|pictures?|photos?|pics?|frames?|videos?|audios?)"
    r"([_-]?(paths?|files?|file_?names?|names?|urls?|list|data|bytes|base64|b64))?",
    re.IGNORECASE,
)
"""Keys under which others keep pictures (LLaMA-Factory, ms-swift, VoRA): a line that has one is no text-only sample."""


_TEXT_KEYS = ("id", "question_id", "question_type", "conversations", "messages", "system", "tools", "objects")


def is_read(column: str) -> bool:
    """Whether a column of a table matters."""
    return column in _TEXT_KEYS or bool(_OTHER_IMAGE_KEYS.fullmatch(column))


def _images_of(line: Mapping[str, Any], inline: list[Any]) -> tuple[Image, ...]:
    """The images of a line: those that its messages name, else those of ``images``, else of ``image``."""
    if inline:
        return tuple(map(_one_image, inline))
    found = [values for key in _IMAGE_KEYS if (values := _values(line.get(key)))]
    if len(found) > 1 and found[0] != found[1]:
        raise _UnfitError("image and images name different pictures")
    if found:
        return tuple(map(_one_image, found[0]))
    for key, value in line.items():
        if _OTHER_IMAGE_KEYS.fullmatch(str(key)) and str(key) not in _IMAGE_KEYS and _values(value):
            raise _UnfitError(f"{key!r} holds a picture, but pictures are read from image (or images): rename the key")
    return ()


def _values(value: Any) -> list[Any]:
    """What a key names: nothing, one thing or several."""
    feature = isinstance(value, Mapping) and value.keys() <= {"bytes", "path"}  # Hugging Face's: null, or empty bytes
    if _nothing(value) or (feature and not any(value.values())):
        return []
    if isinstance(value, list | tuple):
        return [one for part in value for one in _values(part)]
    return [value]


def _empty(value: Any) -> bool:
    """Whether nothing stands in it at any depth; ``[]`` may be spelled as text."""
    if isinstance(value, Mapping | list | tuple):
        return all(map(_empty, value.values() if isinstance(value, Mapping) else value))
    return _nothing(value) or value == "[]"


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
