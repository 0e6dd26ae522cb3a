"""Visual signals, one line per distinct image; also of images that nobody in their shard was scored with."""

from __future__ import annotations

import dataclasses

import torch

from teacher_cache.build.context import Build
from teacher_cache.build.inputs import ReadSample, ShardInput, pictures_or_reason
from teacher_cache.build.signals import finite_arrays, wanted_states
from teacher_cache.data.conversations import IMAGE_TAG, Conversation, Skipped
from teacher_cache.store.records import Array


def owned_images(build: Build, number: int) -> dict[str, int]:
    """The images whose lines lie in shard ``number``: their ids and lines, in order."""
    owned = {image_id: place.row for image_id, place in build.image_places.items() if place.shard == number}
    return dict(sorted(owned.items(), key=lambda item: item[1]))


def image_lines(
    build: Build, number: int, shard: ShardInput, visual: dict[str, dict[str, Array]]
) -> list[tuple[str, dict[str, Array] | None]]:
    """The lines of this shard's images, in order. An image whose samples here were all left out is scored alone:
    later shards may use it. One that cannot be read has no line of its own; no sample refers to it."""
    lines: list[tuple[str, dict[str, Array] | None]] = []
    alone = {c.image.image_id: c for c in shard.left_out if c.image is not None}
    for image_id in owned_images(build, number):
        arrays = visual.get(image_id)
        if arrays is None and image_id in alone:
            arrays = _score_image(build, alone[image_id])
        lines.append((image_id, arrays))
    return lines


def _score_image(build: Build, conversation: Conversation) -> dict[str, Array] | None:
    """The arrays of its image, from a prompt that holds the image and nothing after it but the template's words."""
    pictures = pictures_or_reason(conversation, build.config.data.image_folder)
    if isinstance(pictures, Skipped):
        return None
    alone = dataclasses.replace(conversation, questions=(IMAGE_TAG,), answers=("",))
    shown = ReadSample.read(build.teacher.chat, alone, pictures, original=False).shown((), ask=True)
    ((_, (states,)),) = build.teacher.score([shown], wanted_states(build.config.signals))
    assert states.visual is not None
    arrays = build.extractor.image(states.visual)
    return arrays if bool(torch.isfinite(states.visual).all()) and finite_arrays(arrays) else None
