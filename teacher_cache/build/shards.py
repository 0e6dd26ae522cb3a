"""Making shards: answer, score, write.

What a shard holds depends on its samples alone, so any process can make any shard; where its answers lie on disk
already, it is scored from those.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from teacher_cache.build.answers import AnsweredSample, answer_conversations, answer_text, read_answers, write_answers
from teacher_cache.build.image_owners import owned_images, plan_images
from teacher_cache.build.inputs import Samples, ShardInput, length_limit, unfit_sample
from teacher_cache.build.signals import NOT_FINITE, Extractor, finite_arrays, finite_states, wanted_states
from teacher_cache.build.skips import check_share
from teacher_cache.config import CacheConfig
from teacher_cache.data.conversations import SkipCount, Skipped
from teacher_cache.data.image_files import OtherImageError
from teacher_cache.data.images import Picture
from teacher_cache.data.rows import positions_of
from teacher_cache.data.tokenization import TokenizedSample, assemble, template_by_name
from teacher_cache.errors import TeacherCrashed, TeacherError
from teacher_cache.progress import Stage, Style, note, stage
from teacher_cache.store.codecs import ChannelScales
from teacher_cache.store.manifest import Manifest
from teacher_cache.store.reader import scales_from_bytes
from teacher_cache.store.records import Array, TeacherRecord
from teacher_cache.store.storage import Storage
from teacher_cache.store.tables import INDEX_BYTES
from teacher_cache.store.writer import SCALES, ImagePlace, answers_name, write_images, write_shard
from teacher_cache.teachers.teacher import SampleStates, ScoreRequest, Teacher, pick


@dataclass
class Clock:
    """Seconds the teacher took."""

    answering: float = 0.0
    scoring: float = 0.0
    one_pass: bool = False
    """Some states were captured while answering, so ``scoring`` is not all that scoring takes."""
    skips: SkipCount = field(default_factory=SkipCount)
    """What the shards left out."""

    def add(self, other: Clock) -> None:
        self.answering += other.answering
        self.scoring += other.scoring
        self.one_pass |= other.one_pass
        self.skips.merge(other.skips)


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
            for sample in shard.skipped:
                clock.skips.add(sample)
            check_share(config, len(samples), clock.skips)
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
    for conversation, picture in zip(shard.conversations, shard.images, strict=True):
        if conversation.sample_id in stored and picture is not None:
            _check_same_image(stored[conversation.sample_id], picture, f"{storage.url}/{answers_name(number)}")
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
            max_length=length_limit(config, teacher)[0],
            source="student" if config.teacher.answerer else "teacher",
            style=style,
        )
        for i, sample in zip(absent, answered, strict=True):
            picture = shard.images[i]
            sample.image_checksum = picture.image.checksum if picture is not None else ""
        stored |= {sample.sample_id: sample for sample in answered}
        ordered = [stored[c.sample_id] for c in shard.conversations]
        write_answers(storage, manifest, number, ordered, teacher.tokenizer)
        clock.answering += time.monotonic() - begin
        clock.one_pass |= any(sample.hidden is not None for sample in answered)
    return [stored[c.sample_id] for c in shard.conversations]


def _check_same_image(answered: AnsweredSample, picture: Picture, where: str) -> None:
    if answered.image_checksum not in ("", picture.image.checksum):
        raise OtherImageError(
            f"{where}: sample {answered.sample_id} was answered about other bytes of image {picture.image.image_id} "
            f"(checksum {answered.image_checksum}) than lie there now ({picture.image.checksum}). Give the image "
            "folder the answers were made with, or delete that file: its shard is answered anew"
        )


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
    _, limited = length_limit(config, teacher)
    read = len(shard.conversations)

    def unanswered(i: int) -> str:
        if answered[i].overflowed:
            return NOT_FINITE
        return f"too long before its last question: {limited}" if len(answered[i].answers) < turns[i] else ""

    kept = shard.skip(unanswered)
    failed = sum(sample.overflowed for sample in answered)
    answered = [answered[i] for i in kept]
    tokenized = [assemble(p, a.answers) for p, a in zip(shard.prompts, answered, strict=True)]
    kept = shard.skip(lambda i: unfit_sample(config, teacher, tokenized[i]))
    answered, tokenized = [answered[i] for i in kept], [tokenized[i] for i in kept]
    owned = {image_id: place.row for image_id, place in places.items() if place.shard == number}
    arrays, visual = _scored_arrays(teacher, shard, answered, tokenized, extractor, owned)
    kept = shard.skip(lambda i: "" if arrays[i] is not None else NOT_FINITE)
    _refuse_overflow(config, number, failed + len(tokenized) - len(kept), read)
    records = [
        _record(manifest, teacher, shard, place, answered[i], tokenized[i], arrays[i]) for place, i in enumerate(kept)
    ]
    images = owned_images(config, teacher, extractor, shard, owned, visual)
    clock.scoring += time.monotonic() - begin
    return records, images


def _scored_arrays(
    teacher: Teacher,
    shard: ShardInput,
    answered: list[AnsweredSample],
    tokenized: list[TokenizedSample],
    extractor: Extractor,
    owned: dict[str, int],
) -> tuple[list[dict[str, Array] | None], dict[str, dict[str, Array]]]:
    """What is stored of each sample, None where a number of it is not finite; and of each image in ``owned``."""
    arrays: list[dict[str, Array] | None] = [None] * len(tokenized)
    visual: dict[str, dict[str, Array]] = {}
    for batch, states in _states(teacher, shard, answered, tokenized, extractor):
        made = extractor.records([tokenized[i].sample_id for i in batch], states)
        for i, state, record in zip(batch, states, made, strict=True):
            image = shard.conversations[i].image
            first = image is not None and image.image_id in owned and image.image_id not in visual
            assert not first or state.visual is not None
            shown = extractor.image(state.visual) if first and state.visual is not None else {}
            if not (finite_states(state) and finite_arrays(record) and finite_arrays(shown)):
                continue
            arrays[i] = record
            if first and image is not None:
                visual[image.image_id] = shown
    return arrays, visual


def _refuse_overflow(config: CacheConfig, number: int, failed: int, read: int) -> None:
    """A few samples that overflow are left out; where most do, it is the teacher that does not fit its dtype."""
    if failed >= 8 and 2 * failed > read:
        raise TeacherError(
            f"shard {number:05d}: the logits or states of {failed} of its {read} samples are not finite, so "
            f"teacher.model={config.teacher.model} cannot be run in teacher.dtype={config.teacher.dtype}. Set "
            "teacher.dtype=bfloat16 or float32, and another output"
        )


Scored = tuple[list[TeacherRecord], list[tuple[str, dict[str, Array] | None]]]
"""A shard's records, and the lines of its images."""


