"""The one place through which text of others reaches a terminal: no control character and no secret passes it, and
no secret reaches a file of settings.

A sample id, a model's or a file's name can hold escape sequences, which set a terminal's title, clear it or fill the
clipboard; an address can hold a password or a signature. Both are made visible or blotted out here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import typer

_USER = re.compile(r"(?<=://)[^/\s@]+@")
_QUERY = re.compile(
    r"([?&](?:x-amz-[a-z-]+|x-goog-[a-z-]+|[a-z_-]*(?:token|signature|password|secret|credential|key)|sig|sv|se|sp)=)"
    r"[^&\s'\"]+",
    re.IGNORECASE,
)


def without_secrets(text: str) -> str:
    """``text`` with passwords, tokens and signatures in its addresses blotted out."""
    return _QUERY.sub(r"\1***", _USER.sub("***@", text))


def without_secrets_in(plain: Any) -> Any:
    """A plain tree as a file may hold it: every text of it, names too, without secrets."""
    if isinstance(plain, str):
        return without_secrets(plain)
    if isinstance(plain, Mapping):
        return {without_secrets_in(name): without_secrets_in(value) for name, value in plain.items()}
    return [without_secrets_in(value) for value in plain] if isinstance(plain, list | tuple) else plain


def printable(text: object) -> str:
    """``text`` without secrets; control characters, marks of direction and lone surrogates as ``\\x1b``."""
    return "".join(map(_shown, without_secrets(str(text))))


def say(text: object, err: bool = False) -> None:
    """Print one text."""
    typer.echo(printable(text), err=err)


def _shown(character: str) -> str:
    if character.isprintable() or character in "\n\t" or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode()
