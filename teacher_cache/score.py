"""Phase one, whole: conversations → answers → states → shards.

``build_cache`` reads as the list of its steps. A shard covers a fixed range of the input, so any worker can make any
shard, a shard is made the same way whenever it is made, and what is done is what lies in ``shards/``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PillowImage
from safetensors.torch import save as save_safetensors

from teacher_cache import __version__
from teacher_cache.answer import AnsweredSample, answer_conversations, answer_text, read_answers, write_answers
from teacher_cache.answerer import answerer_facts, with_answerer
from teacher_cache.codecs import ChannelScales, fit_channel_scales
from teacher_cache.config import CacheConfig, ConfigError, as_plain
from teacher_cache.conversations import Conversation, Skipped, read_conversations
from teacher_cache.images import ImageError, load_image
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
from teacher_cache.teacher import SampleStates, ScoreRequest, Teacher, pick, row_positions
from teacher_cache.tokenization import (
    Prompt,
    Template,
    TokenizedSample,
    assemble,
    template_by_name,
    tokenize_answer,
    tokenize_prompt,
)
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

Samples = Sequence[Conversation | Skipped]


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
        from teacher_cache import teacher_vllm

        choice = teacher_vllm.choose(config)
        note(choice.reason, style)
        if choice.use_vllm:
            return teacher_vllm.VllmTeacher(config, samples)
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
    numbers = list(numbers)
    clock, size = Clock(), config.layout.shard_samples
    extractor = make_extractor(config, storage, manifest, teacher)
    places = plan_images(samples, size) if manifest.image_arrays else {}
    total = sum(len(samples[n * size : (n + 1) * size]) for n in numbers)
    with (
        ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as writer,
        stage("answering" if answers_only else "caching", total, "samples", style) as progress,
    ):
        pending: Future[None] | None = None
        for number in numbers:
            chosen = samples[number * size : (number + 1) * size]
            shard = _ShardInput.load(config, teacher, chosen)
            answered = answer_shard(config, storage, manifest, teacher, number, shard, clock)
            if not answers_only:
                records, images = score_shard(
                    config, manifest, teacher, extractor, number, shard, answered, places, clock
                )
                if pending is not None:
                    pending.result()
                pending = writer.submit(_commit, storage, manifest, number, records, images, shard.skipped, places)
            _advance(progress, len(chosen), clock)
        if pending is not None:
            pending.result()
    return clock


@dataclass
class _ShardInput:
    """One shard's usable conversations with their prompts and images, and the samples left out with the reason."""

    conversations: list[Conversation]
    prompts: list[Prompt]
    images: list[PillowImage.Image | None]
    skipped: list[Skipped]
    left_out: list[Conversation] = field(default_factory=list)
    """Conversations that were read but cannot be cached; their images may serve other shards."""

    @classmethod
    def load(cls, config: CacheConfig, teacher: Teacher, chosen: Samples) -> _ShardInput:
        shard = cls([], [], [], [])
        template = template_by_name(config.teacher.template)
        with ThreadPoolExecutor(config.speed.loader_threads) as threads:
            images = list(threads.map(lambda c: _image_or_reason(c, config.data.image_folder), chosen))
        for sample, image in zip(chosen, images, strict=True):
            if isinstance(sample, Skipped) or isinstance(image, Skipped):
                shard.skipped.append(sample if isinstance(sample, Skipped) else image)  # type: ignore[arg-type]
                continue
            prompt = tokenize_prompt(sample, template, teacher.tokenizer)
            shard.conversations.append(sample)
            shard.prompts.append(prompt)
            shard.images.append(image)
        shard.skip(lambda i: _unfit_prompt(config, teacher, shard.prompts[i]))
        return shard

    def skip(self, reason_of: Any) -> list[int]:
        """Move samples with a reason to ``skipped``; returns the kept places."""
        reasons = [reason_of(i) for i in range(len(self.conversations))]
        self.skipped += [Skipped(c.sample_id, r) for c, r in zip(self.conversations, reasons, strict=True) if r]
        self.left_out += [c for c, r in zip(self.conversations, reasons, strict=True) if r]
        kept = [i for i, reason in enumerate(reasons) if not reason]
        self.conversations = [self.conversations[i] for i in kept]
        self.prompts = [self.prompts[i] for i in kept]
        self.images = [self.images[i] for i in kept]
        return kept