def make_extractor(config: CacheConfig, storage: Storage, manifest: Manifest, teacher: Teacher) -> Extractor:
    shape, scales = manifest.shape, {}
    if storage.exists(SCALES):
        data, where = storage.read(SCALES, INDEX_BYTES), f"{storage.url}/{SCALES}"
        scales = scales_from_bytes(data, where, shape.hidden_size, config.signals.pca)
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
            ids, mask = tokenized[i].input_ids, tokenized[i].loss_mask
            positions = positions_of(ids, mask, description.image_token, description.shape.image_tokens)
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
    shard: ShardInput,
    place: int,
    answered: AnsweredSample,
    sample: TokenizedSample,
    arrays: dict[str, Array] | None,
) -> TeacherRecord:
    conversation, picture = shard.conversations[place], shard.images[place]
    assert arrays is not None, f"the teacher scored no states for {sample.sample_id}"
    ids = sample.input_ids.astype(manifest.shape.id_dtype)
    return TeacherRecord(
        sample_id=conversation.sample_id,
        image_id=conversation.image.image_id if conversation.image is not None else "",
        questions=conversation.questions,
        answers=tuple(answer_text(teacher.tokenizer, a) for a in answered.answers),
        original_answers=conversation.answers,
        source=answered.source,
        image_checksum=picture.image.checksum if picture is not None else "",
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
