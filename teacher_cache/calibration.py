"""Channel scales and principal components, fitted on the first samples before any shard is written."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch
from safetensors.torch import save as save_safetensors

from teacher_cache.codecs import ChannelScales, fit_channel_scales
from teacher_cache.config import CacheConfig
from teacher_cache.conversations import Conversation
from teacher_cache.inputs import Samples, ShardInput, unfit_sample
from teacher_cache.manifest import CacheError
from teacher_cache.signals import finite_logits, finite_states, wanted_states
from teacher_cache.teacher import SampleStates, ScoreRequest, Teacher, TeacherError
from teacher_cache.tokenization import assemble, template_by_name, tokenize_answer


def calibrate(config: CacheConfig, samples: Samples, teacher: Teacher) -> dict[str, ChannelScales]:
    """Channel scales and principal components from the first samples' original answers, teacher-forced."""
    signals = config.signals
    if signals.codec in ("float32", "float16", "bfloat16") and not signals.pca:
        return {}
    template = template_by_name(config.teacher.template)
    shard = ShardInput.load(
        config, teacher, _first(samples, 2 * signals.calibration_samples, signals.visual == "states")
    )
    tokenized = [
        assemble(p, [tokenize_answer(a, template, teacher.tokenizer) for a in c.answers])
        for c, p in zip(shard.conversations, shard.prompts, strict=True)
    ]
    fit = [i for i in range(len(tokenized)) if not unfit_sample(config, teacher, tokenized[i])]
    shown = [i for i in fit if shard.images[i] is not None] if signals.visual == "states" else []
    fit = sorted({*fit[: signals.calibration_samples], *shown[: signals.calibration_samples]})
    if not fit:
        raise CacheError("no usable sample among the first ones, so channel scales cannot be fitted: check data.path")
    states: list[SampleStates] = []
    requests, head = [ScoreRequest(tokenized[i], shard.images[i]) for i in fit], teacher.head()
    for _, batch in teacher.score(requests, wanted_states(signals)):
        states += [s for s in batch if finite_states(s) and finite_logits(s.rows, head, config.speed.head_rows)]
    if not states:
        raise TeacherError(
            f"teacher.model={config.teacher.model}: none of the first {len(fit)} samples has finite logits and states "
            f"in teacher.dtype={config.teacher.dtype}. Set teacher.dtype=bfloat16 or float32, and another output"
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


def _first(samples: Samples, count: int, images: bool) -> Samples:
    """The first ``count`` samples, more than are needed, since some cannot be used; where ``images`` are to be fitted,
    also as many with an image, wherever they begin."""
    chosen = set(range(min(count, len(samples))))
    if images:
        shown = (i for i, s in enumerate(samples) if isinstance(s, Conversation) and s.image is not None)
        chosen |= set(itertools.islice(shown, count))
    return [samples[i] for i in sorted(chosen)]


def scales_to_bytes(scales: dict[str, ChannelScales]) -> bytes:
    """The counterpart of ``reader.scales_from_bytes``."""
    tensors = {}
    for name, fitted in scales.items():
        for part in dataclasses.fields(fitted):
            value = getattr(fitted, part.name)
            if value is not None:
                tensors[f"{name}.{part.name}"] = torch.from_numpy(value)
    return bytes(save_safetensors(tensors))
