"""The student and everything that is compared with the teacher, as one module: a micro-batch in, a loss out.

One module, so that DDP and FSDP wrap student and projectors together. The output head is applied at predicting
positions only, in chunks (``head_loss``); every term is a weighted sum whose weights already hold the divisions by
the global batch, so micro-batches, ranks and accumulation need no further scaling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from student_train.config import HIDDEN_LOSSES, LOGIT_LOSSES, LossSpec
from student_train.feed.batch import StudentBatch
from student_train.losses import image_losses as relations
from student_train.losses import row_losses as losses
from student_train.losses.head_loss import head_losses
from student_train.losses.shared_ids import shared_count
from student_train.losses.targets import (
    ImageTargets,
    RowTargets,
    decoded,
    image_targets,
    row_targets,
    scales_on,
)
from teacher_cache.config import SignalsConfig
from teacher_cache.errors import CacheError, ConfigError
from teacher_cache.store.codecs import ChannelScales
from teacher_cache.store.manifest import Manifest
from teacher_cache.store.reader import TeacherCache


@dataclass(frozen=True)
class TeacherSide:
    """What the losses need of one cache beside its batches. ``head`` (V, d) lies on the device, without gradient."""

    signals: SignalsConfig
    scales: dict[str, ChannelScales]
    head: Tensor | None
    hidden_size: int
    image_tokens: int
    vocabulary: int | None = None
    """How many ids the teacher's logits have, where the student may have another number."""
    head_square: Tensor | None = None
    """WᵀW over the ids that both have, for the relation loss on logits from visual states: once a run."""


def needed_arrays(specs: Sequence[LossSpec], manifest: Manifest) -> tuple[list[str], list[str]]:
    """Names of the cache's arrays, and of its per-image arrays, that these losses read."""
    names: set[str] = set()
    visual: set[str] = set()
    for spec in specs:
        if spec.name in LOGIT_LOSSES:
            names |= _logit_arrays(spec, manifest.signals_config)
        if spec.name in HIDDEN_LOSSES:
            names.add("hidden" if spec.layer == "last" else "hidden_second_last")
        if spec.name == "attention_mse":
            names.add("attention")
        if spec.name == "similarity_mse":
            names.add("hidden")
        if spec.name in ("visual_kl", "relation", "similarity_mse") or spec.tokens == "all":
            visual |= {s.name for s in manifest.image_arrays} or {"visual"}
    if manifest.signals["codec"] in ("int8", "int4"):
        names |= {f"{n}_scale" for n in names if n.startswith("hidden")}
    return sorted(names), sorted(visual)


def _logit_arrays(spec: LossSpec, signals: SignalsConfig) -> set[str]:
    """Of coarse states ``exact`` takes the tail alone: the head is the stored top-k's (``targets.exact_logits``). A
    cache has a top-k for answer rows only."""
    kept = {"topk_ids", "topk_logprobs", "stats"}
    if spec.source == "topk":
        return kept
    if spec.source == "sampled":
        return {"sampled_ids", "sampled_counts", "stats"} | (kept if signals.sampled_from == "tail" else set())
    coarse = signals.codec == "int4" or signals.pca > 0
    return {"hidden"} | (kept if coarse and signals.top_k and spec.tokens == "answer" else set())


def check_losses(specs: Sequence[LossSpec], manifest: Manifest, url: str) -> None:
    """Losses that this cache's settings cannot serve, before the first step."""
    for spec in specs:
        _check_visual(spec, manifest, url)
        if spec.tokens != "answer" and spec.name in (*LOGIT_LOSSES, *HIDDEN_LOSSES, "similarity_mse"):
            if manifest.signals["hidden"] != "text":
                raise CacheError(
                    f"{url}: {spec.name} on {spec.tokens} tokens needs states of all text positions, the cache has "
                    f"signals.hidden={manifest.signals['hidden']}. Use tokens: answer, or build with "
                    "signals.hidden=text"
                )
            if spec.name in LOGIT_LOSSES and spec.source != "exact":
                raise ConfigError(f"losses: {spec.name} on {spec.tokens} tokens is exact only; set source: exact")
            if spec.tokens == "all" and manifest.signals["visual"] != "states":
                raise CacheError(
                    f"{url}: {spec.name} on all tokens needs visual states, the cache has "
                    f"signals.visual={manifest.signals['visual']}. Use tokens: text, or build with "
                    "signals.visual=states"
                )
            if spec.tokens == "all" and spec.layer == "second_last":
                raise ConfigError(
                    f"losses: {spec.label} on all tokens: visual states are cached for the last layer only"
                )
        if (
            spec.source == "topk"
            and spec.name in LOGIT_LOSSES
            and spec.temperature not in manifest.signals["temperatures"]
        ):
            raise ConfigError(
                f"losses: {spec.name} at temperature {spec.temperature:g} from top-k is exact only on the cache's grid "
                f"{manifest.signals['temperatures']}. Take one of these, or source: exact"
            )


