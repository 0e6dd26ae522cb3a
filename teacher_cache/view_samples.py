"""One sample of the page: image, question, both answers, and every answer token with its alternatives."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from teacher_cache.page import escape, image_element
from teacher_cache.reader import TeacherCache
from teacher_cache.records import Array
from teacher_cache.token_text import TokenText
from teacher_cache.view_overview import Texts, answer_slices, sample_texts

SHOWN_IDS = 10
LEAST_SHARE = 0.00005
"""Alternatives shown of a token, and the least probability of one; the rest is a single bar. Most tokens are nearly
certain, so this keeps the page of a top-128 cache small and its panel short."""
CLASSES = ((0.95, ""), (0.8, "c1"), (0.5, "c2"), (0.2, "c3"), (0.0, "c4"))
_NAMES = {"": "95 % and more", "c1": "80–95 %", "c2": "50–80 %", "c3": "20–50 %", "c4": "below 20 %"}
_SIMILAR = 0.4


@dataclass(frozen=True)
class _Token:
    """An answer token with what the teacher thought of it. ``probability`` None: not among the stored ids."""

    token: int
    before: int
    text: str
    probability: float | None
    entropy: float
    ids: Array
    probabilities: Array

    @property
    def is_first(self) -> bool:
        return not len(self.ids) or int(self.ids[0]) == self.token

    @property
    def share(self) -> str:
        """The probability as text, or the most it can be."""
        if not len(self.ids):
            return "no top-k stored"
        return percent(self.probability) if self.probability is not None else f"< {percent(self.probabilities[-1])}"


def legend() -> str:
    """What the colours and keys mean."""
    colours = "".join(f'<span class="t {css}">{escape(_NAMES[css])}</span>' for _, css in CLASSES)
    return (
        f'<div class="legend"><span>The teacher’s probability of each token it was scored on:</span>{colours}'
        '<span class="t other">not its first choice</span></div>'
        '<p class="note legend">Point at or tap a token for its alternatives. Keys: <kbd>Tab</kbd> to an answer, '
        "<kbd>←</kbd> <kbd>→</kbd> from token to token, <kbd>↓</kbd> <kbd>↑</kbd> to the next uncertain one, "
        "<kbd>Esc</kbd> to leave. Without a script, open “All tokens” under an answer.</p>"
    )


def sample_article(cache: TeacherCache, index: int, image_folder: str, words: TokenText) -> str:
    """The sample as HTML."""
    top = ["topk_ids", "topk_logprobs"] if cache.manifest.signals["top_k"] else []
    batch = cache.read([index], ["input_ids", "loss_mask", "stats", *top])
    shard = cache.shard_of(index)
    texts = sample_texts(cache, shard, [index - int(cache.shard_starts[shard])])[0]
    tokens = _tokens(batch.arrays, cache.manifest.stats_names.index("entropy"), words)
    slices = answer_slices(batch.arrays["loss_mask"])
    turns = "".join(_turn(texts, turn, tokens[part], f"rows-{index}-{turn}", words) for turn, part in enumerate(slices))
    sample_id, image_id = batch.sample_ids[0], batch.image_ids[0]
    figure = f"<figure>{image_element(image_id, image_folder, f'Image {image_id}')}</figure>" if image_id else ""
    about = f"{image_id or 'text only'} · {len(batch.arrays['input_ids']):,} tokens, {len(tokens):,} in answers"
    return (
        f'<article class="sample" id="sample-{index}"><header><h3>{escape(sample_id)}</h3><p>{escape(about)}</p>'
        f'</header><div class="inside{"" if image_id else " text-only"}">{figure}<div>{turns}</div></div></article>'
    )


def percent(probability: float) -> str:
    """Digits where they tell something: 99.97 %, 83 %, 0.4 %."""
    value = 100 * float(probability)
    digits = 2 if value >= 99.5 or value < 0.095 else 1 if value >= 95 or value < 10 else 0
    return "100 %" if value >= 99.995 else "< 0.01 %" if value < 0.005 else f"{value:.{digits}f} %"


def confidence_class(probability: float | None) -> str:
    return next(css for least, css in CLASSES if (probability or 0.0) >= least)


def _tokens(arrays: dict[str, Array], entropy: int, words: TokenText) -> list[_Token]:
    ids = arrays["input_ids"].astype(np.int64)
    places = np.flatnonzero(arrays["loss_mask"])
    tokens = []
    for row, place in enumerate(places):
        token, before = int(ids[place]), int(ids[place - 1])
        kept = arrays["topk_ids"][row].astype(np.int64) if "topk_ids" in arrays else np.zeros(0, np.int64)
        shares = np.exp(arrays["topk_logprobs"][row].astype(np.float64)) if len(kept) else np.zeros(0)
        hit = np.flatnonzero(kept == token)
        share = float(shares[hit[0]]) if len(hit) else None
        text = words(token, before)
        tokens.append(_Token(token, before, text, share, float(arrays["stats"][row, entropy]), kept, shares))
    return tokens


def _turn(texts: Texts, turn: int, tokens: list[_Token], rows_id: str, words: TokenText) -> str:
    question, answer = texts["questions"][turn], texts["answers"][turn]
    original, source = texts["original_answers"][turn], texts["source"][0]
    title = {"original": "Original answer, kept", "student": "Student’s answer, scored"}.get(source, "Teacher’s answer")
    mean = float(np.mean([t.probability or 0.0 for t in tokens])) if len(tokens[0].ids) else None
    facts = f"{len(tokens)} tokens" + (f", mean probability {percent(mean)}" if mean is not None else "")
    shown = f"<div><h4>{title} <small>{facts}</small></h4>{_answer(answer, tokens, rows_id, words)}</div>"
    first = f"<div><h4>{_original_title(original, answer)}</h4>{_original(original, answer)}</div>"
    return (
        f'<section class="turn"><p class="question">{escape(question)}</p><div class="pair">'
        f"{'' if source == 'original' else first}{shown}{_table(tokens, rows_id, words)}</div></section>"
    )


def _original_title(original: str, answer: str) -> str:
    same = original.strip() == answer.strip()
    return "Original answer" + (' <small class="same">the same</small>' if same else "")


def _original(original: str, answer: str) -> str:
    """The original answer, with the words underlined that a similar regenerated answer does not have."""
    old, new = (re.findall(r"\S+|\s+", t) for t in (original, answer))
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    if matcher.ratio() < _SIMILAR and len(new) > 1:
        return f'<p class="text">{escape(original)}</p>'
    parts = []
    for kind, a, b, _, _ in matcher.get_opcodes():
        text = escape("".join(old[a:b]))
        parts.append(text if kind == "equal" or not text.strip() else f'<mark class="gone">{text}</mark>')
    return f'<p class="text">{"".join(parts)}</p>'


def _answer(answer: str, tokens: list[_Token], rows_id: str, words: TokenText) -> str:
    plain = "" if words.known else f'<p class="text">{escape(answer)}</p>'
    spans = "".join(_span(t, i, words) for i, t in enumerate(tokens))
    label = f"{len(tokens)} tokens; arrow keys move between them"
    return f'{plain}<p class="tokens" data-rows="{rows_id}" aria-label="{label}">{spans}</p>'


def _table(tokens: list[_Token], rows_id: str, words: TokenText) -> str:
    """Every token with its alternatives as text: for readers without a script, and the panel's source."""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("token", "id", "probability", "entropy", "most likely"))
    return (
        '<details class="rows"><summary>All tokens</summary><div class="scroll" tabindex="0"><table '
        f'id="{rows_id}"><thead><tr>{head}</tr></thead><tbody>{"".join(_row(t, words) for t in tokens)}</tbody></table>'
        "</div></details>"
    )