def answer_shard(
    config: CacheConfig,
    storage: Storage,
    manifest: Manifest,
    teacher: Teacher,
    number: int,
    shard: _ShardInput,
    clock: Clock,
) -> list[AnsweredSample]:
    """The shard's answers: those already on disk, or new ones, which are written before anything is scored."""
    begin = time.monotonic()
    stored = read_answers(storage, manifest, number)
    if stored is not None:
        absent = [c.sample_id for c in shard.conversations if c.sample_id not in stored]
        if absent:
            raise CacheError(
                f"{storage.url}/{answers_name(number)}: no answers for {len(absent)} samples (first: {absent[0]}), "
                "which could not be read when it was made. Delete the file to answer this shard anew"
            )
        return [stored[c.sample_id] for c in shard.conversations]
    answered = answer_conversations(
        teacher,
        shard.conversations,
        shard.prompts,
        shard.images,
        template_by_name(config.teacher.template),
        history=config.data.history,
        seed=config.generation.seed,
        capture=teacher.one_pass and not (config.signals.second_last or config.signals.attention),
        max_length=config.teacher.max_length,
        source="student" if config.teacher.answerer else "teacher",
    )
    write_answers(storage, manifest, number, answered, teacher.tokenizer)
    clock.answering += time.monotonic() - begin
    return answered


def score_shard(
    config: CacheConfig,
    manifest: Manifest,
    teacher: Teacher,
    extractor: Extractor,
    number: int,
    shard: _ShardInput,
    answered: list[AnsweredSample],
    places: dict[str, ImagePlace],
    clock: Clock,
) -> tuple[list[TeacherRecord], list[tuple[str, dict[str, Array] | None]]]:
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
    kept = shard.skip(lambda i: _unfit_sample(config, teacher, tokenized[i]))
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
    images = _owned_images(config, teacher, extractor, shard, owned, visual)
    clock.scoring += time.monotonic() - begin
    return records, images


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


def calibrate(config: CacheConfig, samples: Samples, teacher: Teacher) -> dict[str, ChannelScales]:
    """Channel scales and principal components from the first samples' original answers, teacher-forced."""
    signals = config.signals
    if signals.codec in ("float32", "float16", "bfloat16") and not signals.pca:
        return {}
    template = template_by_name(config.teacher.template)
    # More than are needed are looked at, since some cannot be used.
    shard = _ShardInput.load(config, teacher, samples[: 2 * signals.calibration_samples])
    tokenized = [
        assemble(p, [tokenize_answer(a, template, teacher.tokenizer) for a in c.answers])
        for c, p in zip(shard.conversations, shard.prompts, strict=True)
    ]
    fit = [i for i in range(len(tokenized)) if not _unfit_sample(config, teacher, tokenized[i])]
    fit = fit[: signals.calibration_samples]
    if not fit:
        raise CacheError("no usable sample among the first ones, so channel scales cannot be fitted: check data.path")
    states: list[SampleStates] = []
    requests = [ScoreRequest(tokenized[i], shard.images[i]) for i in fit]
    for _, batch in teacher.score(requests, wanted_states(signals)):
        states += batch
    kinds: dict[str, list[torch.Tensor | None]] = {}
    if signals.hidden != "none":
        kinds["hidden"] = [s.text if signals.hidden == "text" else s.rows for s in states]
    if signals.second_last:
        kinds["hidden_second_last"] = [
            s.text_second_last if signals.hidden == "text" else s.rows_second_last for s in states
        ]
    if signals.visual == "states":
        kinds["visual"] = [s.visual for s in states]
    fitted = {}
    for name, tensors in kinds.items():
        rows = [t.float().cpu().numpy() for t in tensors if t is not None]
        if rows:
            fitted[name] = fit_channel_scales(np.concatenate(rows), signals.codec, signals.pca)
    return fitted


def scales_to_bytes(scales: dict[str, ChannelScales]) -> bytes:
    """The counterpart of ``reader.scales_from_bytes``."""
    tensors = {}
    for name, fitted in scales.items():
        for part in dataclasses.fields(fitted):
            value = getattr(fitted, part.name)
            if value is not None:
                tensors[f"{name}.{part.name}"] = torch.from_numpy(value)
    return bytes(save_safetensors(tensors))


