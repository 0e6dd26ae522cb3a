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

from teacher_cache.data.rows import rows_among_text, text_positions
from teacher_cache.store.checksums import BLOCK_BYTES
from teacher_cache.store.codecs import ChannelScales, decode
from teacher_cache.store.folder import COUNTS, ShardFolder
from teacher_cache.store.manifest import Manifest
from teacher_cache.store.records import Array, ArraySpec
from teacher_cache.trust.fidelity import log_softmax

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
    yield from _counts(folder, manifest)
    lengths = folder.lengths()
    for spec in manifest.arrays:
        expected = int(folder.numbers[:, _column(spec) + 1].sum()) if len(folder.numbers) else 0
        if lengths[spec.name] != expected:
            yield f"{lengths[spec.name]} lines, but the index counts {expected}", spec.name, ""
            return
    impossible = [fault for spec in manifest.arrays for fault in _values(folder, spec, manifest)]
    if impossible:  # what follows reckons with these numbers
        yield from impossible
        return
    yield from _masks(folder, manifest)
    yield from _image_places(folder, manifest)
    if answers is not None:
        yield from _answer_tokens(folder, manifest, answers)
    if manifest.generation["temperature"] == 0 and manifest.signals["top_k"]:
        yield from _greedy(folder)
    if head is not None and manifest.signals["top_k"] and "hidden" in lengths and not manifest.signals["pca"]:
        yield from _states_give_logprobs(folder, manifest, *head)


def sample_of_block(folder: ShardFolder, file: str, block: int) -> str:
    """The first sample with a line in block ``block`` of an array's data file; empty where it is no such file."""
    name, _, rest = file.partition("/")
    if not rest.startswith("c/") or not hasattr(folder, "numbers"):
        return ""
    try:
        line = block * BLOCK_BYTES // max(folder.line_bytes(name), 1)
        axis = folder.axis(name)
    except (OSError, ValueError, KeyError):
        return ""
    start = list(COUNTS).index(axis) * 2 if axis in COUNTS else 0
    ends = folder.numbers[:, start] + folder.numbers[:, start + 1]
    place = int(np.searchsorted(ends, line, side="right"))
    return str(folder.sample_ids[min(place, len(ends) - 1)].as_py()) if len(ends) else ""


def _column(spec: ArraySpec) -> int:
    return 2 * list(COUNTS).index(spec.axis)


def _sample(folder: ShardFolder, spec_column: int, line: int) -> str:
    ends = folder.numbers[:, spec_column] + folder.numbers[:, spec_column + 1]
    return str(folder.sample_ids[int(np.searchsorted(ends, line, side="right"))].as_py())


def _counts(folder: ShardFolder, manifest: Manifest) -> Iterator[Fault]:
    for number, (axis, _) in enumerate(COUNTS.items()):
        starts, counts = folder.numbers[:, 2 * number], folder.numbers[:, 2 * number + 1]
        if not np.array_equal(starts, np.cumsum(counts) - counts):
            yield f"the starts on axis {axis} do not follow from the counts", "index.parquet", ""
    if len(set(folder.sample_ids.to_pylist())) != len(folder.sample_ids):
        yield "a sample_id comes twice", "index.parquet", ""
    planned = manifest.layout["shard_samples"]
    number = folder.extra["shard"]
    expected = min(planned, manifest.planned_samples - number * planned)
    if len(folder.numbers) + len(folder.extra["skipped"]) != expected:
        yield f"cached + skipped samples are not the {expected} of this shard", "index.parquet", ""


def _values(folder: ShardFolder, spec: ArraySpec, manifest: Manifest) -> Iterator[Fault]:
    """The first line of an array that holds what it cannot hold."""
    total = int(folder.numbers[:, _column(spec) + 1].sum()) if len(folder.numbers) else 0
    step = _lines_at_once(spec)
    for start in range(0, total, step):
        lines = folder.lines(spec.name, start, min(step, total - start))
        bad, what = _bad_lines(spec, lines, manifest)
        if bad.any():
            yield what, spec.name, _sample(folder, _column(spec), start + int(np.argmax(bad)))
            return


def image_faults(folder: ShardFolder, manifest: Manifest) -> Iterator[Fault]:
    """What an images folder holds and cannot hold, in the lines of its images that could be read."""
    assert folder.present is not None
    present = np.flatnonzero(folder.present)
    for spec in manifest.image_arrays:
        step = _lines_at_once(spec)
        for start in range(0, len(folder.present), step):
            lines = folder.lines(spec.name, start, min(step, len(folder.present) - start))
            at = present[(present >= start) & (present < start + len(lines))]
            bad, what = _bad_lines(spec, lines[at - start], manifest)
            if bad.any():
                yield f"line {at[int(np.argmax(bad))]}: {what}", spec.name, ""
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


def _per_sample(folder: ShardFolder, name: str, column: int) -> Iterator[tuple[str, Array]]:
    for sample_id, numbers in zip(folder.sample_ids, folder.numbers, strict=True):
        yield sample_id.as_py(), folder.lines(name, int(numbers[column]), int(numbers[column + 1]))


