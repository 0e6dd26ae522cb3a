"""What a teacher can do: a Protocol, its requests and what it hands out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from teacher_cache.data.conversations import Conversation
from teacher_cache.data.images import AnyImage
from teacher_cache.data.logit_rule import AS_THEY_ARE, LogitRule
from teacher_cache.data.rows import Positions, TokenizedSample
from teacher_cache.models.chat import Chat
from teacher_cache.models.slots import Ids
from teacher_cache.store.records import TeacherShape


@dataclass(frozen=True)
class TeacherDescription:
    """Who the teacher is; all of it stands in the manifest and enters the fingerprint."""

    model: str
    weights: str
    """A digest of the checkpoint's configuration and weight files."""
    tokenizer: str
    shape: TeacherShape
    layers: int
    dtype: str
    image_token: int
    end_token: int
    processor: dict[str, Any]
    """Every setting of its processor, with the library that resizes images."""
    template: str = ""
    """The name of its chat template, where that is a shipped one."""
    chat_template: str = ""
    """Its text."""
    one_sequence: bool = True
    """Whether one sequence holds all answers of a conversation; if not, each turn is a sample of its own, which
    supervises its last answer alone."""
    vocabulary: dict[str, Any] = field(default_factory=dict)
    """What its ids mean: ``data.vocabulary.describe_vocabulary``."""
    logit_rule: LogitRule = AS_THEY_ARE

    def facts(self) -> dict[str, Any]:
        """What stands in the manifest; ``image_mode``: how LLaVA-1.5's processor shows images that are no square."""
        image = self.processor.get("image", {})
        mode = "pad" if image.get("do_pad", not image.get("do_center_crop")) else "crop"
        return dataclasses.asdict(self) | ({"image_mode": mode} if "crop_size" in image else {})


@dataclass(frozen=True)
class Shown:
    """A conversation as a teacher is shown it: up to the last of the ``answers`` given, or to the prompt for the next.

    ``sample``: its ids as a cache keeps them, with the lengths of its runs · ``images``: of all turns, in order.
    """

    conversation: Conversation
    answers: tuple[Ids, ...]
    images: tuple[AnyImage, ...]
    sample: TokenizedSample
    ask: bool = False

    @property
    def sees(self) -> bool:
        """Whether an image stands in it."""
        return len(self.sample.runs) > 0


@dataclass(frozen=True)
class AnswerRequest:
    """One turn to answer: the one after ``shown.answers``; ``seed`` only where it is sampled.

    With ``capture`` a one-pass teacher returns the states of the whole sequence beside the answer.
    """

    shown: Shown
    seed: int
    capture: bool = False

    @property
    def sample_id(self) -> str:
        return self.shown.conversation.sample_id

    @property
    def turn(self) -> int:
        return len(self.shown.answers)


OVERFLOW = "overflow"
"""Why an answer ended whose logits were not finite: it has no ids, and its sample is skipped."""


@dataclass(frozen=True)
class Answer:
    """What the teacher said: the ids it produced, the end token included when ``finish_reason`` is ``stop``.

    ``hidden``: (S, d) final-layer states after the final norm of all positions of the expanded sequence but the
    last token's, for requests with ``capture``; on the CPU, as a shard's states would fill a GPU.
    """

    token_ids: Ids
    finish_reason: str
    hidden: torch.Tensor | None = None


@dataclass(frozen=True)
class Wanted:
    """Which states a scoring pass must hand out beside the rows'."""

    text: bool = False
    visual: bool = False
    second_last: bool = False
    attention: bool = False


@dataclass(frozen=True)
class SampleStates:
    """The teacher's states for one sample, after the final norm, on the teacher's device in its dtype.

    rows (R, d) · text (P, d) · visual (N, d) · *_second_last likewise, before the last layer and not normed ·
    attention (R, its image positions), last layer, mean over heads. What was not wanted, or does not exist (no image),
    is None.
    """

    rows: torch.Tensor
    text: torch.Tensor | None = None
    visual: torch.Tensor | None = None
    rows_second_last: torch.Tensor | None = None
    text_second_last: torch.Tensor | None = None
    attention: torch.Tensor | None = None


Then = Callable[[AnswerRequest, Answer], AnswerRequest | None]
"""The request that follows an answer in its conversation, None where that was the last turn."""


class Teacher(Protocol):
    """A model that answers and scores. Implementations: ``TorchTeacher``, ``VllmTeacher``, ``AnsweringStudent``."""

    @property
    def description(self) -> TeacherDescription: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def chat(self) -> Chat:
        """How it is shown conversations."""
        ...

    @property
    def positions(self) -> int | None:
        """Tokens of the longest sequence that the model was made for (image expanded); None where nothing limits it."""
        ...

    @property
    def one_pass(self) -> bool:
        """Whether :meth:`answers` honours ``capture``."""
        ...

    @property
    def two_engines(self) -> bool:
        """Whether answering and scoring take turns on the device, each with a start of its own."""
        ...

    def prove(self, requests: Sequence[AnswerRequest]) -> None:
        """Try it on ``requests``, before anything is cached: ``TeacherError`` where it scores otherwise than it answers
        or than torch does."""
        ...

    def answers(self, requests: Sequence[AnswerRequest], then: Then | None = None) -> Iterator[tuple[int, Answer]]:
        """Each answer as soon as it is there, with the place of its request.

        ``then``, asked once the answer has been taken, may give the next turn of that conversation: it comes under
        the same place.
        """
        ...

    def score(self, requests: Sequence[Shown], wanted: Wanted) -> Iterator[tuple[list[int], list[SampleStates]]]:
        """Teacher-forced states, batch by batch: (indices into ``requests``, their states), each index once."""
        ...

    def head(self) -> torch.Tensor:
        """(V, d) the output projection: logits = description.logit_rule.apply(hidden @ head.T)."""
        ...

    def close(self) -> None:
        """Free the device."""
        ...


def answers_in_rounds(
    answer: Callable[[list[AnswerRequest]], list[Answer]], requests: Sequence[AnswerRequest], then: Then | None
) -> Iterator[tuple[int, Answer]]:
    """:meth:`Teacher.answers` for a teacher that answers lists: turn t of all conversations is one list."""
    asked = dict(enumerate(requests))
    while asked:
        following: dict[int, AnswerRequest] = {}
        for (place, request), given in zip(asked.items(), answer(list(asked.values())), strict=True):
            yield place, given
            if then is not None and (after := then(request, given)) is not None:
                following[place] = after
        asked = following


def pick(
    positions: Positions,
    wanted: Wanted,
    hidden: torch.Tensor,
    second_last: torch.Tensor | None = None,
    attention: torch.Tensor | None = None,
) -> SampleStates:
    """The states at ``positions`` out of ``hidden`` (S, d), ``second_last`` (S, d), ``attention`` (S, S)."""
    rows = torch.as_tensor(positions.rows, device=hidden.device)
    text = torch.as_tensor(positions.text, device=hidden.device)
    visual = torch.as_tensor(positions.visual, device=hidden.device)
    return SampleStates(
        rows=hidden[rows],
        text=hidden[text] if wanted.text else None,
        visual=hidden[visual] if wanted.visual and len(visual) else None,
        rows_second_last=second_last[rows] if second_last is not None else None,
        text_second_last=second_last[text] if second_last is not None and wanted.text else None,
        attention=attention[rows][:, visual] if attention is not None and len(visual) else None,
    )
