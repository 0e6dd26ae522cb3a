"""What a student is compared with: the cache's arrays as tensors on a device, and one loss out of them.

States stay quantised until a chunk of rows is asked for, so a batch's targets take the bytes they take on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from student_train.losses import row_losses as losses
from student_train.losses import topk
from student_train.losses.shared_ids import shared_count, shared_draws, shared_topk
from teacher_cache.config import SignalsConfig
from teacher_cache.errors import LossError
from teacher_cache.store.codecs import ChannelScales, decode, is_coarse, with_exact_head
from teacher_cache.store.records import stats_names

LOGIT_LOSSES = ("forward_kl", "reverse_kl", "jsd", "logit_mse", "forward_kl_standardised")


class LogitLoss(Protocol):
    """What :func:`row_loss` reads of a loss's settings."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str:
        """topk, exact or sampled."""
        ...

    @property
    def temperature(self) -> float: ...

    @property
    def temperature_squared(self) -> bool: ...

    @property
    def beta(self) -> float: ...


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
    head (V, d) in the dtype in which logits are formed · vocabulary: the teacher's V, where it may be another than the
    student's (``shared_ids``); None where it is the same.
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
    head: Tensor | None = None
    vocabulary: int | None = None

    def answers(self, rows: slice) -> Tensor:
        """(rows,) int64 the answer tokens."""
        return _present(self.answer_ids, "answer tokens", "cross_entropy")[rows]

    def exact_logits(self, rows: slice, shared: int | None = None) -> Tensor:
        """(rows, V) float32: the teacher's full-vocabulary logits, formed from the states and the head; of the first
        ``shared`` ids where the two sides have different numbers of them.

        Of coarse states (int4, principal components) they give the tail alone; the head is the stored top-k's.
        """
        hidden, head = _present(self.hidden, "hidden", "exact"), _present(self.head, "head", "exact")
        shared = None if self.vocabulary is None else shared
        coarse = is_coarse(hidden.codec, hidden.scales) and self.topk_ids is not None
        head = head if coarse else head[:shared]
        logits = topk.wide(hidden.decode(rows).to(head.dtype) @ head.T)
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


def row_targets(
    arrays: Mapping[str, Tensor],
    answer_ids: Tensor | None,
    signals: SignalsConfig,
    scales: Mapping[str, ChannelScales],
    head: Tensor | None,
    row_index: Tensor | None = None,
    vocabulary: int | None = None,
) -> RowTargets:
    """The targets of a batch whose tensors are on the device already.

    arrays: by the names of ``records.record_arrays``, as stored, samples one after another · scales: by the name of the
    states, from :func:`scales_on` · row_index (R,): with ``signals.hidden: text``, which of the batch's lines of
    ``hidden`` are rows' (``rows.rows_among_text``, shifted by the samples before).
    """
    lines = row_index if signals.hidden == "text" else None
    return RowTargets(
        answer_ids=answer_ids,
        topk_ids=_ids(arrays.get("topk_ids")),
        topk_logprobs=_float(arrays.get("topk_logprobs")),
        stats=named_columns(arrays.get("stats"), signals),
        sampled_ids=_ids(arrays.get("sampled_ids")),
        sampled_counts=arrays.get("sampled_counts"),
        sampled_from=signals.sampled_from,
        hidden=stored_states("hidden", arrays, signals.codec, scales, lines),
        hidden_second_last=stored_states("hidden_second_last", arrays, signals.codec, scales, lines),
        attention=_float(arrays.get("attention")),
        head=head,
        vocabulary=vocabulary,
    )


def image_targets(
    arrays: Mapping[str, Tensor],
    signals: SignalsConfig,
    scales: Mapping[str, ChannelScales],
    image_tokens: int,
    head: Tensor | None,
    head_square: Tensor | None = None,
    vocabulary: int | None = None,
) -> ImageTargets:
    """The targets of a batch of distinct images; arrays by the names of ``records.image_arrays``, a line an image."""
    return ImageTargets(
        tokens=image_tokens,
        states=stored_states("visual", arrays, signals.codec, scales),
        topk_ids=_ids(arrays.get("visual_topk_ids")),
        topk_logprobs=_float(arrays.get("visual_topk_logprobs")),
        stats=named_columns(arrays.get("visual_stats"), signals),
        gram_hidden=arrays.get("gram_hidden"),
        gram_logits=arrays.get("gram_logits"),
        gram_scale=arrays.get("gram_scale"),
        head=head,
        head_square=head_square,
        vocabulary=vocabulary,
    )


def stored_states(
    name: str,
    arrays: Mapping[str, Tensor],
    codec: str,
    scales: Mapping[str, ChannelScales],
    lines: Tensor | None = None,
) -> StoredStates | None:
    """The states called ``name`` among ``arrays``, still quantised; None where there are none."""
    if name not in arrays:
        return None
    codes = arrays[name].view(torch.bfloat16) if codec == "bfloat16" else arrays[name]
    return StoredStates(codes, arrays.get(f"{name}_scale"), codec, scales[name], lines)


def scales_on(scales: ChannelScales, device: torch.device | str) -> ChannelScales:
    """The same scales as tensors on ``device``, so that decoding a chunk copies nothing there."""
    parts: list[Any] = [
        None if part is None else torch.as_tensor(part, device=device)
        for part in (scales.channel_scale, scales.mean, scales.basis)
    ]
    return ChannelScales(*parts)


