"""``teacher-cache view``: a page to look into a cache. One file; no server, no network, no script needed to read it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from glob import glob
from pathlib import Path

import numpy as np

from teacher_cache.config import DataConfig
from teacher_cache.data.conversations import Conversation, Image
from teacher_cache.data.sample_reader import read_conversations
from teacher_cache.errors import CacheError
from teacher_cache.pages.info import cache_info
from teacher_cache.pages.page import Figure, figure, write_page
from teacher_cache.pages.token_text import TokenText
from teacher_cache.pages.view_overview import MAX_SKIPPED_LINES, measure, overview, skipped_samples
from teacher_cache.pages.view_samples import CLASSES, sample_values
from teacher_cache.store.manifest import data_names
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.storage import Storage


def write_view(
    cache: str | Path,
    output: str | Path,
    samples: int = 24,
    image_folder: str | Path | Sequence[str | Path] = (),
    ids: Sequence[str] = (),
    tokenizer: str = "",
    seed: int = 0,
) -> Path:
    """Write the page of ``cache`` to ``output``.

    It shows ``samples`` samples drawn with ``seed``, or those named in ``ids``; the overview is measured on a bounded
    number of samples and says on how many, so the page costs the same for a cache of any size. ``image_folder``: where
    the images lie, a folder or the data files that they are embedded in.

    Raises ``CacheError``: no complete cache, an id that is not in it, a ``tokenizer`` that is not the teacher's, or no
    such image folder.
    """
    storage = Storage(cache)
    with TeacherCache(storage) as opened:
        chosen = choose_samples(opened, samples, ids, seed)
        words = TokenText.open(tokenizer, opened) if tokenizer else TokenText()
        names = [image_folder] if isinstance(image_folder, str | Path) else image_folder
        figures = find_figures(
            [str(n) for n in names if str(n)], [i for ids in opened.read(chosen, []).image_ids for i in ids]
        )
        measured = measure(opened, seed)
        how = "chosen by id" if ids else f"drawn at random with seed {seed}"
        return write_page(
            output,
            "view.html",
            script="view.js",
            model=opened.manifest.teacher["model"],
            data=data_names(opened.manifest),
            counts=opened.manifest.counts,
            measured=measured,
            contents=cache_info(storage),
            overview=overview(opened, measured),
            skipped=skipped_samples(storage),
            most_skipped=MAX_SKIPPED_LINES,
            chosen=f"{len(chosen):,} of {len(opened):,}, {how}.",
            classes=CLASSES,
            told=opened.manifest.signals_config.advantage != "none",
            words_known=words.known,
            samples=(sample_values(opened, index, figures, words) for index in chosen),
        )


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


def find_figures(names: Sequence[str], image_ids: Sequence[str]) -> Callable[[str], Figure]:
    """From an image's id to the image. ``names``: a folder, and data files (also those of the folder) that images are
    embedded in; those of ``image_ids`` are kept."""
    folders = [name for name in names if Path(name).is_dir()]
    found = {name: sorted(glob(name)) for name in names if name not in folders}  # noqa: PTH207
    if len(folders) > 1 or not all(found.values()):
        raise CacheError(f"--image-folder {' '.join(names)}: expected one folder, or data files that are there")
    files = [str(file) for folder in folders for file in sorted(Path(folder).glob("*.parquet"))]
    files += [file for files_of_name in found.values() for file in files_of_name]
    wanted, embedded = set(image_ids), dict[str, Image]()
    for sample in read_conversations(DataConfig(path=tuple(files), duplicate_ids="number")) if files else ():
        for image in sample.images if isinstance(sample, Conversation) else ():
            if image.image_id in wanted:
                embedded[image.image_id] = image
        if len(embedded) == len(wanted):
            break

    def find(image_id: str) -> Figure:
        if image_id not in embedded and re.fullmatch("[0-9a-f]{32}", image_id):
            return Figure("embedded in a data file: name it with --image-folder")
        return figure(embedded.get(image_id, Image(image_id, path=image_id)), next(iter(folders), ""))

    return find
