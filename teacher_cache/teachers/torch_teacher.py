"""The reference teacher: a Transformers model run by torch, on a GPU or a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from teacher_cache.config import GenerationConfig, SpeedConfig, TeacherConfig
from teacher_cache.data.images import decoded
from teacher_cache.errors import TeacherError
from teacher_cache.models.chat import Chat
from teacher_cache.models.generation import Decoding, forward, generate
from teacher_cache.models.model_config import position_limit
from teacher_cache.models.open_chat import load_processor, open_chat
from teacher_cache.models.parts import media_tokens
from teacher_cache.models.pretrained import load_model
from teacher_cache.models.probe import probe
from teacher_cache.teachers.description import describe_teacher
from teacher_cache.teachers.teacher import (
    OVERFLOW,
    Answer,
    AnswerRequest,
    SampleStates,
    Shown,
    TeacherDescription,
    Then,
    Wanted,
    answers_in_rounds,
    pick,
)


class TorchTeacher:
    """Any model that reads images and text, or text, as :class:`~teacher_cache.teachers.teacher.Teacher`.

    Raises
    ------
    TeacherError, TemplateError
        The folder or name holds no such checkpoint, or its processor or chat template is missing.
    """

    one_pass = False
    two_engines = False

    def __init__(
        self, config: TeacherConfig, generation: GenerationConfig, speed: SpeedConfig, attention: bool = False
    ) -> None:
        """``attention``: the attention maps will be wanted, which only the eager implementation hands out."""
        if config.quantization:
            raise TeacherError(
                f"teacher.quantization={config.quantization}: only vLLM applies it. Set teacher.backend=vllm, or leave "
                "it empty: a checkpoint that was saved quantised says so in its own config.json"
            )
        self._generation, self._speed = generation, speed
        self._device = device_of(speed)
        processor, self._tokenizer = load_processor(config)
        self._chat = open_chat(config, processor)
        model = load_model(
            "teacher.model",
            config.model,
            config.revision,
            dtype=getattr(torch, config.dtype),
            **({"attn_implementation": "eager"} if attention else {}),
        )
        self._model = model.to(self._device).eval()
        self._name, self._never = config.model, media_tokens(model.config)
        self._description = describe_teacher(config, processor, self._chat)

    @property
    def description(self) -> TeacherDescription:
        return self._description

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def chat(self) -> Chat:
        return self._chat

    @property
    def positions(self) -> int | None:
        return position_limit(self._model.config)

    def head(self) -> torch.Tensor:
        weight: torch.Tensor = self._model.get_output_embeddings().weight.detach()
        return weight

    def close(self) -> None:
        del self._model
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def prove(self, requests: Sequence[AnswerRequest]) -> None:
        """See ``models.probe``."""
        for request in requests:
            fields = self._fields(request.shown)
            probe("teacher.model", self._name, self._model, fields, self._pad, self._description.logit_rule)

    def answers(self, requests: Sequence[AnswerRequest], then: Then | None = None) -> Iterator[tuple[int, Answer]]:
        return answers_in_rounds(self.answer, requests, then)

    @torch.inference_mode()
    def answer(self, requests: Sequence[AnswerRequest]) -> list[Answer]:
        """Batches of similar length, padded on the left. A prompt without an image never shares a batch with one
        that has one: the vision tower then runs on full batches only. One whose answer may reach the model's last
        position is alone: it stops there, and the answers of others do not depend on it."""
        answers: list[Answer | None] = [None] * len(requests)
        shown = [request.shown for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (not shown[i].sees, shown[i].sample.length, i))
        rooms = [self._room(request) for request in requests]
        whole = self._generation.max_new_tokens
        batches = [[i] for i in order if rooms[i] < whole]
        for has_image in (True, False):
            group = [i for i in order if shown[i].sees == has_image and rooms[i] == whole]
            size = self._speed.answer_batch
            batches += [group[start : start + size] for start in range(0, len(group), size)]
        for places in batches:
            given = self._generate([requests[i] for i in places], rooms[places[0]])
            for place, answer in zip(places, given, strict=True):
                answers[place] = answer
        assert all(answer is not None for answer in answers)
        return [answer for answer in answers if answer is not None]

    @torch.inference_mode()
    def score(self, requests: Sequence[Shown], wanted: Wanted) -> Iterator[tuple[list[int], list[SampleStates]]]:
        positions = [shown.sample.positions(self._description.image_token) for shown in requests]
        order = sorted(range(len(requests)), key=lambda i: (not requests[i].sees, positions[i].length, i))
        for places in _token_batches(order, requests, positions, self._speed.score_batch_tokens):
            hidden, second_last, attention = self._forward([requests[i] for i in places], wanted)
            yield (
                places,
                [
                    pick(
                        positions[i],
                        wanted,
                        hidden[b],
                        second_last[b] if second_last is not None else None,
                        attention[b] if attention is not None else None,
                    )
                    for b, i in enumerate(places)
                ],
            )

    def _room(self, request: AnswerRequest) -> int:
        """Tokens that may be generated: one beyond the last position tells that the answer did not fit."""
        limit, most = self.positions, self._generation.max_new_tokens
        if limit is None:
            return most
        return max(min(most, limit + 1 - request.shown.sample.length), 1)

    def _generate(self, requests: list[AnswerRequest], room: int) -> list[Answer]:
        generation, end = self._generation, self._description.end_token
        how = Decoding(end, self._pad, room, self._never, generation.temperature, generation.top_p)
        samples = [self._fields(request.shown) for request in requests]
        return [
            Answer((), OVERFLOW)
            if ids is None
            else Answer(tuple(ids[: generation.max_new_tokens]), "stop" if end in ids else "length")
            for ids in generate(self._model, samples, how, [r.seed for r in requests])
        ]

    def _forward(
        self, requests: list[Shown], wanted: Wanted
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        deep = wanted.second_last or wanted.attention
        samples = [self._fields(shown) for shown in requests]
        options = {"output_hidden_states": deep, "output_attentions": wanted.attention}
        out = forward(self._model, samples, self._pad, **options)
        hidden = out.last_hidden_state
        second_last = out.hidden_states[-2] if wanted.second_last else None
        if not wanted.attention:
            return hidden, second_last, None
        if not out.attentions or out.attentions[-1] is None:
            raise TeacherError("signals.attention needs the attention maps: the model must run with eager attention")
        return hidden, second_last, out.attentions[-1].float().mean(1)

    @property
    def _pad(self) -> int:
        pad = self._tokenizer.pad_token_id
        return int(pad if pad is not None else self._description.end_token)

    def _fields(self, shown: Shown) -> dict[str, torch.Tensor]:
        """What the model reads: its processor's fields, of which the ids must be those of ``shown.sample``."""
        conversation = shown.conversation
        read = self._chat.sample(conversation, shown.answers, [decoded(image) for image in shown.images], shown.ask)
        if not np.array_equal(read.input_ids, shown.sample.expanded(self._chat.image_token)):
            raise TeacherError(
                f"sample {conversation.sample_id}: teacher.model={self._name} reads {len(read.input_ids)} ids of this "
                f"conversation, others than the {shown.sample.length} that are cached of it. Does its processor make "
                "another number of positions of an image beside others? Give the data, the template and the processor "
                "with which its cache was begun, or take another model"
            )
        return {"input_ids": torch.from_numpy(read.input_ids), **read.model}


def device_of(speed: SpeedConfig) -> torch.device:
    if speed.device == "cuda" and not torch.cuda.is_available():
        raise TeacherError("speed.device is cuda, but torch sees no CUDA device; set speed.device=cpu or auto")
    if speed.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(speed.device)


def _token_batches(
    order: list[int], requests: Sequence[Shown], positions: Sequence[Any], budget: int
) -> Iterator[list[int]]:
    """Consecutive runs of ``order`` whose padded size stays under ``budget`` tokens, images and text-only apart."""
    batch: list[int] = []
    longest = 0
    for i in order:
        length = max(longest, positions[i].length)
        other_kind = bool(batch) and requests[batch[0]].sees != requests[i].sees
        if batch and (length * (len(batch) + 1) > budget or other_kind):
            yield batch
            batch, length = [], positions[i].length
        batch.append(i)
        longest = length
    if batch:
        yield batch
