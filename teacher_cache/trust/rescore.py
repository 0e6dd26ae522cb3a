"""Samples of a cache scored again by the teacher: does it still say what is stored?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from teacher_cache.config import CacheConfig
from teacher_cache.data.conversations import Conversation
from teacher_cache.data.images import open_picture
from teacher_cache.data.rows import TokenizedSample, turns
from teacher_cache.data.sample_reader import read_conversations
from teacher_cache.errors import CacheError
from teacher_cache.models.open_chat import open_chat
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.records import TeacherRecord
from teacher_cache.store.storage import Storage
from teacher_cache.teachers.teacher import SampleStates, Shown, Teacher, Wanted


@dataclass(frozen=True)
class Difference:
    """One sample: mean |Δ log-probability| over ids kept both times (nats), and rows whose first id differs."""

    sample_id: str
    rows: int
    logprob: float
    first_id: int


@dataclass(frozen=True)
class RescoreReport:
    """How far the teacher of today is from the stored one; samples in order of their difference, largest first."""

    differences: tuple[Difference, ...]
    tolerance: float

    @property
    def ok(self) -> bool:
        return all(d.logprob <= self.tolerance for d in self.differences)

    def __str__(self) -> str:
        rows = max(sum(d.rows for d in self.differences), 1)
        mean = sum(d.logprob * d.rows for d in self.differences) / rows
        first = sum(d.first_id for d in self.differences)
        lines = [
            f"{len(self.differences)} samples scored again: log-probabilities {mean:.4f} nats apart on average, "
            f"{first} of {rows} rows with another most likely id"
        ]
        apart = [d for d in self.differences if d.logprob > self.tolerance]
        lines += [f"sample {d.sample_id}: {d.logprob:.3f} nats apart (allowed {self.tolerance})" for d in apart[:10]]
        return "\n".join(lines)


def rescore_cache(
    config: CacheConfig, samples: int, *, teacher: Teacher | None = None, tolerance: float = 0.1, seed: int = 0
) -> RescoreReport:
    """Let the teacher of ``config`` score ``samples`` samples of its cache again.

    Raises ``CacheError`` when a sample of the cache is not in the data any more, or the cache has no top-k.
    """
    with TeacherCache(Storage(config.output)) as cache, scoring_again(config, teacher) as (live, score):
        if not cache.manifest.signals_config.top_k:
            raise CacheError(
                f"{config.output}: no top-k to compare with (signals.top_k is 0). Compare the states in its place: "
                "teacher-cache fidelity CACHE --config FILE"
            )
        records = drawn_records(cache, samples, seed)
        found = [_difference(r, s, live) for r, s in zip(records, score(records), strict=True)]
    return RescoreReport(tuple(sorted(found, key=lambda d: -d.logprob)), tolerance)


def drawn_records(cache: TeacherCache, samples: int, seed: int) -> list[TeacherRecord]:
    """``samples`` of the cache's records, drawn by ``seed``, in the cache's order."""
    return [cache[int(i)] for i in np.sort(np.random.default_rng(seed).permutation(len(cache))[:samples])]


Score = Callable[[Sequence[TeacherRecord]], list[SampleStates]]


@contextlib.contextmanager
def scoring_again(config: CacheConfig, teacher: Teacher | None) -> Iterator[tuple[Teacher, Score]]:
    """The teacher of ``config``, opened and closed here unless it is given, and what gives its states for the stored
    token ids of records, in order.

    Raises ``CacheError`` for a sample that is not in the data any more.
    """
    from teacher_cache.build.build import open_teacher

    chat = teacher.chat if teacher is not None else open_chat(config.teacher)
    data = read_conversations(config.data, by_turn=not chat.one_sequence)
    live = teacher if teacher is not None else open_teacher(config, data)
    by_id = {s.sample_id: s for s in data if isinstance(s, Conversation)}
    try:
        yield live, lambda records: _score_again(config, live, records, by_id)
    finally:
        if teacher is None:
            live.close()


def _score_again(
    config: CacheConfig, teacher: Teacher, records: Sequence[TeacherRecord], by_id: dict[str, Conversation]
) -> list[SampleStates]:
    requests = []
    for record in records:
        conversation = by_id.get(record.sample_id)
        if conversation is None:
            raise CacheError(
                f"{config.output}: sample {record.sample_id} is not in data.path; give the data it came from"
            )
        images = tuple(open_picture(image, config.data.image_folder) for image in conversation.images)
        ids, mask = record.arrays["input_ids"].astype(np.int64), record.arrays["loss_mask"]
        sample = TokenizedSample(record.sample_id, ids, mask, record.arrays["runs"].astype(np.int64))
        answers = tuple(tuple(ids[mask][part].tolist()) for part in turns(mask))
        if not teacher.chat.one_sequence:  # the earlier answers stand there in words
            answers = (*map(teacher.chat.original, record.answers[:-1]), *answers[-1:])
        requests.append(Shown(conversation, answers, images, sample))
    states: dict[int, SampleStates] = {}
    for places, batch in teacher.score(requests, Wanted()):
        states.update(zip(places, batch, strict=True))
    return [states[i] for i in range(len(requests))]


def _difference(record: TeacherRecord, states: SampleStates, teacher: Teacher) -> Difference:
    from teacher_cache.build.signals import row_signals

    ids = record.arrays["topk_ids"].astype(np.int64)
    stored = record.arrays["topk_logprobs"].astype(np.float64)
    logits = teacher.description.logit_rule.apply((states.rows @ teacher.head().T).float())
    anew = row_signals(logits, ids.shape[1], (1.0,))
    given = np.take_along_axis(logits.double().log_softmax(-1).cpu().numpy(), ids, -1)
    first = int((anew["topk_ids"][:, :1].cpu().numpy() != ids[:, :1]).sum())
    weights = np.exp(stored)
    apart = float(np.average(np.abs(given - stored), weights=weights)) if len(ids) else 0.0
    return Difference(record.sample_id, len(ids), apart, first)