def plan_images(samples: Samples, shard_samples: int) -> dict[str, ImagePlace]:
    """Where each distinct image's line stands: in the shard in which it comes first, in order of appearance."""
    places: dict[str, ImagePlace] = {}
    filled: dict[int, int] = {}
    for position, sample in enumerate(samples):
        if isinstance(sample, Skipped) or sample.image is None or sample.image.image_id in places:
            continue
        shard = position // shard_samples
        places[sample.image.image_id] = ImagePlace(shard, filled.get(shard, 0))
        filled[shard] = filled.get(shard, 0) + 1
    return places


def _states(
    teacher: Teacher,
    shard: _ShardInput,
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
            states.append(pick(positions, wanted, hidden))
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


def _owned_images(
    config: CacheConfig,
    teacher: Teacher,
    extractor: Extractor,
    shard: _ShardInput,
    owned: dict[str, int],
    visual: dict[str, dict[str, Array]],
) -> list[tuple[str, dict[str, Array] | None]]:
    """The lines of this shard's images, in order. An image whose samples here were all left out is scored alone:
    later shards may use it. One that cannot be read has no line of its own; no sample refers to it."""
    template = template_by_name(config.teacher.template)
    lines: list[tuple[str, dict[str, Array] | None]] = []
    alone = {c.image.image_id: c for c in shard.left_out if c.image is not None}
    for image_id, _ in sorted(owned.items(), key=lambda item: item[1]):
        if image_id not in visual and image_id in alone:
            visual.update(_score_image(config, teacher, extractor, alone[image_id], template))
        lines.append((image_id, visual.get(image_id)))
    return lines


def _score_image(
    config: CacheConfig, teacher: Teacher, extractor: Extractor, conversation: Conversation, template: Template
) -> dict[str, dict[str, Array]]:
    """{image_id: arrays} from a prompt that holds the image and nothing after it but the template's words."""
    image = _image_or_reason(conversation, config.data.image_folder)
    if isinstance(image, Skipped) or image is None:
        return {}
    assert conversation.image is not None
    probe = dataclasses.replace(conversation, questions=("",), answers=("",))
    ids = np.asarray(tokenize_prompt(probe, template, teacher.tokenizer).segments[0], np.int64)
    sample = TokenizedSample(conversation.sample_id, ids, np.zeros(len(ids), np.bool_))
    for _, states in teacher.score([ScoreRequest(sample, image)], wanted_states(extractor.signals)):
        assert states[0].visual is not None
        return {conversation.image.image_id: extractor.image(states[0].visual)}
    return {}


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


def _image_or_reason(sample: Conversation | Skipped, folder: str) -> PillowImage.Image | Skipped | None:
    if isinstance(sample, Skipped) or sample.image is None:
        return None
    try:
        return load_image(sample.image, folder)
    except ImageError as error:
        return Skipped(sample.sample_id, str(error))


def _unfit_prompt(config: CacheConfig, teacher: Teacher, prompt: Prompt) -> str:
    """Why a conversation cannot be answered, or an empty text."""
    length = sum(_expanded_length(teacher, np.asarray(segment)) for segment in prompt.segments)
    if length >= config.teacher.max_length:
        return (
            f"questions alone take {length} tokens, teacher.max_length is {config.teacher.max_length}: "
            f"{length - config.teacher.max_length + 1} over"
        )
    return ""


def _unfit_sample(config: CacheConfig, teacher: Teacher, sample: TokenizedSample) -> str:
    """Why an answered conversation cannot be cached, or an empty text."""
    length, limit = _expanded_length(teacher, sample.input_ids), config.teacher.max_length
    if length > limit:
        return f"{length} tokens with answers, teacher.max_length is {limit}: {length - limit} over"
    if np.count_nonzero(sample.input_ids == teacher.description.image_token) > 1:
        return "the text of a question or an answer holds the image token"
    return ""


def _expanded_length(teacher: Teacher, ids: np.ndarray[Any, Any]) -> int:
    images = int(np.count_nonzero(ids == teacher.description.image_token))
    return len(ids) + images * (teacher.description.shape.image_tokens - 1)


def _data_files(config: CacheConfig) -> list[dict[str, str]]:
    paths = [config.data.path] if isinstance(config.data.path, str) else list(config.data.path)
    if config.data.regenerate == "ids":
        paths.append(config.data.regenerate_ids)
    return [{"name": Path(p).name, "sha256": hashlib.sha256(Path(p).read_bytes()).hexdigest()} for p in paths]


def _versions() -> dict[str, str]:
    import transformers

    return {"teacher_cache": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
