"""Channel scales and principal components, fitted on the first samples before any shard is written."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch
from safetensors.torch import save as save_safetensors

from teacher_cache.build.context import Build
from teacher_cache.build.inputs import ShardInput, unfit_sample
from teacher_cache.build.signals import finite_logits, finite_states, wanted_states
from teacher_cache.data.conversations import Conversation, Skipped
from teacher_cache.data.sample_reader import SkipCount
from teacher_cache.errors import DataError, TeacherError
from teacher_cache.store.codecs import ChannelScales, fit_channel_scales
from teacher_cache.teachers.teacher import SampleStates, Shown


def calibrate(build: Build) -> dict[str, ChannelScales]:
    """Channel scales and principal components from the first samples' original answers, teacher-forced."""
    config, teacher = build.config, build.teacher
    signals = config.signals
    if signals.codec in ("float32", "float16", "bfloat16") and not signals.pca:
        return {}
    requests = _usable(build)
    states: list[SampleStates] = []
    head = teacher.head()
    for _, batch in teacher.score(requests, wanted_states(signals)):
        states += [s for s in batch if finite_states(s) and finite_logits(s.rows, head, config.speed.head_rows)]
    if not states:
        raise TeacherError(
            f"teacher.model={config.teacher.model}: none of the first {len(requests)} samples has finite logits and "
            f"states in teacher.dtype={config.teacher.dtype}. Set teacher.dtype=bfloat16 or float32, and another output"
        )
    kinds: dict[str, list[torch.Tensor | None]] = {}
    if signals.hidden != "none":
        kinds["hidden"] = [s.text if signals.hidden == "text" else s.rows for s in states]
    if signals.second_last:
        kinds["hidden_second_last"] = [
            s.text_second_last if signals.hidden == "text" else s.rows_second_last for s in states
        ]
    if signals.visual == "states":
        kinds["visual"] = [s.visual for s in states]
    fitted = {}
    for name, tensors in kinds.items():
        rows = [t.float().cpu().numpy() for t in tensors if t is not None]
        if rows:
            fitted[name] = fit_channel_scales(np.concatenate(rows), signals.codec, signals.pca)
    return fitted


def _usable(build: Build) -> list[Shown]:
    """The first ``calibration_samples`` usable samples with their original answers, wherever they begin; where visual
    states are fitted, also the first as many with an image.

    Raises
    ------
    DataError
        Not one sample can be used; says why, with counts.
    """
    signals, skips = build.config.signals, SkipCount()
    count, visual = signals.calibration_samples, signals.visual == "states"
    found: list[Shown] = []
    seen = 0
    waiting = iter(build.samples)
    while len(found) < count or (visual and seen < count):
        chosen = list(itertools.islice(waiting, 2 * count))
        if not chosen:
            break
        if len(found) >= count:  # only images are missing: a part without any is passed over unread
            chosen = [s for s in chosen if isinstance(s, Conversation) and s.image is not None]
        shard = ShardInput.load(build, chosen, original=True)
        for left_out in shard.skipped:
            skips.add(left_out)
        for sample in shard.samples:
            shown = sample.shown(sample.original)
            if reason := unfit_sample(build, shown):
                skips.add(Skipped(sample.sample_id, reason))
            elif len(found) < count or (visual and seen < count and shown.sees):
                found.append(shown)
                seen += shown.sees
    if not found:
        raise DataError(f"none of {len(build.samples):,} samples can be used, so there is nothing to cache: {skips}")
    return found


def scales_to_bytes(scales: dict[str, ChannelScales], fingerprint: str = "") -> bytes:
    """The counterpart of ``reader.scales_from_bytes``; ``fingerprint`` says which cache they were fitted for."""
    tensors = {}
    for name, fitted in scales.items():
        for part in dataclasses.fields(fitted):
            value = getattr(fitted, part.name)
            if value is not None:
                tensors[f"{name}.{part.name}"] = torch.from_numpy(value)
    return bytes(save_safetensors(tensors, {"fingerprint": fingerprint} if fingerprint else None))
