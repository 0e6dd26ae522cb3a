"""What the teacher costs, before it runs: memory of a GPU and hours, from its configuration alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from teacher_cache.config import CacheConfig
from teacher_cache.data.rows import expanded_length
from teacher_cache.data.units import bytes_text
from teacher_cache.errors import ConfigError
from teacher_cache.models.model_sizes import (
    CARD,
    GB,
    GPU_SIZES,
    parameter_bytes,
    size_of,
)
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.storage import Storage

STEP_TOKENS = 8192
"""Tokens that vLLM puts into one step by default."""


@dataclass(frozen=True)
class Throughput:
    """Tokens per second of one GPU: reading (prompts, scoring) and writing (answers)."""

    read_tokens_per_second: float
    write_tokens_per_second: float
    source: str = "given"
    writing_reads: bool = False
    """The writing rate was measured with the reading of the prompts in it."""

    def hours(self, scored: float, prompts: float, answers: float) -> float:
        """Answering reads ``prompts`` tokens and writes ``answers``; scoring reads ``scored`` once more."""
        read = scored + (0 if self.writing_reads else prompts)
        return float(read / self.read_tokens_per_second + answers / self.write_tokens_per_second) / 3600


def assumed_throughput(weights: int) -> Throughput:
    """:data:`CARD`, which writes 64 answers at once. For 13B: 4,800 and 2,800 tokens/s."""
    return Throughput(
        read_tokens_per_second=CARD.half_flops / (2 * weights),
        write_tokens_per_second=CARD.read_bytes / (2 * weights) * 64,
        source=f"{CARD.basis}, batches of 64; plan --like takes what a cache of yours took",
    )


def measured_throughput(storage: Storage) -> Throughput:
    """What a finished cache of two passes took, a worker (``cost.json``); answers that were kept took no writing.

    Raises ``ConfigError``: the cache has no such figures, or came out of one pass, whose time does not tell reading
    from writing.
    """
    with TeacherCache(storage) as cache:
        counts = cache.manifest.counts
        read = expanded_length(counts["tokens"], counts["runs"], counts["image_positions"])
        again, shows = cache.manifest.signals_config.advantage, cache.images() > 0
        if again != "none":
            read += (cache.counts("token") - cache.counts("run"))[shows].sum()
            read += counts["image_positions"] if again == "blurred" else 0
        rows = zip(cache.counts("row").tolist(), cache.texts(), strict=True)
        written = sum(count for count, text in rows if text.source != "original")
    cost = json.loads(storage.read("cost.json")) if storage.exists("cost.json") else {}
    answering, scoring = cost.get("answer_seconds", 0.0), cost.get("score_seconds", 0.0)
    if not answering or not scoring or cost.get("one_pass", False):
        raise ConfigError(
            f"{storage.url}: cost.json has {answering:g} s of answering and {scoring:g} s of scoring"
            f"{', out of one pass' if cost.get('one_pass') else ''}; expected both, of two passes. "
            "Give --read-rate and --write-rate in its place"
        )
    return Throughput(read / scoring, written / answering, f"measured in {storage.url}", writing_reads=True)


@dataclass(frozen=True)
class TeacherMemory:
    """Bytes on one GPU of the tensor-parallel group.

    weights · sequence: KV cache of the longest sample, and its captured states · step: activations of one forward ·
    signals: the output head once more and the float32 logits of a chunk of rows, beside the engine · share: of the
    GPU, for the engine · length: tokens of the longest sample.
    """

    weights: int
    sequence: int
    step: int
    signals: int
    share: float
    length: int
    gpus: int

    def sequences(self, gpu_bytes: float) -> int:
        """How many samples of full length run at once on such a GPU; 0 where the teacher does not fit."""
        engine = min(gpu_bytes * self.share, gpu_bytes - self.signals)
        return max(0, int((engine - self.weights - self.step) // self.sequence))

    def as_rows(self) -> Iterator[tuple[str, str]]:
        group = f", each of {self.gpus}" if self.gpus > 1 else ""
        yield (
            f"memory of a GPU{group}",
            f"weights {bytes_text(self.weights)}, a forward step {bytes_text(self.step)}, signals "
            f"{bytes_text(self.signals)}, KV cache {bytes_text(self.sequence)} a sample of {self.length:,} tokens",
        )
        fits = [f"{size} GB: {n:,}" for size in GPU_SIZES if (n := self.sequences(size * GB))]
        yield "samples at once, by size of the GPU", ", ".join(fits) or f"does not fit into {GPU_SIZES[-1]} GB"


def teacher_memory(config: CacheConfig, model: Any, length: int) -> TeacherMemory:
    """An estimate from shapes: weights and KV cache are exact, a step's activations within tens of per cent."""
    text, gpus = model.get_text_config(), config.speed.tensor_parallel
    size, each = size_of(model), parameter_bytes(config.teacher.dtype)
    packed = parameter_bytes(config.teacher.quantization or config.teacher.dtype)
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kept = 2 * text.num_hidden_layers * kv_heads * head_size / gpus + text.hidden_size * (
        1 + config.signals.second_last
    )
    tokens = STEP_TOKENS if config.teacher.backend != "torch" else config.speed.score_batch_tokens
    wide = 2 * text.intermediate_size / gpus + 6 * text.hidden_size
    rows = config.speed.head_rows * text.vocab_size * 4 * 3
    return TeacherMemory(
        weights=int((size.linear * packed + (size.embeddings + size.vision) * each) / gpus),
        sequence=int(kept * each * length),
        step=int(tokens * wide * each),
        signals=int(text.vocab_size * text.hidden_size * each + rows),
        share=config.speed.gpu_memory_share,
        length=length,
        gpus=gpus,
    )