def check_shared(specs: Sequence[LossSpec], teacher: int, student: int, visual: str, url: str) -> None:
    """Refuse what cannot be cut to the shared ids, because only sums over all of the teacher's ids are stored.

    Raises ``ConfigError``.
    """
    if teacher <= student:
        return
    for spec in specs:
        standardised = spec.name == "forward_kl_standardised" and spec.source == "topk"
        gram = spec.name == "relation" and spec.space == "logits" and visual == "gram"
        if standardised or gram:
            stored = "mean and deviation of the logits" if standardised else "Gram of the logits"
            instead = "source: exact" if standardised else "space: hidden, or a cache with signals.visual=states"
            raise ConfigError(
                f"losses: {spec.name}: {url} holds the {stored} over the teacher's {teacher:,} ids, and the student "
                f"has {student:,}. Take {instead}"
            )


_VISUAL = {"visual_kl": ("states", "topk"), "relation": ("states", "gram"), "similarity_mse": ("states",)}


def _check_visual(spec: LossSpec, manifest: Manifest, url: str) -> None:
    wanted, found = _VISUAL.get(spec.name, ()), manifest.signals["visual"]
    if wanted and found not in wanted:
        raise CacheError(
            f"{url}: {spec.name} needs signals.visual={' or '.join(wanted)}, the cache has {found}. Build one with "
            "that signal (teacher-cache plan prices it), or leave the loss out"
        )


