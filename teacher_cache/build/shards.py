"""Making shards: answer, score, write.

What a shard holds depends on its samples alone, so any process can make any shard; where its answers lie on disk
already, it is scored from those.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from teacher_cache.build.advantage import advantages
from teacher_cache.build.answers import AnsweredSample, answer_conversations, answer_text, read_answers, write_answers
from teacher_cache.build.context import Build, shard_size
from teacher_cache.build.first_shard import check_first
from teacher_cache.build.image_owners import image_lines, owned_images
from teacher_cache.build.inputs import ReadSample, ShardInput, unfit_sample
from teacher_cache.build.signals import NOT_FINITE, finite_arrays, finite_states, wanted_states
from teacher_cache.build.skips import check_share
from teacher_cache.config import CacheConfig
from teacher_cache.data.conversations import Skipped
from teacher_cache.data.image_files import OtherImageError
from teacher_cache.errors import ConversationError, TeacherCrashed, TeacherError
from teacher_cache.progress import note, stage
from teacher_cache.store.index import ImagePlace
from teacher_cache.store.records import Array, TeacherRecord
from teacher_cache.store.writer import answers_name, write_images, write_shard
from teacher_cache.teachers.teacher import SampleStates, Shown, pick

Answered = dict[str, AnsweredSample]
Whole = dict[str, Shown]
Arrays = dict[str, dict[str, Array]]
"""Of a shard's samples by sample_id, of images by image_id."""
Scored = tuple[list[TeacherRecord], list[tuple[str, dict[str, Array] | None]]]
"""A shard's records, and the lines of its images."""


def build_shards(build: Build, numbers: Iterable[int], *, answers_only: bool = False) -> None:
    """Make the shards ``numbers``; writing runs behind the teacher, one shard back, and its errors surface here."""
    numbers, tally = list(numbers), build.tally
    if build.teacher.two_engines and not answers_only:  # a change of engines costs minutes: one for all shards
        bare = [n for n in numbers if not build.storage.exists(answers_name(n))]
        build_shards(build, bare, answers_only=True)
    total = sum(shard_size(build.manifest, n) for n in numbers)
    with (
        ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as writer,
        stage("answering" if answers_only else "caching", total, "samples", build.style) as progress,
    ):
        pending: Future[None] | None = None
        unproved = True
        for number in numbers:
            try:
                shard, scored = _make(build, number, answers_only)
            except TeacherCrashed as error:  # once: its answers are on disk by now, or will not come
                note(f"{error} Starting it again for shard {number:05d}", build.style)
                shard, scored = _make(build, number, answers_only)
            for sample in shard.skipped:
                tally.skips.add(sample)
            check_share(build.config, len(build.samples), tally.skips)
            if scored is not None:
                if pending is not None:
                    pending.result()
                pending = writer.submit(_commit, build, number, scored, shard.skipped, unproved)
                unproved = False
            busy = tally.answering + tally.scoring
            share = f"{100 * tally.answering / busy:.0f} %" if busy else "-"
            progress.advance(shard_size(build.manifest, number), answering=share)
        if pending is not None:
            pending.result()


def _make(build: Build, number: int, answers_only: bool) -> tuple[ShardInput, Scored | None]:
    shard = ShardInput.load(build, build.chosen(number))
    answered = answer_shard(build, number, shard)
    return shard, None if answers_only else score_shard(build, number, shard, answered)


def answer_shard(build: Build, number: int, shard: ShardInput) -> Answered:
    """The shard's answers: those already on disk, and new ones, which are written before anything is scored.

    Samples that could not be read when the file was made, and can be now, are answered in addition.
    """
    begin, name = time.monotonic(), answers_name(number)
    stored = read_answers(build.storage, build.manifest, number)
    answered: Answered = stored or {}
    for sample in shard.samples:
        if sample.sample_id in answered:
            _check_same_image(answered[sample.sample_id], sample, f"{build.storage.url}/{name}")
    absent = [sample for sample in shard.samples if sample.sample_id not in answered]
    if absent or stored is None:
        made = answer_conversations(build, absent)
        answered |= {sample.sample_id: sample for sample in made}
        ordered = [answered[sample.sample_id] for sample in shard.samples]
        write_answers(build.storage, build.manifest, number, ordered, build.teacher.tokenizer)
        build.tally.answering += time.monotonic() - begin
        build.tally.one_pass |= any(sample.hidden is not None for sample in made)
    return answered


def _check_same_image(answered: AnsweredSample, sample: ReadSample, where: str) -> None:
    if answered.image_checksum not in ("", sample.image_checksum):
        raise OtherImageError(
            f"{where}: sample {answered.sample_id} was answered about other bytes of image {sample.image_id} "
            f"(checksum {answered.image_checksum}) than lie there now ({sample.image_checksum}). Give the "
            "image folder the answers were made with, or delete that file: its shard is answered anew"
        )


def score_shard(build: Build, number: int, shard: ShardInput, answered: Answered) -> Scored:
    """Records of the shard in input order, and the lines of the images that this shard owns."""
    begin, read, whole = time.monotonic(), len(shard.samples), Whole()

    def unfit(sample: ReadSample) -> str:
        answers = answered[sample.sample_id]
        if answers.overflowed:
            return NOT_FINITE
        ask = len(answers.answers) < len(sample.conversation.questions)
        try:
            whole[sample.sample_id] = shown = sample.shown(answers.answers, ask)
        except ConversationError as error:
            return str(error)
        return f"too long before its last question: {build.limit[1]}" if ask else unfit_sample(build, shown)

    shard.skip(unfit)
    arrays, visual = _scored_arrays(build, number, shard, answered, whole)
    if build.config.signals.advantage != "none":
        arrays = _with_advantages(build, shard, whole, arrays)
    shard.skip(lambda sample: "" if sample.sample_id in arrays else NOT_FINITE)
    _refuse_overflow(build.config, number, sum(s.reason == NOT_FINITE for s in shard.skipped), read)
    records = [_record(build, s, answered[s.sample_id], whole[s.sample_id], arrays[s.sample_id]) for s in shard.samples]
    images = image_lines(build, number, shard, visual)
    build.tally.scoring += time.monotonic() - begin
    return records, images


