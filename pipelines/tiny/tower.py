"""Trains the tiny vision tower on what each cell holds. Teacher and students then share it, as they share CLIP."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel

from pipelines.tiny.optimization import cosine_adamw, take_step
from pipelines.tiny.scenes import COLORS, KINDS, POSITIONS, Glyphs, Scene, render, sample_scene
from pipelines.tiny.tokenizer import PIXEL_MEAN, PIXEL_STD

BATCH = 64
IGNORED = -100
EMPTY = len(KINDS)


def pixels(scenes: Sequence[Scene]) -> Tensor:
    """Normalised as the processor does: (B, 3, 32, 32)."""
    images = torch.from_numpy(render(scenes)).permute(0, 3, 1, 2)
    return (images / 255 - PIXEL_MEAN) / PIXEL_STD


def cell_labels(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """What each cell holds: kinds (B, 4), EMPTY included, and colours (B, 4), IGNORED where empty."""
    kinds = torch.full((len(scenes), len(POSITIONS)), EMPTY)
    colors = torch.full((len(scenes), len(POSITIONS)), IGNORED)
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            cell = POSITIONS.index(thing.position)
            kinds[row, cell] = KINDS.index(thing.kind)
            colors[row, cell] = COLORS.index(thing.color)
    return kinds, colors


class CellProbe(nn.Module):
    """Linear read-outs of a cell's kind, colour and position; they shape the tower and are then thrown away."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, n) for n in (len(KINDS) + 1, len(COLORS), len(POSITIONS)))

    def loss(self, features: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """Summed cross-entropies over cells; features (B, 4, D)."""
        kinds, colors = cell_labels(scenes)
        places = torch.arange(len(POSITIONS)).expand_as(kinds)
        losses = [
            F.cross_entropy(head(features).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
            for head, labels in zip(self.heads, (kinds, colors, places), strict=True)
        ]
        return torch.stack(losses).sum()


def train_tower(tower: CLIPVisionModel, glyphs: Glyphs, *, steps: int, rng: np.random.Generator) -> None:
    """Teach the tower what its cells hold, then freeze it."""
    probe = CellProbe(tower.config.hidden_size)
    parameters = [*tower.parameters(), *probe.parameters()]
    optimizer, schedule = cosine_adamw(parameters, steps=steps, warmup_steps=steps // 20)
    tower.train()
    for step in range(steps):
        scenes = [sample_scene(rng, glyphs) for _ in range(BATCH)]
        loss = probe.loss(tower(pixels(scenes)).last_hidden_state[:, 1:], scenes)
        take_step(loss, parameters, optimizer, schedule)
        if step % 200 == 0 or step == steps - 1:
            print(f"tower {step:5d} loss {loss.item():.3f}", flush=True)
    tower.eval().requires_grad_(False)