def _span(token: _Token, place: int, words: TokenText) -> str:
    """The token; a leading space stands before its coloured box, a line break is shown and kept."""
    special = words.is_special(token.token)
    text = token.text
    space = " " if text.startswith(" ") and len(text) > 1 and place else ""
    text = text.removeprefix(" ") if len(text) > 1 else text
    css = ["t", confidence_class(token.probability) if len(token.ids) else "", "" if token.is_first else "other"]
    css += ["special" if special else "", "" if words.known else "id"]
    shown = escape(text).replace("\n", "↵\n")
    return f'{space}<span class="{" ".join(c for c in css if c)}" title="{escape(token.share)}">{shown}</span>'


def _row(token: _Token, words: TokenText) -> str:
    return (
        f'<tr><th scope="row">{escape(_visible(token.text))}</th><td>{token.token}</td><td>{escape(token.share)}</td>'
        f'<td>{token.entropy:.3f}</td><td><ol class="alts">{"".join(_alternatives(token, words))}</ol></td></tr>'
    )


def _alternatives(token: _Token, words: TokenText) -> Iterator[str]:
    kept = zip(token.ids[:SHOWN_IDS].tolist(), token.probabilities[:SHOWN_IDS].tolist(), strict=True)
    shown = [(i, share) for i, share in kept if share >= LEAST_SHARE]
    if token.probability is not None and token.token not in (i for i, _ in shown):
        shown = [*shown[: SHOWN_IDS - 1], (token.token, token.probability)]
    for i, share in shown:
        css = ' class="chosen"' if i == token.token else ""
        text = escape(_visible(words(i, token.before)))
        yield f'<li{css} style="--p:{100 * share:.2f}"><span>{text}</span><b>{percent(share)}</b></li>'
    rest = max(0.0, 1.0 - sum(share for _, share in shown))
    if len(token.ids):
        yield f'<li class="rest" style="--p:{100 * rest:.2f}"><span>all others</span><b>{percent(rest)}</b></li>'


def _visible(text: str) -> str:
    """White space as signs, so that two tokens that differ in it look different."""
    return text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
