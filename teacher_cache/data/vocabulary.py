"""What token ids mean: a tokenizer described so that two can be compared without either, and their difference named.

A base and an instruction-tuned model of one family share their base vocabulary and its ids, and differ in the end token
or in a few added tokens. Ids of the one mean the same to the other as long as none of those is among them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of the vocabulary and special tokens: equal exactly where token ids mean the same text."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    text = json.dumps([vocabulary, special], ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def describe_vocabulary(tokenizer: Any) -> dict[str, Any]:
    """Plain data for the manifest.

    ``base``: a digest of the vocabulary without added tokens, ``ids`` its size · ``merges``: a digest of how text is
    cut ('' for tokenizers without merges) · ``added``: {id: token} of the others · ``begin``, ``end``: [id, token], or
    None.
    """
    whole: dict[str, int] = tokenizer.get_vocab()
    base, merges = _base(tokenizer, whole)
    added = sorted((i, token) for token, i in whole.items() if base.get(token) != i)
    return {
        "base": _digest(sorted(base.items(), key=lambda item: item[1])),
        "ids": len(base),
        "merges": _digest(merges) if merges else "",
        "added": {str(i): token for i, token in added},
        "begin": _special(tokenizer.bos_token_id, tokenizer.bos_token),
        "end": _special(tokenizer.eos_token_id, tokenizer.eos_token),
    }


@dataclass(frozen=True)
class Comparison:
    """How another tokenizer differs from the one that wrote ids; every text names what each side has."""

    never: str
    """Why no id can be trusted, or an empty text."""
    differences: tuple[str, ...]
    """What ids that are already written may not depend on."""
    foreign: Mapping[int, bool]
    """Ids that do not mean the same to the other: whether they mean anything to it."""


def compare(written: Mapping[str, Any], other: Mapping[str, Any], who: str, begins: bool = True) -> Comparison:
    """``other`` (its owner is called ``who`` in the texts) against the vocabulary that wrote the ids.

    Tokens that the other alone has are no difference: no written id is theirs. ``begins``: texts open with the begin
    token.
    """
    never = ""
    if written["base"] != other["base"]:
        never = f"{who} has another base vocabulary ({other['ids']:,} tokens, the teacher {written['ids']:,})"
    elif begins and written["begin"] != other["begin"]:
        never = f"texts begin with {_named(written['begin'])} for the teacher, with {_named(other['begin'])} for {who}"
    differences, foreign = [], {}
    for key, token in written["added"].items():
        theirs = other["added"].get(key)
        if theirs != token:
            foreign[int(key)] = theirs is not None
            differences.append(f"id {key} is {token!r} for the teacher and {theirs or 'no token'!r} for {who}")
    if written["end"] != other["end"]:
        differences.append(
            f"the end token is {_named(written['end'])} for the teacher, {_named(other['end'])} for {who}"
        )
    if written["merges"] != other["merges"]:
        differences.append(f"{who} cuts text into other tokens of the same vocabulary (its merges differ)")
    return Comparison(never, tuple(differences), foreign)


def _base(tokenizer: Any, whole: Mapping[str, int]) -> tuple[Mapping[str, int], list[Any]]:
    """The vocabulary without added tokens, and the merges."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {token: i for token, i in whole.items() if i < tokenizer.vocab_size}, []
    merges = json.loads(backend.to_str())["model"].get("merges") or []
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
    return backend.get_vocab(with_added_tokens=False), pairs


def _special(number: int | None, token: str | None) -> list[Any] | None:
    return [int(number), str(token)] if number is not None else None


def _named(special: list[Any] | None) -> str:
    return f"{special[1]} ({special[0]})" if special else "none"


def _digest(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, ensure_ascii=True).encode()).hexdigest()
