"""Visual signals, one line per distinct image: which shard owns an image, and lines for images nobody scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from teacher_cache.build.inputs import Samples, ShardInput, image_or_reason
from teacher_cache.build.signals import Extractor, finite_arrays, wanted_states
from teacher_cache.config import CacheConfig
from teacher_cache.data.conversations import Conversation, Skipped
from teacher_cache.data.spool import SampleFile
from teacher_cache.data.tokenization import Template, TokenizedSample, template_by_name, tokenize_prompt
from teacher_cache.store.records import Array
from teacher_cache.store.writer import ImagePlace
from teacher_cache.teachers.teacher import ScoreRequest, Teacher


def plan_images(samples: Samples, shard_samples: int) -> dict[str, ImagePlace]:
    """Where each distinct image's line stands: in the shard in which it comes first, in order of appearance."""
    places: dict[str, ImagePlace] = {}
    filled: dict[int, int] = {}
    for position, image_id in enumerate(samples.image_ids() if isinstance(samples, SampleFile) else _ids(samples)):
        if not image_id or image_id in places:
            continue
        shard = position // shard_samples
        places[image_id] = ImagePlace(shard, filled.get(shard, 0))
        filled[shard] = filled.get(shard, 0) + 1
    return places


def _ids(samples: Samples) -> Iterator[str]:
    for sample in samples:
        yield sample.image.image_id if isinstance(sample, Conversation) and sample.image is not None else ""


def owned_images(
    config: CacheConfig,
    teacher: Teacher,
    extractor: Extractor,
    shard: ShardInput,
    owned: dict[str, int],
    visual: dict[str, dict[str, Array]],
) -> list[tuple[str, dict[str, Array] | None]]:
    """The lines of this shard's images, in order. An image whose samples here were all left out is scored alone:
    later shards may use it. One that cannot be read has no line of its own; no sample refers to it."""
    template = template_by_name(config.teacher.template)
    lines: list[tuple[str, dict[str, Array] | None]] = []
    alone = {c.image.image_id: c for c in shard.left_out if c.image is not None}
    for image_id, _ in sorted(owned.items(), key=lambda item: item[1]):
        if image_id not in visual and image_id in alone:
            visual.update(_score_image(config, teacher, extractor, alone[image_id], template))
        lines.append((image_id, visual.get(image_id)))
    return lines


def _score_image(
    config: CacheConfig, teacher: Teacher, extractor: Extractor, conversation: Conversation, template: Template
) -> dict[str, dict[str, Array]]:
    """{image_id: arrays} from a prompt that holds the image and nothing after it but the template's words."""
    image = image_or_reason(conversation, config.data.image_folder)
    if isinstance(image, Skipped) or image is None:
        return {}
    assert conversation.image is not None
    probe = dataclasses.replace(conversation, questions=("",), answers=("",))
    ids = np.asarray(tokenize_prompt(probe, template, teacher.tokenizer).segments[0], np.int64)
    sample = TokenizedSample(conversation.sample_id, ids, np.zeros(len(ids), np.bool_))
    for _, states in teacher.score([ScoreRequest(sample, image)], wanted_states(extractor.signals)):
        assert states[0].visual is not None
        arrays = extractor.image(states[0].visual)
        finite = bool(torch.isfinite(states[0].visual).all()) and finite_arrays(arrays)
        return {conversation.image.image_id: arrays} if finite else {}
    return {}
