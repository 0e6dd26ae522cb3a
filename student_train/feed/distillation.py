"""The losses of a batch's teacher, as the function that Transformers' Trainer, and any other loop, calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from student_train.feed.teacher import Labels, Loss, specs_of
from student_train.losses.catalogue import LossSpec
from teacher_cache.errors import LossError


@dataclass(frozen=True)
class Distillation:
    """See :func:`distillation`."""

    losses: tuple[LossSpec, ...]

    def __call__(self, outputs: Any, labels: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """A scalar. ``outputs``: the model's, with logits (B, S, V) · ``labels``: of a batch of ``data.collate`` ·
        ``num_items_in_batch``: answer tokens of the global batch; None: of this one."""
        if not isinstance(labels, Labels):
            found = "no labels" if labels is None else f"labels of type {type(labels).__name__}"
            raise LossError(
                f"distillation: the batch has {found}, so no teacher and no predicting rows. Make batches with the "
                "data set's own collate: data_collator=data.collate, or DataLoader(…, collate_fn=data.collate)"
            )
        return labels.teacher.loss(self.losses, outputs["logits"], num_items_in_batch)


def distillation(losses: Sequence[Loss]) -> Distillation:
    """The weighted sum of ``losses`` as ``compute_loss_func`` of Transformers' ``Trainer``.

    losses: names (``"forward_kl"``), settings as in a configuration file (``{"name": "forward_kl", "weight": 2}``), or
    ``LossSpec``. The function takes (outputs, labels, num_items_in_batch) and returns a scalar: each loss's mean over
    the answer rows of the global batch, gradient accumulation and several processes included, times its weight.

    Raises
    ------
    ConfigError
        No such loss, a setting that it does not have, or one loss twice.
    LossError
        When called: labels of another collate, or a loss that takes a signal that the data set did not read.

    Examples
    --------
    >>> import teacher_cache as tc
    >>> compute_loss = tc.distillation(["cross_entropy", {"name": "forward_kl", "temperature": 0.7}])
    >>> [loss.name for loss in compute_loss.losses]
    ['cross_entropy', 'forward_kl']
    """
    return Distillation(tuple(specs_of(losses)))
