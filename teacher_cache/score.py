"""Phase one, whole: conversations → answers → states → shards.

``build_cache`` reads as the list of its steps. A shard covers a fixed range of the input, so any worker can make any
shard, a shard is made the same way whenever it is made, and what is done is what lies in ``shards/``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_safetensors

from teacher_cache import __version__
from teacher_cache.answer import AnsweredSample, answer_conversations, answer_text, read_answers, write_answers
from teacher_cache.answerer import answerer_facts, with_answerer
from teacher_cache.calibration import calibrate, scales_to_bytes
from teacher_cache.codecs import ChannelScales
from teacher_cache.config import CacheConfig, ConfigError, as_plain
from teacher_cache.conversations import Conversation, Skipped, read_conversations
from teacher_cache.inputs import Samples, ShardInput, unfit_sample
from teacher_cache.manifest import (
    CacheError,
    Manifest,
    check_same_content,
    new_manifest,
    read_manifest,
    write_manifest,
)
from teacher_cache.progress import Stage, Style, note, stage
from teacher_cache.reader import scales_from_bytes
from teacher_cache.records import Array, TeacherRecord
from teacher_cache.signals import Extractor, wanted_states
from teacher_cache.storage import Storage
from teacher_cache.teacher import SampleStates, ScoreRequest, Teacher, TeacherCrashed, pick, row_positions
from teacher_cache.tokenization import (
    TokenizedSample,
    assemble,
    template_by_name,
)
from teacher_cache.visual import owned_images, plan_images
from teacher_cache.writer import (
    HEAD,
    SCALES,
    ImagePlace,
    answers_name,
    committed_shards,
    finish,
    refuse_foreign_shards,
    write_images,
    write_shard,
)


@dataclass(frozen=True)
class BuildSummary:
    """What ``teacher-cache build`` reports."""

    samples: int
    skipped: int
    rows: int
    bytes: int
    seconds: float
    answer_seconds: float
    score_seconds: float
    shards_made: int

    @property
    def bytes_per_row(self) -> float:
        return self.bytes / max(self.rows, 1)


@dataclass
class Clock:
    """Seconds the teacher took."""

    answering: float = 0.0
    scoring: float = 0.0
    one_pass: bool = False
    """Some states were captured while answering, so ``scoring`` is not all that scoring takes."""

    def add(self, other: Clock) -> None:
        self.answering += other.answering
        self.scoring += other.scoring
        self.one_pass |= other.one_pass


def build_cache(
    config: CacheConfig, *, teacher: Teacher | None = None, style: Style = "auto", options: dict[str, Any] | None = None
) -> BuildSummary:
    """Make the cache ``config.output``, or go on where an earlier run stopped.

    Raises
    ------
    ConfigError, DataError, TeacherError, CacheError, StorageError
        Each says what, where, what was expected and what to do. Shards that were committed stay.
    """
    begin = time.monotonic()
    samples = read_conversations(config.data)
    storage = Storage(config.output, options)
    own = teacher is None
    teacher = teacher if teacher is not None else open_teacher(config, samples, style)
    try:
        manifest = prepare(config, storage, samples, teacher)
        numbers = missing_shards(storage, manifest)
        clock = build_shards(config, storage, manifest, samples, teacher, numbers, style)
    finally:
        if own:
            teacher.close()
    return finish_build(storage, manifest, clock, time.monotonic() - begin, len(numbers))


def finish_build(storage: Storage, manifest: Manifest, clock: Clock, seconds: float, shards_made: int) -> BuildSummary:
    """Write the ledger and the manifest's last word once every shard is there, and say what was made."""
    counts = finish(storage, manifest).counts
    _add_cost(storage, clock)
    return BuildSummary(
        samples=counts["samples"],
        skipped=counts["skipped"],
        rows=counts["rows"],
        bytes=counts["bytes"],
        seconds=seconds,
        answer_seconds=clock.answering,
        score_seconds=clock.scoring,
        shards_made=shards_made,
    )


def _add_cost(storage: Storage, clock: Clock) -> None:
    """``cost.json``: what the teacher took, over all runs that made the cache. Not content: no checksum, no promise."""
    cost = json.loads(storage.read(COST)) if storage.exists(COST) else {"answer_seconds": 0.0, "score_seconds": 0.0}
    cost["answer_seconds"] += clock.answering
    cost["score_seconds"] += clock.scoring
    cost["one_pass"] = cost.get("one_pass", False) or clock.one_pass
    storage.write(COST, [json.dumps(cost).encode()])


COST = "cost.json"


