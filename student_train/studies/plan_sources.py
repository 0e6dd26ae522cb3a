"""What a plan counts of a source: its manifest (or the one that is to come), and what an epoch takes of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from student_train.config import FitConfig, SourceConfig
from student_train.losses.catalogue import Answers
from student_train.losses.needs import needed_arrays
from teacher_cache.config import CacheConfig, load_config
from teacher_cache.data.images import image_tokens_of
from teacher_cache.data.rows import expanded_length, text_positions
from teacher_cache.errors import ConfigError
from teacher_cache.models.model_config import load_model_config
from teacher_cache.models.model_sizes import size_of
from teacher_cache.store.manifest import MANIFEST, Manifest, new_manifest, read_manifest
from teacher_cache.store.records import Axis, TeacherShape, pairs
from teacher_cache.store.storage import Storage


def source_manifest(source: SourceConfig) -> Manifest:
    """The manifest of a finished cache; else the one that ``made_with`` will write, with expected counts.

    Raises ``ConfigError``: neither is there. ``CacheError``: a cache is there that may not be used: of another format,
    changed.
    """
    if source.cache and Storage(source.cache).exists(MANIFEST):
        manifest = read_manifest(Storage(source.cache))
        if manifest.complete:
            return manifest
    expected = source.expected
    if not expected.samples:
        raise ConfigError(
            f"{source.cache or source.data}: not there yet (or not complete), and sources[…].expected says nothing of "
            "its size. Make it, or give expected: {samples, rows_per_sample, tokens_per_sample, images} (and "
            "made_with: for a cache)"
        )
    phase_one = load_config(CacheConfig, source.made_with or None)
    facts: dict[str, Any] = {"shape": {"hidden_size": 1, "vocabulary": 1}}
    image_tokens = 0
    if source.made_with:
        teacher = load_model_config(phase_one.teacher.model, phase_one.teacher.revision)
        text = teacher.get_text_config()
        shape, image_tokens = TeacherShape(text.hidden_size, text.vocab_size), _image_positions(teacher, source)
        facts = {"shape": dataclasses.asdict(shape), "model": phase_one.teacher.model}
    with_image = round(expected.samples * expected.image_share)
    counts = {
        "samples": expected.samples,
        "rows": round(expected.samples * expected.rows_per_sample),
        "tokens": round(expected.samples * expected.tokens_per_sample),
        "positions": round(expected.samples * float(text_positions(expected.tokens_per_sample, expected.image_share))),
        "images": expected.images,
        "runs": with_image,
        "image_positions": with_image * image_tokens,
        **dict.fromkeys(("least_image", "most_image"), image_tokens),
    }
    manifest = new_manifest(phase_one, facts, {}, expected.samples)
    return dataclasses.replace(manifest, counts=counts)


def _image_positions(teacher: Any, source: SourceConfig) -> int:
    """What an image takes in a teacher of this configuration; not asked for where no sample has one."""
    expected = source.expected
    if expected.positions_per_image or not expected.image_share or teacher.get_text_config() is teacher:
        return expected.positions_per_image
    if teacher.model_type != "llava":
        raise ConfigError(
            f"{source.cache}: how many positions an image takes in a {teacher.model_type} model is known to its "
            "processor alone. Give their mean as sources[…].expected.positions_per_image (teacher-cache plan counts "
            "them; Qwen2.5-VL: 391 for 640 × 480 pixels)"
        )
    return image_tokens_of(teacher)


@dataclass(frozen=True)
class Epoch:
    """What an epoch takes of one source. tokens: of all its samples, image positions counted · longest: tokens of the
    longest sample to expect · cache_bytes: of the arrays that the losses need, an image's once for each sample ·
    teacher_flops: of an online teacher's forward passes, 2 a weight and token."""

    samples: int
    tokens: float
    longest: float
    cache_bytes: float = 0.0
    teacher_flops: float = 0.0


def epoch_of(config: FitConfig, source: SourceConfig, manifest: Manifest, image_tokens: int) -> Epoch:
    counts = manifest.counts
    whole, tokens = max(counts["samples"], 1), counts["tokens"]
    samples = int(source.share * min(source.max_samples or whole, counts["samples"]))
    images = counts["runs"]
    mean = expanded_length(tokens, images, images * image_tokens) / whole
    longest = max(mean, float(manifest.teacher.get("max_length", 0)) if source.cache else 0.0)
    if not distils(source):
        return Epoch(samples, samples * mean, longest)
    n = manifest.image_tokens
    lines: dict[Axis, float] = {
        **{"token": tokens, "row": counts["rows"], "position": counts["positions"], "run": images, "image": images},
        **{"patch": counts["image_positions"], "pair": images * pairs(n), "cell": counts["rows"] * n},
    }
    names, visual = needed_arrays(config.losses, manifest)
    wanted = {"input_ids", "loss_mask", "runs", *names, *visual}
    arrays = [spec for spec in (*manifest.arrays, *manifest.image_arrays) if spec.name in wanted]
    size = sum(spec.line_bytes * lines[spec.axis] for spec in arrays)
    for url in filter(None, (source.before, source.onto)):  # the same rows' states in other caches
        other = source_manifest(dataclasses.replace(source, cache=url))
        size += sum(s.line_bytes * lines[s.axis] for s in other.arrays if s.name in ("hidden", "hidden_scale"))
    flops = 0.0
    if any(not isinstance(loss.entry, Answers) for loss in config.losses):
        read = expanded_length(tokens, images, counts["image_positions"])
        flops = 2.0 * _teacher_parameters(str(manifest.teacher.get("model", ""))) * read
    part = samples / whole
    return Epoch(samples, samples * mean, longest, part * size, part * flops)


def distils(source: SourceConfig) -> bool:
    return bool(source.cache) and source.answers == "cached"


def _teacher_parameters(name: str) -> int:
    """0 for a teacher whose configuration is not at hand: a cache does not need it."""
    try:
        return size_of(load_model_config(name)).all
    except ConfigError:
        return 0
