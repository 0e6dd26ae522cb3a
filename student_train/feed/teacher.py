"""What a batch knows of its teacher, for any training loop: which rows, which answers, and the losses of both.

A batch is a plain dictionary of what the model reads, and ``labels``. The labels are the (B, S) tensor that every
trainer expects, and carry the teacher. So the batch goes unharmed through loader processes, Transformers' Trainer, TRL
and Accelerate, which move, count and hand on ``labels``, and know of nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args

import torch
from torch import Tensor

from student_train.feed.batch import StudentBatch, row_weights, weighed_by
from student_train.losses.by_source import row_loss
from student_train.losses.catalogue import DEFAULT_LOSS, MEASURED_BY, Answers, Drawable, Logits, LossSpec
from student_train.losses.head_loss import LogitHead, head_losses
from student_train.losses.needs import check_losses, check_shared
from student_train.losses.targets import RowTargets, TeacherSide
from teacher_cache.data.logit_rule import LogitRule
from teacher_cache.errors import CacheError, ConfigError, LossError
from teacher_cache.store.manifest import Manifest
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.writer import HEAD
from teacher_cache.terminal import without_secrets

Loss = str | Mapping[str, Any] | LossSpec
"""A loss by its name, its settings as a configuration file has them, or a ``LossSpec``."""
SIGNALS = {source: LossSpec(MEASURED_BY, source=source) for source in get_args(Drawable.sources)} | {
    "advantage": LossSpec(DEFAULT_LOSS.name, advantage_share=0.5)
}
"""What a batch may hold of its teacher beside the answers, by the losses' ``source``, and what rows are weighed by: a
loss that reads all of it."""
IGNORED = -100
"""The label of a position that is no answer token's, as ``torch.nn.CrossEntropyLoss`` has it."""


@dataclass(frozen=True)
class Origin:
    """The cache that a batch was read from; its head and scales do not travel with each batch, but are read by this."""

    address: str
    fingerprint: str


@lru_cache(maxsize=4)
def _manifest_and_side(
    origin: Origin, vocabulary: int, device: torch.device, dtype: torch.dtype, head: bool
) -> tuple[Manifest, TeacherSide]:
    """Read once a process: a finished cache does not change, and another one in its place is refused."""
    with TeacherCache.open(origin.address) as cache:
        if cache.manifest.fingerprint != origin.fingerprint:
            raise CacheError(
                f"{cache.storage.url}: another cache than the one the batch was read from (fingerprint "
                f"{cache.manifest.fingerprint[:12]}, expected {origin.fingerprint[:12]}). Open it again, and make a "
                "new data set of it"
            )
        has_head = head and HEAD in cache.manifest.files
        return cache.manifest, TeacherSide.of(cache, vocabulary, device, dtype, has_head)


