"""The reference teacher: a Transformers model run by torch, on a GPU or a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from teacher_cache.config import GenerationConfig, SpeedConfig, TeacherConfig
from teacher_cache.data.images import AnyImage, image_tokens_of, square
from teacher_cache.data.logit_rule import LogitRule
from teacher_cache.data.rows import expand
from teacher_cache.data.tokenization import (
    end_token_id,
    image_token_id,
    template_by_name,
    template_text,
    tokenizer_fingerprint,
)
from teacher_cache.data.vocabulary import describe_vocabulary
from teacher_cache.errors import TeacherError
from teacher_cache.models.checkpoint import checkpoint_digest
from teacher_cache.models.generation import Decoding, forward, generate
from teacher_cache.models.model_config import position_limit
from teacher_cache.models.parts import media_tokens
from teacher_cache.models.pretrained import (
    check_llava,
    load_model,
    model_class,
    read_config,
    read_processor,
    read_tokenizer,
)
from teacher_cache.models.probe import TOKENS, probe
from teacher_cache.models.processor_settings import processor_settings
from teacher_cache.store.records import TeacherShape
from teacher_cache.teachers.teacher import (
    OVERFLOW,
    Answer,
    AnswerRequest,
    SampleStates,
    ScoreRequest,
    TeacherDescription,
    Then,
    Wanted,
    answers_in_rounds,
    pick,
)


class TorchTeacher:
    """A model of LLaVA-1.5's kind, or of text alone, as :class:`~teacher_cache.teachers.teacher.Teacher`.

    Raises
    ------
    TeacherError
        The folder or name holds no such checkpoint, or its processor is missing.
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
        self._processor, self._tokenizer = load_processor(config)
        model = load_model(
            "teacher.model",
            config.model,
            config.revision,
            dtype=getattr(torch, config.dtype),
            **({"attn_implementation": "eager"} if attention else {}),
        )
        self._model = model.to(self._device).eval()
        self._name, self._never = config.model, media_tokens(model.config)
        self._mode = config.image_mode
        self._description = describe_teacher(config, self._tokenizer, self._processor)

    @property
    def description(self) -> TeacherDescription:
        return self._description

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

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

    def prove(self, request: AnswerRequest) -> bool:
        """See ``models.probe``; False where the model has no positions left behind the prompt."""
        fields = self._fields(request.input_ids, request.image)
        if self.positions is not None and len(fields["input_ids"]) + TOKENS > self.positions:
            return False
        probe("teacher.model", self._name, self._model, fields, self._pad, self._description.logit_rule)
        return True

    def answers(self, requests: Sequence[AnswerRequest], then: Then | None = None) -> Iterator[tuple[int, Answer]]:
        return answers_in_rounds(self.answer, requests, then)

    @torch.inference_mode()
    def answer(self, requests: Sequence[AnswerRequest]) -> list[Answer]:
        """Batches of similar length, padded on the left. A prompt without an image never shares a batch with one
        that has one: the vision tower then runs on full batches only. One whose answer may reach the model's last
        position is alone: it stops there, and the answers of others do not depend on it."""
        answers: list[Answer | None] = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (requests[i].image is None, len(requests[i].input_ids), i))
        rooms = [self._room(request) for request in requests]
        whole = self._generation.max_new_tokens
        batches = [[i] for i in order if rooms[i] < whole]
        for has_image in (True, False):
            group = [i for i in order if (requests[i].image is not None) == has_image and rooms[i] == whole]
            size = self._speed.answer_batch
            batches += [group[start : start + size] for start in range(0, len(group), size)]
        for places in batches:
            given = self._generate([requests[i] for i in places], rooms[places[0]])
            for place, answer in zip(places, given, strict=True):
                answers[place] = answer
        assert all(answer is not None for answer in answers)
        return [answer for answer in answers if answer is not None]

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest], wanted: Wanted) -> Iterator[tuple[list[int], list[SampleStates]]]:
        positions = [r.sample.positions(self._description.image_token) for r in requests]
        order = sorted(range(len(requests)), key=lambda i: (requests[i].image is None, positions[i].length, i))
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
        description = self._description
        ids = np.asarray(request.input_ids, np.int64)
        read = len(expand(ids, description.image_token, description.image_tokens))
        return max(min(most, limit + 1 - read), 1)

    def _generate(self, requests: list[AnswerRequest], room: int) -> list[Answer]:
        generation, end = self._generation, self._description.end_token
        how = Decoding(end, self._pad, room, self._never, generation.temperature, generation.top_p)
        samples = [self._fields(r.input_ids, r.image) for r in requests]
        return [
            Answer((), OVERFLOW)
            if ids is None
            else Answer(tuple(ids[: generation.max_new_tokens]), "stop" if end in ids else "length")
            for ids in generate(self._model, samples, how, [r.seed for r in requests])
        ]

    def _forward(
        self, requests: list[ScoreRequest], wanted: Wanted
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        deep = wanted.second_last or wanted.attention
        samples = [self._fields(r.sample.input_ids, r.image) for r in requests]
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

    def _fields(self, input_ids: Any, image: AnyImage | None) -> dict[str, torch.Tensor]:
        """What the model reads of ``input_ids``, which hold one placeholder for ``image``."""
        description = self._description
        ids = expand(np.asarray(input_ids, np.int64), description.image_token, description.image_tokens)
        fields = {"input_ids": torch.from_numpy(ids)}
        if image is not None and not description.image_tokens:
            raise TeacherError(
                f"teacher.model={self._name}: a model that reads text alone, and a sample has an image. Take a model "
                "with a vision tower, or data without images"
            )
        if image is not None:
            shown = square(image, tuple(self._image_processor.image_mean), self._mode)
            fields["pixel_values"] = self._image_processor([shown], return_tensors="pt")["pixel_values"]
        return fields

    @property
    def _image_processor(self) -> Any:
        return self._processor.image_processor


def device_of(speed: SpeedConfig) -> torch.device:
    if speed.device == "cuda" and not torch.cuda.is_available():
        raise TeacherError("speed.device is cuda, but torch sees no CUDA device; set speed.device=cpu or auto")
    if speed.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(speed.device)


def load_processor(config: TeacherConfig) -> tuple[Any, Any]:
    """The processor and the tokenizer of the teacher's folder or repository, whose model type fits.

    Raises
    ------
    TeacherError
    """
    if reads_text_alone(read_teacher_config(config)):
        tokenizer = read_tokenizer("teacher.model", config.model, config.revision)
        return tokenizer, tokenizer
    processor = read_processor("teacher.model", config.model, config.revision, config.trust_remote_code)
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise TeacherError(
            f"teacher.model={config.model}: found a {type(processor).__name__}, expected a LLaVA processor with "
            "an image processor and a tokenizer"
        )
    return processor, tokenizer


def read_teacher_config(config: TeacherConfig) -> Any:
    """The Transformers configuration of the teacher, of a type that can be run here.

    Raises
    ------
    TeacherError
    """
    model = read_config("teacher.model", config.model, config.revision, config.trust_remote_code)
    if reads_text_alone(model):
        model_class("teacher.model", config.model, model)
    else:
        check_llava("teacher.model", config.model, model)
    return model


def reads_text_alone(model: Any) -> bool:
    """Whether a Transformers configuration is that of a language model by itself."""
    return model.get_text_config() is model


def describe_teacher(config: TeacherConfig, tokenizer: Any, processor: Any) -> TeacherDescription:
    """Everything the manifest says of the teacher; needs its configuration files, not its weights in memory."""
    model = read_teacher_config(config)
    text = model.get_text_config()
    template = template_by_name(config.template)
    sees = not reads_text_alone(model)
    return TeacherDescription(
        model=Path(config.model).name if Path(config.model).is_dir() else config.model,
        weights=checkpoint_digest(config.model, config.revision),
        tokenizer=tokenizer_fingerprint(tokenizer),
        shape=TeacherShape(text.hidden_size, text.vocab_size),
        layers=text.num_hidden_layers,
        dtype=config.dtype,
        image_token=image_token_id(tokenizer) if sees else -1,
        end_token=end_token_id(tokenizer, template),
        processor=processor_settings(processor) if sees else {},
        image_tokens=image_tokens_of(model) if sees else 0,
        chat_template=template_text(template),
        vocabulary=describe_vocabulary(tokenizer),
        logit_rule=LogitRule.of(model),
    )


def _token_batches(
    order: list[int], requests: Sequence[ScoreRequest], positions: Sequence[Any], budget: int
) -> Iterator[list[int]]:
    """Consecutive runs of ``order`` whose padded size stays under ``budget`` tokens, images and text-only apart."""
    batch: list[int] = []
    longest = 0
    for i in order:
        length = max(longest, positions[i].length)
        other_kind = bool(batch) and (requests[batch[0]].image is None) != (requests[i].image is None)
        if batch and (length * (len(batch) + 1) > budget or other_kind):
            yield batch
            batch, length = [], positions[i].length
        batch.append(i)
        longest = length
    if batch:
        yield batch
