"""Hidden states in few bytes: floats as they are, int8 and int4 with channel scales, optional principal components.

int8 is a scale per channel (rms^0.75, fitted once per cache) times a scale per row. One channel of a language
model's final state can hold 44 % of the energy, so without the channel scale a row's scale is set by that channel
and the rest is rounded away: KL to the exact distribution 0.003 without it, 0.0003 with it (SmolLM2-135M; the latter
is in docs/benchmarks.md). int4 has a scale per block of 32 channels. Encoding runs where the teacher runs, in torch.
Decoding runs in numpy or in torch, and is written once, over the array operations that the two share.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from teacher_cache.errors import CacheError, ConfigError
from teacher_cache.store.arrays import load_safetensors_array, tensor_entries
from teacher_cache.store.records import INT4_BLOCK

CHANNEL_POWER = 0.75
"""Between 0 (no channel scale) and 1 (all channels equally loud); 0.75 had the least KL of those tried."""

Stored = TypeVar("Stored")
"""A numpy array or a torch tensor."""


@dataclass(frozen=True)
class ChannelScales:
    """What a codec needs beside the rows: channel_scale (d,) float32 and, with PCA, mean (d0,) and basis (p, d0)."""

    channel_scale: npt.NDArray[np.float32]
    mean: npt.NDArray[np.float32] | None = None
    basis: npt.NDArray[np.float32] | None = None


def fit_channel_scales(states: npt.NDArray[np.float32], codec: str, pca: int = 0) -> ChannelScales:
    """Fit on calibration rows ``states`` (n, d) float32; float codecs get ones."""
    mean = basis = None
    if pca:
        mean = states.mean(0).astype(np.float32)
        _, _, directions = np.linalg.svd(states - mean, full_matrices=False)
        if len(directions) < pca:
            raise ConfigError(
                f"signals.pca={pca} needs at least as many calibration rows and channels, found {states.shape}; "
                "raise signals.calibration_samples or lower signals.pca"
            )
        basis = np.ascontiguousarray(directions[:pca], np.float32)
        states = (states - mean) @ basis.T
    if codec not in ("int8", "int4"):
        return ChannelScales(np.ones(states.shape[1], np.float32), mean, basis)
    rms = np.sqrt(np.mean(np.square(states, dtype=np.float64), axis=0))
    scale = np.maximum(rms, rms.max() * 1e-4 + 1e-12) ** CHANNEL_POWER
    return ChannelScales(scale.astype(np.float32), mean, basis)


def encode(states: Any, codec: str, scales: ChannelScales) -> tuple[Any, Any | None]:
    """``states`` (…, d) float32 torch tensor → (codes, row scales or None), tensors on the same device.

    In float16 a state beyond 65,504 is infinite, not cut off: whoever stores it looks for that.
    """
    import torch

    states = states.float()
    if scales.basis is not None:
        assert scales.mean is not None
        states = (states - torch.as_tensor(scales.mean, device=states.device)) @ torch.as_tensor(
            scales.basis, device=states.device
        ).T
    if codec == "float32":
        return states, None
    if codec == "float16":
        return states.half(), None
    if codec == "bfloat16":
        return states.bfloat16().view(torch.uint16), None
    scaled = states / torch.as_tensor(scales.channel_scale, device=states.device)
    if codec == "int8":
        step = _row_step(scaled, 127)
        codes = (scaled / step.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
        return codes, step
    return _encode_int4(scaled)


def _encode_int4(scaled: Any) -> tuple[Any, Any]:
    """Blocks of 32 channels, codes −7…7 stored as +8 in a nibble, the even channel in the low one."""
    import torch

    width = scaled.shape[-1]
    blocks = -(-width // INT4_BLOCK)
    scaled = torch.nn.functional.pad(scaled, (0, blocks * INT4_BLOCK - width))
    grouped = scaled.reshape(*scaled.shape[:-1], blocks, INT4_BLOCK)
    step = _row_step(grouped, 7)
    codes = ((grouped / step.float().unsqueeze(-1)).round().clamp(-7, 7) + 8).to(torch.uint8).flatten(-2)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), step


def _row_step(scaled: Any, levels: int) -> Any:
    """(…) float16 the step of each row, so that its largest entry gets the code ``levels``; never 0, never infinite
    (an entry ten thousand times what its channel showed in calibration is cut off)."""
    return (scaled.abs().amax(-1) / levels).clamp(min=_FLOAT16_LEAST, max=_FLOAT16_MOST).half()


_FLOAT16_LEAST, _FLOAT16_MOST = 2.0**-24, 65504.0


def decode(stored: Stored, row_scale: Any | None, codec: str, scales: ChannelScales) -> Stored:
    """Arrays as they lie in the cache → states (…, d) float32: numpy for numpy, tensors on their device for tensors."""
    codes: Any = stored
    xp: Any = np if isinstance(codes, np.ndarray) else _torch()
    floats = partial(xp.asarray, dtype=xp.float32, device=codes.device)
    if codec in ("float32", "float16"):
        states = floats(codes)
    elif codec == "bfloat16":  # the upper half of a float32
        states = (xp.asarray(codes.view(xp.int16), dtype=xp.int32) << 16).view(xp.float32)
    else:
        assert row_scale is not None
        channel = floats(scales.channel_scale)
        if codec == "int8":
            states = floats(codes) * floats(row_scale)[..., None]
        else:
            nibbles = floats(xp.stack([codes & 15, codes >> 4], -1)) - 8  # (…, bytes, 2)
            blocks = nibbles.reshape(*row_scale.shape, INT4_BLOCK) * floats(row_scale)[..., None]
            states = blocks.reshape(*codes.shape[:-1], 2 * codes.shape[-1])[..., : len(channel)]
        states = states * channel
    if scales.basis is not None:
        states = states @ floats(scales.basis) + floats(scales.mean)
    return states  # type: ignore[no-any-return]


def _torch() -> Any:
    import torch

    return torch


def is_coarse(codec: str, scales: ChannelScales) -> bool:
    """Whether logits formed from such states are to be corrected by the stored top-k (:func:`with_exact_head`)."""
    return codec == "int4" or scales.basis is not None


def with_exact_head(logits: Any, topk_ids: Any, topk_logprobs: Any, log_sum_exp: Any) -> Any:
    """Logits of coarse states (R, V) float32, with the stored head put in: torch tensors on one device.

    The kept ids get their exact logits (topk_logprobs (R, k) + log_sum_exp (R,)); the others keep the shape that the
    states give and are shifted to the mass that is left, so the whole sums to exp(log_sum_exp). On SmolLM2-135M the
    tail's shape from 44 principal components and an exact top-12 (110 bytes a row) leave 0.19 nats, the top-50 alone
    with an even tail 0.39, the components alone 1.6.
    """
    import torch

    topk_logprobs = topk_logprobs.to(logits.dtype)
    left = (1 - topk_logprobs.exp().sum(-1)).clamp(min=_LEAST_TAIL).log()
    tail = logits.scatter(-1, topk_ids, -torch.inf)
    shift = log_sum_exp + left - tail.logsumexp(-1)
    return (tail + shift.unsqueeze(-1)).scatter(-1, topk_ids, topk_logprobs + log_sum_exp.unsqueeze(-1))


_LEAST_TAIL = 1e-6


def scales_from_bytes(data: bytes, where: str, hidden_size: int, pca: int = 0) -> dict[str, ChannelScales]:
    """``scales.safetensors``: ``{array}.channel_scale`` and, with PCA, ``{array}.mean`` and ``{array}.basis``.

    Raises ``CacheError``, which names the file (``where``), for other tensors, shapes other than the cache's width and
    components (``pca``), or numbers that are not finite.
    """
    found: dict[str, dict[str, npt.NDArray[np.float32]]] = {}
    for key, (_, shape, _) in tensor_entries(data, where).items():
        name, _, part = key.rpartition(".")
        array = load_safetensors_array(data, key, where, shape)
        if part not in _PARTS or array.dtype != np.float32 or not np.isfinite(array).all():
            raise CacheError(f"{where}: {ascii(key)[:80]}: not finite float32 scales")
        found.setdefault(name, {})[part] = array
    expected: dict[str, tuple[int, ...]] = {"channel_scale": (pca or hidden_size,)}
    if pca:
        expected |= {"mean": (hidden_size,), "basis": (pca, hidden_size)}
    for name, parts in found.items():
        shapes = {part: array.shape for part, array in parts.items()}
        if shapes != expected:
            raise CacheError(f"{where}: {ascii(name)[:80]}: expected the shapes {expected}, found {shapes}")
    return {name: ChannelScales(**parts) for name, parts in found.items()}


_PARTS = {f.name for f in dataclasses.fields(ChannelScales)}
