"""The numbers of a cache at a glance: lengths of all samples, and signals measured on a bounded number of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from teacher_cache.data.rows import turns
from teacher_cache.pages.charts import Series, histogram, key, line_chart
from teacher_cache.pages.page import Card
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.records import Array
from teacher_cache.store.storage import Storage
from teacher_cache.store.writer import skipped_lines

MAX_SHARDS = 16
MAX_SAMPLES_A_SHARD = 64
MAX_SKIPPED_LINES = 30
POSITION_EDGES = (0, 1, 2, 3, 4, 8, 16, 32, 64, 128, 1 << 30)
TYPES = ("yes or no", "number", "one to three words", "a sentence (up to 20 words)", "longer")

Texts = dict[str, list[str]]


@dataclass
class Measured:
    """What was found on ``samples`` samples of ``shards`` shards.

    mass: (rows, k) probability within the first 1 … k ids · entropy: nats of every row, by place in its answer and by
    type of the answer · changed: regenerated answers that are not the original's text.
    """

    samples: int = 0
    shards: int = 0
    rows: int = 0
    changed: int = 0
    regenerated: int = 0
    mass: list[Array] = field(default_factory=list)
    by_position: dict[int, list[Array]] = field(default_factory=lambda: defaultdict(list))
    by_type: dict[str, list[Array]] = field(default_factory=lambda: defaultdict(list))

    def words(self, samples: int, shards: int) -> str:
        """What the numbers stand for, out of ``samples`` and ``shards``."""
        if self.samples == samples:
            return f"Measured on all {samples:,} samples, {self.rows:,} answer tokens."
        return (
            f"Measured on {self.samples:,} of {samples:,} samples ({self.rows:,} answer tokens, from {self.shards} of "
            f"{shards:,} shards), drawn at random."
        )


def measure(cache: TeacherCache, seed: int) -> Measured:
    """Signals of at most ``MAX_SHARDS`` × ``MAX_SAMPLES_A_SHARD`` samples, drawn with ``seed``."""
    measured = Measured()
    random = np.random.default_rng(seed)
    starts = cache.shard_starts
    filled = np.flatnonzero(np.diff(starts))
    for shard in sorted(random.choice(filled, min(MAX_SHARDS, len(filled)), replace=False).tolist()):
        first, last = int(starts[shard]), int(starts[shard + 1])
        lines = np.sort(random.choice(last - first, min(MAX_SAMPLES_A_SHARD, last - first), replace=False))
        _add(measured, cache, shard, first, lines)
        measured.shards += 1
    return measured


def sample_texts(cache: TeacherCache, shard: int, lines: Iterable[int]) -> list[Texts]:
    """questions, answers, original_answers (lists) and source (a list of one) of samples of one shard."""
    names = ["questions", "answers", "original_answers", "source"]
    table = cache.shard_texts(shard).take(list(lines)).to_pylist()
    return [{n: [line[n]] if isinstance(line[n], str) else line[n] for n in names} for line in table]


def answer_type(answer: str) -> str:
    """The kind of an answer by its words, one of ``TYPES``."""
    words = answer.strip().rstrip(".").split()
    if len(words) == 1 and words[0].lower() in ("yes", "no"):
        return TYPES[0]
    if len(words) == 1 and words[0].replace(",", "").replace(".", "", 1).isdigit():
        return TYPES[1]
    return TYPES[2] if len(words) <= 3 else TYPES[3] if len(words) <= 20 else TYPES[4]


def overview(cache: TeacherCache, measured: Measured) -> Iterator[Card]:
    """The cards of the overview."""
    note = measured.words(len(cache), len(cache.shard_starts) - 1)
    yield _lengths(cache.counts("row"), "Answer tokens a sample")
    yield _lengths(cache.counts("token"), "Tokens a conversation", "One for an image, whatever it takes in the model.")
    if measured.mass:
        yield _mass(np.concatenate(measured.mass), note)
    places = {_place(p): measured.by_position[p] for p in sorted(measured.by_position)}
    types = {t: measured.by_type[t] for t in TYPES if t in measured.by_type}
    for title, groups in (("place in the answer", places), ("type of answer", types)):
        if groups:
            yield Card(f"Entropy by {title} (nats)", note=f"{note} In brackets: tokens.", bars=_entropy_bars(groups))


def skipped_samples(storage: Storage) -> list[tuple[str, str]]:
    """(sample_id, reason) of those that are not in the cache."""
    return [(line["sample_id"], line["reason"]) for line in skipped_lines(storage)]


def _add(measured: Measured, cache: TeacherCache, shard: int, first: int, lines: npt.NDArray[np.int64]) -> None:
    top = ["topk_logprobs"] if cache.manifest.signals["top_k"] else []
    batch = cache.read(first + lines, ["loss_mask", "stats", *top])
    entropy = batch.arrays["stats"][:, cache.manifest.stats_names.index("entropy")]
    if top:
        measured.mass.append(np.cumsum(np.exp(batch.arrays["topk_logprobs"].astype(np.float64)), -1))
    tokens, rows = np.cumsum(batch.counts["token"]), np.cumsum(batch.counts["row"])
    for i, texts in enumerate(sample_texts(cache, shard, lines)):
        mask = batch.arrays["loss_mask"][tokens[i] - batch.counts["token"][i] : tokens[i]]
        _add_sample(measured, mask, entropy[rows[i] - batch.counts["row"][i] : rows[i]], texts)
    measured.samples += len(lines)
    measured.rows += len(entropy)


def _add_sample(measured: Measured, mask: Array, entropy: Array, texts: Texts) -> None:
    parts = turns(mask)
    for part, answer in zip(parts, texts["answers"][-len(parts) :], strict=True):  # the last alone, in some caches
        rows = entropy[part]
        measured.by_type[answer_type(answer)].append(rows)
        places = np.searchsorted(POSITION_EDGES, np.arange(len(rows)), side="right") - 1
        for place in np.unique(places):
            measured.by_position[int(place)].append(rows[places == place])
    if texts["source"] != ["original"]:
        pairs = list(zip(texts["answers"], texts["original_answers"], strict=True))
        measured.regenerated += len(pairs)
        measured.changed += sum(a.strip() != b.strip() for a, b in pairs)


def _lengths(counts: npt.NDArray[np.int64], title: str, note: str = "") -> Card:
    """All samples; the longest hundredth is gathered in the last bar, or one outlier would flatten the rest."""
    limit = int(np.quantile(counts, 0.99)) + 1
    step = max(1, -(-(limit + 1 - int(counts.min())) // 32))
    edges = np.arange(int(counts.min()), limit + 1 + step, step)
    found, _ = np.histogram(np.minimum(counts, edges[-1] - 1), edges)
    facts = f"Median {np.median(counts):,.0f}, mean {counts.mean():,.1f}, longest {counts.max():,}. All samples. {note}"
    return Card(title, histogram(edges.tolist(), found.tolist(), "tokens", "samples"), facts)


def _mass(mass: Array, note: str) -> Card:
    ks = np.arange(1, mass.shape[1] + 1)
    low = min(0.9, float(np.quantile(mass[:, 0], 0.05)))
    curves = {"mean": mass.mean(0), "one token in twenty is below": np.quantile(mass, 0.05, axis=0)}
    lines = [Series(name, list(zip(ks, c, strict=True)), style) for style, (name, c) in enumerate(curves.items())]
    chart = line_chart(lines, "ids kept", "probability", log_x=True, y_range=(low, 1.0))
    mean, least = (100 * curve[-1] for curve in curves.values())
    words = f"With all {mass.shape[1]} ids: {mean:.2f} % on average, {least:.2f} % or less for one token in twenty."
    return Card("Probability within the stored top-k", key(list(curves)) + chart, note, words)


def _entropy_bars(groups: dict[str, list[Array]]) -> list[tuple[str, float, str]]:
    rows = {label: np.concatenate(parts) for label, parts in groups.items()}
    longest = max(1e-9, *(float(r.mean()) for r in rows.values()))
    return [(f"{label} ({len(r):,})", float(r.mean()) / longest, f"{r.mean():.3f}") for label, r in rows.items()]


def _place(place: int) -> str:
    first, last = POSITION_EDGES[place] + 1, POSITION_EDGES[place + 1]
    if first == last:
        return f"token {first}"
    return f"tokens {first}–{last}" if place + 2 < len(POSITION_EDGES) else f"tokens from {first} on"
