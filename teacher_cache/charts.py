"""Small charts as SVG text: no library, no script, colours from the page's style, so they follow light and dark.

Each is drawn 330 units wide, about the width of a phone, so that its letters keep their size there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from teacher_cache.page import escape

WIDTH, HEIGHT = 330, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 38
DASHES = ("", "6 3", "2 3", "8 3 2 3")
COLOURS = 8

_LETTER = 6.2
_WIDE = 20
Point = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Series:
    """A line. ``style`` picks its colour and dash; ``thin`` lines stand behind (single seeds behind their mean);
    ``spread`` (one value a point) is drawn as a band around the line."""

    name: str
    points: Sequence[Point]
    style: int = 0
    thin: bool = False
    spread: Sequence[float] = field(default=())


@dataclass(frozen=True)
class Dot:
    """A point of a scatter chart, with its deviation along y."""

    name: str
    x: float
    y: float
    spread: float = 0.0
    style: int = 0


@dataclass(frozen=True)
class _Frame:
    """The plane of a chart: data units to SVG units, on a linear or logarithmic x axis."""

    x: tuple[float, float]
    y: tuple[float, float]
    log_x: bool = False
    log_y: bool = False

    def at(self, x: float, y: float) -> str:
        return f"{self.across(x):.1f},{self.up(y):.1f}"

    def across(self, x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * _share(x, self.x, self.log_x)

    def up(self, y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * _share(y, self.y, self.log_y)


def line_chart(
    series: Sequence[Series], x_label: str, y_label: str, *, log_x: bool = False, y_range: Point | None = None
) -> str:
    """Lines over a common plane, its y axis logarithmic where the heights span more than ``_WIDE`` and no ``y_range``
    is given; points that are not finite are left out (a loss that diverged)."""
    series = [_finite(s) for s in series]
    points = [p for s in series for p in s.points]
    if not points:
        return '<p class="note">nothing to draw</p>'
    heights = [y for _, y in points]
    log_y = y_range is None and 0 < _WIDE * min(heights) < max(heights)
    y_span = y_range or ((min(heights), max(heights)) if log_y else _padded(heights))
    frame = _Frame(_span([x for x, _ in points], log_x), y_span, log_x, log_y)
    drawn = "".join(_line(s, frame) for s in sorted(series, key=lambda s: not s.thin))
    return _svg(_axes(frame, x_label, y_label) + drawn, f"{y_label} against {x_label}")


def scatter_chart(dots: Sequence[Dot], x_label: str, y_label: str) -> str:
    """Named dots with whiskers of one deviation, their names beside them."""
    dots = [d for d in dots if math.isfinite(d.x) and math.isfinite(d.y)]
    if not dots:
        return '<p class="note">nothing to draw</p>'
    heights = [v for d in dots for v in (d.y - d.spread, d.y + d.spread)]
    frame = _Frame(_padded([d.x for d in dots], 0.15), _padded(heights))
    drawn = "".join(_dot(d, frame) for d in dots) + "".join(_labels(dots, frame))
    return _svg(_axes(frame, x_label, y_label) + drawn, f"{y_label} against {x_label}")


def histogram(edges: Sequence[float], counts: Sequence[int], x_label: str, y_label: str) -> str:
    """Counts between ``edges`` (one more than counts), the number in words on each bar for pointer and reader."""
    frame = _Frame((edges[0], edges[-1]), (0.0, max([*counts, 1]) * 1.05))
    drawn = []
    for (left, right), count in zip(pairwise(edges), counts, strict=True):
        x, y = frame.across(left), frame.up(count)
        width = max(frame.across(right) - x - 1, 0.5)
        words = escape(f"{left:,.0f} to {right - 1:,.0f}: {count:,}")
        drawn.append(
            f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{frame.up(0) - y:.1f}">'
            f"<title>{words}</title></rect>"
        )
    return _svg(_axes(frame, x_label, y_label) + "".join(drawn), f"{y_label} by {x_label}")


def key(names: Sequence[str]) -> str:
    """What the colours and dashes of a page's charts stand for; style n is ``names[n]``."""
    items = []
    for style, name in enumerate(names):
        stroke = f'<line class="line {_colour(style)}" x1="1" x2="25" y1="5" y2="5"{_dash(style)}/>'
        items.append(f'<li><svg viewBox="0 0 26 10" aria-hidden="true">{stroke}</svg>{escape(name)}</li>')
    return f'<ul class="key">{"".join(items)}</ul>'


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between ``low`` and ``high``: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number for an axis: 1,250 → 1.25k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:,.4g}" if abs(value) < 1e3 else f"{value:,.0f}"