def _masks(folder: ShardFolder, manifest: Manifest) -> Iterator[Fault]:
    """As many rows as supervised tokens, as many positions as text tokens that predict one."""
    ids = _per_sample(folder, "input_ids", 0)
    masks = _per_sample(folder, "loss_mask", 0)
    for (sample, tokens), (_, mask), numbers in zip(ids, masks, folder.numbers, strict=True):
        supervised = int(np.count_nonzero(mask))
        if supervised != numbers[3]:
            yield f"{supervised} supervised tokens, but {numbers[3]} rows", "loss_mask", sample
            return
        images = int(np.count_nonzero(tokens == manifest.image_token))
        if text_positions(len(tokens), images) != numbers[5] or images > 1:
            yield f"{images} images and {len(tokens)} tokens do not make {numbers[5]} positions", "input_ids", sample
            return
        if len(mask) and (mask[0] or (mask & (tokens == manifest.image_token)).any()):
            yield "the first token or the image is supervised", "loss_mask", sample
            return


def _image_places(folder: ShardFolder, manifest: Manifest) -> Iterator[Fault]:
    """A sample's image stands in this shard or in an earlier one; a sample without one points nowhere."""
    for image_id, sample_id, numbers in zip(folder.image_ids, folder.sample_ids, folder.numbers, strict=True):
        wanted = bool(image_id.as_py()) and bool(manifest.image_arrays)
        shard, row = int(numbers[6]), int(numbers[7])
        if (0 <= shard <= folder.extra["shard"] and row >= 0) != wanted:
            yield f"its image's place is shard {shard}, line {row}", "index.parquet", sample_id.as_py()
            return


def _answer_tokens(folder: ShardFolder, manifest: Manifest, wanted: dict[str, list[int]]) -> Iterator[Fault]:
    """The supervised tokens are the answers' tokens, in order."""
    ids_of, masks = _per_sample(folder, "input_ids", 0), _per_sample(folder, "loss_mask", 0)
    for (sample, tokens), (_, mask) in zip(ids_of, masks, strict=True):
        if tokens[mask].tolist() != wanted.get(sample):
            yield "the supervised tokens are not those of its answers", "input_ids", sample
            return


def _greedy(folder: ShardFolder) -> Iterator[Fault]:
    """Of greedy answers, the most likely id of row r is answer token r."""
    sources = folder.texts["source"].to_pylist()
    same = seen = 0
    worst = (1.0, "")
    ids, masks = _per_sample(folder, "input_ids", 0), _per_sample(folder, "loss_mask", 0)
    for source, (sample, tokens), (_, mask), (_, top) in zip(
        sources, ids, masks, _per_sample(folder, "topk_ids", 2), strict=True
    ):
        if source == "teacher" and len(top):
            equal = tokens[mask] == top[:, 0]
            same, seen = same + int(equal.sum()), seen + len(equal)
            worst = min(worst, (float(equal.mean()), sample))
    if seen and same < GREEDY_SHARE * seen:
        what = f"only {same} of {seen} greedy answer tokens are the most likely id of their row: rows are misplaced"
        yield what, "topk_ids", worst[1]


def _states_give_logprobs(folder: ShardFolder, manifest: Manifest, head: Array, scales: Any) -> Iterator[Fault]:
    """``hidden @ head.T`` of some samples gives their top-k log-probabilities."""
    compared = 0
    codec = manifest.signals["codec"]
    for line in range(len(folder.numbers)):
        if compared >= COMPARED_ROWS:
            return
        rows = int(folder.numbers[line, 3])
        if not rows:
            continue
        exact = log_softmax(
            manifest.logit_rule.apply(_row_states(folder, manifest, scales, line) @ head.astype(np.float32).T)
        )
        ids, stored = (folder.lines(n, int(folder.numbers[line, 2]), rows) for n in ("topk_ids", "topk_logprobs"))
        given = np.take_along_axis(exact, ids.astype(np.int64), -1)
        # what is far down the tail says little, and bfloat16 logits are coarse there
        error = float(np.sqrt(np.average((given - stored) ** 2, weights=np.exp(stored.astype(np.float64)))))
        if error > TOLERANCE[codec]:
            what = f"the states give other log-probabilities: {error:.2f} nats apart (allowed {TOLERANCE[codec]})"
            yield what, "hidden", str(folder.sample_ids[line].as_py())
            return
        compared += rows


def _row_states(folder: ShardFolder, manifest: Manifest, scales: Any, line: int) -> npt.NDArray[np.float32]:
    signals, numbers = manifest.signals, folder.numbers[line]
    column = 2 if signals["hidden"] == "rows" else 4
    start, count = int(numbers[column]), int(numbers[column + 1])
    codes = folder.lines("hidden", start, count)
    scale = folder.lines("hidden_scale", start, count) if signals["codec"] in ("int8", "int4") else None
    states = decode(
        codes,
        scale,
        signals["codec"],
        scales.get("hidden") or ChannelScales(np.ones(manifest.shape.hidden_size, np.float32)),
    )
    if signals["hidden"] == "rows":
        return states
    tokens, mask = (folder.lines(n, int(numbers[0]), int(numbers[1])) for n in ("input_ids", "loss_mask"))
    return states[rows_among_text(tokens, mask, manifest.image_token)]
