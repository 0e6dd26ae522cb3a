"""How a student of any family reads a sample: by its own processor and chat template, an answer as its teacher's ids.

Teacher and student share the answers' ids, turn by turn, and nothing else: the prompt around them, the image tokens
and the pixels are the student's own. Rows are those of its own loss mask, so they are the cached ones in number and
order, which is compared for every sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import LlavaProcessor

from student_train.students.lines import Ints, Line
from teacher_cache.data.conversations import Conversation
from teacher_cache.data.rows import collapse, turns
from teacher_cache.errors import CacheError, ConfigError, ConversationError, TemplateError
from teacher_cache.models.chat import Chat, Sample
from teacher_cache.models.collate import Fields
from teacher_cache.models.model_config import position_limit

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ChatReader:
    """A student's reading. ``image_tokens``: N, the positions of the first image that was looked at."""

    chat: Chat
    tokenizer: Any
    pad: int
    image_token: int
    """-1 for a student that reads text only."""
    positions: int | None
    """Its limit."""
    image_tokens: int = 0
    compares_text: bool = False
    """Whether a loss compares all text positions, so that the student must read what its teacher read."""
    compares_images: bool = False
    """Whether a loss compares image positions, so that each image must be one run of N."""

    def lines(self, asked: Conversation, cached_ids: Ints, cached_mask: Mask, pictures: Sequence[Any]) -> list[Line]:
        """One sample; ``cached_ids``, ``cached_mask`` (T,): its answers, as the cache (or plain data) has them.

        Raises
        ------
        CacheError
            The student cannot be shown it, has no room for it, or reads otherwise than a loss needs; with its name.
        """
        rows, where = cached_ids[cached_mask], f"sample {asked.sample_id}"
        answers = [tuple(rows[turn].tolist()) for turn in turns(cached_mask)]
        try:
            samples = list(self._samples(asked, answers, pictures))
        except (ConversationError, TemplateError) as error:
            raise CacheError(
                f"{where}: this student cannot read it: {error}. Leave such samples out of the data, or take another "
                "student"
            ) from error
        made = [self._line(sample, where) for sample in samples]
        found = np.concatenate([line.input_ids[line.loss_mask] for line in made])
        if not np.array_equal(found, rows):
            raise CacheError(
                f"{where}: the student's own loss mask has {len(found)} rows, the cache {len(rows)} (or other tokens "
                "in them). Do the answers end with another token than the student's chat template writes? Name a "
                "template with student.chat_template"
            )
        self._check(made, samples, cached_ids, where)
        return made

    def prompt(self, asked: Conversation, pictures: Sequence[Any]) -> Fields:
        """The first question, to be answered."""
        first = replace(asked, questions=asked.questions[:1])
        return _fields(self.chat.sample(first, (), pictures, ask=True))

    def most_positions(self, tokens: Ints, rows: Ints, images: Ints) -> npt.NDArray[np.float64]:
        """(M,) no sample with so many cached ``tokens``, ``rows`` and ``images`` (M,) takes more: its texts and answers
        as they are cached, around them what this template writes at most, and images of the size that takes most."""
        answer, asked = (self.chat.end,), Conversation("", ("", ""), ("", ""))
        one, two = (len(self.chat.unexpanded(asked, [answer] * turns)[0]) for turns in (1, 2))
        turns = np.minimum(rows, tokens - rows)  # each has a token of its answer, and one around it
        shown = np.where(images > 0, np.maximum(images, 1) * self._widest(), 0.0)
        return np.asarray(tokens + one + two * turns + shown)

    def _widest(self) -> float:
        """No image takes more positions, texts between them counted; infinite where the processor does not say."""
        if isinstance(self.chat.processor, LlavaProcessor):  # shows all in one size
            return float(self.image_tokens)
        count = getattr(self.chat.processor, "_get_num_multimodal_tokens", None)  # vLLM asks this, too
        shapes = [[4096, 4096], [3072, 4096], [4096, 3072]]
        return 1.25 * max(count(image_sizes=shapes)["num_image_tokens"]) if count is not None else math.inf

    def _samples(
        self, asked: Conversation, answers: Sequence[tuple[int, ...]], pictures: Sequence[Any]
    ) -> Iterator[Sample]:
        """The whole conversation, or each supervised turn of it; earlier answers that are not in the mask as texts."""
        before = [self.chat.original(text) for text in asked.answers[: len(asked.questions) - len(answers)]]
        given = [*before, *answers]
        if self.chat.one_sequence:
            sample = self.chat.sample(asked, given, pictures)
            mask = sample.loss_mask.copy()
            mask[np.flatnonzero(mask)[: -sum(map(len, answers))]] = False
            yield replace(sample, loss_mask=mask)
            return
        for turn in range(len(before), len(given)):
            yield self.chat.sample(asked, given[: turn + 1], pictures)

    def _line(self, sample: Sample, where: str) -> Line:
        length = len(sample.input_ids)
        if self.positions is not None and length > self.positions:
            raise ConfigError(
                f"{where}: {length} positions, and the student has {self.positions}. Take a student with more, or make "
                "the cache with a smaller teacher.max_length, which skips longer samples"
            )
        ids, mask, runs = collapse(sample.input_ids, sample.loss_mask, sample.image)
        return Line(0, ids, mask, runs[:, 0], self.image_token, dict(sample.model))

    def _check(self, made: Sequence[Line], samples: Sequence[Sample], cached: Ints, where: str) -> None:
        if (self.compares_text or self.compares_images) and len(made) > 1:
            raise CacheError(
                f"{where}: the student's template rewrites earlier turns, so each is read by itself, and a loss "
                "compares positions of whole conversations. Take losses with tokens: answer, or one turn a sample"
            )
        line, sample = made[0], samples[0]
        if self.compares_text and not np.array_equal(line.input_ids, cached):
            differs = np.flatnonzero(line.input_ids[: len(cached)] != cached[: len(line.input_ids)])
            at = int(differs[0]) if len(differs) else min(len(cached), len(line.input_ids))
            raise CacheError(
                f"{where}: the student reads other tokens than its teacher did (the first at {at}), so text positions "
                "cannot be compared. Take losses with tokens: answer, or a student with the teacher's chat template"
            )
        images = np.unique(sample.image[sample.image >= 0])
        if self.compares_images and not (len(line.widths) == len(images) and np.all(line.widths == self.image_tokens)):
            raise CacheError(
                f"{where}: the student reads its {len(images)} images in runs of {line.widths.tolist()} positions, "
                f"expected one run of {self.image_tokens} for each, as in the first sample: losses on image positions "
                "compare them one by one. Leave these losses out, or show images of one size"
            )


def _fields(sample: Sample) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.from_numpy(sample.input_ids), **sample.model}


def make_chat(model: Any, processor: Any, template: str = "", template_kwargs: Mapping[str, Any] | None = None) -> Chat:
    """The ``Chat`` of a student.

    Raises
    ------
    TemplateError
        It has no usable template, with what to set.
    """
    ends = getattr(model.generation_config, "eos_token_id", None)
    given = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    try:
        return Chat(processor, model.config, given, template, template_kwargs)
    except TemplateError as error:
        raise TemplateError(str(error).replace("teacher.", "student.")) from error


def chat_reader(model: Any, processor: Any, chat: Chat, **compares: Any) -> ChatReader:
    """How ``model`` reads with its ``processor`` (a tokenizer, for a text-only model)."""
    tokenizer = getattr(processor, "tokenizer", processor)
    token = getattr(model.config, "image_token_id", None) if tokenizer is not processor else None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    limit = position_limit(model.config)
    return ChatReader(chat, tokenizer, int(pad), -1 if token is None else int(token), limit, **compares)