def answer_only(config: CacheConfig, style: Style = "auto", options: dict[str, Any] | None = None) -> int:
    """Write the answers of every shard that has none yet; returns how many shards that were."""
    samples = read_conversations(config.data)
    storage = Storage(config.output, options)
    teacher = open_teacher(config, samples, style)
    try:
        manifest = prepare(config, storage, samples, teacher)
        numbers = [n for n in missing_shards(storage, manifest) if not storage.exists(answers_name(n))]
        build_shards(config, storage, manifest, samples, teacher, numbers, style, answers_only=True)
    finally:
        teacher.close()
    return len(numbers)


def check_answered(config: CacheConfig, options: dict[str, Any] | None = None) -> None:
    """Refuse to score when a shard that is to be scored has no answers yet."""
    storage = Storage(config.output, options)
    manifest = read_manifest(storage)
    bare = [n for n in missing_shards(storage, manifest) if not storage.exists(answers_name(n))]
    if bare:
        raise CacheError(
            f"{storage.url}: {len(bare)} shards have no answers (first: {answers_name(bare[0])}). "
            "Run teacher-cache answer with the same configuration first, or build, which does both"
        )


def open_teacher(config: CacheConfig, samples: Samples, style: Style = "auto") -> Teacher:
    """The teacher of ``config.teacher.backend``; ``auto`` takes vLLM where it is installed and holds the model.

    With ``teacher.answerer`` a student answers in its place.
    """
    check_config(config)
    return with_answerer(_open_backend(config, samples, style), config)


def _open_backend(config: CacheConfig, samples: Samples, style: Style) -> Teacher:
    if config.teacher.backend != "torch":
        from teacher_cache.vllm_choice import choose

        choice = choose(config)
        note(choice.reason, style)
        if choice.use_vllm:
            from teacher_cache.teacher_vllm import VllmTeacher

            return VllmTeacher(config, samples)
    from teacher_cache.teacher_torch import TorchTeacher

    return TorchTeacher(config.teacher, config.generation, config.speed, attention=config.signals.attention)


def check_config(config: CacheConfig) -> None:
    """Settings that are missing or contradict each other, before anything is loaded."""
    if not config.output:
        raise ConfigError("output: not set; name a folder or an s3:// or gs:// address for the cache")
    if not config.teacher.model:
        raise ConfigError("teacher.model: not set; name a LLaVA checkpoint (a folder or a hub name)")
    if not config.data.path:
        raise ConfigError("data.path: not set; name a LLaVA JSON, JSONL or Parquet file")
    signals = config.signals
    if 1.0 not in signals.temperatures:
        raise ConfigError("signals.temperatures: must contain 1.0, the temperature of topk_logprobs")
    if signals.sampled > 255:
        raise ConfigError(f"signals.sampled: at most 255 draws a row (counts are one byte), found {signals.sampled}")
    if signals.sampled and signals.sampled_from == "tail" and not signals.top_k:
        raise ConfigError("signals.sampled_from=tail needs signals.top_k: the tail is what lies outside the top-k")
    if not 0 < config.generation.top_p <= 1:
        raise ConfigError(f"generation.top_p: expected 0 < top_p ≤ 1, found {config.generation.top_p:g}")
    if signals.second_last and signals.hidden == "none":
        raise ConfigError("signals.second_last needs signals.hidden=rows or text")
    if signals.hidden == "none" and not signals.top_k:
        raise ConfigError("signals: neither hidden states nor a top-k would be stored; set signals.top_k")


def prepare(config: CacheConfig, storage: Storage, samples: Samples, teacher: Teacher) -> Manifest:
    """Write manifest, head and channel scales, or check that those of an earlier run fit."""
    check_config(config)
    data = as_plain(config.data) | {"files": _data_files(config)}
    data |= answerer_facts(config)
    data.pop("image_folder")  # where the images lie may change, which ones they are may not
    manifest = new_manifest(config, dataclasses.asdict(teacher.description), data, len(samples))
    manifest = dataclasses.replace(manifest, made_with=_versions())
    if storage.exists("manifest.json"):
        old = read_manifest(storage)
        check_same_content(old, manifest, storage.url)
        manifest = dataclasses.replace(old, complete=False, counts={}, files={})
    else:
        refuse_foreign_shards(storage, manifest)
        write_manifest(storage, manifest)
    if manifest.signals_config.hidden != "none" or manifest.image_arrays:
        if not storage.exists(HEAD):
            storage.write(HEAD, [save_safetensors({"head": teacher.head().cpu().contiguous()})])
        if not storage.exists(SCALES):
            scales = calibrate(config, samples, teacher)
            if scales:
                storage.write(SCALES, [scales_to_bytes(scales)])
    return manifest


def missing_shards(storage: Storage, manifest: Manifest) -> list[int]:
    return sorted(set(range(manifest.planned_shards)) - committed_shards(storage, manifest))


