"""The usable part of some samples: conversations with prompts and images, and what was left out, with reasons."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from teacher_cache.build.context import Build
from teacher_cache.data.conversations import Conversation, Skipped
from teacher_cache.data.images import Picture, open_picture
from teacher_cache.errors import ConversationError, ImageError
from teacher_cache.models.chat import Chat
from teacher_cache.models.prompt import Prompt
from teacher_cache.models.slots import Ids
from teacher_cache.teachers.teacher import Shown

KEPT_BYTES = 256 << 20
"""Of decoded images in a shard; those beyond it are decoded again when they are shown to the teacher. 512 photographs
of 640 × 480 take 600 MB, of 12 megapixels 25 GB."""


class _Room:
    """What is left for decoded images, over all loader threads."""

    def __init__(self, size: int) -> None:
        self._left, self._lock = size, threading.Lock()

    def settle(self, pictures: Sequence[Picture]) -> None:
        """Let go of decoded images for which there is no room."""
        for picture in pictures:
            width, height = picture.kept.size if picture.kept is not None else (0, 0)
            with self._lock:
                self._left -= 4 * width * height  # Pillow's RGB
                if self._left < 0:
                    self._left += 4 * width * height
                    picture.kept = None


@dataclass(frozen=True)
class ReadSample:
    """A conversation as the teacher will see it, with its images; ``original``: its own answers as ids, where they are
    needed. ``prompt``: where the template leaves earlier turns as they were."""

    conversation: Conversation
    pictures: tuple[Picture, ...]
    chat: Chat
    prompt: Prompt | None
    original: tuple[Ids, ...] = ()

    @classmethod
    def read(cls, chat: Chat, conversation: Conversation, pictures: tuple[Picture, ...], original: bool) -> ReadSample:
        """Raises ``ConversationError``: the model cannot be shown this."""
        prompt = chat.prompt(conversation, [p.decoded() for p in pictures]) if chat.one_sequence else None
        answers = tuple(chat.original(answer) for answer in conversation.answers) if original else ()
        return cls(conversation, pictures, chat, prompt, answers)

    @property
    def sample_id(self) -> str:
        return self.conversation.sample_id

    @property
    def image_id(self) -> str:
        """Of its first image; empty without one."""
        return self.conversation.image.image_id if self.conversation.image is not None else ""

    @property
    def image_checksum(self) -> str:
        """Of all its images' bytes."""
        return ",".join(picture.image.checksum for picture in self.pictures)

    @property
    def length(self) -> int:
        """Positions of its questions alone; of the first one where a template rewrites turns."""
        return self.prompt.length if self.prompt is not None else self.shown((), ask=True).sample.length

    def shown(self, answers: Sequence[Ids], ask: bool = False) -> Shown:
        """It up to the last of ``answers``, or (``ask``) to the prompt for the next; raises ``ConversationError``."""
        if self.prompt is not None:
            sample = self.prompt.sample(answers, ask)
        else:
            sample = self.chat.tokenized(self.conversation, answers, [p.decoded() for p in self.pictures], ask)
        return Shown(self.conversation, tuple(answers), self.pictures, sample, ask)


@dataclass
class ShardInput:
    """The usable ``samples`` of a shard, and those that were left out."""

    samples: list[ReadSample] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    left_out: list[Conversation] = field(default_factory=list)
    """Conversations that were read but cannot be cached; their images may serve other shards."""

    @classmethod
    def load(cls, build: Build, chosen: Sequence[Conversation | Skipped], original: bool = False) -> ShardInput:
        """``original``: the answers of the data are needed of all samples, not only of those that keep them."""
        shard, room, data, chat = cls(), _Room(KEPT_BYTES), build.config.data, build.teacher.chat

        def read(sample: Conversation | Skipped) -> tuple[Picture, ...] | Skipped:
            pictures = pictures_or_reason(sample, data.image_folder)
            if not isinstance(pictures, Skipped):
                room.settle(pictures)
            return pictures

        with ThreadPoolExecutor(build.config.speed.loader_threads) as threads:
            images = list(threads.map(read, chosen))
        for sample, pictures in zip(chosen, images, strict=True):
            if isinstance(sample, Skipped) or isinstance(pictures, Skipped):
                shard.skipped.append(sample if isinstance(sample, Skipped) else pictures)  # type: ignore[arg-type]
                continue
            needed = original or not sample.regenerate or data.history == "original"
            try:
                shard.samples.append(ReadSample.read(chat, sample, pictures, needed))
            except ConversationError as error:
                shard.skipped.append(Skipped(sample.sample_id, str(error)))
        shard.skip(lambda sample: _unfit_prompt(build, sample))
        return shard

    def skip(self, reason_of: Callable[[ReadSample], str]) -> None:
        """Move the samples that have a reason to ``skipped``."""
        samples, self.samples = self.samples, []
        for sample in samples:
            if reason := reason_of(sample):
                self.skipped.append(Skipped(sample.sample_id, reason))
                self.left_out.append(sample.conversation)
            else:
                self.samples.append(sample)


def pictures_or_reason(sample: Conversation | Skipped, folder: str) -> tuple[Picture, ...] | Skipped:
    """The sample's images, or why one cannot be read; a folder that does not answer is an error, not a reason."""
    if isinstance(sample, Skipped):
        return sample
    try:
        return tuple(open_picture(image, folder) for image in sample.images)
    except ImageError as error:
        return Skipped(sample.sample_id, str(error))


def _unfit_prompt(build: Build, sample: ReadSample) -> str:
    """Why a conversation cannot be answered, or an empty text."""
    length, (limit, what) = sample.length, build.limit
    return f"questions alone take {length} tokens, {what}: {length - limit + 1} over" if length >= limit else ""


def unfit_sample(build: Build, shown: Shown) -> str:
    """Why an answered conversation cannot be cached, or an empty text."""
    length, (limit, what) = shown.sample.length, build.limit
    return f"{length} tokens with answers, {what}: {length - limit} over" if length > limit else ""
