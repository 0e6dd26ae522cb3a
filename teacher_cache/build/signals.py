"""From a teacher's states to what is stored: top-k, statistics, sampled ids, quantised states, visual signals.

Everything here runs on the teacher's device, over chunks of rows, so that the (rows × vocabulary) logits of a batch
never exist at once. The logits are formed from the states and the head, as a reader will form them again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from teacher_cache.config import SignalsConfig
from teacher_cache.data.logit_rule import AS_THEY_ARE, LogitRule
from teacher_cache.data.rows import TokenizedSample
from teacher_cache.store.codecs import ChannelScales, encode
from teacher_cache.store.records import Array, TeacherShape
from teacher_cache.teachers.teacher import SampleStates, Wanted

NOT_FINITE = (
    "logits or states that are not finite (inf or NaN) or beyond what signals.codec holds: another teacher.dtype or "
    "signals.codec may hold them"
)
"""Why such a sample is skipped. The same words every time: reasons are part of a cache's bytes."""


def finite_states(states: SampleStates) -> bool:
    """Whether every state of the sample is a number."""
    parts = (getattr(states, part.name) for part in dataclasses.fields(states))
    return all(bool(torch.isfinite(part).all()) for part in parts if part is not None)


def finite_arrays(arrays: Mapping[str, Array]) -> bool:
    """Whether what will be stored is finite: states may be where their logits, or float16 of them, are not."""
    return all(bool(np.isfinite(a).all()) for a in arrays.values() if np.issubdtype(a.dtype, np.floating))


@torch.inference_mode()
def finite_logits(rows: torch.Tensor, head: torch.Tensor, head_rows: int) -> bool:
    """Whether ``rows @ head.T`` is finite, in the dtype in which it will be formed."""
    return all(bool(torch.isfinite(part @ head.T).all()) for part in torch.split(rows, head_rows))


def wanted_states(signals: SignalsConfig) -> Wanted:
    """What a scoring pass must hand out for these signals."""
    return Wanted(
        text=signals.hidden == "text",
        visual=signals.visual != "none",
        second_last=signals.second_last,
        attention=signals.attention,
    )


