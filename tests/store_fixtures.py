"""Small valid caches without a teacher: random final-layer states, and everything else as it follows from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_safetensors

from teacher_cache.calibration import scales_to_bytes
from teacher_cache.codecs import ChannelScales, fit_channel_scales
from teacher_cache.config import PRESETS, CacheConfig, DataConfig, LayoutConfig, SignalsConfig, TeacherConfig
from teacher_cache.conversations import Skipped
from teacher_cache.data.rows import positions_of
from teacher_cache.manifest import Manifest, new_manifest, write_manifest
from teacher_cache.records import TeacherRecord, TeacherShape
from teacher_cache.signals import Extractor
from teacher_cache.storage import Storage
from teacher_cache.teacher import SampleStates, TeacherDescription
from teacher_cache.tokenization import TokenizedSample
from teacher_cache.writer import HEAD, SCALES, ImagePlace, finish, write_images, write_shard

SHAPE = TeacherShape(hidden_size=40, vocabulary=97, image_tokens=4)
IMAGE_TOKEN, END_TOKEN = 96, 2


@dataclass(frozen=True)
class Made:
    """A cache that was written, and what was put into it."""

    storage: Storage
    manifest: Manifest
    records: list[TeacherRecord]
    states: list[SampleStates]
    head: torch.Tensor
    images: dict[str, dict[str, Any]]


def signals(preset: str = "standard", **fields: Any) -> SignalsConfig:
    return SignalsConfig(**{"preset": preset, "top_k": 8, **PRESETS[preset], **fields})


def synthetic_cache(
    folder: str | Path,
    samples: int = 11,
    *,
    shard_samples: int = 4,
    skipped: tuple[int, ...] = (6,),
    seed: int = 0,
    options: dict[str, Any] | None = None,
    layout: dict[str, Any] | None = None,
    shape: TeacherShape = SHAPE,
    complete: bool = True,
    config: SignalsConfig | None = None,
) -> Made:
    """Write a cache of ``samples`` samples (those in ``skipped`` left out with a reason) at ``folder``."""
    config = config or signals()
    random = np.random.default_rng(seed)
    storage = Storage(folder, options)
    manifest = synthetic_manifest(samples, config, shard_samples, layout or {}, shape)
    write_manifest(storage, manifest)
    head = torch.from_numpy(random.normal(size=(shape.vocabulary, shape.hidden_size)).astype(np.float32))
    scales = _scales(random, config, shape)
    storage.write(HEAD, [save_safetensors({"head": head})])
    storage.write(SCALES, [scales_to_bytes(scales)])
    extractor = Extractor(config, shape, head, scales)
    made = Made(storage, manifest, [], [], head, {})
    for number in range(manifest.planned_shards):
        _write(made, extractor, random, number, shard_samples, samples, skipped)
    return dataclasses.replace(made, manifest=finish(storage, manifest)) if complete else made


def synthetic_manifest(
    samples: int, config: SignalsConfig, shard_samples: int, layout: dict[str, Any], shape: TeacherShape
) -> Manifest:
    description = TeacherDescription("toy", "w", "t0k3n1z3r", shape, 2, "float32", IMAGE_TOKEN, END_TOKEN, "p")
    cache = CacheConfig(
        data=DataConfig(path="toy.json"),
        teacher=TeacherConfig(model="toy"),
        signals=config,
        layout=LayoutConfig(**{"shard_samples": shard_samples, **layout}),
    )
    data = {"files": [{"name": "toy.json", "sha256": "0"}], "regenerate": "none"}
    return dataclasses.replace(new_manifest(cache, dataclasses.asdict(description), data, samples), created_at="")


def _scales(random: np.random.Generator, config: SignalsConfig, shape: TeacherShape) -> dict[str, ChannelScales]:
    names = ("hidden", "hidden_second_last", "visual")
    samples = {name: random.normal(size=(200, shape.hidden_size)).astype(np.float32) for name in names}
    return {name: fit_channel_scales(sample, config.codec, config.pca) for name, sample in samples.items()}


def _write(
    made: Made,
    extractor: Extractor,
    random: np.random.Generator,
    number: int,
    size: int,
    samples: int,
    skipped: tuple[int, ...],
) -> None:
    kept = [i for i in range(number * size, min((number + 1) * size, samples)) if i not in skipped]
    left = [i for i in range(number * size, min((number + 1) * size, samples)) if i in skipped]
    tokenized = [_tokens(random, i) for i in kept]
    states = [_states(random, extractor, sample) for sample in tokenized]
    arrays = extractor.records([s.sample_id for s in tokenized], states) if kept else []
    records = [_record(i, sample, a) for i, sample, a in zip(kept, tokenized, arrays, strict=True)]
    images: list[tuple[str, Any]] = []
    for record, state in zip(records, states, strict=True):
        if record.image_id and record.image_id not in made.images:
            lines = extractor.image(state.visual) if made.manifest.image_arrays else {}
            made.images[record.image_id] = {"place": ImagePlace(number, len(images)), **lines}
            images.append((record.image_id, lines))
    places = [made.images[r.image_id]["place"] if r.image_id else ImagePlace() for r in records]
    if made.manifest.image_arrays:
        write_images(made.storage, made.manifest, number, images)
    else:
        places = [ImagePlace()] * len(records)
    reasons = [Skipped(f"sample-{i}", "left out by the test") for i in left]
    write_shard(made.storage, made.manifest, number, records, places, reasons)
    made.records.extend(records)
    made.states.extend(states)


def _tokens(random: np.random.Generator, i: int) -> TokenizedSample:
    """Two turns; every second sample has an image; answers of 0 (only the end token) to 7 tokens."""
    ids: list[int] = [1]
    mask = [False]
    for turn in range(2):
        question = random.integers(3, 90, random.integers(1, 5)).tolist()
        answer = [*random.integers(3, 90, random.integers(0, 8)).tolist(), END_TOKEN]
        image = [IMAGE_TOKEN] if turn == 0 and i % 2 == 0 else []
        ids += [*image, *question, *answer]
        mask += [False] * (len(image) + len(question)) + [True] * len(answer)
    return TokenizedSample(f"sample-{i}", np.array(ids, np.int64), np.array(mask, np.bool_))


def _states(random: np.random.Generator, extractor: Extractor, sample: TokenizedSample) -> SampleStates:
    shape = extractor.shape
    at = positions_of(sample.input_ids, sample.loss_mask, IMAGE_TOKEN, shape.image_tokens)
    hidden = torch.from_numpy(random.normal(size=(at.length, shape.hidden_size)).astype(np.float32))
    second = torch.from_numpy(random.normal(size=(at.length, shape.hidden_size)).astype(np.float32))
    return SampleStates(
        rows=hidden[at.rows],
        text=hidden[at.text],
        visual=hidden[at.visual] if len(at.visual) else None,
        rows_second_last=second[at.rows],
        text_second_last=second[at.text],
        attention=torch.rand(len(at.rows), shape.image_tokens) if len(at.visual) else None,
    )


def _record(i: int, sample: TokenizedSample, arrays: dict[str, Any]) -> TeacherRecord:
    return TeacherRecord(
        sample_id=sample.sample_id,
        image_id=f"image-{i % 3}.png" if i % 2 == 0 else "",
        questions=("what?", "where?"),
        answers=(f"answer {i}", "there"),
        original_answers=("a", "b"),
        source="original",
        arrays={"input_ids": sample.input_ids.astype(np.uint16), "loss_mask": sample.loss_mask, **arrays},
    )
