"""What a cache will hold and cost, before anything runs: from the data and the teacher's configuration alone.

Bytes, memory and hours are meant to decide by, within 10 % where the token counts are known: bytes of a line times
lines, laid out by the writer's own rule in shards of mean size. Token counts of answers to come are estimates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from teacher_cache.config import PRESETS, CacheConfig, SignalsConfig
from teacher_cache.data.conversations import Conversation
from teacher_cache.data.rows import expanded_length, text_positions
from teacher_cache.data.sample_reader import read_conversations
from teacher_cache.data.units import bytes_text
from teacher_cache.models.chat import Chat
from teacher_cache.models.model_config import load_model_config
from teacher_cache.models.model_sizes import parameter_bytes, size_of
from teacher_cache.models.pretrained import model_class
from teacher_cache.plan.cost import TeacherMemory, Throughput, assumed_throughput, teacher_memory
from teacher_cache.plan.lengths import ImageLength, Lengths, conversation_lengths, image_length, read_chat
from teacher_cache.store.arrays import ArrayLayout, chunk_rows_for
from teacher_cache.store.records import Axis, TeacherShape, image_arrays, pairs, record_arrays
from teacher_cache.store.storage import Storage
from teacher_cache.store.tables import INDEX_BYTES, answer_ids
from teacher_cache.store.writer import answers_name

ARRAY_BYTES, SHARD_BYTES, CACHE_BYTES = 1200, 8000, 9000
"""Metadata and checksums: of an array in a shard, of a shard with its index and answers, of a cache."""
IMAGE_SUM_BYTES = 40
"""Of a sample's image: its checksum, in the index and beside its answer."""
TEXTS_MEASURED = 1000
"""Conversations whose texts are compressed to learn what a character takes."""


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
    part_bytes: dict[str, int]
    """Each array by its name, then ``indexes and texts``, ``answers``, ``output head``."""
    preset_bytes: dict[str, int]
    gpu_hours: float
    throughput: Throughput
    memory: TeacherMemory
    free_bytes: int | None
    notes: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        return sum(self.part_bytes.values())

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
            *((f"bytes: {name}", bytes_text(size)) for name, size in self.part_bytes.items()),
            ("bytes: everything", f"{bytes_text(self.total_bytes)} ({self.total_bytes / rows:,.0f} a row)"),
            *((f"  as preset {name}", bytes_text(size)) for name, size in self.preset_bytes.items()),
            ("free space", "not known (object store)" if self.free_bytes is None else bytes_text(self.free_bytes)),
            ("fits", {None: "not known", True: "yes", False: "NO: free space or choose a smaller preset"}[self.fits]),
            *self.memory.as_rows(),
            ("GPU hours", _few_digits(self.gpu_hours)),
            (
                "throughput of one GPU",
                f"{rate.read_tokens_per_second:,.0f} tokens/s read, {rate.write_tokens_per_second:,.0f} written "
                f"({rate.source})",
            ),
            *(("note", note) for note in self.notes),
        ]


