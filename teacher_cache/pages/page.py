"""One HTML file that needs nothing else, made by templates that escape every value they are given.

Should a value ever come through as HTML all the same, the content security policy still lets no script run but ours
(named by its digest) and no request leave the page.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from teacher_cache.data.conversations import Image
from teacher_cache.data.images import load_image
from teacher_cache.data.units import bytes_text, seconds_text
from teacher_cache.errors import DataError, ImageError
from teacher_cache.files import whole

MAX_IMAGE_SIDE = 480
"""Pixels; larger images are scaled down, which keeps a page of 24 photographs near one megabyte."""
TEMPLATES = "teacher_cache.pages"
_TINY = 64
_SIGNS = {n: 0x2400 + n for n in range(32) if chr(n) not in "\t\n\r"} | {0x7F: 0x2421}
_SIGNS |= dict.fromkeys((*range(0x80, 0xA0), 0xFFFE, 0xFFFF), 0xFFFD)


@dataclass(frozen=True)
class Card:
    """A titled box: a chart, or bars (label, length in [0, 1], value as shown), or both; ``words`` below them;
    ``note`` says what the numbers were measured on."""

    title: str
    chart: str = ""
    note: str = ""
    words: str = ""
    bars: Sequence[tuple[str, float, str]] = ()


@dataclass(frozen=True)
class Figure:
    """An image as it lies in the page, or why it is ``missing``."""

    missing: str = ""
    uri: str = ""
    width: int = 0
    height: int = 0


def render(template: str, package: str = TEMPLATES, **values: Any) -> str:
    """The template of ``package``, which may use ours beside its own. Only Markup among ``values`` is not escaped."""
    return _environment(package).get_template(template).render(values)


def write_page(output: str | Path, template: str, package: str = TEMPLATES, script: str = "", **values: Any) -> Path:
    """Render the page with ``script`` (a file of this package) and write it whole: a browser that reloads meanwhile
    sees the old one."""
    script = _asset(script) if script else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = Markup(_asset("page.css"))
    text = render(template, package, style=style, script=Markup(script), digest=digest, **values)
    with whole(Path(output)) as part:
        part.write_text(text, encoding="utf-8")
    return Path(output)


def clean(value: object) -> str:
    """A value as text that a page may hold: control characters become their signs (␀), half a surrogate pair ``?``."""
    return value if isinstance(value, Markup) else str(value).encode("utf-8", "replace").decode().translate(_SIGNS)


def figure(image: Image, folder: str | Path) -> Figure:
    """The image, scaled down: PNG for icons and drawings of a few pixels, JPEG for photographs."""
    if not image.embedded and not folder:
        return Figure("no image folder was given")
    try:
        opened = load_image(image, folder)
    except (ImageError, DataError) as error:
        return Figure(str(error))
    opened.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    buffer = io.BytesIO()
    kind = "PNG" if max(opened.size) <= _TINY else "JPEG"
    opened.save(buffer, kind, **({"quality": 85} if kind == "JPEG" else {}))
    return Figure("", f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}", *opened.size)


@cache
def _environment(package: str) -> Environment:
    loader = ChoiceLoader([PackageLoader(name) for name in dict.fromkeys((package, TEMPLATES))])
    made = Environment(
        loader=loader, autoescape=True, finalize=clean, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {"bytes": bytes_text, "seconds": seconds_text}
    made.globals["tiny"] = _TINY
    return made


def _asset(name: str) -> str:
    """A style sheet or script that lies beside this file."""
    return files("teacher_cache.pages").joinpath(name).read_text(encoding="utf-8")
