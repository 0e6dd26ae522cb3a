"""The teacher under vLLM: answers, and the final-layer states of the whole sequence, out of one pass.

The engine hands out the residual stream before the final norm (``session.py`` says how); the norm, the model's own
module, is applied here in float32. Top-k and statistics are formed from these states and the output head like those of
every other teacher; the engine's own logits serve to check them. Each captured answer must satisfy
``rule(head(norm(h))) = the engine's logits``: that catches a wrong layer, a shifted row or a stale cache block before
anything is stored. That the engine runs the model as Transformers does is tried before the build, on a sample of each
kind. Of every request, ``the ids the engine read = ours with each image written out``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from teacher_cache.config import CacheConfig
from teacher_cache.data.conversations import Conversation, Skipped
from teacher_cache.data.images import AnyImage
from teacher_cache.errors import TeacherError
from teacher_cache.models.chat import Chat
from teacher_cache.models.model_config import position_limit
from teacher_cache.models.open_chat import load_processor, open_chat, read_teacher_config
from teacher_cache.models.parts import check_head, media_tokens
from teacher_cache.models.pretrained import without_weights
from teacher_cache.models.slots import Ids
from teacher_cache.models.weights import checkpoint_folder, final_norm, output_head
from teacher_cache.teachers.description import describe_teacher
from teacher_cache.teachers.teacher import (
    Answer,
    AnswerRequest,
    SampleStates,
    Shown,
    TeacherDescription,
    Then,
    Wanted,
    pick,
)
from teacher_cache.teachers.vllm import registry
from teacher_cache.teachers.vllm.checks import check_ids, check_logits, check_states, torch_states
from teacher_cache.teachers.vllm.choice import (
    architecture_of,
    check_context,
    check_weight_names,
    samples_rightly,
    why_not_vllm,
)
from teacher_cache.teachers.vllm.jobs import Job, Mode, Outcome, VllmOptions
from teacher_cache.teachers.vllm.session import LENGTH_MARGIN, VllmSession


class VllmTeacher:
    """A ``Teacher`` of any model class that vLLM has of its own; ``with`` or ``close`` frees its device.

    The engine starts with the first request, and again after :class:`TeacherCrashed`. Model classes that cannot hand
    out inner states answer first; then that engine is stopped and another, a ``token_embed`` pooler, scores.

    Raises ``TeacherError``: vLLM is missing, does not know the architecture or the weight names; the processor is
    missing; the head has a bias; there is no memory for the KV cache. Each says what to set.
    """

    def __init__(
        self, config: CacheConfig, samples: Sequence[Conversation | Skipped], options: VllmOptions | None = None
    ) -> None:
        """``samples``: the data that will come; the engine is told how many images they have at most."""
        teacher = config.teacher
        self._config, self._options = config, options or VllmOptions()
        self._processor, self._tokenizer = load_processor(teacher)
        self._chat = open_chat(teacher, self._processor)
        if problem := why_not_vllm(config):
            raise TeacherError(f"teacher.backend=vllm: {problem}. Set teacher.backend=torch.")
        self._description = describe_teacher(teacher, self._processor, self._chat)
        self._folder = checkpoint_folder(teacher.model, teacher.revision)
        self._model = read_teacher_config(teacher)
        self._text = self._model.get_text_config()
        skeleton = without_weights("teacher.model", teacher.model, self._model)
        check_head("teacher.model", teacher.model, skeleton)
        self._extracts = self._options.capture and registry.can_capture(architecture_of(teacher))
        self._captures = self._extracts and samples_rightly(config)
        self._limit = min([teacher.max_length, *filter(None, [self.positions])]) + 1
        """Tokens of the longest sequence; the one beyond tells that a sample is too long."""
        self._images = max([1, *(len(s.images) for s in samples if isinstance(s, Conversation))])
        check_weight_names(teacher, self._folder)
        self._device = torch.device("cpu" if registry.on_cpu() else "cuda")
        self._norm = final_norm(skeleton, self._folder).to(self._device) if self._extracts else None
        self._head = output_head(self._folder).to(self._device, self._dtype)
        self._session: VllmSession | None = None
        self.last_cached_tokens = 0
        """Of the last prompt that was answered, how many tokens came out of the prefix cache."""

    def __enter__(self) -> VllmTeacher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        """Some less than the model's own: vLLM needs room behind every sequence."""
        return limit - LENGTH_MARGIN - 1 if (limit := position_limit(self._model)) else None

    @property
    def one_pass(self) -> bool:
        return self._captures

    @property
    def two_engines(self) -> bool:
        return self._answering_mode != self._scoring_mode

    def head(self) -> torch.Tensor:
        return self._head

    def close(self) -> None:
        """Stop the engine; its processes are gone and their memory is free when this returns."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def engine_pids(self) -> list[int]:
        """Process ids of the running engine, none while there is none."""
        return [p.pid for p in self._session.processes()] if self._session is not None else []

    def events(self) -> dict[str, int]:
        """See :meth:`VllmSession.events`."""
        return self._session.events() if self._session is not None else {}

    def scratch_files(self) -> list[Path]:
        """The connector's files that nobody has read yet."""
        return self._session.scratch_files() if self._session is not None else []

    def prove(self, requests: Sequence[AnswerRequest]) -> None:
        """Score the prompts with torch too. One pass of a model that torch cannot take alike (quantised, or on several
        GPUs) goes without: each of its answers is compared with the engine's own logits."""
        quantised = self._config.teacher.quantization or getattr(self._model, "quantization_config", None)
        apart = quantised or self._config.speed.tensor_parallel > 1
        if (self._extracts and apart) or not requests:
            return
        shown, wanted = [request.shown for request in requests], Wanted(text=True)
        expected = torch_states(self._config, shown, wanted)
        for (place,), (state,) in self.score(shown, wanted):
            name = f"teacher.model={self._config.teacher.model}: sample {shown[place].sample.sample_id}"
            check_states(name, state, expected[place], self._head, self._description)

    def answer(self, requests: Sequence[AnswerRequest]) -> list[Answer]:
        answers: list[Answer | None] = [None] * len(requests)
        for place, answer in self.answers(requests):
            answers[place] = answer
        assert all(answer is not None for answer in answers)
        return [answer for answer in answers if answer is not None]

    def answers(self, requests: Sequence[AnswerRequest], then: Then | None = None) -> Iterator[tuple[int, Answer]]:
        """See :meth:`Teacher.answers`. The next turn runs at once: its earlier turns are still in the prefix cache, and
        no conversation waits for another."""
        if any(r.capture for r in requests) and not self._captures:
            raise TeacherError("this engine cannot hand out states as it answers (see one_pass): answer, then score")
        asked = dict(enumerate(requests))

        def follow(job: Job, outcome: Outcome) -> Job | None:
            assert then is not None
            following = then(asked[job.place], given.pop(job.place))
            if following is None:
                return None
            asked[job.place] = following
            return self._answer_job(job.place, following)

        given: dict[int, Answer] = {}
        jobs = [self._answer_job(place, request) for place, request in asked.items()]
        for job, outcome in self._run(self._answering_mode, jobs, follow if then is not None else None):
            hidden = self._checked(job, outcome)[0].cpu() if job.capture else None
            if not job.capture:
                check_ids(job.sample_id, job.expanded, outcome.read_ids)
            self.last_cached_tokens = outcome.cached_tokens
            given[job.place] = Answer(outcome.token_ids, outcome.finish_reason, hidden)
            yield job.place, given[job.place]

    def score(self, requests: Sequence[Shown], wanted: Wanted) -> Iterator[tuple[list[int], list[SampleStates]]]:
        """One request at a time, in the order in which they end.

        The prompt is the sequence without its last token, which predicts nothing. The one token that the engine then
        generates is thrown away, but its logits are those of the last row and check the states.
        """
        if wanted.attention or (wanted.second_last and not self._second_last):
            raise TeacherError("vLLM was not set up for signals.attention or signals.second_last: score with torch")
        jobs = [self._score_job(place, request) for place, request in enumerate(requests)]
        for job, outcome in self._run(self._scoring_mode, jobs):
            hidden, second_last = self._checked(job, outcome)
            positions = requests[job.place].sample.positions(self._description.image_token)
            yield [job.place], [pick(positions, wanted, hidden, second_last if wanted.second_last else None)]

    def _answer_job(self, place: int, request: AnswerRequest) -> Job:
        """One token beyond ``teacher.max_length`` is enough: the sample will be skipped as too long."""
        sample = request.shown.sample
        room = min(self._config.generation.max_new_tokens, self._limit - sample.length)
        job = Job(
            place,
            f"{request.sample_id}, turn {request.turn}",
            self._unexpanded(request.shown),
            sample.expanded(self._chat.image_token),
            _images_of(request.shown),
            room,
            request.seed if self._config.generation.temperature > 0 else None,
            request.capture,
        )
        return self._fitting(job)

    def _score_job(self, place: int, shown: Shown) -> Job:
        ids, expanded = self._unexpanded(shown)[:-1], shown.sample.expanded(self._chat.image_token)[:-1]
        return self._fitting(Job(place, shown.sample.sample_id, ids, expanded, _images_of(shown), 1, None, True))

    def _unexpanded(self, shown: Shown) -> Ids:
        """With one placeholder an image, which the engine writes out itself: in some families as several runs."""
        if not shown.sees:
            return tuple(shown.sample.input_ids.tolist())
        return self._chat.unexpanded(shown.conversation, shown.answers, shown.ask)[0]

    def _fitting(self, job: Job) -> Job:
        check_context(job.sample_id, len(job.expanded) + max(job.max_tokens, 1), self._limit)
        return job

    def _run(
        self, mode: Mode, jobs: Sequence[Job], then: Callable[[Job, Outcome], Job | None] | None = None
    ) -> Iterator[tuple[Job, Outcome]]:
        if not jobs:
            return
        session = self._session_for(mode)
        try:
            yield from session.embed(jobs) if mode == "states" else session.generate(jobs, then)
        finally:
            if not session.idle:  # dead, or with requests in it that nobody will read: the next call starts a fresh one
                self.close()

    def _session_for(self, mode: Mode) -> VllmSession:
        if self._session is None or self._session.mode != mode:
            self.close()
            layers = int(self._text.num_hidden_layers)
            captured = [layers - 1, layers] if self._second_last else [layers]
            arguments, eyes = self._arguments(), getattr(self._processor, "image_processor", None)
            self._session = VllmSession(mode, arguments, self._sampling(), self._options, captured, eyes)
        return self._session

    def _arguments(self) -> dict[str, Any]:
        """Arguments of ``vllm.LLM`` that do not depend on the mode; None keeps vLLM's default."""
        teacher, speed, options = self._config.teacher, self._config.speed, self._options
        arguments = {
            "model": str(self._folder),
            "dtype": teacher.dtype,
            "quantization": teacher.quantization or None,
            "trust_remote_code": teacher.trust_remote_code,
            "tensor_parallel_size": speed.tensor_parallel,
            "gpu_memory_utilization": speed.gpu_memory_share,
            "max_model_len": self._limit + LENGTH_MARGIN,
            "max_num_seqs": options.max_sequences,
            "max_num_batched_tokens": options.prefill_tokens or None,
            "limit_mm_per_prompt": {"image": self._images, "video": 0} if self._chat.image_token >= 0 else None,
            "generation_config": "vllm",  # the folder's own sampling defaults are not ours
            "num_gpu_blocks_override": options.cache_blocks or None,
            "block_size": options.block_tokens or None,
            "kv_cache_memory_bytes": options.cache_bytes or None,
        }
        if registry.on_cpu():
            arguments |= self._cpu_arguments()
        return {name: value for name, value in arguments.items() if value is not None}

    def _cpu_arguments(self) -> dict[str, Any]:
        options = self._options
        arguments: dict[str, Any] = {
            "enforce_eager": True,
            "block_size": options.block_tokens or 32,
            "kv_cache_memory_bytes": options.cache_bytes or self._cpu_cache_bytes(),
        }
        if self._config.generation.temperature > 0:
            # vLLM rewinds a request's random generator after a chunk of its prompt, which a CPU generator cannot do
            # ("CPU Generator does not use offset"): then prompts go in whole.
            arguments["enable_chunked_prefill"] = False
            arguments["max_num_batched_tokens"] = max(self._limit + LENGTH_MARGIN, options.prefill_tokens, 4096)
        return arguments

    def _sampling(self) -> dict[str, Any]:
        """What all requests share. Only the template's end token ends an answer; one with an image's token in it could
        never be read again."""
        generation, never = self._config.generation, list(media_tokens(self._model))
        return {
            "temperature": generation.temperature,
            "top_p": generation.top_p if generation.temperature > 0 else 1.0,
            "ignore_eos": True,
            "stop_token_ids": [self._description.end_token],
            "bad_words": self._tokenizer.convert_ids_to_tokens(never) or None,
            "detokenize": False,
        }

    def _cpu_cache_bytes(self) -> int:
        """Room for ``max_sequences`` sequences of full length, between 256 MiB and a quarter of the free memory."""
        values = 2 * (self._text.num_hidden_layers + 1) * self._text.hidden_size  # at most, of a token
        needed = values * torch.finfo(self._dtype).bits // 8 * self._options.max_sequences * (self._limit + 32)
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        return int(max(256 << 20, min(needed, free // 4)))

    def _checked(self, job: Job, outcome: Outcome) -> tuple[torch.Tensor, torch.Tensor | None]:
        """States after the final norm (S, d) and those before the last layer, once they have been checked."""
        assert outcome.states is not None
        read = np.concatenate([job.expanded, np.asarray(outcome.token_ids[:-1], np.int64)])
        check_ids(job.sample_id, read, outcome.read_ids)
        raw = outcome.states.to(self._device)
        if self._norm is None:  # rows of a second pass have gone through it already
            return raw[:, 0].to(self._dtype), None
        hidden = self._norm(raw[:, -1].float()).to(self._dtype)
        rows = hidden[len(job.expanded) - 1 :]
        check_logits(job.sample_id, rows, self._head, outcome, self._description)
        return hidden, raw[:, 0] if self._second_last else None

    @property
    def _answering_mode(self) -> Mode:
        return "capture" if self._captures else "plain"

    @property
    def _scoring_mode(self) -> Mode:
        return "capture" if self._extracts else "states"

    @property
    def _second_last(self) -> bool:
        return self._config.signals.second_last

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self._config.teacher.dtype)
        return dtype


def _images_of(shown: Shown) -> Sequence[AnyImage]:
    """Those that stand in what is shown: later turns' are not."""
    runs = shown.sample.runs
    return shown.images[: int(runs[:, 1].max()) + 1 if len(runs) else 0]
