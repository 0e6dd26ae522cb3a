"""What must hold inside a shard whatever the teacher said: counts, finite numbers, order, and the row rule.

The row rule shows in three places: as many rows as supervised tokens; greedy answers are the most likely ids of their
rows; and the stored states give the stored log-probabilities. Rows that are one position late fail the last two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from teacher_cache.data.rows import expanded_length, rows_among_text, text_positions, turns
from teacher_cache.store.checksums import BLOCK_BYTES
from teacher_cache.store.codecs import ChannelScales, decode
from teacher_cache.store.folder import ShardFolder
from teacher_cache.store.index import run_fault
from teacher_cache.store.manifest import Manifest
from teacher_cache.store.records import Array, ArraySpec

Fault = tuple[str, str, str]
"""(what, array, sample_id)"""

CHUNK_LINES, CHUNK_BYTES = 4096, 64 << 20
COMPARED_ROWS = 64
TOLERANCE = {"float32": 0.15, "float16": 0.15, "bfloat16": 0.25, "int8": 0.35, "int4": 2.0}
"""Root mean square difference, in nats, of stored log-probabilities and those that the stored states give: a
bfloat16 teacher's own rounding and the codec's. A row one position off differs by several nats."""
GREEDY_SHARE = 0.8
"""Least share of a shard's greedy answer tokens that must be the most likely id of their row; ties and other
arithmetic when scoring cost a few in a hundred."""


def shard_faults(
    folder: ShardFolder, manifest: Manifest, head: Any, answers: dict[str, list[int]] | None
) -> Iterator[Fault]:
    """Every broken invariant of one shard whose checksums fit.

    ``head``: (head, scales), where the cache has them · ``answers``: token ids by sample, where they are stored.
    """
    yield from _listed(folder, manifest)
    impossible = [fault for spec in manifest.arrays for fault in _values(folder, spec, manifest)]
    if impossible:  # what follows reckons with these numbers
        yield from impossible
        return
    yield from _runs(folder, manifest)
    yield from _masks(folder, manifest)
    yield from _image_places(folder, manifest)
    if answers is not None:
        yield from _answer_tokens(folder, answers, manifest.one_sequence)
    if manifest.generation["temperature"] == 0 and manifest.signals["top_k"]:
        yield from _greedy(folder)
    stored = manifest.signals["hidden"] != "none" and manifest.signals["top_k"] and not manifest.signals["pca"]
    if head is not None and stored:
        yield from _states_give_logprobs(folder, manifest, *head)


def sample_of_block(folder: ShardFolder, file: str, block: int) -> str:
    """The first sample with a line in block ``block`` of an array's data file; empty where it is no such file."""
    name, _, rest = file.partition("/")
    if not rest.startswith("c/") or not hasattr(folder, "samples"):
        return ""
    try:
        owner = folder.owner(name, block * BLOCK_BYTES // max(folder.line_bytes(name), 1))
    except (OSError, ValueError, KeyError):
        return ""
    ids = folder.samples.sample_ids
    return str(ids[min(owner, len(ids) - 1)].as_py()) if len(ids) else ""


def _listed(folder: ShardFolder, manifest: Manifest) -> Iterator[Fault]:
    ids = folder.samples.sample_ids
    if len(set(ids.to_pylist())) != len(ids):
        yield "a sample_id comes twice", "index.parquet", ""
    planned, number = manifest.layout["shard_samples"], folder.extra["shard"]
    expected = min(planned, manifest.planned_samples - number * planned)
    if len(ids) + len(folder.extra["skipped"]) != expected:
        yield f"cached + skipped samples are not the {expected} of this shard", "index.parquet", ""


def _values(folder: ShardFolder, spec: ArraySpec, manifest: Manifest) -> Iterator[Fault]:
    """The first line of an array that holds what it cannot hold."""
    total = folder.total(spec.name)
    step = _lines_at_once(spec)
    for start in range(0, total, step):
        lines = folder.lines(spec.name, start, min(step, total - start))
        bad, what = _bad_lines(spec, lines, manifest)
        if bad.any():
            owner = folder.owner(spec.name, start + int(np.argmax(bad)))
            yield what, spec.name, str(folder.samples.sample_ids[owner].as_py())
            return


def image_faults(folder: ShardFolder, manifest: Manifest) -> Iterator[Fault]:
    """What an images folder holds and cannot hold."""
    for spec in manifest.image_arrays:
        step = _lines_at_once(spec)
        total = folder.total(spec.name)
        for start in range(0, total, step):
            lines = folder.lines(spec.name, start, min(step, total - start))
            bad, what = _bad_lines(spec, lines, manifest)
            if bad.any():
                image = folder.owner(spec.name, start + int(np.argmax(bad)))
                yield f"image {image}: {what}", spec.name, ""
                break


def _lines_at_once(spec: ArraySpec) -> int:
    return max(1, min(CHUNK_LINES, CHUNK_BYTES // max(spec.line_bytes, 1)))


def _bad_lines(spec: ArraySpec, lines: Array, manifest: Manifest) -> tuple[npt.NDArray[np.bool_], str]:
    """(lines,) which of them are impossible, and why."""
    flat = lines.reshape(len(lines), math.prod(lines.shape[1:]))
    bad, what = np.zeros(len(lines), np.bool_), ""
    name = spec.name.removeprefix("visual_")
    if name in ("input_ids", "topk_ids", "sampled_ids"):
        bad, what = np.asarray((flat >= manifest.shape.vocabulary).any(-1)), "an id outside the vocabulary"
    elif spec.name == "sampled_counts":
        draws = manifest.signals["sampled"]
        bad, what = np.asarray(flat.astype(np.int64).sum(-1) != draws), f"counts do not add up to {draws} draws"
    elif name.startswith(("hidden", "visual")) and spec.dtype == "uint16":  # bfloat16: all exponent bits set
        bad, what = np.asarray(((flat & 0x7F80) == 0x7F80).any(-1)), "a number that is not finite"
    elif np.issubdtype(lines.dtype, np.floating):
        bad, what = np.asarray(~np.isfinite(flat).all(-1)), "a number that is not finite"
    if bad.any():
        return bad, what
    axes = tuple(range(1, lines.ndim))
    if name == "topk_logprobs":
        values = lines.astype(np.float32)
        unsorted = (np.diff(values, axis=-1) > 0).any(axes)
        too_much = (np.exp(values).sum(-1) > 1.01).any(axes[:-1])
        return np.asarray(unsorted | too_much), "log-probabilities not in descending order, or of more than mass 1"
    if spec.name.endswith("_scale") and spec.name != "gram_scale":
        return np.asarray((flat <= 0).any(-1)), "a scale that is not above 0"
    if name == "stats":
        entropy = lines[..., -1].reshape(len(lines), -1)
        most = math.log(manifest.shape.vocabulary) + 1e-3
        return np.asarray(((entropy < -1e-3) | (entropy > most)).any(-1)), "an impossible entropy"
    return bad, what


def _per_sample(folder: ShardFolder, *names: str) -> Iterator[tuple[Any, ...]]:
    """sample_id, and its lines of each array."""
    for line, sample in enumerate(folder.samples.sample_ids.to_pylist()):
        yield sample, *(folder.of(name, line) for name in names)


def _runs(folder: ShardFolder, manifest: Manifest) -> Iterator[Fault]:
    """A run for each placeholder, of an image that the sample has; no longer together than the teacher reads."""
    samples = folder.samples
    runs = folder.lines("runs", 0, folder.total("runs"))
    if fault := run_fault(runs, samples.counts["run"], samples.images, samples.image_positions):
        yield fault[1], "runs", str(samples.sample_ids[fault[0]].as_py())
        return
    read = expanded_length(samples.counts["token"], samples.counts["run"], samples.image_positions)
    most = manifest.teacher["max_length"]
    if len(over := np.flatnonzero(read > most)):
        sample = str(samples.sample_ids[int(over[0])].as_py())
        yield f"{read[over[0]]:,} tokens with its images, more than {most:,}", "runs", sample
    for line, (sample, lengths) in enumerate(_per_sample(folder, "runs")):
        if len(np.unique(lengths[:, 1])) != samples.images[line]:
            yield f"its runs show {len(np.unique(lengths[:, 1]))} of {samples.images[line]} images", "runs", sample
            return


def _masks(folder: ShardFolder, manifest: Manifest) -> Iterator[Fault]:
    """As many rows as supervised tokens, as many positions as text tokens that predict one, an answer a turn."""
    answers = [len(texts) for texts in folder.texts["answers"].to_pylist()]
    counts = folder.samples.counts
    for line, (sample, tokens, mask) in enumerate(_per_sample(folder, "input_ids", "loss_mask")):
        rows, runs = counts["row"][line], counts["run"][line]
        supervised = int(np.count_nonzero(mask))
        if supervised != rows:
            yield f"{supervised} supervised tokens, but {rows} rows", "loss_mask", sample
            return
        placeholders = tokens == manifest.image_token
        if np.count_nonzero(placeholders) != runs or text_positions(len(tokens), runs) != counts["position"][line]:
            what = f"{np.count_nonzero(placeholders)} placeholders among {len(tokens)} tokens"
            yield f"{what} do not make {runs} runs and {counts['position'][line]} positions", "input_ids", sample
            return
        if len(mask) and (mask[0] or (mask & placeholders).any()):
            yield "the first token or an image is supervised", "loss_mask", sample
            return
        if len(turns(mask)) > answers[line]:
            yield f"{len(turns(mask))} answers in its tokens, {answers[line]} in its texts", "loss_mask", sample
            return


def _image_places(folder: ShardFolder, manifest: Manifest) -> Iterator[Fault]:
    """A sample's image stands in this shard or in an earlier one; a sample without one points nowhere. What is kept
    once an image is the same for all its samples only behind the same ids."""
    before: dict[str, bytes] = {}
    for line, (sample, tokens) in enumerate(_per_sample(folder, "input_ids")):
        images = folder.samples.image_ids[line].as_py()
        wanted = bool(images) and bool(manifest.image_arrays)
        shard, row = folder.samples.places[line].tolist()
        if (0 <= shard <= folder.extra["shard"] and row >= 0) != wanted:
            yield f"its image's place is shard {shard}, line {row}", "index.parquet", sample
            return
        if not wanted:
            continue
        ids = tokens[: int(np.argmax(tokens == manifest.image_token))].tobytes()
        if len(images) > 1 or before.setdefault(images[0], ids) != ids:
            yield "visual signals of an image that is not alone, or not always behind the same ids", "input_ids", sample
            return


def _answer_tokens(folder: ShardFolder, wanted: dict[str, list[int]], all_of_them: bool) -> Iterator[Fault]:
    """The supervised tokens are the answers' tokens, in order, or those of the last answer, by which they end."""
    for sample, tokens, mask in _per_sample(folder, "input_ids", "loss_mask"):
        ids, given = wanted.get(sample, [-1]), tokens[mask].tolist()
        if given != (ids if all_of_them else ids[len(ids) - len(given) :]):
            yield "the supervised tokens are not those of its answers", "input_ids", sample
            return


def _greedy(folder: ShardFolder) -> Iterator[Fault]:
    """Of greedy answers, the most likely id of row r is answer token r."""
    sources = folder.texts["source"].to_pylist()
    same = seen = 0
    worst = (1.0, "")
    for source, (sample, tokens, mask, top) in zip(
        sources, _per_sample(folder, "input_ids", "loss_mask", "topk_ids"), strict=True
    ):
        if source == "teacher" and len(top):
            equal = tokens[mask] == top[:, 0]
            same, seen = same + int(equal.sum()), seen + len(equal)
            worst = min(worst, (float(equal.mean()), sample))
    if seen and same < GREEDY_SHARE * seen:
        what = f"only {same} of {seen} greedy answer tokens are the most likely id of their row: rows are misplaced"
        yield what, "topk_ids", worst[1]


def log_softmax(logits: Array) -> npt.NDArray[np.float64]:
    logits = logits.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    return np.asarray(logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True)))


def _states_give_logprobs(folder: ShardFolder, manifest: Manifest, head: Array, scales: Any) -> Iterator[Fault]:
    """``hidden @ head.T`` of some samples gives their top-k log-probabilities."""
    compared = 0
    allowed = TOLERANCE[manifest.signals["codec"]]
    for line, (sample, ids, stored) in enumerate(_per_sample(folder, "topk_ids", "topk_logprobs")):
        if compared >= COMPARED_ROWS:
            return
        if not len(ids):
            continue
        product = _row_states(folder, manifest, scales, line) @ head.astype(np.float32).T
        exact = log_softmax(manifest.logit_rule.apply(product))
        given = np.take_along_axis(exact, ids.astype(np.int64), -1)
        # what is far down the tail says little, and bfloat16 logits are coarse there
        error = float(np.sqrt(np.average((given - stored) ** 2, weights=np.exp(stored.astype(np.float64)))))
        if error > allowed:
            what = f"the states give other log-probabilities: {error:.2f} nats apart (allowed {allowed})"
            yield what, "hidden", sample
            return
        compared += len(ids)


def _row_states(folder: ShardFolder, manifest: Manifest, scales: Any, line: int) -> npt.NDArray[np.float32]:
    signals = manifest.signals
    scale = folder.of("hidden_scale", line) if signals["codec"] in ("int8", "int4") else None
    none = ChannelScales(np.ones(manifest.shape.hidden_size, np.float32))
    states = decode(folder.of("hidden", line), scale, signals["codec"], scales.get("hidden") or none)
    if signals["hidden"] == "rows":
        return states
    tokens, mask = (folder.of(name, line) for name in ("input_ids", "loss_mask"))
    return states[rows_among_text(tokens, mask, manifest.image_token)]
