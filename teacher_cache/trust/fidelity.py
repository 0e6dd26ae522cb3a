"""How close the stored signals are to the teacher's exact distribution: by answer type and by position.

Three numbers decide what a cache can teach: the mass its top-k captures; KL(exact ‖ top-k with the tail spread
evenly), the most a top-k loss can know; and KL(exact ‖ quantised states · head), what a loss on states loses.

With a live teacher the exact distribution is its own. Without one, the stored states stand for it where the cache has
them: the first two numbers are then theirs, and the third is measured over the kept ids and one tail bucket, which
bounds it from below. A cache without states reports captured mass and entropy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from teacher_cache.config import CacheConfig
from teacher_cache.data.logit_rule import LogitRule
from teacher_cache.data.rows import rows_among_text
from teacher_cache.store.codecs import decode, is_coarse, with_exact_head
from teacher_cache.store.invariants import log_softmax
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.records import Array, TeacherRecord
from teacher_cache.store.storage import Storage
from teacher_cache.teachers.teacher import Teacher
from teacher_cache.trust.rescore import drawn_records, scoring_again

Floats = npt.NDArray[np.float64]
CHUNK_ROWS = 256
SHORT, MIDDLE = 3, 20
"""Answers of up to so many tokens (end token counted) are short (yes, no, a word), middling (a sentence), else long."""
POSITIONS = (1, 8, 32, 128)


@dataclass(frozen=True)
class GroupFidelity:
    """Means over the rows of one group; ``low_mass``: the captured mass that 95 % of its rows exceed. KL in nats."""

    name: str
    rows: int
    entropy: float
    mass: float
    low_mass: float
    topk_kl: float | None
    states_kl: float | None
    states_kl_high: float | None
    """The 99th percentile."""
    first_id_kept: float | None

    def __str__(self) -> str:
        parts = [f"{self.rows:,} rows", f"entropy {self.entropy:.3f}"]
        parts.append(f"top-k mass {self.mass:.4f} (95 % of rows above {self.low_mass:.4f})")
        if self.topk_kl is not None:
            parts.append(f"KL top-k {self.topk_kl:.5f}")
        if self.states_kl is not None:
            parts.append(f"KL states {self.states_kl:.6f} (99 %: {self.states_kl_high:.5f})")
        if self.first_id_kept is not None:
            parts.append(f"same first id {100 * self.first_id_kept:.2f} %")
        return " · ".join(parts)


@dataclass(frozen=True)
class FidelityReport:
    """``reference`` says what counted as exact: ``teacher``, ``stored states`` or ``none``."""

    reference: str
    samples: int
    bytes_per_row: float
    groups: tuple[GroupFidelity, ...]

    def group(self, name: str) -> GroupFidelity:
        return next(g for g in self.groups if g.name == name)

    def as_rows(self) -> list[tuple[str, str]]:
        """(group, numbers) lines for a table."""
        exact = {
            "teacher": "the live teacher's distribution",
            "stored states": "that of the stored states; KL states: over kept ids and one tail bucket, a lower bound",
            "none": "unknown: no states in this cache, and no teacher was given",
        }
        facts = [("exact is", exact[self.reference]), ("samples", f"{self.samples:,}")]
        facts.append(("bytes a row", f"{self.bytes_per_row:,.1f}"))
        return facts + [(group.name, str(group)) for group in self.groups]


def cache_fidelity(
    storage: Storage,
    samples: int = 256,
    *,
    config: CacheConfig | None = None,
    teacher: Teacher | None = None,
    seed: int = 0,
) -> FidelityReport:
    """Measure ``samples`` samples of the cache at ``storage``, drawn by ``seed``.

    With ``config`` (and ``teacher``, else it is opened) the samples are scored again, and exact means exact.
    """
    with TeacherCache(storage) as cache:
        records = [r for r in drawn_records(cache, samples, seed) if r.rows]
        exact, head = _exact_states(config, teacher, records) if config is not None else (None, None)
        stored = [_row_states(cache, r) for r in records]
        if head is None and stored and stored[0] is not None:
            head = cache.head.astype(np.float32)
        logits = None if head is None else partial(_logits, head, cache.manifest.logit_rule)
        columns = list(cache.manifest.stats_names)
        coarse = is_coarse(cache.manifest.signals_config.codec, cache.scales_of("hidden"))
        lines = [
            _Lines.of(r, columns, logits, exact[i] if exact is not None else None, stored[i], coarse)
            for i, r in enumerate(records)
        ]
        bytes_per_row = cache.manifest.counts["bytes"] / max(cache.manifest.counts["rows"], 1)
    reference = "teacher" if exact is not None else "stored states" if head is not None else "none"
    return FidelityReport(reference, len(records), bytes_per_row, tuple(_groups(lines)))


@dataclass(frozen=True)
class _Lines:
    """One sample's rows: (R,) each; NaN where a number cannot be known."""

    entropy: Floats
    mass: Floats
    topk_kl: Floats
    states_kl: Floats
    same_first: Floats
    place: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls,
        record: TeacherRecord,
        columns: list[str],
        logits: Callable[[Array], Array] | None,
        exact: Array | None,
        stored: Array | None,
        coarse: bool,
    ) -> _Lines:
        arrays = record.arrays
        place, length = answer_places(arrays["loss_mask"])
        ids = arrays["topk_ids"].astype(np.int64) if "topk_ids" in arrays else None
        logprobs = arrays["topk_logprobs"].astype(np.float64) if ids is not None else None
        entropy = arrays["stats"][:, columns.index("entropy")].astype(np.float64)
        mass = np.exp(logprobs).sum(-1).clip(0, 1) if logprobs is not None else np.full(len(place), np.nan)
        unknown = np.full(len(place), np.nan)
        reference = exact if exact is not None else stored
        if reference is None or logits is None:
            return cls(entropy, mass, unknown, unknown, unknown, place, length)
        topk, states, same = unknown.copy(), unknown.copy(), unknown.copy()
        for start in range(0, len(place), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            p = log_softmax(logits(reference[part]))
            if ids is not None and logprobs is not None:
                topk[part] = kl_to_topk(p, ids[part], logprobs[part])
            if exact is not None and stored is not None:
                q = log_softmax(logits(stored[part]))
                if coarse and ids is not None and logprobs is not None:
                    q = _with_exact_head(q, ids[part], logprobs[part])
                states[part] = (np.exp(p) * (p - q)).sum(-1)
                same[part] = p.argmax(-1) == q.argmax(-1)
            elif exact is None and ids is not None and logprobs is not None:
                states[part] = bucketed_kl(logprobs[part], np.take_along_axis(p, ids[part], -1))
                same[part] = p.argmax(-1) == ids[part, 0]
        return cls(entropy, mass, topk, states, same, place, length)


def answer_places(loss_mask: Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(R,) each row's place in its answer, and that answer's length; an answer is a run of supervised tokens."""
    padded = np.concatenate([[0], loss_mask.astype(np.int8), [0]])
    starts, ends = (np.flatnonzero(np.diff(padded) == step) for step in (1, -1))
    if not len(starts):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    place = np.concatenate([np.arange(e - s) for s, e in zip(starts, ends, strict=True)])
    return place, np.repeat(ends - starts, ends - starts)


def _logits(head: Array, rule: LogitRule, states: Array) -> Array:
    return rule.apply(states @ head.T)


def kl_to_topk(exact: Floats, ids: npt.NDArray[np.int64], logprobs: Floats) -> Floats:
    """(R,) KL(exact ‖ stored head, tail mass spread evenly over the other ids). exact (R, V) log-probabilities."""
    vocabulary = exact.shape[1]
    tail = np.log(np.maximum(1 - np.exp(logprobs).sum(-1), 1e-12) / max(vocabulary - ids.shape[1], 1))
    other = np.repeat(tail[:, None], vocabulary, 1)
    np.put_along_axis(other, ids, logprobs, -1)
    return np.asarray((np.exp(exact) * (exact - other)).sum(-1))


def _with_exact_head(logprobs: Floats, ids: npt.NDArray[np.int64], kept: Floats) -> Floats:
    import torch

    whole, at, head = (torch.from_numpy(a) for a in (logprobs, ids, kept))
    return log_softmax(with_exact_head(whole, at, head, torch.zeros(len(whole), dtype=whole.dtype)).numpy())


def bucketed_kl(exact: Floats, other: Floats) -> Floats:
    """(R,) KL over the kept ids and one bucket for the rest; both (R, k) log-probabilities of the same ids."""
    p, q = np.exp(exact), np.exp(other)
    p_tail, q_tail = (np.maximum(1 - x.sum(-1), 1e-6) for x in (p, q))
    return np.asarray((p * (exact - other)).sum(-1) + p_tail * np.log(p_tail / q_tail))


def _groups(lines: Sequence[_Lines]) -> Iterator[GroupFidelity]:
    if not lines:
        return
    whole = {name: np.concatenate([getattr(line, name) for line in lines]) for name in _Lines.__dataclass_fields__}
    place, length = whole["place"], whole["length"]
    yield _group("all rows", whole, np.ones(len(place), np.bool_))
    kinds = {
        "first token of an answer": place == 0,
        "inner tokens": (place > 0) & (place < length - 1),
        "last token (end of answer)": place == length - 1,
        f"answers of up to {SHORT} tokens": length <= SHORT,
        f"answers of {SHORT + 1} to {MIDDLE} tokens": (length > SHORT) & (length <= MIDDLE),
        f"answers of more than {MIDDLE} tokens": length > MIDDLE,
    }
    edges = [0, *POSITIONS]
    for low, high in zip(edges, [*POSITIONS, None], strict=True):
        name = f"answer tokens {low + 1} to {high}" if high else f"answer tokens from {low + 1}"
        kinds[name] = (place >= low) & (place < high if high else True)
    for name, chosen in kinds.items():
        if chosen.any():
            yield _group(name, whole, chosen)


def _group(name: str, whole: dict[str, Any], chosen: npt.NDArray[np.bool_]) -> GroupFidelity:
    def mean(column: str) -> float | None:
        values = whole[column][chosen]
        return None if np.isnan(values).any() else float(values.mean())

    states = whole["states_kl"][chosen]
    mass = whole["mass"][chosen]
    return GroupFidelity(
        name=name,
        rows=int(chosen.sum()),
        entropy=float(whole["entropy"][chosen].mean()),
        mass=float(mass.mean()),
        low_mass=float(np.percentile(mass, 5)),
        topk_kl=mean("topk_kl"),
        states_kl=mean("states_kl"),
        states_kl_high=None if np.isnan(states).any() else float(np.percentile(states, 99)),
        first_id_kept=mean("same_first"),
    )


def _row_states(cache: TeacherCache, record: TeacherRecord) -> Array | None:
    """(R, d) the stored states of the rows, decoded; None where the cache has none."""
    signals = cache.manifest.signals_config
    if signals.hidden == "none":
        return None
    arrays = record.arrays
    states = decode(arrays["hidden"], arrays.get("hidden_scale"), signals.codec, cache.scales_of("hidden"))
    if signals.hidden == "rows":
        return states
    return states[rows_among_text(arrays["input_ids"], arrays["loss_mask"], cache.manifest.image_token)]


def _exact_states(
    config: CacheConfig, teacher: Teacher | None, records: list[TeacherRecord]
) -> tuple[list[Array], Array]:
    """(R, d) states of every record from the live teacher, and its output head (V, d)."""
    with scoring_again(config, teacher) as (live, score):
        return [s.rows.float().cpu().numpy() for s in score(records)], live.head().float().cpu().numpy()