class DistilledStudent(nn.Module):
    """``model`` plus one Linear–GELU–Linear projector per hidden loss layer; teachers are data, not submodules."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        specs: Sequence[LossSpec],
        teachers: Sequence[TeacherSide | None],
        *,
        head_rows: int,
        image_tokens: int,
    ) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = list(model.model.language_model._no_split_modules or [])  # what FSDP wraps by itself
        self._specs, self._teachers = tuple(specs), list(teachers)
        self._head_rows, self._image_tokens = head_rows, image_tokens
        for spec in specs:
            for teacher in teachers:
                if teacher is not None and (spec.tokens == "all" or spec.name in (*_VISUAL, "attention_mse")):
                    relations.pooled_grid(teacher.image_tokens, image_tokens, spec.pool)
        width = model.config.get_text_config().hidden_size
        layers = {spec.layer for spec in specs if spec.name in HIDDEN_LOSSES}
        sizes = {t.hidden_size for t in teachers if t is not None}
        if layers and len(sizes) != 1:
            raise ConfigError(f"hidden losses need teachers of one width, the sources have {sorted(sizes)}")
        self.projectors = nn.ModuleDict(
            {layer: losses.HiddenProjector(width, next(iter(sizes))) for layer in sorted(layers)}
        ).to(torch.promote_types(model.dtype, torch.float32))  # trained, and so not in half precision

    def forward(self, batch: StudentBatch, source: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(the weighted loss of this micro-batch, each term's unweighted part of it, detached)."""
        teacher = self._teachers[source]
        states = self._states(batch)
        rows = states.last[batch.row_sample, batch.row_position]
        targets = self._row_targets(batch, teacher)
        parts: dict[str, Tensor] = {}
        total = self._head_terms(rows, targets, batch, parts)
        for spec in self._specs:
            weighted = batch.averaged(spec.average)
            if spec.name in HIDDEN_LOSSES:
                value = self._hidden_term(spec, weighted, states, targets, teacher)
            elif spec.name in LOGIT_LOSSES and spec.tokens != "answer":
                value = self._all_token_logits(spec, weighted, states, teacher)
            elif spec.name == "attention_mse":
                value = self._attention_term(weighted, states, targets)
            elif spec.name in ("visual_kl", "relation", "similarity_mse"):
                value = self._visual_term(spec, weighted, states, targets, teacher)
            else:
                continue
            parts[spec.label] = value.detach()
            total = total + spec.weight * value
        return total + self._reach_all(batch), parts

    def rows(self, batch: StudentBatch, source: int) -> tuple[Tensor, RowTargets]:
        """(R, d) the student's states in the answer rows, and what the teacher has there; evaluation compares these."""
        states = self._states(batch).last  # (B, S, d)
        return states[batch.row_sample, batch.row_position], self._row_targets(batch, self._teachers[source])

    def _reach_all(self, batch: StudentBatch) -> Tensor:
        """Zero, by way of the multimodal projector (and of a trained tower) where the batch has no image.

        DDP and FSDP need every trained module in every backward pass of every rank, and a projector trained alone
        needs one at all. Its gradient is then zero, not absent, however many ranks there are.
        """
        if len(batch.visual_sample):
            return batch.row_weight.new_zeros(())
        llava: Any = self.model.model
        first = llava.multi_modal_projector.linear_1
        blank = torch.zeros(1, first.in_features, dtype=first.weight.dtype, device=batch.row_weight.device)
        if any(p.requires_grad for p in llava.vision_tower.parameters()):
            side = self.model.config.vision_config.image_size
            pixels = blank.new_zeros(1, 3, side, side)
            blank = vision_features(llava, pixels)
        return llava.multi_modal_projector(blank).sum() * 0.0

    def _head_terms(self, rows: Tensor, targets: RowTargets, batch: StudentBatch, parts: dict[str, Tensor]) -> Tensor:
        """Cross-entropy and the answer rows' logit losses, in one sweep over chunks of rows."""
        specs = [s for s in self._specs if s.name in ("cross_entropy", *LOGIT_LOSSES) and s.tokens == "answer"]
        total = rows.sum() * 0.0
        if not specs:
            return total
        for rows_of, average in sorted({(s.rows, s.average) for s in specs}):
            group = [s for s in specs if (s.rows, s.average) == (rows_of, average)]
            weight = batch.averaged(average).row_weight
            if rows_of == "llavadi":
                weight = weight * ~first_rows(batch.row_sample, batch.row_position)
            head = self.model.get_output_embeddings().weight
            weights: dict[str, float] = {s.name: s.weight for s in group}
            value, sums = head_losses(rows, head, targets, group, weights, weight, self._head_rows)
            total = total + value
            parts.update(sums)
        return total

    def _hidden_term(
        self, spec: LossSpec, batch: StudentBatch, states: _States, targets: RowTargets, teacher: TeacherSide | None
    ) -> Tensor:
        assert teacher is not None
        measure = losses.hidden_mse if spec.name == "hidden_mse" else losses.hidden_cosine
        projector = self.projectors[spec.layer]
        student = states.last if spec.layer == "last" else states.second_last
        assert student is not None
        stored = targets.hidden if spec.layer == "last" else targets.hidden_second_last
        assert stored is not None
        if spec.tokens == "answer":
            picked, weight = student[batch.row_sample, batch.row_position], batch.row_weight
            if spec.rows == "llavadi":
                weight = weight * ~first_rows(batch.row_sample, batch.row_position)
            return (measure(stored.decode(slice(None)), projector(picked)) * weight).sum()
        text = replace(stored, lines=None)
        weight = batch.text_token_weight if spec.tokens == "all" else batch.position_weight
        picked = student[batch.text_sample, batch.text_position]
        total = (measure(text.decode(slice(None)), projector(picked)) * weight).sum()
        if spec.tokens == "all" and len(batch.visual_sample):
            images = self._image_states(spec, batch, teacher)
            per_token = measure(images.flatten(0, 1), projector(self._visual(states.last, batch)).flatten(0, 1))
            total = total + (per_token * batch.image_token_weight.repeat_interleave(images.shape[1])).sum()
        return total

    def _all_token_logits(
        self, spec: LossSpec, batch: StudentBatch, states: _States, teacher: TeacherSide | None
    ) -> Tensor:
        """A logit loss on all text positions, and on the image positions too for ``tokens: all`` (LLAVADI, table 2)."""
        assert teacher is not None
        states_only = {name: array for name, array in batch.arrays.items() if name.startswith("hidden")}
        side = (teacher.signals, teacher.scales, teacher.head)
        targets = row_targets(states_only, None, *side, vocabulary=teacher.vocabulary)
        weight = batch.text_token_weight if spec.tokens == "all" else batch.position_weight
        rows = states.last[batch.text_sample, batch.text_position]
        if spec.tokens == "all" and len(batch.visual_sample):
            images = self._image_states(spec, batch, teacher).flatten(0, 1)
            assert targets.hidden is not None
            joined = torch.cat([targets.hidden.decode(slice(None)), images])
            targets = replace(targets, hidden=decoded(joined))
            rows = torch.cat([rows, self._visual(states.last, batch).flatten(0, 1)])
            weight = torch.cat([weight, batch.image_token_weight.repeat_interleave(self._image_tokens)])
        head = self.model.get_output_embeddings().weight
        value, _ = head_losses(rows, head, targets, [spec], {spec.name: 1.0}, weight, self._head_rows)
        return value

    def _attention_term(self, batch: StudentBatch, states: _States, targets: RowTargets) -> Tensor:
        assert states.attention is not None
        assert targets.attention is not None
        total = states.last.sum() * 0.0
        for sample, start in zip(batch.visual_sample, batch.visual_start, strict=True):
            mine = batch.row_sample == sample
            rows = states.attention[sample][batch.row_position[mine]]
            rows = rows[:, start : start + self._image_tokens]
            relations.pooled_grid(targets.attention.shape[1], rows.shape[1], 0)
            value = losses.attention_mse(targets.attention[mine], rows)
            total = total + (value * batch.row_weight[mine]).sum()
        return total

    def _visual_term(
        self, spec: LossSpec, batch: StudentBatch, states: _States, targets: RowTargets, teacher: TeacherSide | None
    ) -> Tensor:
        if not len(batch.visual_sample):
            return states.last.sum() * 0.0
        assert teacher is not None
        student = self._visual(states.last, batch)
        if spec.name == "similarity_mse":
            return self._similarity(spec, batch, states, targets, teacher, student)
        images = self._image_targets(batch, teacher)
        grid = relations.pooled_grid(teacher.image_tokens, self._image_tokens, spec.pool)
        head = self.model.get_output_embeddings().weight
        if spec.name == "relation":
            shared = shared_count(teacher.vocabulary, len(head))
            images = replace(images, head=None if images.head is None else images.head[:shared])
            target = relations.teacher_gram(images, spec.space, grid)
            value = relations.relation_loss(target, relations.student_gram(student, head[:shared], spec.space))
            return (value * batch.image_weight).sum()
        kl = replace(spec, name="forward_kl", source="exact" if images.states is not None else "topk")
        weight = (batch.image_weight / self._image_tokens).repeat_interleave(self._image_tokens)
        rows = relations.visual_rows(images, grid)
        value, _ = head_losses(student.flatten(0, 1), head, rows, [kl], {"forward_kl": 1.0}, weight, self._head_rows)
        return value

    def _similarity(
        self,
        spec: LossSpec,
        batch: StudentBatch,
        states: _States,
        targets: RowTargets,
        teacher: TeacherSide,
        student: Tensor,
    ) -> Tensor:
        """Cosines of image positions with answer rows, as in LLAVADI's code, or with all text (``tokens: text``)."""
        images, total = self._image_states(spec, batch, teacher), states.last.sum() * 0.0
        assert targets.hidden is not None
        stored, owner, weight = targets.hidden, batch.row_sample, batch.row_weight
        rows = states.last[batch.row_sample, batch.row_position]
        if spec.tokens == "text":
            stored, owner, weight = replace(stored, lines=None), batch.text_sample, batch.position_weight
            rows = states.last[batch.text_sample, batch.text_position]
        text = stored.decode(slice(None))
        for image, sample in enumerate(batch.visual_sample):
            mine = owner == sample
            value = losses.similarity_mse(images[image], text[mine], student[image], rows[mine])
            total = total + (value * weight[mine]).sum()
        return total

    def _row_targets(self, batch: StudentBatch, teacher: TeacherSide | None) -> RowTargets:
        if teacher is None:
            return RowTargets(answer_ids=batch.answer_ids)
        side = (teacher.signals, teacher.scales, teacher.head)
        return row_targets(batch.arrays, batch.answer_ids, *side, batch.row_index, teacher.vocabulary)

    def _image_targets(self, batch: StudentBatch, teacher: TeacherSide) -> ImageTargets:
        side = (teacher.signals, teacher.scales, teacher.image_tokens, teacher.head, teacher.head_square)
        return image_targets(batch.visual, *side, teacher.vocabulary)

    def _image_states(self, spec: LossSpec, batch: StudentBatch, teacher: TeacherSide) -> Tensor:
        """(I, N, d) the teacher's visual states, pooled where the spec says so, with the student's N."""
        stored = self._image_targets(batch, teacher).states
        assert stored is not None
        grid = relations.pooled_grid(teacher.image_tokens, self._image_tokens, spec.pool)
        states = stored.decode(slice(None))
        return states if grid is None else relations.pool_grid(states, *grid)

    def _visual(self, hidden: Tensor, batch: StudentBatch) -> Tensor:
        """(I, N, d) the student's states at image positions."""
        places = batch.visual_start.unsqueeze(1) + torch.arange(self._image_tokens, device=hidden.device)
        return hidden[batch.visual_sample.unsqueeze(1), places]

    def _states(self, batch: StudentBatch) -> _States:
        second = any(s.layer == "second_last" for s in self._specs)
        attention = any(s.name == "attention_mse" for s in self._specs)
        llava: Any = self.model.model
        options = {
            "attention_mask": batch.attention_mask if batch.position_ids is None else None,
            "position_ids": batch.position_ids,
            "output_hidden_states": second,
            "output_attentions": attention,
            "use_cache": False,
        }
        if batch.image_features is not None:
            embeddings = merge_features(llava, batch.input_ids, batch.image_features, self.model.config.image_token_id)
            out = llava.language_model(inputs_embeds=embeddings, **options)
        else:
            pixels = batch.pixel_values
            pixels = pixels.to(llava.vision_tower.dtype) if pixels is not None else None
            out = llava(input_ids=batch.input_ids, pixel_values=pixels, **options)
        return _States(
            out.last_hidden_state,
            out.hidden_states[-2] if second else None,
            out.attentions[-1].mean(1) if attention else None,
        )


