"""Scenes of the tiny world and their pictures: 32 x 32 pixels, 2 x 2 cells, one to four objects.

Four shapes and the handwritten digits 0-3 (scikit-learn's copy of the UCI optical digits) in six colours. Hues of
neighbouring colours overlap, things are small and pictures are noisy, so that a well trained teacher is unsure where a
person would be: soft labels then carry something that hard labels do not.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits

POSITIONS = ("top-left", "top-right", "bottom-left", "bottom-right")
SHAPES = ("circle", "square", "triangle", "cross")
DIGITS = ("zero", "one", "two", "three")
KINDS = SHAPES + DIGITS
COLORS = ("red", "yellow", "green", "cyan", "blue", "magenta")

CELL = 16
IMAGE_SIDE = 2 * CELL
HUE_STEP_DEGREES = 360 / len(COLORS)
# The border between two colours is 30 degrees from both: about 1 object in 9 looks like its neighbour's colour.
HUE_SPREAD_DEGREES = 19.0
PIXEL_NOISE = 0.12
RADII = (4.0, 6.2)  # pixels
SHIFT = 1.5  # pixels, either way
# The file's digits come writer by writer, so cutting it in order gives dev and test handwriting of other people.
GLYPH_SHARES = {"train": (0.0, 0.7), "dev": (0.7, 0.85), "test": (0.85, 1.0)}

Glyphs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Thing:
    """One object: what it is, and how it happens to be drawn. Digits have a `glyph`, an (8, 8) mask in 0..1."""

    position: str
    kind: str
    color: str
    rgb: tuple[float, float, float]
    radius: float
    width: float
    slant: float
    angle: float
    shift: tuple[float, float]
    pen: float
    glyph: np.ndarray | None


@dataclass(frozen=True)
class Scene:
    """Things in reading order, on a grey background, with the seed of the pixel noise."""

    things: tuple[Thing, ...]
    background: float
    noise_seed: int


def load_glyphs(split: str) -> Glyphs:
    """Pen masks in [0, 1] for each digit, each (n, 8, 8); the three splits share no glyph."""
    digits = load_digits()
    first, last = GLYPH_SHARES[split]
    glyphs = {}
    for value, kind in enumerate(DIGITS):
        masks = digits.images[digits.target == value] / 16.0
        glyphs[kind] = masks[int(first * len(masks)) : int(last * len(masks))].astype(np.float32)
    return glyphs


def sample_scene(rng: np.random.Generator, glyphs: Glyphs) -> Scene:
    """One to four things of different kinds in different cells, so that "the circle" always means one thing."""
    count = int(rng.integers(1, len(POSITIONS) + 1))
    cells = sorted(rng.choice(len(POSITIONS), size=count, replace=False))
    kinds = rng.choice(len(KINDS), size=count, replace=False)
    things = tuple(
        _draw_thing(rng, glyphs, POSITIONS[cell], KINDS[kind]) for cell, kind in zip(cells, kinds, strict=True)
    )
    return Scene(things, background=float(rng.uniform(0.05, 0.25)), noise_seed=int(rng.integers(2**31)))


def _draw_thing(rng: np.random.Generator, glyphs: Glyphs, position: str, kind: str) -> Thing:
    """Choose how a thing looks: its colour and a hue near it, size, tilt, place in its cell, whose handwriting."""
    color = int(rng.integers(len(COLORS)))
    hue = (color * HUE_STEP_DEGREES + rng.normal(0, HUE_SPREAD_DEGREES)) / 360 % 1.0
    return Thing(
        position=position,
        kind=kind,
        color=COLORS[color],
        rgb=colorsys.hsv_to_rgb(hue, rng.uniform(0.75, 1.0), rng.uniform(0.75, 1.0)),
        radius=float(rng.uniform(*RADII)),
        width=float(rng.uniform(0.8, 1.1)),
        slant=float(rng.uniform(-0.25, 0.25)),
        angle=float(np.deg2rad(rng.uniform(-12, 12))),
        shift=(float(rng.uniform(-SHIFT, SHIFT)), float(rng.uniform(-SHIFT, SHIFT))),
        pen=float(rng.uniform(0.9, 2.2)),
        glyph=glyphs[kind][rng.integers(len(glyphs[kind]))] if kind in DIGITS else None,
    )


def render(scenes: Sequence[Scene]) -> np.ndarray:
    """Draw scenes: (B, 32, 32, 3) uint8. The same scene gives the same bytes in any batch."""
    images = np.empty((len(scenes), IMAGE_SIDE, IMAGE_SIDE, 3), np.float32)
    for image, scene in zip(images, scenes, strict=True):
        image[:] = scene.background
    things = [(index, thing) for index, scene in enumerate(scenes) for thing in scene.things]
    coverage = _coverage([thing for _, thing in things])
    for (index, thing), alpha in zip(things, coverage, strict=True):
        row, column = divmod(POSITIONS.index(thing.position), 2)
        cell = images[index, row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        cell += alpha[..., None] * (np.asarray(thing.rgb, np.float32) - cell)
    for image, scene in zip(images, scenes, strict=True):
        noise = np.random.default_rng(scene.noise_seed).standard_normal(image.shape, np.float32)
        image += PIXEL_NOISE * noise
    return (images.clip(0, 1) * 255).round().astype(np.uint8)


def _coverage(things: Sequence[Thing]) -> np.ndarray:
    """How much of each pixel of its cell a thing covers: (n, 16, 16) in [0, 1]."""
    looks = [(thing.radius, thing.width, thing.slant, thing.angle, *thing.shift) for thing in things]
    columns = np.array(looks, np.float32).reshape(-1, 6).T[:, :, None, None]
    radius, width, slant, angle, right, down = columns  # each (n, 1, 1)
    center = (CELL - 1) / 2
    y, x = np.mgrid[:CELL, :CELL].astype(np.float32)
    x, y = x - center - right, y - center - down
    v = (np.cos(angle) * y - np.sin(angle) * x) / radius  # (n, 16, 16), the thing spans about -1..1
    u = ((np.cos(angle) * x + np.sin(angle) * y) / radius + slant * v) / width

    coverage = np.empty_like(u)
    for kind in SHAPES:
        chosen = [index for index, thing in enumerate(things) if thing.kind == kind]
        distance = _outline_distance(kind, u[chosen], v[chosen])
        coverage[chosen] = (0.5 - distance * radius[chosen]).clip(0, 1)
    written = [index for index, thing in enumerate(things) if thing.glyph is not None]
    if written:
        masks = np.stack([thing.pen * thing.glyph for thing in things if thing.glyph is not None])
        coverage[written] = _sample_bilinear(masks, u[written], v[written]).clip(0, 1)
    return coverage


def _outline_distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of a shape (negative inside), in units of its radius."""
    a, b = np.abs(u), np.abs(v)
    if shape == "circle":
        return np.sqrt(u * u + v * v) - 0.95
    if shape == "square":
        return np.maximum(a, b) - 0.8
    if shape == "triangle":
        return np.maximum(v - 0.75, (1.7 * a - 0.9 * (v + 0.95)) / 1.92)
    return np.minimum(np.maximum(a - 0.3, b - 0.95), np.maximum(a - 0.95, b - 0.3))


def _sample_bilinear(masks: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Read (n, 8, 8) masks at coordinates u (right) and v (down) in -1..1, zero outside: (n, 16, 16)."""
    padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
    x = ((u + 1) * 4 + 0.5).clip(0, 8.999)
    y = ((v + 1) * 4 + 0.5).clip(0, 8.999)
    left, top = x.astype(int), y.astype(int)
    x, y = x - left, y - top
    n = np.arange(len(masks))[:, None, None]
    upper = (1 - x) * padded[n, top, left] + x * padded[n, top, left + 1]
    lower = (1 - x) * padded[n, top + 1, left] + x * padded[n, top + 1, left + 1]
    return (1 - y) * upper + y * lower
