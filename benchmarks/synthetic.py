"""A model of any family and size, without its weights, and a world for it: photographs of noise, random words.

Folders hold what a checkpoint holds but for the weights: within :func:`weights_on` these are drawn where they are used,
so that 26 GB are neither written nor read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from teacher_cache.models import pretrained
from tests.fixtures.families import FAMILIES, make_config, make_tokenizer, write_processor

Settings = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A model: its family (``tests/fixtures/families.py``) and what of its configuration and image processor is not as
    there, by Transformers' own names."""

    family: str
    text: Settings
    vision: Settings
    images: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class WorldSize:
    """``samples`` conversations of one turn, ``question`` and ``answer`` words of about four tokens long (give or take
    a quarter), each with an image of its own of 640 × 480 pixels."""

    samples: int
    question: int
    answer: int


def decoder(width: int, layers: int, inner: int, heads: int, vocabulary: int, **more: Any) -> Settings:
    """A decoder's settings; as many heads for keys as for queries unless ``num_key_value_heads`` says otherwise."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
    } | more


def clip(width: int, layers: int, heads: int, side: int) -> tuple[Settings, Settings]:
    """A CLIP tower on images of ``side`` pixels in patches of 14, and its image processor's settings."""
    tower = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "image_size": side}
    crop = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return tower | {"intermediate_size": 4 * width, "projection_dim": width}, crop


def write_model(folder: Path, shape: Shape) -> None:
    """Configuration and processor."""
    known = FAMILIES[shape.family]
    kind, settings = known.parts["image_processor"]
    family = replace(
        known,
        text=known.text | shape.text,
        vision=known.vision | shape.vision,
        parts=known.parts | {"image_processor": (kind, settings | shape.images)},
    )
    tokenizer = make_tokenizer(family)
    make_config(family, tokenizer).save_pretrained(folder)
    write_processor(family, tokenizer, folder)


@contextmanager
def weights_on(device: str) -> Iterator[None]:
    """Models of folders without weights get random ones, the same each time, on ``device``."""
    read = pretrained._weights

    def drawn(load: Any, setting: str, name: str, **arguments: Any) -> Any:
        if any(Path(name).glob("*.safetensors")):
            return read(load, setting, name, **arguments)
        wanted = {key: arguments.get(key) for key in ("dtype", "attn_implementation") if arguments.get(key)}
        torch.manual_seed(0)
        with torch.device(device):
            return load.__self__._from_config(pretrained.read_config(setting, name), **wanted)

    with mock.patch.object(pretrained, "_weights", drawn):
        yield


def write_data(folder: Path, size: WorldSize) -> None:
    """``images/*.jpg`` and ``data.json``."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    samples = []
    for number in range(size.samples):
        coarse = random.integers(0, 255, (30, 40, 3), np.uint8)
        Image.fromarray(coarse).resize((640, 480)).save(folder / "images" / f"{number}.jpg", quality=90)
        question, answer = (_words(random, n) for n in (size.question, size.answer))
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        samples.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(samples), encoding="utf-8")


def _words(random: np.random.Generator, length: int) -> str:
    count = int(random.integers(length - length // 4, length + length // 4 + 1))
    return " ".join(f"w{i}" for i in random.integers(10, 100, count))