@dataclass(frozen=True)
class _States:
    last: Tensor  # (B, S, d) after the final norm
    second_last: Tensor | None
    attention: Tensor | None  # (B, S, S), last layer, mean over heads


def first_rows(row_sample: Tensor, row_position: Tensor) -> Tensor:
    """(R,) bool: rows of first answer tokens, where a row's position does not follow the one before it."""
    follows = (row_sample[1:] == row_sample[:-1]) & (row_position[1:] == row_position[:-1] + 1)
    return torch.cat([torch.ones_like(row_sample[:1], dtype=torch.bool), ~follows])


def vision_features(llava: Any, pixels: Tensor) -> Tensor:
    """(I, N, d_vision) what the multimodal projector reads: the chosen layer, without the class token if so set."""
    layer = llava.config.vision_feature_layer
    out = llava.vision_tower(pixels, output_hidden_states=True)
    layers = [layer] if isinstance(layer, int) else list(layer)
    drop = 1 if llava.config.vision_feature_select_strategy == "default" else 0
    return torch.cat([out.hidden_states[i][:, drop:] for i in layers], -1)


def merge_features(llava: Any, input_ids: Tensor, features: Tensor, image_token: int) -> Tensor:
    """Token embeddings with the projected ``features`` (I, N, d_vision) at the image positions, as LLaVA does."""
    embeddings = llava.get_input_embeddings()(input_ids)
    projected = llava.multi_modal_projector(features.to(embeddings.dtype))
    mask = (input_ids == image_token).unsqueeze(-1).expand_as(embeddings)
    return embeddings.masked_scatter(mask, projected.to(embeddings.dtype))


def teacher_side(
    cache: TeacherCache, vocabulary: int, device: torch.device, dtype: torch.dtype, head: bool
) -> TeacherSide:
    """Head and scales of a cache on the device, for a student of ``vocabulary`` output ids."""
    manifest = cache.manifest
    weight = torch.from_numpy(cache.head.copy()).to(device, dtype) if head else None
    own = manifest.shape.vocabulary
    return TeacherSide(
        vocabulary=None if own == vocabulary else own,
        signals=manifest.signals_config,
        scales={name: scales_on(scales, device) for name, scales in full_scales(cache).items()},
        head=weight,
        hidden_size=manifest.shape.hidden_size,
        image_tokens=manifest.shape.image_tokens,
    )


def full_scales(cache: TeacherCache) -> Mapping[str, ChannelScales]:
    """Scales for every array of states; float codecs without PCA have none stored and need ones."""
    none = ChannelScales(np.ones(cache.manifest.shape.hidden_size, np.float32))
    return {name: cache.scales.get(name, none) for name in ("hidden", "hidden_second_last", "visual")}