@dataclass(frozen=True)
class Teacher:
    """The teacher of one batch: R answer rows, in the order of the samples.

    ``rows`` holds them as ``student_train.feed.batch`` does, without what the model reads; ``signals``: which of
    :data:`SIGNALS` were read.

    Raises
    ------
    LossError, ConfigError
        A loss of something else than the rows' logits, or of a signal that was not read.

    Examples
    --------
    >>> teacher = batch.teacher
    >>> positions, lines = teacher.positions[1], teacher.positions[0]
    >>> bool((batch["input_ids"][lines, positions + 1] == teacher.answer_ids).all())  # they predict the answers
    True
    >>> logits = student(**batch.inputs).logits  # (B, S, V)
    >>> teacher.row_loss({"name": "forward_kl", "temperature": 0.7}, logits).shape == (len(teacher),)
    True
    >>> states = student.base_model(**batch.inputs).last_hidden_state  # (B, S, d): no logits are formed from here on
    >>> whole = teacher.head_loss(["cross_entropy", "forward_kl"], states, student)
    >>> bool((whole - teacher.loss(["cross_entropy", "forward_kl"], logits)).abs() < 1e-4)
    True
    """

    rows: StudentBatch
    origin: Origin
    signals: tuple[str, ...]

    def __len__(self) -> int:
        """R"""
        return len(self.rows.answer_ids)

    @property
    def answer_ids(self) -> Tensor:
        """(R,) int64: the answer token of each row."""
        return self.rows.answer_ids

    @property
    def positions(self) -> tuple[Tensor, Tensor]:
        """(R,) lines and (R,) positions that *predict* the answer tokens: ``states[teacher.positions]`` is (R, …)."""
        return self.rows.row_sample, self.rows.row_position

    def states(self) -> Tensor:
        """(R, d) float32: the teacher's final states, for a loss of one's own (``signals=["exact"]``).

        Raises ``LossError``: they were not read.
        """
        found = self._side(1, torch.float32, self.answer_ids.device, head=False)[1]
        hidden = self._targets(found).hidden
        if hidden is None:
            raise LossError(f"the batch holds {', '.join(self.signals) or 'answers'} alone. Add signals=['exact']")
        return hidden.decode(slice(None))

    def row_loss(self, loss: Loss, logits: Tensor) -> Tensor:
        """(R,) one loss, not reduced, of the student's ``logits``: (R, V), or the model's (B, S, V). Its ``weight`` is
        left out; rows that it leaves out (``rows: llavadi``) are 0, and ``advantage_share`` is in.

        Raises ``LossError``, ``ConfigError``, ``CacheError``: no loss of single rows' logits, or one that takes what
        was not read; with what to do.
        """
        (spec,) = specs_of([loss])
        logits = logits[self.positions] if logits.ndim == 3 else logits
        manifest, side = self._side(logits.shape[-1], logits.dtype, logits.device, spec.needs_head)
        self._check([spec], manifest, logits.shape[-1])
        targets = self._targets(side)
        return row_loss(spec, targets, logits, slice(0, len(logits))) * row_weights(spec, self.rows, targets)

    def loss(self, losses: Sequence[Loss], logits: Tensor, items: Tensor | int | None = None) -> Tensor:
        """A scalar: the weighted sum of ``losses``, each its mean over ``items`` rows (None: this batch's R).

        ``logits``, errors: as :meth:`row_loss`. ``items``: of the global batch, where it is more than this one.
        """
        specs = specs_of(losses)
        total = sum((spec.weight * self.row_loss(spec, logits).sum() for spec in specs), logits.new_zeros(()))
        return total / self._items(items)

    def head_loss(
        self, losses: Sequence[Loss], states: Tensor, model: Any, items: Tensor | int | None = None
    ) -> Tensor:
        """:meth:`loss` without the logits: output head and losses in chunks of rows, forward and backward at once.

        ``states`` (B, S, d), or (R, d) of the rows: ``model.base_model(**batch.inputs).last_hidden_state`` · ``model``:
        the student, of which the output head and its rule for logits are taken. Under DDP call this inside the forward
        pass of the module that DDP wraps, or the head's gradient is not exchanged.
        """
        states = states[self.positions] if states.ndim == 3 else states
        output, specs = model.get_output_embeddings(), specs_of(losses)
        if getattr(output, "bias", None) is not None:
            raise LossError("the student's output head has a bias, which the chunks leave out. Take teacher.loss(…)")
        needed = any(spec.needs_head for spec in specs)
        manifest, side = self._side(len(output.weight), states.dtype, states.device, needed)
        self._check(specs, manifest, len(output.weight))
        head, targets = LogitHead(output.weight, LogitRule.of(model.config)), self._targets(side)
        total = states.sum() * 0.0
        for key in sorted({weighed_by(spec) for spec in specs}):
            group = [spec for spec in specs if weighed_by(spec) == key]
            weights, counted = {s.name: s.weight for s in group}, row_weights(group[0], self.rows, targets)
            total = total + head_losses(states, head, targets, group, weights, counted)[0]
        return total / self._items(items)

    def to(self, device: torch.device | str) -> Teacher:
        return dataclasses.replace(self, rows=self.rows.to(torch.device(device)))

    def pin_memory(self) -> Teacher:
        return dataclasses.replace(self, rows=self.rows.pin_memory())

    def _side(
        self, vocabulary: int, dtype: torch.dtype, device: torch.device, head: bool
    ) -> tuple[Manifest, TeacherSide]:
        return _manifest_and_side(self.origin, vocabulary, device, dtype, head)

    def _targets(self, side: TeacherSide) -> RowTargets:
        return side.rows(self.rows.arrays, self.answer_ids, self.rows.row_index)

    def _items(self, items: Tensor | int | None) -> Tensor | int:
        return max(len(self), 1) if items is None else items

    def _check(self, specs: Sequence[LossSpec], manifest: Manifest, vocabulary: int) -> None:
        for spec in specs:
            if not isinstance(spec.entry, (Answers, Logits)) or spec.tokens != "answer":
                raise LossError(
                    f"loss {spec.name}: it compares more than the logits of answer rows, which is all that such a "
                    "batch holds. Train with student-train fit, or form it of batch.teacher.states()"
                )
            if isinstance(spec.entry, Logits) and spec.source not in self.signals:
                raise LossError(
                    f"loss {spec.name} takes source: {spec.source}, and the data set was made with "
                    f"signals={list(self.signals)}. Add it: cache.torch(…, signals=[…, {spec.source!r}])"
                )
            if spec.advantage_share and "advantage" not in self.signals:
                raise LossError(
                    f"loss {spec.name}: advantage_share reads signals=['advantage'], which was not asked for"
                )
            if spec.average != "row":
                raise LossError(
                    f"loss {spec.name}: average: {spec.average} needs the samples of the global batch, which a batch "
                    "does not know. Leave it out, or train with student-train fit"
                )
        url = without_secrets(self.origin.address)
        check_losses(specs, manifest, url)
        check_shared(specs, manifest.shape.vocabulary, vocabulary, manifest.signals["visual"], url)