def plan_cache(config: CacheConfig, *, answer_factor: float = 1.0, throughput: Throughput | None = None) -> CachePlan:
    """Count and price the cache that ``config`` describes.

    ``config.teacher.model`` may be a folder that holds only ``config.json``, with or without the tokenizer's files.
    ``answer_factor``: how much longer than the original ones the teacher's answers are expected to be. Answers that
    lie in ``config.output`` already are counted, not estimated.

    Raises ``DataError``, ``ConfigError``: the data cannot be read, or the teacher's configuration cannot be found.

    >>> import teacher_cache as tc
    >>> tc.plan_cache(tc.load_config(tc.CacheConfig, "pipelines/tiny/cache.yaml")).fits
    True
    """
    model, shape = _teacher(config)
    chat = read_chat(config)
    samples = read_conversations(config.data, by_turn=chat is not None and not chat.one_sequence)
    shards = -(-len(samples) // config.layout.shard_samples)
    conversations = [s for s in samples if isinstance(s, Conversation)]
    storage = Storage(config.output or ".")
    answered = _answered(storage, shards) if config.output else {}
    lengths = conversation_lengths(
        conversations,
        chat,
        answer_factor=answer_factor,
        answered=answered,
        most_a_turn=config.generation.max_new_tokens,
    )
    image = np.array([len(c.images) for c in conversations], np.int64)  # (M,)
    of_one = image_length(config, model, chat, [i for c in conversations for i in c.images])
    prompt = expanded_length(lengths.prompt, image * (1 - of_one.tokens + of_one.runs), image * of_one.positions)
    whole = prompt + lengths.answers
    kept = (whole <= config.teacher.max_length) & _image_there(conversations, config)
    lines = _lines(conversations, lengths, image, kept, of_one)
    texts = _text_bytes([conversations[i] for i in np.flatnonzero(kept)])
    parts = {
        name: _part_bytes(as_preset(config.signals, name), config, shape, lines, shards, texts) for name in PRESETS
    }
    rate = throughput or assumed_throughput(size_of(model).language)
    again = whole * (image > 0) * kept if config.signals.advantage != "none" else 0 * whole
    if config.signals.advantage == "without":
        again = again - image * kept * of_one.positions
    anew = kept & np.array([c.regenerate and c.sample_id not in answered for c in conversations], np.bool_)
    return CachePlan(
        samples=int(kept.sum()),
        skipped=len(samples) - int(kept.sum()),
        rows=lines["row"],
        tokens=lines["token"],
        positions=lines["position"],
        images=lines["image"],
        shards=shards,
        part_bytes=_part_bytes(config.signals, config, shape, lines, shards, texts),
        preset_bytes={name: sum(sizes.values()) for name, sizes in parts.items()},
        gpu_hours=rate.hours(whole[kept].sum() + again.sum(), prompt[anew].sum(), lengths.answers[anew].sum()),
        throughput=rate,
        memory=teacher_memory(config, model, min(int(whole.max(initial=1)), config.teacher.max_length)),
        free_bytes=storage.free_bytes() if config.output else None,
        notes=(*_notes(config, conversations, lengths, chat, answered, answer_factor), *_scored_again(again, rate)),
    )


def as_preset(signals: SignalsConfig, name: str) -> SignalsConfig:
    """``signals`` as if the preset ``name`` had been chosen: what their own preset set is undone, the user's own
    settings stay where that preset leaves them open."""
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(SignalsConfig)}
    own = defaults | PRESETS[signals.preset]
    presets = {field for values in PRESETS.values() for field in values}
    undone = {f: defaults[f] for f in presets if getattr(signals, f) == own[f]}
    return dataclasses.replace(signals, **(undone | PRESETS[name]))


def _teacher(config: CacheConfig) -> tuple[Any, TeacherShape]:
    model = load_model_config(config.teacher.model, config.teacher.revision, "teacher.model")
    model_class("teacher.model", config.teacher.model, model)
    text = model.get_text_config()
    return model, TeacherShape(text.hidden_size, text.vocab_size)


def _lines(
    conversations: Sequence[Conversation],
    lengths: Lengths,
    image: npt.NDArray[np.int64],
    kept: npt.NDArray[np.bool_],
    of_one: ImageLength,
) -> dict[Axis, int]:
    """Lines of the cache on each axis. An image has its line even where all its samples are left out."""
    runs = image[kept] * of_one.runs
    tokens = (lengths.prompt + lengths.answers)[kept] + image[kept] * (of_one.tokens - 1)
    distinct = len({i.image_id for c in conversations for i in c.images})
    return {
        "token": round(tokens.sum()),
        "row": int(lengths.answers[kept].sum()),
        "position": round(text_positions(tokens, runs).sum()),
        "run": round(runs.sum()),
        "cell": round((image * lengths.answers)[kept].sum() * of_one.positions),
        "image": distinct,
        "patch": round(distinct * of_one.positions),
        "pair": round(distinct * pairs(of_one.positions)),
    }


