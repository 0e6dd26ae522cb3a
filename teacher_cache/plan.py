"""What a cache will hold and cost, before anything runs: from the data and the teacher's configuration alone.

Sizes are added up file by file with the functions that will write the files; only the token counts of answers that
do not exist yet are estimates.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from teacher_cache.arrays import ArrayLayout, chunk_rows_for, zarr_metadata
from teacher_cache.checksums import BLOCK_BYTES
from teacher_cache.config import PRESETS, CacheConfig, SignalsConfig
from teacher_cache.conversations import Conversation, read_conversations
from teacher_cache.data.rows import expanded_length, text_positions
from teacher_cache.lengths import Lengths, conversation_lengths, load_tokenizer
from teacher_cache.model_config import load_model_config
from teacher_cache.models.pretrained import check_llava
from teacher_cache.plan_cost import TeacherMemory, Throughput, assumed_throughput, size_of, teacher_memory
from teacher_cache.records import ArraySpec, Axis, TeacherShape, image_arrays, record_arrays
from teacher_cache.storage import Storage
from teacher_cache.store.tables import INDEX_BYTES, answer_ids
from teacher_cache.tokenization import template_by_name
from teacher_cache.writer import answers_name

GIB = 2**30


@dataclass(frozen=True)
class CachePlan:
    """What ``teacher-cache plan`` shows. Bytes are those on disk; ``notes`` say what is estimated."""

    samples: int
    skipped: int
    rows: int
    tokens: int
    positions: int
    images: int
    shards: int
    array_bytes: dict[str, int]
    index_bytes: int
    answers_bytes: int
    head_bytes: int
    side_bytes: int
    preset_bytes: dict[str, int]
    gpu_hours: float
    dollars: float
    throughput: Throughput
    memory: TeacherMemory
    free_bytes: int | None
    notes: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        parts = (self.index_bytes, self.answers_bytes, self.head_bytes, self.side_bytes)
        return sum(self.array_bytes.values()) + sum(parts)

    @property
    def fits(self) -> bool | None:
        """Whether the cache fits into the free space; None for an object store."""
        return None if self.free_bytes is None else self.total_bytes <= self.free_bytes

    def as_rows(self) -> list[tuple[str, str]]:
        """(fact, value) lines for a table."""
        rows = max(self.rows, 1)
        rate = self.throughput
        return [
            ("samples", f"{self.samples:,} cached, {self.skipped:,} skipped"),
            ("rows (answer tokens)", f"{self.rows:,} ({self.rows / max(self.samples, 1):.1f} a sample)"),
            ("tokens, image positions not counted", f"{self.tokens:,}"),
            ("distinct images", f"{self.images:,}"),
            ("shards", f"{self.shards:,}"),
            *((f"bytes: {name}", _size(size)) for name, size in self.array_bytes.items()),
            ("bytes: indexes and texts", _size(self.index_bytes)),
            ("bytes: answers", _size(self.answers_bytes)),
            ("bytes: output head", _size(self.head_bytes)),
            ("bytes: everything", f"{_size(self.total_bytes)} ({self.total_bytes / rows:,.1f} a row)"),
            *((f"  as preset {name}", _size(size)) for name, size in self.preset_bytes.items()),
            ("free space", "not known (object store)" if self.free_bytes is None else _size(self.free_bytes)),
            ("fits", {None: "not known", True: "yes", False: "NO: free space or choose a smaller preset"}[self.fits]),
            *self.memory.as_rows(),
            ("GPU hours", _few_digits(self.gpu_hours)),
            ("cost", f"{_few_digits(self.dollars)} $ at {rate.dollars_per_hour:g} $ an hour"),
            (
                "throughput of one GPU",
                f"{rate.read_tokens_per_second:,.0f} tokens/s read, {rate.write_tokens_per_second:,.0f} written "
                f"({rate.source})",
            ),
            *(("note", note) for note in self.notes),
        ]


def plan_cache(
    config: CacheConfig,
    *,
    answer_factor: float = 1.0,
    throughput: Throughput | None = None,
    dollars_per_hour: float = 2.0,
) -> CachePlan:
    """Count and price the cache that ``config`` describes.

    ``config.teacher.model`` may be a folder that holds only ``config.json``, with or without the tokenizer's files.
    ``answer_factor``: how much longer than the original ones the teacher's answers are expected to be. Answers that
    lie in ``config.output`` already are counted, not estimated.

    Raises
    ------
    DataError, ConfigError
        The data cannot be read, or the teacher's configuration cannot be found.
    """
    samples = read_conversations(config.data)
    size = config.layout.shard_samples
    numbers = [i // size for i, s in enumerate(samples) if isinstance(s, Conversation)]
    conversations = [s for s in samples if isinstance(s, Conversation)]
    model = load_model_config(config.teacher.model, config.teacher.revision, "teacher.model")
    check_llava("teacher.model", config.teacher.model, model)
    storage = Storage(config.output or ".")
    tokenizer = load_tokenizer(config.teacher.model, config.teacher.revision)
    answered = _answered(storage, -(-len(samples) // size)) if config.output else {}
    lengths = conversation_lengths(
        conversations,
        template_by_name(config.teacher.template),
        tokenizer,
        answer_factor=answer_factor,
        answered=answered,
        most_a_turn=config.generation.max_new_tokens,
    )
    shape = _shape(model)
    kept = _kept(conversations, lengths, shape, config)
    world = _World(
        shape=shape,
        shard=np.array(numbers, np.int64)[kept],
        token=(lengths.prompt + lengths.answers)[kept],
        row=lengths.answers[kept],
        image=np.array([c.image is not None for c in conversations], np.bool_)[kept],
        conversations=[conversations[i] for i in np.flatnonzero(kept)],
        images=_images_by_shard(samples, size),
        shards=-(-len(samples) // size),
        dtype_bytes=4 if config.teacher.dtype == "float32" else 2,
    )
    array_bytes = world.array_bytes(config.signals, config)
    rate = throughput or assumed_throughput(size_of(model).language, dollars_per_hour)
    image = np.array([c.image is not None for c in conversations], np.int64)
    prompt = expanded_length(lengths.prompt, image, image * shape.image_tokens)
    anew = kept & np.array([c.regenerate and c.sample_id not in answered for c in conversations], np.bool_)
    whole = prompt + lengths.answers
    hours = rate.hours(whole[kept].sum(), prompt[anew].sum(), lengths.answers[anew].sum())
    return CachePlan(
        samples=int(kept.sum()),
        skipped=len(samples) - int(kept.sum()),
        rows=int(world.row.sum()),
        tokens=int(world.token.sum()),
        positions=int(world.position.sum()),
        images=sum(world.images.values()),
        shards=world.shards,
        array_bytes=array_bytes,
        index_bytes=world.index_bytes(config.signals, config),
        answers_bytes=world.answers_bytes(),
        head_bytes=world.head_bytes(config.signals),
        side_bytes=world.side_bytes(config.signals),
        preset_bytes={name: world.preset_bytes(name, config) for name in PRESETS},
        gpu_hours=hours,
        dollars=hours * rate.dollars_per_hour,
        throughput=rate,
        memory=teacher_memory(config, model, min(int(whole.max(initial=1)), config.teacher.max_length), size_of(model)),
        free_bytes=storage.free_bytes() if config.output else None,
        notes=_notes(config, conversations, lengths, tokenizer, answered, answer_factor),
    )


def as_preset(signals: SignalsConfig, name: str) -> SignalsConfig:
    """``signals`` as if the preset ``name`` had been chosen: what their own preset set is undone, the user's own
    settings stay where that preset leaves them open."""
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(SignalsConfig)}
    own = defaults | PRESETS[signals.preset]
    presets = {field for values in PRESETS.values() for field in values}
    undone = {f: defaults[f] for f in presets if getattr(signals, f) == own[f]}
    return dataclasses.replace(signals, **(undone | PRESETS[name]))


@dataclass(frozen=True)
class _World:
    """The kept samples as numbers: (M,) shard, tokens, rows, whether there is an image."""

    shape: TeacherShape
    shard: npt.NDArray[np.int64]
    token: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    image: npt.NDArray[np.bool_]
    conversations: list[Conversation]
    images: dict[int, int]
    shards: int
    dtype_bytes: int

    @property
    def position(self) -> npt.NDArray[np.int64]:
        return np.asarray(text_positions(self.token, self.image))

    def lines(self, axis: Axis) -> npt.NDArray[np.int64]:
        """(shards,) lines of ``axis`` in every shard."""
        if axis == "image":
            return np.array([self.images.get(n, 0) for n in range(self.shards)], np.int64)
        counts = {"token": self.token, "row": self.row, "position": self.position}[axis]
        return np.bincount(self.shard, counts, self.shards).astype(np.int64)

    def layouts(self, spec: ArraySpec, config: CacheConfig) -> list[ArrayLayout]:
        chunk = config.layout.chunk_kilobytes * 1024
        return [
            ArrayLayout(spec.dtype, spec.shape, rows, chunk_rows_for(spec.line_bytes, rows, chunk))
            for rows in self.lines(spec.axis).tolist()
        ]

    def array_bytes(self, signals: SignalsConfig, config: CacheConfig) -> dict[str, int]:
        specs = [*record_arrays(signals, self.shape), *image_arrays(signals, self.shape)]
        return {s.name: sum(x.file_bytes for x in self.layouts(s, config) if x.rows) for s in specs}

    def index_bytes(self, signals: SignalsConfig, config: CacheConfig) -> int:
        """Texts as Parquet with zstd packs them, the columns of numbers, and the metadata of every file."""
        shard = record_arrays(signals, self.shape)
        image = image_arrays(signals, self.shape)
        metadata = sum(
            len(zarr_metadata(x, (s.axis, *"abc"[: len(s.shape)])))
            + (_SUM_BYTES if x.rows else 0)
            + _BLOCK_SUM_BYTES * -(-x.file_bytes // BLOCK_BYTES)
            + _SUM_BYTES
            for s in (*shard, *image)
            for x in self.layouts(s, config)
        )
        columns = self.shards * (_INDEX_BYTES + (_IMAGES_INDEX_BYTES if image else 0))
        lines = _LINE_BYTES * len(self.token) + (_IMAGE_LINE_BYTES * sum(self.images.values()) if image else 0)
        return metadata + columns + lines + self._text_bytes()

    def answers_bytes(self) -> int:
        texts = sum(len(a) for c in self.conversations for a in c.answers)
        answers = sum(len(c.answers) for c in self.conversations)
        return int(_TEXT_RATE * texts + 1.2 * int(self.row.sum()) + 3 * answers + _ANSWERS_BYTES * self.shards)

    def head_bytes(self, signals: SignalsConfig) -> int:
        if signals.hidden == "none" and signals.visual == "none":
            return 0
        return self.shape.vocabulary * self.shape.hidden_size * self.dtype_bytes + 80

    def side_bytes(self, signals: SignalsConfig) -> int:
        """Manifest, ledger, sample list, channel scales."""
        fitted = (signals.hidden != "none") * (1 + signals.second_last) + (signals.visual == "states")
        width, components = self.shape.hidden_size, signals.pca
        one = components + width + components * width if components else width * (signals.codec in ("int8", "int4"))
        scales = 4 * fitted * one
        return 8800 + 150 * self.shards + 5 * len(self.token) + scales

    def preset_bytes(self, name: str, config: CacheConfig) -> int:
        signals = as_preset(config.signals, name)
        if name == "compact":
            signals = dataclasses.replace(signals, second_last=False)
        parts = (self.index_bytes(signals, config), self.answers_bytes(), self.head_bytes(signals))
        return sum(self.array_bytes(signals, config).values()) + sum(parts) + self.side_bytes(signals)

    def _text_bytes(self) -> int:
        """What a shard's texts take, measured on one from the middle, for as many samples as there are."""
        if not self.conversations:
            return 0
        middle = self.shard[len(self.shard) // 2]
        chosen = [self.conversations[i] for i in np.flatnonzero(self.shard == middle)]
        columns = {
            "sample_id": [c.sample_id for c in chosen],
            "image_id": [c.image.image_id if c.image else "" for c in chosen],
            "questions": [c.questions for c in chosen],
            "answers": [c.answers for c in chosen],
            "original_answers": [c.answers for c in chosen],
        }
        sink = io.BytesIO()
        pq.write_table(pa.table(columns), sink, compression="zstd")
        return len(sink.getvalue()) * len(self.conversations) // len(chosen)


_TEXT_RATE = 0.3
_SUM_BYTES, _BLOCK_SUM_BYTES = 175, 26
_INDEX_BYTES, _IMAGES_INDEX_BYTES, _ANSWERS_BYTES = 2700, 1000, 2600
_LINE_BYTES, _IMAGE_LINE_BYTES = 9, 14
"""Measured on caches of 8 to 512 samples a shard: what Parquet and the checksums take beside the arrays."""


def _shape(model: Any) -> TeacherShape:
    from teacher_cache.images import image_tokens_of

    text = model.get_text_config()
    return TeacherShape(text.hidden_size, text.vocab_size, image_tokens_of(model))


def _kept(
    conversations: Sequence[Conversation], lengths: Lengths, shape: TeacherShape, config: CacheConfig
) -> npt.NDArray[np.bool_]:
    """(M,) which conversations are cached: those that fit, and whose image is there."""
    image = np.array([c.image is not None for c in conversations], np.int64)
    expanded = expanded_length(lengths.prompt, image, image * shape.image_tokens) + lengths.answers
    folder = Path(config.data.image_folder)
    if not config.data.image_folder or not folder.is_dir():
        return np.asarray(expanded <= config.teacher.max_length)
    known: dict[str, bool] = {}
    for conversation in conversations:
        picture = conversation.image
        if picture is not None and picture.image_id not in known:
            known[picture.image_id] = bool(picture.data) or (folder / picture.path).is_file()
    there = np.array([c.image is None or known[c.image.image_id] for c in conversations], np.bool_)
    return np.asarray((expanded <= config.teacher.max_length) & there)


def _images_by_shard(samples: Sequence[Any], size: int) -> dict[int, int]:
    """Distinct images by the shard in which each comes first."""
    seen: set[str] = set()
    counts: dict[int, int] = {}
    for position, sample in enumerate(samples):
        if isinstance(sample, Conversation) and sample.image is not None and sample.image.image_id not in seen:
            seen.add(sample.image.image_id)
            counts[position // size] = counts.get(position // size, 0) + 1
    return counts


def _answered(storage: Storage, shards: int) -> dict[str, int]:
    """Answer tokens by sample_id of the answers that lie in the cache folder already."""
    lengths: dict[str, int] = {}
    for number in range(shards if storage.names("answers") else 0):
        if storage.exists(answers_name(number)):
            name = answers_name(number)
            for sample_id, ids in answer_ids(storage.read(name, INDEX_BYTES), f"{storage.url}/{name}").items():
                lengths[sample_id] = lengths.get(sample_id, 0) + len(ids)
    return lengths


def _notes(
    config: CacheConfig,
    conversations: Sequence[Conversation],
    lengths: Lengths,
    tokenizer: Any | None,
    answered: Mapping[str, int],
    answer_factor: float,
) -> tuple[str, ...]:
    notes = []
    anew = sum(c.regenerate and c.sample_id not in answered for c in conversations)
    if anew:
        notes.append(
            f"{anew:,} samples get new answers: counted as {answer_factor:g} times as long as the original ones, "
            f"at most {config.generation.max_new_tokens} tokens"
        )
    if tokenizer is None:
        notes.append("no tokenizer found: token counts are estimated from characters (about 10 % off)")
    elif lengths.counted < len(conversations):
        notes.append(f"token counts: {lengths.counted:,} samples counted, the others from their characters")
    if config.layout.compression != "none":
        notes.append("sizes are those before compression; quantised states hardly compress")
    folder = config.data.image_folder
    if not folder or not Path(folder).is_dir():
        notes.append("data.image_folder not found: all images are taken to be there")
    return tuple(notes)


def _few_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"


def _size(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB // 10 else f"{size / 2**20:,.2f} MiB"