class Labels(Tensor):
    """(B, S) int64: answer tokens where they stand, −100 elsewhere; and the batch's ``teacher``.

    What is computed from them is a plain tensor; copies to a device or into pinned memory take the teacher along.
    """

    teacher: Teacher
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, values: Tensor, teacher: Teacher) -> Labels:
        labels = values.as_subclass(cls)
        labels.teacher = teacher
        return labels

    def to(self, *args: Any, **kwargs: Any) -> Labels:
        moved = super().to(*args, **kwargs)
        return Labels.of(moved, self.teacher.to(moved.device))

    def pin_memory(self, *args: Any, **kwargs: Any) -> Labels:
        return Labels.of(super().pin_memory(*args, **kwargs), self.teacher.pin_memory())


class Batch(dict[str, Any]):
    """What the model reads, by its processor's names (``input_ids`` (B, S), …), and ``labels`` (B, S).

    >>> batch = data.collate([data[0], data[1]])
    >>> batch["labels"].shape == batch["input_ids"].shape, "labels" in batch.inputs
    (True, False)
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)

    @classmethod
    def of(cls, made: StudentBatch, origin: Origin, signals: tuple[str, ...]) -> Batch:
        values = torch.full_like(made.input_ids, IGNORED)
        values[made.row_sample, made.row_position + 1] = made.answer_ids
        rows = dataclasses.replace(made, fields={}, row_weight=torch.ones_like(made.row_weight))
        teacher = Teacher(rows, origin, signals)
        return cls({**made.fields, "labels": Labels.of(values, teacher)})

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model reads alone."""
        return {name: value for name, value in self.items() if name != "labels"}

    @property
    def teacher(self) -> Teacher:
        """Its rows, its signals, its losses."""
        teacher: Teacher = self["labels"].teacher
        return teacher

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        """The same batch on another device."""
        return Batch({name: value.to(*args, **kwargs) for name, value in self.items()})


def specs_of(losses: Sequence[Loss]) -> list[LossSpec]:
    """The ``losses``, checked; raises ``ConfigError``: no such loss or setting, none at all, or one twice."""
    if isinstance(losses, (str, Mapping, LossSpec)) or not losses:
        raise ConfigError(f"losses: expected a list with at least one loss, found {losses!r}")
    specs = [_spec(loss) for loss in losses]
    if len({spec.label for spec in specs}) < len(specs):
        raise ConfigError(f"losses: one term of each name, found {', '.join(spec.label for spec in specs)}")
    return specs


def _spec(loss: Loss) -> LossSpec:
    if isinstance(loss, LossSpec):
        return loss
    return LossSpec(**({"name": loss} if isinstance(loss, str) else loss))
