"""What a student is compared with: the cache's arrays as tensors on a device.

States stay quantised until a chunk of rows is asked for, so a batch's targets take the bytes they take on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from student_train.losses import topk
from teacher_cache.config import SignalsConfig
from teacher_cache.data.logit_rule import AS_THEY_ARE, LogitRule
from teacher_cache.errors import LossError
from teacher_cache.store.codecs import ChannelScales, decode, is_coarse, with_exact_head
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.records import stats_names


@dataclass(frozen=True)
class StoredStates:
    """States (…, d) as the codec left them. ``lines`` (R,): which line of ``codes`` belongs to row r; None: line r."""

    codes: Tensor
    scale: Tensor | None
    codec: str
    scales: ChannelScales
    lines: Tensor | None = None

    def __len__(self) -> int:
        return len(self.codes if self.lines is None else self.lines)

    def flatten(self) -> StoredStates:
        """Of (B, N, d) the same states as (B·N, d) rows."""
        scale = None if self.scale is None else self.scale.flatten(0, 1)
        return StoredStates(self.codes.flatten(0, 1), scale, self.codec, self.scales)

    def decode(self, rows: slice) -> Tensor:
        """(rows, d) float32."""
        index = rows if self.lines is None else self.lines[rows]
        scale = None if self.scale is None else self.scale[index]
        return decode(self.codes[index], scale, self.codec, self.scales)


def decoded(states: Tensor) -> StoredStates:
    """States that need no decoding (pooled ones, or a live teacher's), in the same clothes."""
    return StoredStates(states, None, "float16", ChannelScales(np.ones(states.shape[-1], np.float32)))


@dataclass(frozen=True)
class RowTargets:
    """The teacher's side of R rows; what the cache does not hold is None.

    answer_ids (R,) int64 · topk_ids (R, k) int64 · topk_logprobs (R, k) float32 · stats: column → (R,) float32 ·
    sampled_ids, sampled_counts (R, n) · hidden, hidden_second_last: (R, d) quantised · attention (R, N) float32 ·
    advantage (R,) nats · head (V, d) in the dtype in which logits are formed · vocabulary: the teacher's V, where it
    may be another than the student's (``shared_ids``); None where it is the same · rule: how the teacher's logits
    follow from states @ head.T.
    """

    answer_ids: Tensor | None = None
    topk_ids: Tensor | None = None
    topk_logprobs: Tensor | None = None
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    sampled_ids: Tensor | None = None
    sampled_counts: Tensor | None = None
    sampled_from: str = "all"
    hidden: StoredStates | None = None
    hidden_second_last: StoredStates | None = None
    attention: Tensor | None = None
    advantage: Tensor | None = None
    head: Tensor | None = None
    vocabulary: int | None = None
    rule: LogitRule = AS_THEY_ARE
    factor: float = 1.0
    others: tuple[tuple[float, RowTargets], ...] = ()
    """Of other caches, each with a factor: exact logits are ``factor`` times its own plus theirs (``CacheSource``)."""

    def answers(self, rows: slice) -> Tensor:
        """(rows,) int64 the answer tokens."""
        return _present(self.answer_ids, "answer tokens", "answers")[rows]

    def exact_logits(self, rows: slice, shared: int | None = None) -> Tensor:
        """(rows, V) float32: the teacher's full-vocabulary logits; of the first ``shared`` ids where the two sides have
        different numbers of them."""
        logits = self._own_logits(rows, shared)
        if not self.others:
            return logits
        ids = logits.shape[-1]
        return self.factor * logits + sum(f * other.exact_logits(rows, ids)[:, :ids] for f, other in self.others)

    def _own_logits(self, rows: slice, shared: int | None) -> Tensor:
        """(rows, V) float32, formed from the states and the head.

        Of coarse states (int4, principal components) they give the tail alone; the head is the stored top-k's.
        """
        hidden, head = _present(self.hidden, "hidden", "exact"), _present(self.head, "head", "exact")
        shared = None if self.vocabulary is None else shared
        coarse = is_coarse(hidden.codec, hidden.scales) and self.topk_ids is not None
        head = head if coarse else head[:shared]
        logits = self.rule.apply(topk.wide(hidden.decode(rows).to(head.dtype) @ head.T))
        if not coarse or self.topk_ids is None or self.topk_logprobs is None:
            return logits
        lse = topk.log_sum_exp({name: column[rows] for name, column in self.stats.items()}, 1.0)
        exact = with_exact_head(logits, self.topk_ids[rows], self.topk_logprobs[rows], lse)
        return cast(Tensor, exact)[:, :shared]

    def kept(self, rows: slice) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Of these rows: top-k ids, their log-probabilities at temperature 1, and the statistics by name."""
        ids = _present(self.topk_ids, "topk_ids", "topk")[rows]
        logprobs = _present(self.topk_logprobs, "topk_logprobs", "topk")[rows]
        return ids, logprobs, {name: column[rows] for name, column in self.stats.items()}

    def advantage_factors(self, owner: Tensor, share: float) -> Tensor:
        """(R,) of mean 1 in each sample (``owner`` (R,)), so that no sample weighs more than before.

        ``share`` of the sample's rows (rounded up), those of largest advantage, earlier ones first among equals, weigh
        half of it, all others the other half: VA-OPD (arXiv:2605.21924) averages the losses of two such groups apart.
        The paper's weights of whole samples are left out, as their mean over a global batch is not known in advance. A
        sample without an image, or of which one group would be all, keeps the weights it has.
        """
        advantage = _present(self.advantage, "advantage", "advantage_share")
        falling = advantage.argsort(descending=True, stable=True)
        order = falling[owner[falling].argsort(stable=True)]  # sample by sample, without a loop that asks the device
        owners, image = owner[order], (advantage[order] != 0).cumsum(0)
        first, after = torch.searchsorted(owners, owners), torch.searchsorted(owners, owners, right=True)
        rows = (after - first).double()
        high = (share * rows).ceil()
        place = torch.arange(len(owners), device=owners.device) - first
        sees = image[after - 1] - image[first] + (advantage[order][first] != 0) > 0
        halved = torch.where(place < high, rows / (2 * high), rows / (2 * (rows - high)))
        factors = torch.where(sees & (high < rows), halved, 1.0).to(advantage.dtype)
        return torch.empty_like(advantage).scatter_(0, order, factors)

    def draws(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Of these rows: sampled ids, their counts, and the teacher's entropy (nats)."""
        ids = _present(self.sampled_ids, "sampled_ids", "sampled")[rows]
        counts = _present(self.sampled_counts, "sampled_counts", "sampled")[rows]
        return ids, counts, _present(self.stats.get("entropy"), "stats", "sampled")[rows]


@dataclass(frozen=True)
class ImageTargets:
    """The teacher's side of B distinct images of N positions; what the cache does not hold is None.

    states (B, N, d) quantised · topk_ids, topk_logprobs (B, N, k) · stats: column → (B, N) · gram_hidden, gram_logits
    (B, N·(N + 1)/2) float16, upper triangles row by row, each over its entry of gram_scale (B, 2) · head (V, d) ·
    head_square (d, d): ``relations.head_square(head)``, which a run computes once.
    """

    tokens: int
    states: StoredStates | None = None
    topk_ids: Tensor | None = None
    topk_logprobs: Tensor | None = None
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    gram_hidden: Tensor | None = None
    gram_logits: Tensor | None = None
    gram_scale: Tensor | None = None
    head: Tensor | None = None
    head_square: Tensor | None = None
    vocabulary: int | None = None
    rule: LogitRule = AS_THEY_ARE


@dataclass(frozen=True)
class TeacherSide:
    """What the losses need of one cache beside its batches.

    scales: by the name of the states, from :func:`scales_on` · head (V, d): on the device, without gradient ·
    vocabulary: how many ids the teacher's logits have, where the student may have another number · head_square: WᵀW
    over the ids that both have, for Grams of logits from visual states: once a run.
    """

    signals: SignalsConfig
    scales: Mapping[str, ChannelScales]
    head: Tensor | None
    hidden_size: int
    image_tokens: int
    vocabulary: int | None = None
    rule: LogitRule = AS_THEY_ARE
    head_square: Tensor | None = None
    factor: float = 1.0
    others: tuple[tuple[str, float, TeacherSide], ...] = ()
    """Other caches over the same rows: before the names of their arrays, their factors (``RowTargets.others``)."""

    @classmethod
    def of(
        cls, cache: TeacherCache, vocabulary: int, device: torch.device, dtype: torch.dtype, head: bool
    ) -> TeacherSide:
        """Scales, and the ``head`` if it is wanted, on the device, for a student of ``vocabulary`` output ids."""
        manifest, own = cache.manifest, cache.manifest.shape.vocabulary
        return cls(
            signals=manifest.signals_config,
            scales={name: scales_on(cache.scales_of(name), device) for name in _STATES},
            head=torch.from_numpy(cache.head.copy()).to(device, dtype) if head else None,
            hidden_size=manifest.shape.hidden_size,
            image_tokens=manifest.image_tokens,
            vocabulary=None if own == vocabulary else own,
            rule=manifest.logit_rule,
        )

    def rows(
        self, arrays: Mapping[str, Tensor], answer_ids: Tensor | None, row_index: Tensor | None = None
    ) -> RowTargets:
        """The targets of a batch whose tensors are on the device already.

        arrays: by the names of ``records.record_arrays``, as stored, samples one after another · row_index (R,): with
        ``signals.hidden: text``, which of the batch's lines of ``hidden`` are rows' (``rows.rows_among_text``, shifted
        by the samples before).
        """
        lines = row_index if self.signals.hidden == "text" else None
        return RowTargets(
            answer_ids=answer_ids,
            topk_ids=_ids(arrays.get("topk_ids")),
            topk_logprobs=_float(arrays.get("topk_logprobs")),
            stats=self._columns(arrays.get("stats")),
            sampled_ids=_ids(arrays.get("sampled_ids")),
            sampled_counts=arrays.get("sampled_counts"),
            sampled_from=self.signals.sampled_from,
            hidden=self._states("hidden", arrays, lines),
            hidden_second_last=self._states("hidden_second_last", arrays, lines),
            attention=_float(arrays.get("attention")),
            advantage=_float(arrays.get("advantage")),
            head=self.head,
            vocabulary=self.vocabulary,
            rule=self.rule,
            factor=self.factor,
            others=tuple((f, side.rows(_of(name, arrays), None)) for name, f, side in self.others),
        )

    def images(self, arrays: Mapping[str, Tensor]) -> ImageTargets:
        """The targets of distinct images; arrays by the names of ``records.image_arrays``, a line an image."""
        return ImageTargets(
            tokens=self.image_tokens,
            states=self._states("visual", arrays),
            topk_ids=_ids(arrays.get("visual_topk_ids")),
            topk_logprobs=_float(arrays.get("visual_topk_logprobs")),
            stats=self._columns(arrays.get("visual_stats")),
            gram_hidden=arrays.get("gram_hidden"),
            gram_logits=arrays.get("gram_logits"),
            gram_scale=arrays.get("gram_scale"),
            head=self.head,
            head_square=self.head_square,
            vocabulary=self.vocabulary,
            rule=self.rule,
        )

    def _states(self, name: str, arrays: Mapping[str, Tensor], lines: Tensor | None = None) -> StoredStates | None:
        """The states called ``name``, still quantised; None where there are none."""
        if name not in arrays:
            return None
        codec = self.signals.codec
        codes = arrays[name].view(torch.bfloat16) if codec == "bfloat16" else arrays[name]
        return StoredStates(codes, arrays.get(f"{name}_scale"), codec, self.scales[name], lines)

    def _columns(self, stats: Tensor | None) -> dict[str, Tensor]:
        """``stats`` (…, s) as column name → (…,)."""
        return {} if stats is None else dict(zip(stats_names(self.signals), stats.unbind(-1), strict=True))


_STATES = ("hidden", "hidden_second_last", "visual")
"""The arrays of states, which a codec may have scaled; float codecs have ones."""


def scales_on(scales: ChannelScales, device: torch.device | str) -> ChannelScales:
    """The same scales as tensors on ``device``, so that decoding a chunk copies nothing there."""
    parts: list[Any] = [
        None if part is None else torch.as_tensor(part, device=device)
        for part in (scales.channel_scale, scales.mean, scales.basis)
    ]
    return ChannelScales(*parts)


Found = TypeVar("Found")


def _present(value: Found | None, name: str, wanted: str) -> Found:
    if value is None:
        raise LossError(
            f"{wanted}: the cache holds no {name}. Choose another source for the loss, or score again with this signal "
            "(signals.top_k, signals.hidden, signals.sampled, signals.advantage)."
        )
    return value


def _of(name: str, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of another cache, by their own names."""
    return {key.removeprefix(name): array for key, array in arrays.items() if key.startswith(name)}


def _ids(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.long()


def _float(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.float()