def _line(series: Series, frame: _Frame) -> str:
    if not series.points:
        return ""
    band = ""
    if series.spread:
        upper = [frame.at(x, y + s) for (x, y), s in zip(series.points, series.spread, strict=True)]
        lower = [frame.at(x, y - s) for (x, y), s in zip(series.points, series.spread, strict=True)]
        band = f'<polygon class="band f{series.style % COLOURS}" points="{" ".join([*upper, *reversed(lower)])}"/>'
    points = " ".join(frame.at(x, y) for x, y in series.points)
    css = f"line {_colour(series.style)}{' thin' if series.thin else ''}"
    last_x, last_y = series.points[-1]
    words = escape(f"{series.name}: {last_y:.4g} at {last_x:,.4g}")
    drawn = f'<polyline class="{css}"{_dash(series.style)} points="{points}"><title>{words}</title></polyline>'
    if len(series.points) == 1:
        drawn = f'<circle class="f{series.style % COLOURS}" r="3" cx="{frame.across(last_x):.1f}" '
        drawn += f'cy="{frame.up(last_y):.1f}"><title>{words}</title></circle>'
    return band + drawn


def _dot(dot: Dot, frame: _Frame) -> str:
    x, colour = frame.across(dot.x), dot.style % COLOURS
    top, bottom = frame.up(dot.y + dot.spread), frame.up(dot.y - dot.spread)
    words = escape(f"{dot.name}: {dot.y:.4g} ± {dot.spread:.2g} at {dot.x:,.4g}")
    return (
        f'<line class="whisker k{colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
        f'<circle class="f{colour}" r="4" cx="{x:.1f}" cy="{frame.up(dot.y):.1f}"><title>{words}</title></circle>'
    )


def _labels(dots: Sequence[Dot], frame: _Frame) -> Iterator[str]:
    """Each name at the first place around its dot where it meets no dot, no other name and no edge."""
    taken = [(frame.across(d.x) - 5, frame.up(d.y) - 5, frame.across(d.x) + 5, frame.up(d.y) + 5) for d in dots]
    for dot in dots:
        x, y, width = frame.across(dot.x), frame.up(dot.y), _LETTER * len(dot.name)
        places = [(left, y + down) for down in (0, 13, -13, 26, -26) for left in (x + 8, x - 8 - width)]
        boxes = [(left, level - 6, left + width, level + 6) for left, level in places]
        free = [box for box in boxes if box[0] > LEFT and box[2] < WIDTH and not any(_meet(box, t) for t in taken)]
        box = (free or boxes)[0]
        taken.append(box)
        yield f'<text class="name" x="{box[0]:.1f}" y="{box[1] + 10:.1f}">{escape(dot.name)}</text>'


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _axes(frame: _Frame, x_label: str, y_label: str) -> str:
    floor = HEIGHT - BOTTOM
    parts = []
    for value in _decades(*frame.y) if frame.log_y else ticks(*frame.y):
        y = frame.up(value)
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value in _powers(*frame.x) if frame.log_x else ticks(*frame.x):
        x = frame.across(value)
        parts.append(f'<text x="{x:.1f}" y="{floor + 15}" text-anchor="middle">{short(value)}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>'
    )
    middle = (TOP + floor) / 2
    turned = f'transform="rotate(-90 9 {middle})" x="9" y="{middle}" text-anchor="middle"'
    return "".join([*parts, f"<text {turned}>{escape(y_label)}</text>"])


def _svg(inner: str, label: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{inner}</svg>'


def _finite(series: Series) -> Series:
    keep = [i for i, (x, y) in enumerate(series.points) if math.isfinite(x) and math.isfinite(y)]
    spread = [series.spread[i] for i in keep] if series.spread else ()
    return Series(series.name, [series.points[i] for i in keep], series.style, series.thin, spread)


def _span(values: Sequence[float], log: bool) -> Point:
    low, high = min(values), max(values)
    if low < high:
        return low, high
    return (low / 2, high * 2) if log and low > 0 else (low - 0.5, high + 0.5)


def _padded(values: Sequence[float], share: float = 0.06) -> Point:
    low, high = min(values), max(values)
    pad = (high - low) * share or abs(high) * 0.1 or 0.5
    return (0.0 if 0 <= low <= 0.25 * high else low - pad), high + pad


def _share(value: float, span: Point, log: bool) -> float:
    low, high, value = (math.log(v) for v in (*span, value)) if log else (*span, value)
    return (value - low) / (high - low)


def _decades(low: float, high: float) -> list[float]:
    """1, 10, 100 … for a logarithmic axis of losses, with 2 and 5 between where there is room."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(exponents) < 4 else (1,)
    return [m * 10.0**n for n in exponents for m in steps if low <= m * 10.0**n <= high]


def _powers(low: float, high: float) -> list[float]:
    """1, 2, 4, 8 … for a logarithmic axis of counts, few enough to be read."""
    values = [2.0**n for n in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    return values[:: -(-len(values) // 8)]


def _colour(style: int) -> str:
    return f"k{style % COLOURS}"


def _dash(style: int) -> str:
    dash = DASHES[(style // 2) % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""
