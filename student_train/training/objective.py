"""The student and everything that is compared with the teacher, as one module: a micro-batch in, a loss out.

One module, so that DDP and FSDP wrap student and projectors together. The output head is applied at predicting
positions only, in chunks (``head_loss``); every term is a weighted sum whose weights already hold the divisions by
the global batch, so micro-batches, ranks and accumulation need no further scaling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from student_train.feed.batch import StudentBatch, row_weights, weighed_by
from student_train.losses import image_losses as relations
from student_train.losses.catalogue import (
    Answers,
    Attention,
    ImageLogits,
    ImagesAndText,
    Logits,
    LossSpec,
    States,
)
from student_train.losses.head_loss import LogitHead, head_losses
from student_train.losses.needs import check_grids
from student_train.losses.row_losses import HiddenProjector
from student_train.losses.targets import RowTargets, StoredStates, TeacherSide, decoded
from teacher_cache.data.logit_rule import LogitRule
from teacher_cache.errors import ConfigError
from teacher_cache.models.parts import parts_of


class DistilledStudent(nn.Module):
    """``model`` plus one Linear–GELU–Linear projector per hidden loss layer; teachers are data, not submodules."""

    def __init__(
        self,
        model: PreTrainedModel,
        specs: Sequence[LossSpec],
        teachers: Sequence[TeacherSide | None],
        *,
        head_rows: int,
        image_tokens: int,
    ) -> None:
        super().__init__()
        self.model = model
        self._parts = parts_of(model)
        decoder: Any = model.get_submodule(self._parts.decoder)
        self._no_split_modules = list(decoder._no_split_modules or [])  # what FSDP wraps by itself
        self._rule = LogitRule.of(model.config)
        for spec in specs if self._rule.cap else ():
            if spec.own().get("space") == "logits":
                raise ConfigError(f"losses: {spec.label}: the student's logits are soft-capped. Set space: hidden")
        self._specs, self._teachers = tuple(specs), list(teachers)
        self._head_rows, self._image_tokens = head_rows, image_tokens
        width = model.config.get_text_config().hidden_size
        layers = {spec.layer for spec in specs if isinstance(spec.entry, States)}
        sides = [teacher for teacher in teachers if teacher is not None]
        for teacher in sides:
            check_grids(specs, teacher.image_tokens, image_tokens)
        sizes = {teacher.hidden_size for teacher in sides}
        if layers and len(sizes) != 1:
            raise ConfigError(f"hidden losses need teachers of one width, the sources have {sorted(sizes)}")
        self.projectors = nn.ModuleDict(
            {layer: HiddenProjector(width, next(iter(sizes))) for layer in sorted(layers)}
        ).to(torch.promote_types(model.dtype, torch.float32))  # trained, and so not in half precision

    def forward(self, batch: StudentBatch, source: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(the weighted loss of this micro-batch, each term's unweighted part of it, detached)."""
        teacher, student = self._teachers[source], self._states(batch)
        targets = self._row_targets(batch, teacher)
        total, parts = self._head_terms(batch, student, targets)
        for spec in self._specs:
            if not _on_answer_logits(spec):
                assert teacher is not None
                value = self._term(spec, _Micro(batch.averaged(spec.average), student, targets, teacher))
                parts[spec.label] = value.detach()
                total = total + spec.weight * value
        return total + self._reach_all(batch), parts

    def _row_targets(self, batch: StudentBatch, teacher: TeacherSide | None) -> RowTargets:
        if teacher is None:
            return RowTargets(answer_ids=batch.answer_ids)
        return teacher.rows(batch.arrays, batch.answer_ids, batch.row_index)

    def rows(self, batch: StudentBatch, source: int) -> tuple[Tensor, RowTargets]:
        """(R, d) the student's states in the answer rows, and what the teacher has there; evaluation compares these."""
        states = self._states(batch).last  # (B, S, d)
        return states[batch.row_sample, batch.row_position], self._row_targets(batch, self._teachers[source])

    def _term(self, spec: LossSpec, micro: _Micro) -> Tensor:
        """A scalar: one loss, unweighted, of a micro-batch whose weights are those of its average."""
        match spec.entry:
            case States():
                return self._states_term(spec, micro)
            case Logits():
                return self._logits_term(spec, micro)
            case Attention():
                return self._attention_term(spec, micro)
        if not len(micro.batch.visual_sample):
            return micro.student.last.sum() * 0.0
        return self._text_term(spec, micro) if isinstance(spec.entry, ImagesAndText) else self._image_term(spec, micro)

    def _reach_all(self, batch: StudentBatch) -> Tensor:
        """Zero, by way of all that is trained outside the decoder (projector, tower) where the batch has no image.

        DDP and FSDP need every trained module in every backward pass of every rank, and a projector trained alone
        needs one at all. Its gradient is then zero, not absent, however many ranks there are.
        """
        total = batch.row_weight.new_zeros(())
        if len(batch.visual_sample):
            return total
        own = tuple(f"{name}." for name in (self._parts.tower, *self.multimodal_projector) if name)
        outside = [p for name, p in self.model.named_parameters() if f"{name}.".startswith(own) and p.requires_grad]
        return sum((parameter.sum() * 0.0 for parameter in outside), total)

    @property
    def multimodal_projector(self) -> tuple[str, ...]:
        """The names of its modules and parameters in the model."""
        return (*self._parts.projector, *self._parts.parameters)

    def _head_terms(
        self, batch: StudentBatch, student: _States, targets: RowTargets
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of the answer rows' logits, in one sweep over chunks of rows: (weighted sum, each unweighted)."""
        rows = student.last[batch.row_sample, batch.row_position]
        specs = [spec for spec in self._specs if _on_answer_logits(spec)]
        total, parts = rows.sum() * 0.0, dict[str, Tensor]()
        for key in sorted({weighed_by(s) for s in specs}):
            group = [s for s in specs if weighed_by(s) == key]
            weight = row_weights(group[0], batch.averaged(group[0].average), targets)
            value, sums = self._head_losses(rows, targets, group, weight)
            total = total + value
            parts.update(sums)
        return total, parts

    def _head_losses(
        self, rows: Tensor, targets: RowTargets, specs: Sequence[LossSpec], row_weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weights = {spec.name: spec.weight for spec in specs}
        head = LogitHead(self._head, self._rule)
        return head_losses(rows, head, targets, specs, weights, row_weight, self._head_rows)

    @property
    def _head(self) -> Tensor:
        """(V, d) the student's output head."""
        return self.model.get_output_embeddings().weight

    def _places(self, spec: LossSpec, micro: _Micro) -> list[_Places]:
        """The positions that the spec's ``tokens`` name: answer rows, text, or text and then images."""
        batch, targets, states = micro.batch, micro.targets, micro.student.of(spec.layer)
        stored = targets.hidden if spec.layer == "last" else targets.hidden_second_last
        assert stored is not None
        if spec.tokens == "answer":
            rows = states[batch.row_sample, batch.row_position]
            return [_Places(rows, stored, row_weights(spec, batch, targets))]
        weight = batch.text_token_weight if spec.tokens == "all" else batch.position_weight
        rows = states[batch.text_sample, batch.text_position]
        places = [_Places(rows, replace(stored, lines=None), weight)]
        if spec.tokens == "all" and len(batch.visual_sample):
            images = decoded(self._image_states(spec, micro).flatten(0, 1))
            weight = self._of_positions(spec, micro, batch.image_token_weight)
            places.append(_Places(self._visual(states, batch).flatten(0, 1), images, weight))
        return places

    def _states_term(self, spec: LossSpec, micro: _Micro) -> Tensor:
        projector, parts = self.projectors[spec.layer], []
        for places in self._places(spec, micro):
            values = spec.entry.function(places.teacher.decode(slice(None)), projector(places.student), **spec.own())
            parts.append((values * places.weight).sum())
        return sum(parts[1:], parts[0])

    def _logits_term(self, spec: LossSpec, micro: _Micro) -> Tensor:
        """A logit loss on all text positions, and on the image positions too for ``tokens: all`` (LLAVADI, table 2)."""
        places = self._places(spec, micro)
        hidden = places[0].teacher
        if len(places) > 1:
            hidden = decoded(torch.cat([place.teacher.decode(slice(None)) for place in places]))
        side = micro.teacher
        targets = RowTargets(hidden=hidden, head=side.head, vocabulary=side.vocabulary, rule=side.rule)
        rows, weight = torch.cat([p.student for p in places]), torch.cat([p.weight for p in places])
        return self._head_losses(rows, targets, [replace(spec, weight=1.0)], weight)[0]

    def _attention_term(self, spec: LossSpec, micro: _Micro) -> Tensor:
        batch, attention, stored = micro.batch, micro.student.attention, micro.targets.attention
        assert attention is not None
        assert stored is not None
        total = micro.student.last.sum() * 0.0
        for line, start, mine, _ in batch.spans:
            rows = attention[line][batch.row_position[mine], start : start + self._image_tokens]
            value = spec.entry.function(stored[mine], rows, **spec.own())
            total = total + (value * batch.row_weight[mine]).sum()
        return total

    def _text_term(self, spec: LossSpec, micro: _Micro) -> Tensor:
        """Image positions with answer rows, as in LLAVADI's code, or with all text (``tokens: text``)."""
        batch, total = micro.batch, micro.student.last.sum() * 0.0
        images, student = self._image_states(spec, micro), self._visual(micro.student.last, batch)
        (places,) = self._places(spec, micro)
        text = places.teacher.decode(slice(None))
        for image, span in enumerate(batch.spans):
            mine = span.rows if spec.tokens == "answer" else span.text
            sides = (images[image], text[mine], student[image], places.student[mine])
            total = total + (spec.entry.function(*sides, **spec.own()) * places.weight[mine]).sum()
        return total

    def _image_term(self, spec: LossSpec, micro: _Micro) -> Tensor:
        batch, images = micro.batch, micro.teacher.images(micro.batch.visual)
        student = self._visual(micro.student.last, batch)
        grid = relations.pooled_grid(images.tokens, self._image_tokens, spec.pool)
        if not isinstance(spec.entry, ImageLogits):
            value = spec.entry.function(images, student, self._head, grid, **spec.own())
            return (value * batch.image_weight).sum()
        weight = self._of_positions(spec, micro, batch.image_weight / self._image_tokens)
        own = {name: getattr(spec, name) for name in ("temperature", "temperature_squared", *spec.own())}
        of_rows = LossSpec(spec.entry.of, source="topk" if images.states is None else "exact", **own)
        rows = relations.visual_rows(images, grid)
        return self._head_losses(student.flatten(0, 1), rows, [of_rows], weight)[0]

    def _image_states(self, spec: LossSpec, micro: _Micro) -> Tensor:
        """(I, N, d) the teacher's visual states, pooled where the spec says so, with the student's N."""
        images = micro.teacher.images(micro.batch.visual)
        assert images.states is not None
        grid = relations.pooled_grid(images.tokens, self._image_tokens, spec.pool)
        states = images.states.decode(slice(None))
        return states if grid is None else relations.pool_grid(states, *grid)

    def _of_positions(self, spec: LossSpec, micro: _Micro, weight: Tensor) -> Tensor:
        """(I·N,) what each image position counts, from what those of its image do in the mean (I,)."""
        weight = weight[:, None].expand(-1, self._image_tokens)
        if spec.density and len(weight):
            weight = weight * relations.density_weights(self._image_states(spec, micro))
        return weight.flatten()

    def _visual(self, hidden: Tensor, batch: StudentBatch) -> Tensor:
        """(I, N, d) the student's states at image positions."""
        places = batch.visual_start.unsqueeze(1) + torch.arange(self._image_tokens, device=hidden.device)
        return hidden[batch.visual_sample.unsqueeze(1), places]

    def _states(self, batch: StudentBatch) -> _States:
        second = any(s.layer == "second_last" for s in self._specs)
        attention = any(isinstance(s.entry, Attention) for s in self._specs)
        base: Any = self.model.base_model  # without its head
        options: dict[str, Any] = {"output_hidden_states": second, "output_attentions": attention, "use_cache": False}
        fields = dict(batch.fields)
        if batch.image_features is not None:
            ids = fields.pop("input_ids")
            embeddings = merge_features(base, ids, batch.image_features, self.model.config.image_token_id)
            out = base.language_model(inputs_embeds=embeddings, **fields, **options)
        else:
            dtype = getattr(self.model.get_submodule(self._parts.tower), "dtype", self.model.dtype)  # "": the model's
            fields = {n: f.to(dtype) if f.is_floating_point() else f for n, f in fields.items()}
            out = base(**fields, **options)
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

    def of(self, layer: str) -> Tensor:
        states = self.last if layer == "last" else self.second_last
        assert states is not None
        return states


@dataclass(frozen=True)
class _Micro:
    """What a term is made of: a micro-batch, what the student made of it, and the teacher's side."""

    batch: StudentBatch
    student: _States
    targets: RowTargets
    teacher: TeacherSide


@dataclass(frozen=True)
class _Places:
    """P positions: the student's states (P, d) and the teacher's, what each counts (P,)."""

    student: Tensor
    teacher: StoredStates
    weight: Tensor


def _on_answer_logits(spec: LossSpec) -> bool:
    return isinstance(spec.entry, (Answers, Logits)) and spec.tokens == "answer"


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