@dataclass(frozen=True)
class Extractor:
    """Turns states into arrays. ``head`` (V, d) lies on the teacher's device, in the teacher's dtype.

    The float16 log-probabilities are those of float32 logits; ``seed`` drives Random Sampling KD, per sample, so
    that a sample's draws do not depend on the batch it was scored in.
    """

    signals: SignalsConfig
    shape: TeacherShape
    head: torch.Tensor
    scales: dict[str, ChannelScales]
    seed: int = 0
    head_rows: int = 2048
    rule: LogitRule = AS_THEY_ARE

    @torch.inference_mode()
    def records(self, sample_ids: Sequence[str], states: Sequence[SampleStates]) -> list[dict[str, Array]]:
        """For each sample the arrays of ``records.record_arrays`` but input_ids, loss_mask, runs and advantage."""
        rows = torch.cat([s.rows for s in states])
        arrays = self._rows(rows, sample_ids, [len(s.rows) for s in states])
        counts = {name: [len(s.rows) for s in states] for name in arrays}
        for name, second in (("hidden", False), ("hidden_second_last", True)):
            kept = [self._kept(s, second) for s in states]
            if any(k is None for k in kept):
                continue
            for key, value in self._encoded(name, torch.cat([k for k in kept if k is not None])).items():
                arrays[key], counts[key] = value, [len(k) for k in kept if k is not None]
        if self.signals.attention:
            maps = [rows.new_zeros(0) if s.attention is None else s.attention.flatten() for s in states]
            arrays["attention"] = torch.cat(maps).to(torch.float16)
            counts["attention"] = [len(m) for m in maps]
        return _split({name: array.cpu().numpy() for name, array in arrays.items()}, counts, len(states))

    @torch.inference_mode()
    def answer_logprobs(self, samples: Sequence[TokenizedSample], states: Sequence[SampleStates]) -> list[Array]:
        """(R,) float32 of each sample: the log-probability of every answer token."""
        rows = torch.cat([s.rows for s in states])
        ids = torch.cat([torch.from_numpy(s.input_ids[s.loss_mask]) for s in samples]).to(rows.device)
        chunks = zip(self._logits(rows), torch.split(ids, self.head_rows), strict=True)
        parts = [logits.gather(-1, own[:, None]).squeeze(-1) - logits.logsumexp(-1) for logits, own in chunks]
        return np.split(torch.cat(parts).cpu().numpy(), np.cumsum([len(s.rows) for s in states])[:-1])

    @torch.inference_mode()
    def image(self, visual: torch.Tensor) -> dict[str, Array]:
        """(N, d) visual states of one image → its lines of the arrays of ``records.image_arrays``."""
        signals = self.signals
        if signals.visual == "states":
            arrays = self._encoded("visual", visual)
        elif signals.visual == "topk":
            top = _stored_ids(self._topk(visual, min(signals.visual_top_k, self.shape.vocabulary)), self.shape)
            arrays = {f"visual_{name}": value for name, value in top.items()}
        else:
            arrays = self._gram(visual)
        return {name: value.cpu().numpy() for name, value in arrays.items()}

    def _kept(self, states: SampleStates, second_last: bool) -> torch.Tensor | None:
        if self.signals.hidden == "none" or (second_last and not self.signals.second_last):
            return None
        if self.signals.hidden == "rows":
            return states.rows_second_last if second_last else states.rows
        return states.text_second_last if second_last else states.text

    def _encoded(self, name: str, states: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, scale = encode(states, self.signals.codec, self.scales[name])
        return {name: codes} if scale is None else {name: codes, f"{name}_scale": scale}

    def _logits(self, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        """float32 logits of ``head_rows`` rows at a time."""
        for start in range(0, max(len(rows), 1), self.head_rows):
            yield self.rule.apply((rows[start : start + self.head_rows] @ self.head.T).float())

    def _topk(self, rows: torch.Tensor, k: int) -> dict[str, torch.Tensor]:
        parts = [row_signals(logits, k, self.signals.temperatures) for logits in self._logits(rows)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _rows(self, rows: torch.Tensor, sample_ids: Sequence[str], counts: list[int]) -> dict[str, torch.Tensor]:
        signals = self.signals
        if not signals.sampled:
            arrays = self._topk(rows, min(signals.top_k, self.shape.vocabulary))
            return _stored_ids(arrays, self.shape)
        uniform = torch.cat(
            [_uniform(self.seed, i, n, signals.sampled) for i, n in zip(sample_ids, counts, strict=True)]
        )
        parts = []
        for number, logits in enumerate(self._logits(rows)):
            part = row_signals(logits, min(signals.top_k, self.shape.vocabulary), signals.temperatures)
            start = number * self.head_rows
            draws = uniform[start : start + len(logits)].to(logits.device)
            excluded = part["topk_ids"] if signals.sampled_from == "tail" else None
            part["sampled_ids"], part["sampled_counts"] = sample_ids_and_counts(logits, draws, excluded)
            parts.append(part)
        return _stored_ids({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, self.shape)

    def _gram(self, visual: torch.Tensor) -> dict[str, torch.Tensor]:
        """Upper triangles of H·Hᵀ and of logits·logitsᵀ = H(WᵀW)Hᵀ, each over its largest entry (float32 scale).

        The relation loss is a cosine of Grams, so the scale is free there; it is stored so that nothing is lost. Logits
        that are soft-capped have no such short form: ``context.Build.extractor`` refuses them.
        """
        states, head = visual.float(), self.head.float()
        grams = [states @ states.T, states @ (head.T @ head) @ states.T]
        upper = torch.triu_indices(len(states), len(states), device=states.device)
        scale = torch.stack([gram.abs().max().clamp(min=1e-30) for gram in grams])
        packed = [(gram / s)[upper[0], upper[1]].half() for gram, s in zip(grams, scale, strict=True)]
        return {"gram_hidden": packed[0], "gram_logits": packed[1], "gram_scale": scale.unsqueeze(0)}


def row_signals(logits: torch.Tensor, k: int, temperatures: Sequence[float]) -> dict[str, torch.Tensor]:
    """Top-k and statistics of ``logits`` (R, V) float32.

    topk_ids (R, k) int64, most likely first, the smaller id first among equals · topk_logprobs (R, k) float16 at
    temperature 1 over the full vocabulary · stats (R, s) float32, see ``records.stats_names``.

    All statistics come from one copy of the logits, less the largest, and one buffer: 0.66 instead of 1.26 times what
    forming the logits takes (256 rows of 32,000 from 1,280 channels, one CPU core).
    """
    largest = logits.amax(-1, keepdim=True)
    shifted = logits - largest
    buffer = shifted.exp()
    total = buffer.sum(-1)
    lse = largest.squeeze(-1) + total.log()
    entropy = total.log() - torch.linalg.vecdot(buffer, shifted) / total
    columns = []
    for t in temperatures:
        warm = total if t == 1 else torch.mul(shifted, 1 / t, out=buffer).exp_().sum(-1)
        columns.append(largest.squeeze(-1) / t + warm.log())
    mean = shifted.mean(-1, keepdim=True)
    deviation = torch.linalg.vector_norm(torch.sub(shifted, mean, out=buffer), dim=-1) / math.sqrt(logits.shape[-1])
    columns += [(largest + mean).squeeze(-1), deviation, entropy]
    arrays: dict[str, torch.Tensor] = {}
    if k:
        values, ids = stable_topk(logits, k)
        arrays["topk_ids"] = ids
        arrays["topk_logprobs"] = (values - lse.unsqueeze(-1)).to(torch.float16)
    arrays["stats"] = torch.stack(columns, -1).float()
    return arrays


def stable_topk(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``torch.topk`` whose order among the kept is defined: by value downwards, then by id upwards."""
    values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    ids, by_id = ids.sort(dim=-1)
    values = values.gather(-1, by_id)
    values, by_value = values.sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, by_value)


def sample_ids_and_counts(
    logits: torch.Tensor, uniform: torch.Tensor, excluded: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random Sampling KD: draws with replacement from softmax(logits), as distinct ids and their counts.

    uniform: (R, n) in [0, 1), float64 · excluded: (R, k) ids that may not be drawn (the stored head), or None.
    Returns ids (R, n) int64 and counts (R, n) uint8; unused places have count 0. The counts over n are an unbiased
    estimate of the distribution (Anshumann et al., ACL 2025, section 3).
    """
    if excluded is not None:
        logits = logits.scatter(-1, excluded, -math.inf)
    cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
    draws = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    draws = draws.clamp(max=logits.shape[-1] - 1).sort(dim=-1).values
    first = torch.ones_like(draws, dtype=torch.bool)
    first[:, 1:] = draws[:, 1:] != draws[:, :-1]
    place = first.cumsum(-1) - 1
    ids = torch.zeros_like(draws).scatter(-1, place, draws)
    counts = torch.zeros_like(draws).scatter_add(-1, place, torch.ones_like(draws))
    return ids, counts.to(torch.uint8)


def _uniform(seed: int, sample_id: str, rows: int, draws: int) -> torch.Tensor:
    """(rows, draws) float64 in [0, 1), the same whatever batch or device the sample was scored on."""
    digest = hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()
    return torch.from_numpy(np.random.default_rng(int.from_bytes(digest[:8], "little")).random((rows, draws)))


def _stored_ids(arrays: dict[str, torch.Tensor], shape: TeacherShape) -> dict[str, torch.Tensor]:
    dtype = torch.uint16 if shape.id_dtype == "uint16" else torch.uint32
    return {n: a.to(dtype) if n.endswith("ids") else a for n, a in arrays.items()}


def _split(arrays: dict[str, Array], counts: dict[str, list[int]], samples: int) -> list[dict[str, Array]]:
    out: list[dict[str, Array]] = [{} for _ in range(samples)]
    for name, array in arrays.items():
        for place, part in enumerate(np.split(array, np.cumsum(counts[name])[:-1])):
            out[place][name] = part
    return out
