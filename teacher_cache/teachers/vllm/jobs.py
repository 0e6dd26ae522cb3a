"""What an engine is started for, asked and answers: plain data, without vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from teacher_cache.data.images import AnyImage

Mode = Literal["capture", "plain", "states"]
"""What an engine is started for: one pass; answers alone; states of given sequences (``token_embed``)."""


@dataclass(frozen=True)
class VllmOptions:
    """What an engine needs to know beside the configuration. Nothing here changes what is cached; 0 is "you choose"."""

    capture: bool = True
    """Hand out states while answering, where the model class can; False answers first, then scores."""
    max_sequences: int = 256
    """Requests that run at once."""
    prefill_tokens: int = 0
    """Tokens of one scheduler step; longer prompts are prefilled in chunks."""
    block_tokens: int = 0
    """Tokens of a KV-cache block: prefix-cache hits are whole blocks. On a CPU a multiple of 32, and 32 by default."""
    cache_blocks: int = 0
    cache_bytes: int = 0
    checked_ids: int = 4
    """Of the engine's most likely ids, how many have their logits compared with ours, in every captured row."""
    count_events: bool = False
    """Let the engine count what :meth:`VllmSession.events` reports."""
    scratch: str = ""
    """Where the connector's files lie for a moment (a few MB a running request); "": the temporary directory."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the engine's processes, over our defaults."""


@dataclass(frozen=True)
class Job:
    """One request: its place among the caller's, the ids with one placeholder an image, and as the model reads them."""

    place: int
    sample_id: str
    prompt: Sequence[int]
    expanded: npt.NDArray[np.int64]
    images: Sequence[AnyImage]
    max_tokens: int
    seed: int | None
    """Of a sampled answer; None takes the most likely ids."""
    capture: bool


@dataclass(frozen=True)
class Outcome:
    """What the engine gave for a job, states only where they were captured.

    states (S, layers, d), before the final norm (after it in mode ``states``) · read_ids: the ids that it read, of the
    prompt, and of the answer too where states were captured · top_ids, top_logits (n, k): the engine's most likely ids
    for each of the n answer tokens, and their raw logits.
    """

    token_ids: tuple[int, ...]
    finish_reason: str
    states: torch.Tensor | None = None
    read_ids: npt.NDArray[np.int64] | None = None
    top_ids: npt.NDArray[np.int64] | None = None
    top_logits: npt.NDArray[np.float32] | None = None
    cached_tokens: int = 0
    """Prompt tokens that came out of the prefix cache."""