def _part_bytes(
    signals: SignalsConfig,
    config: CacheConfig,
    shape: TeacherShape,
    lines: Mapping[Axis, int],
    shards: int,
    texts: tuple[int, int],
) -> dict[str, int]:
    """Bytes by part of a cache with so many lines on each axis; ``texts``: what :func:`_text_bytes` gives."""
    specs = [*record_arrays(signals, shape), *image_arrays(signals, shape)]
    parts = {}
    for spec in specs:
        rows = -(-lines[spec.axis] // max(shards, 1))
        chunk = chunk_rows_for(spec.line_bytes, rows, config.layout.chunk_kilobytes * 1024)
        parts[spec.name] = shards * ArrayLayout(spec.dtype, spec.shape, rows, chunk).file_bytes if rows else 0
    states = signals.hidden != "none" or signals.visual == "states"
    fitted = (
        (signals.pca + 2) * shape.hidden_size * 4 * states
    )  # channel scales, and the components where there are some
    head = shape.vocabulary * shape.hidden_size * parameter_bytes(config.teacher.dtype)
    text = texts[0] + IMAGE_SUM_BYTES * lines["image"]
    return parts | {
        "indexes and texts": shards * (SHARD_BYTES + ARRAY_BYTES * len(specs)) + CACHE_BYTES + fitted + text,
        "answers": texts[1] + lines["row"],  # an id takes about a byte there
        "output head": int(head) if signals.hidden != "none" or signals.visual != "none" else 0,
    }


def _text_bytes(conversations: Sequence[Conversation]) -> tuple[int, int]:
    """Compressed (questions and both answers in the indexes, answers in files of their own), at the rate of some."""
    questions = sum(len(q) for c in conversations for q in c.texts)
    answers = sum(len(a) for c in conversations for a in c.answers)
    some = "".join("".join((*c.texts, *c.answers)) for c in conversations[:TEXTS_MEASURED]).encode("utf-8", "replace")
    rate = len(pa.compress(some, codec="zstd", asbytes=True)) / len(some) if some else 0.0
    return int(rate * (questions + 2 * answers)), int(rate * answers)


def _image_there(conversations: Sequence[Conversation], config: CacheConfig) -> npt.NDArray[np.bool_]:
    """(M,) whether a conversation's image lies in the folder; all do where the folder is not there."""
    folder = Path(config.data.image_folder)
    if not config.data.image_folder or not folder.is_dir():
        return np.ones(len(conversations), np.bool_)
    images = {image.image_id: image for c in conversations for image in c.images}
    there = {name: image.embedded or (folder / image.path).is_file() for name, image in images.items()}
    return np.array([all(there[image.image_id] for image in c.images) for c in conversations], np.bool_)


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
    chat: Chat | None,
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
    if chat is None:
        notes.append("no tokenizer found: token counts are estimated from characters (about 10 % off)")
    elif lengths.counted < len(conversations):
        notes.append(f"token counts: {lengths.counted:,} samples counted, the others from their characters")
    if config.layout.compression != "none":
        notes.append("sizes are those before compression; quantised states hardly compress")
    folder = config.data.image_folder
    shown = any(c.images for c in conversations)
    if shown and (not folder or not Path(folder).is_dir()):
        notes.append("data.image_folder not found: all images are taken to be there")
    return tuple(notes)


def _scored_again(lengths: npt.NDArray[np.int64], rate: Throughput) -> Iterator[str]:
    """Of ``signals.advantage``: (M,) tokens that a second scoring pass reads of each sample."""
    if lengths.any():
        hours = _few_digits(rate.hours(lengths.sum(), 0, 0))
        count = np.count_nonzero(lengths)
        yield f"signals.advantage: {count:,} samples are scored a second time, {hours} of the GPU hours"


def _few_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"
