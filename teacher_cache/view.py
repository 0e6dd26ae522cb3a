"""``teacher-cache view``: a page to look into a cache. One file; no server, no network, no script needed to read it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from teacher_cache.info import cache_info
from teacher_cache.manifest import CacheError
from teacher_cache.page import bytes_text, card, escape, facts, render_page, tiles, write_page
from teacher_cache.reader import TeacherCache
from teacher_cache.storage import Storage
from teacher_cache.token_text import TokenText
from teacher_cache.view_overview import Measured, measure, overview_cards, skipped_card
from teacher_cache.view_samples import legend, sample_article

SCRIPT = "view.js"


def write_view(
    cache: str | Path,
    output: str | Path,
    samples: int = 24,
    image_folder: str | Path = "",
    ids: Sequence[str] = (),
    tokenizer: str = "",
    seed: int = 0,
) -> Path:
    """Write the page of ``cache`` to ``output``.

    It shows ``samples`` samples drawn with ``seed``, or those named in ``ids``; the overview is measured on a bounded
    number of samples and says on how many, so the page costs the same for a cache of any size.

    Raises
    ------
    CacheError
        No complete cache, an id that is not in it, or a ``tokenizer`` that is not the teacher's.
    """
    storage = Storage(cache)
    with TeacherCache(storage) as opened:
        chosen = choose_samples(opened, samples, ids, seed)
        words = TokenText.open(tokenizer, opened) if tokenizer else TokenText()
        measured = measure(opened, seed)
        body = [
            _header(opened, measured),
            "<h2>Overview</h2>",
            f'<div class="overview">{card("Contents", facts(cache_info(storage)))}<div class="grid">',
            *overview_cards(opened, measured),
            f"</div></div>{skipped_card(storage)}",
            _samples_header(opened, chosen, bool(ids), seed, words),
            *(sample_article(opened, index, str(image_folder), words) for index in chosen),
            '<div id="inspector" role="tooltip" hidden></div>',
        ]
    title = f"{opened.manifest.teacher['model']} · teacher cache"
    return write_page(output, render_page(title, f"<main>{''.join(body)}</main>", SCRIPT))


def choose_samples(cache: TeacherCache, samples: int, ids: Sequence[str], seed: int) -> list[int]:
    """Sample numbers, ascending when drawn, in the order asked for when named."""
    if ids:
        try:
            return [cache.find(sample_id) for sample_id in ids]
        except KeyError as error:
            raise CacheError(f"--id: {error.args[0]}") from None
    if samples < 1:
        raise CacheError(f"--samples: expected at least 1, found {samples}")
    drawn = np.random.default_rng(seed).choice(len(cache), min(samples, len(cache)), replace=False)
    return sorted(int(i) for i in drawn)


def _header(cache: TeacherCache, measured: Measured) -> str:
    manifest = cache.manifest
    counts = manifest.counts
    names = ", ".join(f["name"] for f in manifest.data["files"])
    numbers = [
        (f"{counts['samples']:,}", "samples"),
        (f"{counts['rows']:,}", "answer tokens"),
        (bytes_text(counts["bytes"]), f"in shards, {counts['bytes'] / max(counts['rows'], 1):,.0f} bytes a token"),
        (f"{counts['skipped']:,}", "skipped"),
    ]
    if measured.regenerated:
        share = measured.changed / measured.regenerated
        numbers.append((f"{100 * share:.0f} %", "of regenerated answers differ from the original"))
    return (
        f'<header><p class="eyebrow">Teacher cache</p><h1>{escape(manifest.teacher["model"])}</h1>'
        f'<p class="lead">Answers to {escape(names)}, with the teacher’s confidence in every token.</p></header>'
        f"{tiles(numbers)}"
    )


def _samples_header(cache: TeacherCache, chosen: Sequence[int], named: bool, seed: int, words: TokenText) -> str:
    how = "chosen by id" if named else f"drawn at random with seed {seed}"
    missing = (
        "" if words.known else " Tokens are shown as ids: name the teacher’s folder with --tokenizer to see words."
    )
    return (
        f'<h2 id="samples">Samples</h2><p class="lead">{len(chosen):,} of {len(cache):,}, {how}.'
        f"{escape(missing)}</p>{legend()}"
    )