def build_shards(
    config: CacheConfig,
    storage: Storage,
    manifest: Manifest,
    samples: Samples,
    teacher: Teacher,
    numbers: Iterable[int],
    style: Style = "auto",
    *,
    answers_only: bool = False,
) -> Clock:
    """Make the shards ``numbers``; writing runs behind the teacher, one shard back, and its errors surface here."""
    numbers, clock = list(numbers), Clock()
    if teacher.two_engines and not answers_only:  # a change of engines costs minutes: one for all shards, not one each
        bare = [n for n in numbers if not storage.exists(answers_name(n))]
        clock = build_shards(config, storage, manifest, samples, teacher, bare, style, answers_only=True)
    size = config.layout.shard_samples
    extractor = make_extractor(config, storage, manifest, teacher)
    places = plan_images(samples, size) if manifest.image_arrays else {}
    total = sum(len(samples[n * size : (n + 1) * size]) for n in numbers)

    def make(number: int) -> tuple[ShardInput, Scored | None]:
        shard = ShardInput.load(config, teacher, samples[number * size : (number + 1) * size])
        answered = answer_shard(config, storage, manifest, teacher, number, shard, clock, style)
        if answers_only:
            return shard, None
        return shard, score_shard(config, manifest, teacher, extractor, number, shard, answered, places, clock)

    with (
        ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as writer,
        stage("answering" if answers_only else "caching", total, "samples", style) as progress,
    ):
        pending: Future[None] | None = None
        for number in numbers:
            try:
                shard, scored = make(number)
            except TeacherCrashed as error:  # once: its answers are on disk by now, or will not come
                note(f"{error} Starting it again for shard {number:05d}", style)
                shard, scored = make(number)
            if scored is not None:
                if pending is not None:
                    pending.result()
                pending = writer.submit(_commit, storage, manifest, number, *scored, shard.skipped, places)
            _advance(progress, len(samples[number * size : (number + 1) * size]), clock)
        if pending is not None:
            pending.result()
    return clock


def answer_shard(
    config: CacheConfig,
    storage: Storage,
    manifest: Manifest,
    teacher: Teacher,
    number: int,
    shard: ShardInput,
    clock: Clock,
    style: Style = "auto",
) -> list[AnsweredSample]:
    """The shard's answers: those already on disk, and new ones, which are written before anything is scored.

    Samples that could not be read when the file was made, and can be now, are answered in addition.
    """
    begin = time.monotonic()
    stored = read_answers(storage, manifest, number) or {}
    absent = [i for i, c in enumerate(shard.conversations) if c.sample_id not in stored]
    if absent or not storage.exists(answers_name(number)):
        answered = answer_conversations(
            teacher,
            [shard.conversations[i] for i in absent],
            [shard.prompts[i] for i in absent],
            [shard.images[i] for i in absent],
            template_by_name(config.teacher.template),
            history=config.data.history,
            seed=config.generation.seed,
            capture=teacher.one_pass and not (config.signals.second_last or config.signals.attention),
            max_length=config.teacher.max_length,
            source="student" if config.teacher.answerer else "teacher",
            style=style,
        )
        stored |= {sample.sample_id: sample for sample in answered}
        ordered = [stored[c.sample_id] for c in shard.conversations]
        write_answers(storage, manifest, number, ordered, teacher.tokenizer)
        clock.answering += time.monotonic() - begin
        clock.one_pass |= any(sample.hidden is not None for sample in answered)
    return [stored[c.sample_id] for c in shard.conversations]


def score_shard(
    config: CacheConfig,
    manifest: Manifest,
    teacher: Teacher,
    extractor: Extractor,
    number: int,
    shard: ShardInput,
    answered: list[AnsweredSample],
    places: dict[str, ImagePlace],
    clock: Clock,
) -> Scored:
    """Records of the shard in input order, and the lines of the images that this shard owns."""
    begin = time.monotonic()
    turns = [len(p.segments) for p in shard.prompts]
    kept = shard.skip(
        lambda i: (
            f"longer than teacher.max_length={config.teacher.max_length} before its last question"
            if len(answered[i].answers) < turns[i]
            else ""
        )
    )
    answered = [answered[i] for i in kept]
    tokenized = [assemble(p, a.answers) for p, a in zip(shard.prompts, answered, strict=True)]
    kept = shard.skip(lambda i: unfit_sample(config, teacher, tokenized[i]))
    answered, tokenized = [answered[i] for i in kept], [tokenized[i] for i in kept]
    owned = {image_id: place.row for image_id, place in places.items() if place.shard == number}
    arrays: list[dict[str, Array] | None] = [None] * len(tokenized)
    visual: dict[str, dict[str, Array]] = {}
    for batch, states in _states(teacher, shard, answered, tokenized, extractor):
        for i, record in zip(batch, extractor.records([tokenized[i].sample_id for i in batch], states), strict=True):
            arrays[i] = record
        for i, state in zip(batch, states, strict=True):
            image = shard.conversations[i].image
            if image is not None and image.image_id in owned and image.image_id not in visual:
                assert state.visual is not None
                visual[image.image_id] = extractor.image(state.visual)
    records = [
        _record(manifest, teacher, shard.conversations[i], answered[i], tokenized[i], arrays[i])
        for i in range(len(tokenized))
    ]
    images = owned_images(config, teacher, extractor, shard, owned, visual)
    clock.scoring += time.monotonic() - begin
    return records, images


