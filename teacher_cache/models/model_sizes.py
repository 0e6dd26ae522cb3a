"""What a model weighs, and what a GPU does with it: one set of constants for the plans of both phases."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

GB = 10**9
GPU_SIZES = (16, 24, 40, 48, 80, 141)
"""GB of GPUs that people have."""


@dataclass(frozen=True)
class Card:
    """A second of one GPU: FLOP in 16 bits and in float32, with which training, and reading by a teacher, are counted;
    bytes read of its memory, which writing answers is bound by. ``date``: of the measurement, or of the data sheet."""

    name: str
    half_flops: float
    float32_flops: float
    read_bytes: float
    source: str
    date: str

    @property
    def basis(self) -> str:
        return f"one {self.name}, {self.source} ({self.date})"


CARD = Card(
    name="A100 SXM 80 GB",
    half_flops=0.4 * 312e12,
    float32_flops=0.4 * 19.5e12,
    read_bytes=0.55 * 2.039e12,
    source="not measured: its data sheet at 40 % of arithmetic and 55 % of memory",
    date="June 2021",
)
"""What the hours of both plans are counted with."""

GROUPS_OF_128 = 0.5 + (2 + 0.5) / 128
"""Bytes of a weight in AWQ and GPTQ: four bits; a float16 scale and four bits of zero point for every 128."""
NF4 = 0.5 + 4 / 64
"""Bytes of a weight in bitsandbytes' nf4: four bits, and a float32 scale for every 64 (QLoRA, arXiv 2305.14314, 2)."""
_PARAMETER_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0, "bitsandbytes": NF4}


def parameter_bytes(name: str) -> float:
    """Bytes of a weight, by dtype or by vLLM's name of a quantisation; groups of 128 where the name says no more."""
    return _PARAMETER_BYTES.get(name, GROUPS_OF_128)


@dataclass(frozen=True)
class ModelSize:
    """Parameters: of the language model's linear layers (which quantisation packs), its embeddings and head, and
    those of the vision tower and the projector."""

    linear: int
    embeddings: int
    vision: int

    @property
    def language(self) -> int:
        return self.linear + self.embeddings

    @property
    def all(self) -> int:
        return self.language + self.vision


def size_of(config: Any) -> ModelSize:
    """Counted on a model of this Transformers configuration without storage (``meta`` device)."""
    return _size_of(config.to_json_string(use_diff=False))


@lru_cache(maxsize=8)
def _size_of(plain: str) -> ModelSize:
    from transformers import AutoConfig

    from teacher_cache.models.parts import parts_of
    from teacher_cache.models.pretrained import without_weights

    fields = json.loads(plain)
    kind = fields.pop("model_type")
    made = without_weights("model_type", kind, AutoConfig.for_model(kind, **fields))
    decoder, ends = parts_of(made).decoder, (made.get_input_embeddings(), made.get_output_embeddings())
    ids = {id(end.weight) for end in ends}
    parts = {"linear": 0, "embeddings": 0, "vision": 0}
    for name, weight in made.named_parameters():
        part = "embeddings" if id(weight) in ids else "linear" if name.startswith(f"{decoder}.") else "vision"
        parts[part] += weight.numel()
    return ModelSize(**parts)
