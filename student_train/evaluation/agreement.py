"""How close a student is to the teacher of a held-out cache, row by row, by the forward pass of its training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from student_train.config import SourceConfig
from student_train.evaluation.answers import Student
from student_train.evaluation.rows import answer_rows, in_batches
from student_train.feed.sources import CacheSource
from student_train.losses.by_source import row_loss
from student_train.losses.catalogue import MEASURED_BY, LossSpec
from student_train.losses.needs import needed_arrays
from student_train.losses.shared_ids import shared_count, shared_topk
from student_train.losses.targets import RowTargets, TeacherSide
from teacher_cache.store.manifest import read_manifest
from teacher_cache.store.storage import Storage


@dataclass(frozen=True)
class Agreement:
    """Student against teacher on the answer rows of a held-out cache.

    kl: mean KL(teacher ‖ student) in nats, exact where the cache has states, else top-k + tail (a lower bound) ·
    top1, top5: share of rows where the student's (five) most likely ids hold the teacher's most likely one.
    """

    kl: float
    top1: float
    top5: float
    rows: int

    def as_facts(self) -> dict[str, float]:
        """For tables."""
        return {"kl": self.kl, "top1": self.top1, "top5": self.top5}


@torch.inference_mode()
def agreement(
    student: Student, source: SourceConfig, batch: int = 32, only: Callable[[str], bool] = lambda sample_id: True
) -> Agreement:
    """Over the samples of the source's cache whose id is one of ``only``, ``batch`` at a time."""
    manifest = read_manifest(Storage(source.cache))
    exact = manifest.signals["hidden"] != "none"
    spec = LossSpec(MEASURED_BY, source="exact" if exact else "topk")
    reader = student.reader
    opened = CacheSource(source, reader.tokenizer, *needed_arrays([spec], manifest), reader.chat)
    model, vocabulary = student.model, student.model.get_output_embeddings().weight.shape[0]
    teacher = TeacherSide.of(opened.cache, vocabulary, model.device, model.dtype, exact)
    chosen = [number for number in range(len(opened)) if only(opened.name_of(number))]
    totals = np.zeros(4)
    for _, logits, targets in answer_rows(student, opened, in_batches(chosen, batch), teacher):
        totals += _compare(targets, logits, spec)
    kl, top1, top5, rows = totals
    return Agreement(kl / rows, top1 / rows, top5 / rows, int(rows))


def _compare(targets: RowTargets, logits: torch.Tensor, spec: LossSpec) -> npt.NDArray[np.float64]:
    """(4,) sums over the rows of ``logits`` (R, V): KL, top-1 hits, top-5 hits, rows."""
    rows, shared = slice(0, len(logits)), shared_count(targets.vocabulary, logits.shape[-1])
    if spec.source == "exact":
        best = targets.exact_logits(rows, shared).argmax(-1)  # (R,)
    else:
        assert targets.topk_ids is not None
        assert targets.topk_logprobs is not None
        ids, logprobs, _ = shared_topk(targets.topk_ids, targets.topk_logprobs, targets.vocabulary, shared)  # (R, k)
        best = ids.gather(-1, logprobs.argmax(-1, keepdim=True)).squeeze(-1)
    top5 = logits[:, :shared].topk(min(5, shared), -1).indices  # (R, 5)
    kl = row_loss(spec, targets, logits, rows).sum()
    hit1, hit5 = (top5[:, 0] == best).sum(), (top5 == best.unsqueeze(-1)).any(-1).sum()
    return np.array([float(kl), float(hit1), float(hit5), len(logits)])