Scored = tuple[list[TeacherRecord], list[tuple[str, dict[str, Array] | None]]]
"""A shard's records, and the lines of its images."""


def make_extractor(config: CacheConfig, storage: Storage, manifest: Manifest, teacher: Teacher) -> Extractor:
    scales = scales_from_bytes(storage.read(SCALES)) if storage.exists(SCALES) else {}
    shape = manifest.shape
    none = ChannelScales(np.ones(shape.hidden_size, np.float32))
    names = ("hidden", "hidden_second_last", "visual")
    return Extractor(
        signals=config.signals,
        shape=shape,
        head=teacher.head(),
        scales={name: scales.get(name, none) for name in names},
        seed=config.generation.seed,
        head_rows=config.speed.head_rows,
    )


def _states(
    teacher: Teacher,
    shard: ShardInput,
    answered: list[AnsweredSample],
    tokenized: list[TokenizedSample],
    extractor: Extractor,
) -> Iterator[tuple[list[int], list[SampleStates]]]:
    """States of every sample: those captured while answering, the rest from a scoring pass."""
    wanted = wanted_states(extractor.signals)
    description = teacher.description
    captured = [i for i, sample in enumerate(answered) if sample.hidden is not None]
    for begin in range(0, len(captured), _CAPTURED_BATCH):
        batch, states = captured[begin : begin + _CAPTURED_BATCH], []
        for i in batch:
            hidden, answered[i].hidden = answered[i].hidden, None  # freed as soon as it is used
            assert hidden is not None
            positions = row_positions(tokenized[i], description.image_token, description.shape.image_tokens)
            states.append(pick(positions, wanted, hidden.to(extractor.head.device)))
        yield batch, states
    rest = sorted(set(range(len(answered))) - set(captured))
    requests = [ScoreRequest(tokenized[i], shard.images[i]) for i in rest]
    for places, scored in teacher.score(requests, wanted) if requests else ():
        yield [rest[place] for place in places], scored


_CAPTURED_BATCH = 32


def _record(
    manifest: Manifest,
    teacher: Teacher,
    conversation: Conversation,
    answered: AnsweredSample,
    sample: TokenizedSample,
    arrays: dict[str, Array] | None,
) -> TeacherRecord:
    assert arrays is not None, f"the teacher scored no states for {sample.sample_id}"
    ids = sample.input_ids.astype(manifest.shape.id_dtype)
    return TeacherRecord(
        sample_id=conversation.sample_id,
        image_id=conversation.image.image_id if conversation.image is not None else "",
        questions=conversation.questions,
        answers=tuple(answer_text(teacher.tokenizer, a) for a in answered.answers),
        original_answers=conversation.answers,
        source=answered.source,
        arrays={"input_ids": ids, "loss_mask": sample.loss_mask, **arrays},
    )


def _commit(
    storage: Storage,
    manifest: Manifest,
    number: int,
    records: list[TeacherRecord],
    images: list[tuple[str, dict[str, Array] | None]],
    skipped: list[Skipped],
    places: dict[str, ImagePlace],
) -> None:
    """Images first: a committed shard never points at image lines that are not there yet."""
    if manifest.image_arrays:
        write_images(storage, manifest, number, images)
    write_shard(storage, manifest, number, records, [places.get(r.image_id, ImagePlace()) for r in records], skipped)


def _advance(progress: Stage, count: int, clock: Clock) -> None:
    busy = clock.answering + clock.scoring
    progress.advance(count, answering=f"{100 * clock.answering / busy:.0f} %" if busy else "-")


def _data_files(config: CacheConfig) -> list[dict[str, str]]:
    paths = [config.data.path] if isinstance(config.data.path, str) else list(config.data.path)
    if config.data.regenerate == "ids":
        paths.append(config.data.regenerate_ids)
    return [{"name": Path(p).name, "sha256": hashlib.sha256(Path(p).read_bytes()).hexdigest()} for p in paths]


def _versions() -> dict[str, str]:
    import transformers

    return {"teacher_cache": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
