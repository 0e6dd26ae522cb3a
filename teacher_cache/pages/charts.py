"""Small charts as SVG: no library, no script, sharp text, colours from the style, so they follow light and dark.

Each is drawn 330 units wide, about the width of a phone, so that its letters keep their size there. ``picture`` is a
file of its own, every other chart a part of a page. All texts pass through ``_tag``, which escapes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from markupsafe import Markup

from teacher_cache.pages.page import clean, render

WIDTH, HEIGHT = 330, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 38
DASHES = ("", "6 3", "2 3", "8 3 2 3")
COLOURS = 8
GREY = 7
"""The style that stands behind all others: what they are compared with."""

_NOTHING = Markup('<p class="note">nothing to draw</p>')
_LETTER = 6.2
_WIDE = 20
_PANEL, _LINE, _HEAD, _GAP = 190, 24, 34, 20
Point = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Series:
    """A line. ``style`` picks its colour and dash; ``thin`` lines stand behind (single seeds behind their mean)."""

    name: str
    points: Sequence[Point]
    style: int = 0
    thin: bool = False


@dataclass(frozen=True)
class Dot:
    """A point of a scatter chart, with its deviation along y."""

    name: str
    x: float
    y: float
    spread: float = 0.0
    style: int = 0


@dataclass(frozen=True)
class Interval:
    """A mean with its deviation and the single values behind it, on the line ``row`` of a panel."""

    row: int
    mean: float
    spread: float
    values: Sequence[float]
    style: int = 0


@dataclass(frozen=True)
class _Frame:
    """The plane of a chart: data units to SVG units, on a linear or logarithmic x axis."""

    x: Point
    y: Point
    log_x: bool = False
    log_y: bool = False

    def across(self, x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * _share(x, self.x, self.log_x)

    def up(self, y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * _share(y, self.y, self.log_y)


def line_chart(
    series: Sequence[Series], x_label: str, y_label: str, *, log_x: bool = False, y_range: Point | None = None
) -> Markup:
    """Lines over a common plane, its y axis logarithmic where the heights span more than ``_WIDE`` and no ``y_range``
    is given; points that are not finite are left out (a loss that diverged)."""
    series = [replace(s, points=[p for p in s.points if all(map(math.isfinite, p))]) for s in series]
    points = [p for s in series for p in s.points]
    if not points:
        return _NOTHING
    heights = [y for _, y in points]
    log_y = y_range is None and 0 < _WIDE * min(heights) < max(heights)
    y_span = y_range or ((min(heights), max(heights)) if log_y else _padded(heights))
    frame = _Frame(_span([x for x, _ in points], log_x), y_span, log_x, log_y)
    lines = [_line(s, frame) for s in sorted(series, key=lambda s: not s.thin) if s.points]
    return _chart(frame, x_label, y_label, f"{y_label} against {x_label}", lines)


def scatter_chart(dots: Sequence[Dot], x_label: str, y_label: str) -> Markup:
    """Named dots with whiskers of one deviation, their names beside them."""
    dots = [d for d in dots if math.isfinite(d.x) and math.isfinite(d.y)]
    if not dots:
        return _NOTHING
    heights = [v for d in dots for v in (d.y - d.spread, d.y + d.spread)]
    frame = _Frame(_padded([d.x for d in dots], 0.15), _padded(heights))
    drawn = [*(_dot(d, frame) for d in dots), *_labels(dots, frame)]
    return _chart(frame, x_label, y_label, f"{y_label} against {x_label}", drawn)


def histogram(edges: Sequence[float], counts: Sequence[int], x_label: str, y_label: str) -> Markup:
    """Counts between ``edges`` (one more than counts), the number in words on each bar for pointer and reader."""
    frame = _Frame((edges[0], edges[-1]), (0.0, max([*counts, 1]) * 1.05))
    bars = []
    for (left, right), count in zip(pairwise(edges), counts, strict=True):
        x, y = frame.across(left), frame.up(count)
        words = _tag("title", f"{left:,.0f} to {right - 1:,.0f}: {count:,}")
        width = max(frame.across(right) - x - 1, 0.5)
        bars.append(_tag("rect", words, class_="bar", x=x, y=y, width=width, height=frame.up(0) - y))
    return _chart(frame, x_label, y_label, f"{y_label} by {x_label}", bars)


def key(names: Sequence[str]) -> Markup:
    """What the colours and dashes of a page's charts stand for; style n is ``names[n]``."""
    items = Markup()
    for style, name in enumerate(names):
        css = f"line k{style % COLOURS}"
        stroke = _tag("line", class_=css, x1=1, x2=25, y1=5, y2=5, stroke_dasharray=_dash(style))
        items += _tag("li", _tag("svg", stroke, viewBox="0 0 26 10", aria_hidden="true") + clean(name))
    return _tag("ul", items, class_="key")


def picture(rows: Sequence[str], panels: Mapping[str, Sequence[Interval]]) -> str:
    """An SVG file: names on the left, beside them a panel for each of ``panels`` with an interval a row."""
    left = round(_LETTER * max(map(len, rows), default=0)) + 2 * _GAP
    floor = _HEAD + _LINE * len(rows)
    names = [_tag("text", n, class_="name", x=_GAP, y=_HEAD + _LINE * i + 16) for i, n in enumerate(rows)]
    drawn = [_panel(t, panel, left + n * (_PANEL + _GAP), floor) for n, (t, panel) in enumerate(panels.items())]
    width, height = left + len(panels) * (_PANEL + _GAP), floor + 26
    label = ", ".join(panels)
    return render("picture.svg", width=width, height=height, label=label, drawn=Markup().join([*names, *drawn]))


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


