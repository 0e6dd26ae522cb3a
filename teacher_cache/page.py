"""One HTML file that needs nothing else: the shell, the style and the few elements that all our pages share.

Everything that comes from data goes through :func:`escape`. Should that ever be forgotten, the content security
policy still lets no script run but ours (named by its digest) and no request leave the page.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from PIL import Image as PillowImage

from teacher_cache.conversations import Image
from teacher_cache.images import ImageError, load_image

MAX_IMAGE_SIDE = 480
"""Pixels; larger images are scaled down, which keeps a page of 24 photographs near one megabyte."""

_PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'$policy">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
$body
$script</body>
</html>
"""
)


def render_page(title: str, body: str, script_name: str = "") -> str:
    """The whole page; ``body`` is HTML, ``script_name`` a file of this package."""
    script = asset(script_name) if script_name else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _PAGE.substitute(
        title=escape(title),
        style=asset("page.css"),
        body=body,
        policy=f"; script-src 'sha256-{digest}'" if script else "",
        script=f"<script>{script}</script>\n" if script else "",
    )


def write_page(output: str | Path, text: str) -> Path:
    """Write the page whole: a browser that reloads meanwhile sees the old one."""
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(target)
    return target


def asset(name: str) -> str:
    """A style sheet or script that lies beside this file."""
    return files("teacher_cache").joinpath(name).read_text(encoding="utf-8")


def escape(text: object) -> str:
    """Any value as HTML text or as the value of a quoted attribute; half a surrogate pair becomes ``?``."""
    return html.escape(str(text).encode("utf-8", "replace").decode("utf-8"), quote=True)


def bytes_text(count: float) -> str:
    """1,230,000 → ``1.2 MB``."""
    unit, size = next(((u, s) for u, s in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if count >= s), ("kB", 1e3))
    return f"{count / size:,.1f} {unit}"


def seconds_text(seconds: float) -> str:
    """5,400 → ``1.5 h``."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:,.1f} min" if seconds >= 120 else f"{seconds:,.1f} s"


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """Large numbers with a word under each: (number, word)."""
    inner = "".join(f"<div><dd>{escape(number)}</dd><dt>{escape(word)}</dt></div>" for number, word in values)
    return f'<dl class="tiles">{inner}</dl>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """(fact, value) pairs as a definition list."""
    inner = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows)
    return f'<dl class="facts">{inner}</dl>'


def card(title: str, inner: str, note: str = "", wide: bool = False) -> str:
    """A titled box; ``inner`` is HTML, ``note`` (text) says what the numbers were measured on."""
    small = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<section class="card{" wide" if wide else ""}"><h3>{escape(title)}</h3>{inner}{small}</section>'


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Horizontal bars that are also text: (label, length in [0, 1], value as shown)."""
    inner = "".join(
        f'<li style="--p:{100 * length:.1f}"><span>{escape(label)}</span><b>{escape(value)}</b></li>'
        for label, length, value in rows
    )
    return f'<ol class="bars">{inner}</ol>'


def image_element(image_id: str, folder: str, alt: str) -> str:
    """The image inside the page, or a box that says why it is not there."""
    if not folder:
        return _no_image("no image folder was given")
    try:
        opened = load_image(Image(image_id, path=image_id), folder)
    except ImageError as error:
        return _no_image(str(error))
    opened.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    width, height = opened.size
    pixelated = ' class="pixels"' if max(width, height) <= 64 else ""
    return f'<img src="{data_uri(opened)}" alt="{escape(alt)}" width="{width}" height="{height}"{pixelated}>'


def data_uri(image: PillowImage.Image) -> str:
    """PNG for icons and drawings of a few pixels, JPEG for photographs."""
    buffer = io.BytesIO()
    kind = "PNG" if max(image.size) <= 64 else "JPEG"
    image.save(buffer, kind, **({"quality": 85} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _no_image(reason: str) -> str:
    return f'<p class="no-image">{escape(reason)}</p>'
