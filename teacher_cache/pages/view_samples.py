"""One sample of the page: image, question, both answers, and every answer token with its alternatives."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from teacher_cache.data.rows import turns
from teacher_cache.pages.page import Figure
from teacher_cache.pages.token_text import TokenText
from teacher_cache.pages.view_overview import Texts, sample_texts
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.records import Array

SHOWN_IDS = 10
LEAST_SHARE = 0.00005
"""Alternatives shown of a token, and the least probability of one; the rest is a single bar. Most tokens are nearly
certain, so this keeps the page of a top-128 cache small and its panel short."""
SEEN = 0.5
"""Nats from which a token counts as read off the image: the image makes it 1.6 times as likely."""
CLASSES = (
    (0.95, "", "95 % and more"),
    (0.8, "c1", "80–95 %"),
    (0.5, "c2", "50–80 %"),
    (0.2, "c3", "20–50 %"),
    (0.0, "c4", "below 20 %"),
)
"""(least probability, style, in words)"""
_SIMILAR = 0.4


@dataclass(frozen=True)
class Token:
    """An answer token with what the teacher thought of it. ``probability`` None: not among the stored ids."""

    words: TokenText
    id: int
    before: int
    probability: float | None
    entropy: float
    ids: Array
    probabilities: Array
    advantage: float | None = None
    """How much likelier the image makes it, nats; None where that is not stored."""

    @property
    def text(self) -> str:
        return self.words(self.id, self.before)

    @property
    def visible(self) -> str:
        return _visible(self.text)

    @property
    def is_spaced(self) -> bool:
        """A leading space stands before the coloured box, not in it."""
        return self.text.startswith(" ") and len(self.text) > 1

    @property
    def shown(self) -> str:
        """The text in its box; a line break is shown and kept."""
        return self.text[self.is_spaced :].replace("\n", "↵\n")

    @property
    def css(self) -> str:
        colours = (css for least, css, _ in CLASSES if (self.probability or 0.0) >= least)
        colour = next(colours, CLASSES[-1][1]) if len(self.ids) else ""  # NaN: the least
        is_first = not len(self.ids) or int(self.ids[0]) == self.id
        marks = {
            "other": not is_first,
            "seen": (self.advantage or 0.0) >= SEEN,
            "special": self.words.is_special(self.id),
            "id": not self.words.known,
        }
        return " ".join(["t", *filter(None, [colour]), *(mark for mark, holds in marks.items() if holds)])

    @property
    def share(self) -> str:
        """The probability as text, or the most it can be."""
        if not len(self.ids):
            return "no top-k stored"
        return percent(self.probability) if self.probability is not None else f"< {percent(self.probabilities[-1])}"

    @property
    def alternatives(self) -> Iterator[tuple[str, str, str, str]]:
        """(style, text, length of the bar in percent, probability) of the likeliest ids, the chosen one, all others."""
        kept = zip(self.ids[:SHOWN_IDS].tolist(), self.probabilities[:SHOWN_IDS].tolist(), strict=True)
        shown = [(i, share) for i, share in kept if share >= LEAST_SHARE]
        if self.probability is not None and self.id not in (i for i, _ in shown):
            shown = [*shown[: SHOWN_IDS - 1], (self.id, self.probability)]
        for i, share in shown:
            css = "chosen" if i == self.id else ""
            yield css, _visible(self.words(i, self.before)), f"{100 * share:.2f}", percent(share)
        rest = max(0.0, 1.0 - sum(share for _, share in shown))
        if len(self.ids):
            yield "rest", "all others", f"{100 * rest:.2f}", percent(rest)


def sample_values(cache: TeacherCache, index: int, figure: Callable[[str], Figure], words: TokenText) -> dict[str, Any]:
    """What the sample's template is given; ``figure`` finds an image by its id."""
    top = ["topk_ids", "topk_logprobs"] if cache.manifest.signals["top_k"] else []
    told = ["advantage"] if cache.manifest.signals_config.advantage != "none" else []
    batch = cache.read([index], ["input_ids", "loss_mask", "stats", *top, *told])
    shard = cache.shard_of(index)
    texts = sample_texts(cache, shard, [index - int(cache.shard_starts[shard])])[0]
    tokens = _tokens(batch.arrays, cache.manifest.stats_names.index("entropy"), words)
    images = batch.image_ids[0]
    return {
        "number": index,
        "id": batch.sample_ids[0],
        "figures": [(image_id, figure(image_id)) for image_id in images],
        "about": f"{', '.join(images) or 'text only'} · {len(batch.arrays['input_ids']):,} tokens, "
        f"{len(tokens):,} in answers",
        "turns": [
            _turn(texts, t, tokens[part])
            for t, part in enumerate(
                turns(batch.arrays["loss_mask"]), 0 if cache.manifest.one_sequence else len(texts["answers"]) - 1
            )
        ],
    }


def percent(probability: float) -> str:
    """Digits where they tell something: 99.97 %, 83 %, 0.4 %."""
    value = 100 * float(probability)
    digits = 2 if value >= 99.5 or value < 0.095 else 1 if value >= 95 or value < 10 else 0
    return "100 %" if value >= 99.995 else "< 0.01 %" if value < 0.005 else f"{value:.{digits}f} %"


def _tokens(arrays: dict[str, Array], entropy: int, words: TokenText) -> list[Token]:
    ids = arrays["input_ids"].astype(np.int64)
    places = np.flatnonzero(arrays["loss_mask"])
    tokens = []
    for row, place in enumerate(places):
        token, before = int(ids[place]), int(ids[place - 1])
        kept = arrays["topk_ids"][row].astype(np.int64) if "topk_ids" in arrays else np.zeros(0, np.int64)
        shares = np.exp(arrays["topk_logprobs"][row].astype(np.float64)) if len(kept) else np.zeros(0)
        hit = np.flatnonzero(kept == token)
        share = float(shares[hit[0]]) if len(hit) else None
        told = float(arrays["advantage"][row]) if "advantage" in arrays else None
        tokens.append(Token(words, token, before, share, float(arrays["stats"][row, entropy]), kept, shares, told))
    return tokens


def _turn(texts: Texts, turn: int, tokens: list[Token]) -> dict[str, Any]:
    answer, original = texts["answers"][turn], texts["original_answers"][turn]
    facts = f"{len(tokens)} tokens"
    if len(tokens[0].ids):
        facts += f", mean probability {percent(float(np.mean([t.probability or 0.0 for t in tokens])))}"
    return {
        "question": texts["questions"][turn],
        "answer": answer,
        "source": texts["source"][0],
        "original": _original(original, answer),
        "same": original.strip() == answer.strip(),
        "facts": facts,
        "tokens": tokens,
    }


def _original(original: str, answer: str) -> list[tuple[str, bool]]:
    """The original answer in parts, and whether a similar regenerated answer does not have the part (underlined)."""
    old, new = (re.findall(r"\S+|\s+", t) for t in (original, answer))
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    if matcher.ratio() < _SIMILAR and len(new) > 1:
        return [(original, False)]
    parts = [("".join(old[a:b]), kind != "equal") for kind, a, b, _, _ in matcher.get_opcodes()]
    return [(text, gone and bool(text.strip())) for text, gone in parts]


def _visible(text: str) -> str:
    """White space as signs, so that two tokens that differ in it look different."""
    return text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