def _tag(name: str, inner: object = "", **attributes: object) -> Markup:
    """An element; what is not Markup in it is cleaned and escaped. ``class_`` is class, ``stroke_width`` stroke-width,
    an empty attribute is left out, lengths are written to a tenth of a unit."""
    spelled = Markup()
    for attribute, value in attributes.items():
        if value != "":
            text = clean(f"{value:.1f}" if isinstance(value, float) else value)
            spelled += Markup(' {}="{}"').format(attribute.rstrip("_").replace("_", "-"), text)
    return Markup("<{0}{1}>{2}</{0}>").format(name, spelled, clean(inner))


def _line(series: Series, frame: _Frame) -> Markup:
    places = [(frame.across(x), frame.up(y)) for x, y in series.points]
    last_x, last_y = series.points[-1]
    words = _tag("title", f"{series.name}: {last_y:.4g} at {last_x:,.4g}")
    if len(places) == 1:
        return _tag("circle", words, class_=f"f{series.style % COLOURS}", r=3, cx=places[0][0], cy=places[0][1])
    css = f"line k{series.style % COLOURS}{' thin' if series.thin else ''}"
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return _tag("polyline", words, class_=css, stroke_dasharray=_dash(series.style), points=points)


def _dot(dot: Dot, frame: _Frame) -> Markup:
    x, top, bottom = frame.across(dot.x), frame.up(dot.y + dot.spread), frame.up(dot.y - dot.spread)
    words = _tag("title", f"{dot.name}: {dot.y:.4g} ± {dot.spread:.2g} at {dot.x:,.4g}")
    whisker = _tag("line", class_=f"whisker k{dot.style % COLOURS}", x1=x, x2=x, y1=top, y2=bottom)
    return whisker + _tag("circle", words, class_=f"f{dot.style % COLOURS}", r=4, cx=x, cy=frame.up(dot.y))


def _labels(dots: Sequence[Dot], frame: _Frame) -> Iterator[Markup]:
    """Each name at the first place around its dot where it meets no dot, no other name and no edge."""
    taken = [(frame.across(d.x) - 5, frame.up(d.y) - 5, frame.across(d.x) + 5, frame.up(d.y) + 5) for d in dots]
    for dot in dots:
        x, y, width = frame.across(dot.x), frame.up(dot.y), _LETTER * len(dot.name)
        places = [(left, y + down) for down in (0, 13, -13, 26, -26) for left in (x + 8, x - 8 - width)]
        boxes = [(left, level - 6, left + width, level + 6) for left, level in places]
        free = [b for b in boxes if b[0] > LEFT and b[2] < WIDTH and not any(_meet(b, t) for t in taken)]
        box = (free or boxes)[0]
        taken.append(box)
        yield _tag("text", dot.name, class_="name", x=box[0], y=box[1] + 10)


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _chart(frame: _Frame, x_label: str, y_label: str, label: str, drawn: Sequence[Markup]) -> Markup:
    """The axes with their words, and what is drawn over them."""
    floor, middle = HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    parts = []
    for value in _decades(*frame.y) if frame.log_y else ticks(*frame.y):
        y = frame.up(value)
        parts.append(_tag("line", class_="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        parts.append(_tag("text", short(value), x=LEFT - 6, y=y + 4, text_anchor="end"))
    for value in _powers(*frame.x) if frame.log_x else ticks(*frame.x):
        parts.append(_tag("text", short(value), x=frame.across(value), y=floor + 15, text_anchor="middle"))
    parts.append(_tag("text", x_label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 5, text_anchor="middle"))
    parts.append(_tag("text", y_label, transform=f"rotate(-90 9 {middle})", x=9, y=middle, text_anchor="middle"))
    inner = Markup().join([*parts, *drawn])
    return _tag("svg", inner, class_="chart", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)


def _panel(title: str, intervals: Sequence[Interval], left: int, floor: int) -> Markup:
    """One metric: a grid of round numbers, and on each row its mean, deviation and single values."""
    ends = [v for i in intervals for v in (i.mean - i.spread, i.mean + i.spread, *i.values)]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 0.5

    def across(value: float) -> float:
        return left + _PANEL * _share(value, (low - pad, high + pad), False)

    parts = [_tag("rect", class_="ground", x=left, y=_HEAD, width=_PANEL, height=floor - _HEAD, rx=4)]
    parts.append(_tag("text", title, class_="name", x=left + _PANEL / 2, y=_HEAD - 12, text_anchor="middle"))
    for value in ticks(low - pad, high + pad, 6):
        x = across(value)
        parts.append(_tag("line", class_="axis", x1=x, x2=x, y1=_HEAD, y2=floor))
        parts.append(_tag("text", short(value), x=x, y=floor + 15, text_anchor="middle"))
    for i in intervals:
        y, fill = _HEAD + _LINE * i.row + 12, f"f{i.style % COLOURS}"
        first, last = across(i.mean - i.spread), across(i.mean + i.spread)
        path = f"M{first:.1f} {y}H{last:.1f}M{first:.1f} {y - 4}v8M{last:.1f} {y - 4}v8"
        parts.append(_tag("path", class_=f"whisker k{i.style % COLOURS}", d=path))
        parts += [_tag("circle", class_=f"single {fill}", r=2, cx=across(v), cy=y) for v in i.values]
        words = _tag("title", f"{title}: {i.mean:.4g} ± {i.spread:.2g}")
        parts.append(_tag("circle", words, class_=fill, r=4, cx=across(i.mean), cy=y))
    return Markup().join(parts)


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


def _dash(style: int) -> str:
    return DASHES[(style // 2) % len(DASHES)]
