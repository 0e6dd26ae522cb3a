"""Whether the ids in a cache mean the same to a student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from teacher_cache.data.tokenization import template_by_name
from teacher_cache.data.vocabulary import Comparison, compare, describe_vocabulary
from teacher_cache.errors import CacheError
from teacher_cache.store.reader import TeacherCache

SCANNED = 1024
"""Samples whose ids are looked at in one go."""


def check_tokenizer(cache: TeacherCache, tokenizer: Any, same_ids: bool) -> None:
    """Refuse a cache whose ids mean other text to the student with this ``tokenizer``.

    ``same_ids``: the user says that the tokenizers differ in what the cached ids do not depend on; that is checked.

    Raises ``CacheError``: names the first difference, and the setting that allows it where one does.
    """
    teacher, url = cache.manifest.teacher, cache.storage.url
    begins = template_by_name(str(teacher["template"])).bos
    found = compare(teacher["vocabulary"], describe_vocabulary(tokenizer), "the student", begins)
    if found.never:
        raise CacheError(
            f"{url}: the cache was made with the tokenizer of {teacher['model']}, the student's is another: "
            f"{found.never}. Logits can be distilled only between models of one vocabulary: use a student with the "
            "teacher's tokenizer, or cache a teacher that has the student's"
        )
    if found.differences and not same_ids:
        raise CacheError(
            f"{url}: the student's tokenizer is that of {teacher['model']} but for this: {_listed(found)}. If that is "
            "meant, as for the base model of an instruction-tuned teacher, set sources[…].tokenizer=same_ids: then "
            "only a cached id that means something else is refused"
        )
    check_ids(cache, teacher["vocabulary"]["added"], found)


def check_ids(cache: TeacherCache, added: Mapping[str, str], found: Comparison) -> None:
    """No sample may hold an id that is foreign to the student, and no top-k one that is another token there. (An id in
    a top-k that is no token of the student costs nothing: it is a row of its head that nobody uses.)

    Raises ``CacheError``.
    """
    kept = {spec.name for spec in cache.manifest.arrays}
    scanned = {name: list(found.foreign) for name in ("input_ids",)}
    others = [i for i, is_token in found.foreign.items() if is_token]
    scanned |= {name: others for name in ("topk_ids", "sampled_ids") if name in kept}
    for name, foreign in scanned.items():
        for start in range(0, len(cache) if foreign else 0, SCANNED):
            ids = cache.read(range(start, min(start + SCANNED, len(cache))), [name]).arrays[name]
            if len(held := ids[np.isin(ids, foreign)]):
                token = int(held[0])
                raise CacheError(
                    f"{cache.storage.url}: {name} holds id {token}, {added[str(token)]!r}, which is not the "
                    f"student's ({_listed(found)}). Give the student the teacher's tokenizer, or cache a teacher that "
                    "has the student's"
                )


def _listed(found: Comparison) -> str:
    more = len(found.differences) - 1
    return found.differences[0] + (f" (and {more} more)" if more else "")