def _scored_arrays(
    build: Build, number: int, shard: ShardInput, answered: Answered, whole: Whole
) -> tuple[Arrays, Arrays]:
    """What is stored of each sample, and of each image that this shard owns; nothing where a number is not finite."""
    arrays: Arrays = {}
    visual: Arrays = {}
    owned, extractor = owned_images(build, number), build.extractor
    for batch, states in _states(build, shard, answered, whole):
        made = extractor.records([sample.sample_id for sample in batch], states)
        if build.config.signals.advantage != "none":
            logprobs = extractor.answer_logprobs([whole[sample.sample_id].sample for sample in batch], states)
            made = [{**record, "advantage": seen} for record, seen in zip(made, logprobs, strict=True)]
        for sample, state, record in zip(batch, states, made, strict=True):
            first = sample.image_id in owned and sample.image_id not in visual
            assert not first or state.visual is not None
            shown = extractor.image(state.visual) if first and state.visual is not None else {}
            if not (finite_states(state) and finite_arrays(record) and finite_arrays(shown)):
                continue
            arrays[sample.sample_id] = record
            if first:
                visual[sample.image_id] = shown
    if build.config.signals.visual == "gram" and len({len(shown["gram_hidden"]) for shown in visual.values()}) > 1:
        raise TeacherError(
            f"signals.visual=gram: images of shard {number:05d} take several numbers of positions in teacher.model="
            f"{build.config.teacher.model}, and Grams are compared entry by entry. Set signals.visual=states or none"
        )
    return arrays, visual


def _with_advantages(build: Build, shard: ShardInput, whole: Whole, arrays: Arrays) -> Arrays:
    """``arrays``, whose ``advantage`` is log p(answer token) with its image so far, less that without."""
    samples = [sample for sample in shard.samples if sample.sample_id in arrays]
    seen = [arrays[sample.sample_id]["advantage"] for sample in samples]
    found = advantages(build, samples, [whole[sample.sample_id] for sample in samples], seen)
    return {
        sample.sample_id: {**arrays[sample.sample_id], "advantage": advantage}
        for sample, advantage in zip(samples, found, strict=True)
        if advantage is not None
    }


def _refuse_overflow(config: CacheConfig, number: int, failed: int, read: int) -> None:
    """A few samples that overflow are left out; where most do, it is the teacher that does not fit its dtype."""
    if failed >= 8 and 2 * failed > read:
        raise TeacherError(
            f"shard {number:05d}: the logits or states of {failed} of its {read} samples are not finite, so "
            f"teacher.model={config.teacher.model} cannot be run in teacher.dtype={config.teacher.dtype}. Set "
            "teacher.dtype=bfloat16 or float32, and another output"
        )


def _states(
    build: Build, shard: ShardInput, answered: Answered, shown: Whole
) -> Iterator[tuple[list[ReadSample], list[SampleStates]]]:
    """States of every sample: those captured while answering, the rest from a scoring pass."""
    wanted = wanted_states(build.config.signals)
    captured = [s for s in shard.samples if answered[s.sample_id].hidden is not None]
    rest = [s for s in shard.samples if answered[s.sample_id].hidden is None]
    for begin in range(0, len(captured), _CAPTURED_BATCH):
        batch, states = captured[begin : begin + _CAPTURED_BATCH], []
        for sample in batch:
            answers, whole = answered[sample.sample_id], shown[sample.sample_id].sample
            hidden, answers.hidden = answers.hidden, None  # freed as soon as it is used
            assert hidden is not None
            positions = whole.positions(build.teacher.description.image_token)
            states.append(pick(positions, wanted, hidden.to(build.extractor.head.device)))
        yield batch, states
    requests = [shown[s.sample_id] for s in rest]
    for places, scored in build.teacher.score(requests, wanted) if requests else ():
        yield [rest[place] for place in places], scored


_CAPTURED_BATCH = 32


def _record(
    build: Build, sample: ReadSample, answered: AnsweredSample, shown: Shown, arrays: dict[str, Array]
) -> TeacherRecord:
    whole, images = shown.sample, [picture.image for picture in sample.pictures]
    ids, runs = whole.input_ids.astype(build.manifest.shape.id_dtype), whole.runs.astype(np.uint32)
    return TeacherRecord(
        sample_id=sample.sample_id,
        image_ids=tuple(image.image_id for image in images),
        questions=sample.conversation.questions,
        system=sample.conversation.system,
        answers=tuple(answer_text(build.teacher.tokenizer, a) for a in answered.answers),
        original_answers=sample.conversation.answers,
        source=answered.source,
        image_checksums=tuple(image.checksum for image in images),
        arrays={"input_ids": ids, "loss_mask": whole.loss_mask, "runs": runs, **arrays},
    )


def _commit(build: Build, number: int, scored: Scored, skipped: list[Skipped], unproved: bool) -> None:
    """Images first: a committed shard never points at image lines that are not there yet. The first one is proved."""
    records, images = scored
    places = [build.image_places.get(next(iter(r.image_ids), ""), ImagePlace()) for r in records]
    if build.manifest.image_arrays:
        write_images(build.storage, build.manifest, number, images)
    write_shard(build.storage, build.manifest, number, records, places, skipped)
    if unproved:
        check_first(build, number)