def named_columns(stats: Tensor | None, signals: SignalsConfig) -> dict[str, Tensor]:
    """``stats`` (…, s) as column name → (…,)."""
    return {} if stats is None else dict(zip(stats_names(signals), stats.unbind(-1), strict=True))


def row_loss(spec: LogitLoss, targets: RowTargets, student_logits: Tensor, rows: slice) -> Tensor:
    """One value per row (rows,) of the loss that ``spec`` names; ``student_logits`` (rows, V) are those of ``rows``.

    Raises ``LossError``: for a name or source that does not exist, or a signal that the cache does not hold.
    """
    if spec.name == "cross_entropy":
        return losses.cross_entropy(targets.answers(rows), student_logits)
    shared = shared_count(targets.vocabulary, student_logits.shape[-1])
    student_logits = student_logits[..., :shared]
    if spec.source == "exact":
        return _exact_loss(spec, targets.exact_logits(rows, shared), student_logits)
    if spec.source == "topk":
        return _topk_loss(spec, targets, student_logits, rows)
    if spec.source == "sampled":
        return _sampled_loss(spec, targets, student_logits, rows)
    raise LossError(f"loss {spec.name}: source {spec.source!r} is none of topk, exact, sampled; set one of these.")


def _exact_loss(spec: LogitLoss, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    check_vocabulary(spec.name, teacher_logits.shape[-1], student_logits.shape[-1])
    t, squared = spec.temperature, spec.temperature_squared
    match spec.name:
        case "forward_kl":
            return losses.forward_kl(teacher_logits, student_logits, t, squared)
        case "reverse_kl":
            return losses.reverse_kl(teacher_logits, student_logits, t, squared)
        case "jsd":
            return losses.jsd(teacher_logits, student_logits, spec.beta, t, squared)
        case "logit_mse":
            return losses.logit_mse(teacher_logits, student_logits, t, squared)
        case "forward_kl_standardised":
            return losses.forward_kl_standardised(teacher_logits, student_logits, t, squared)
    raise _unknown(spec)


def _topk_loss(spec: LogitLoss, targets: RowTargets, student_logits: Tensor, rows: slice) -> Tensor:
    ids, logprobs, stats = targets.kept(rows)
    vocabulary = student_logits.shape[-1]
    if spec.name == "logit_mse":
        logits = topk.topk_logits(logprobs, stats)
        ids, _, inside = shared_topk(ids, topk.wide(logprobs), targets.vocabulary, vocabulary)
        return losses.logit_mse_topk(ids, logits, student_logits, spec.temperature, spec.temperature_squared, inside)
    if spec.name == "forward_kl_standardised":  # of a larger teacher: refused before the first step
        head = topk.topk_standardised(logprobs, stats, vocabulary, spec.temperature)
        t, squared = spec.temperature, spec.temperature_squared
        return losses.forward_kl_standardised_topk(ids, head, student_logits, t, squared)
    head = topk.topk_at_temperature(logprobs, stats, spec.temperature)
    ids, head, inside = shared_topk(ids, head, targets.vocabulary, vocabulary)
    settings = (spec.temperature, spec.temperature_squared, inside)
    match spec.name:
        case "forward_kl":
            return losses.forward_kl_topk(ids, head, student_logits, *settings)
        case "reverse_kl":
            return losses.reverse_kl_topk(ids, head, student_logits, *settings)
        case "jsd":
            return losses.jsd_topk(ids, head, student_logits, spec.beta, *settings)
    raise _unknown(spec)


def _sampled_loss(spec: LogitLoss, targets: RowTargets, student_logits: Tensor, rows: slice) -> Tensor:
    check_sampled(spec)
    vocabulary = student_logits.shape[-1]
    ids, counts, entropy = targets.draws(rows)
    ids, counts = shared_draws(ids, counts, targets.vocabulary, vocabulary)
    if targets.sampled_from == "all":
        return losses.forward_kl_sampled(ids, counts, entropy, student_logits)
    head_ids, logprobs, _ = targets.kept(rows)
    head_ids, head, inside = shared_topk(head_ids, topk.wide(logprobs), targets.vocabulary, vocabulary)
    return losses.forward_kl_hybrid(head_ids, head, ids, counts, entropy, student_logits, inside)


def check_sampled(spec: LogitLoss) -> None:
    """Draws serve forward KL at temperature 1 only: other objectives are not linear in the teacher's distribution."""
    if spec.name != "forward_kl" or spec.temperature != 1:
        raise LossError(
            f"loss {spec.name} at temperature {spec.temperature:g} from sampled ids: expected forward_kl at "
            "temperature 1, the only objective of which draws give an unbiased estimate. Use `source: exact` or `topk`."
        )


def check_vocabulary(name: str, teacher: int, student: int) -> None:
    """Exact losses compare id by id."""
    if teacher != student:
        raise LossError(
            f"loss {name}: the teacher's head gives {teacher:,} logits, the student's {student:,}. Cut both heads to "
            f"the {min(teacher, student):,} ids that they share."
        )


def _unknown(spec: LogitLoss) -> ValueError:
    names = ", ".join(LOGIT_LOSSES)
    return ValueError(f"loss {spec.name!r}: expected cross_entropy or one of {names}; correct its name.")


Found = TypeVar("Found")


def _present(value: Found | None, name: str, wanted: str) -> Found:
    if value is None:
        raise LossError(
            f"{wanted}: the cache holds no {name}. Choose another source for the loss, or score again with this signal "
            "(signals.top_k, signals.hidden, signals.sampled)."
        )
    return value


def _ids(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.long()


def _float(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.float()
