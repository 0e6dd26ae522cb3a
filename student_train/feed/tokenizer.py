"""Whether the ids in a cache mean the same to a student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from teacher_cache.data.vocabulary import Comparison
from teacher_cache.errors import CacheError
from teacher_cache.models.chat import Chat
from teacher_cache.store.reader import TeacherCache

SCANNED = 1024
"""Samples whose ids are looked at in one go."""


def check_tokenizer(
    cache: TeacherCache, tokenizer: Any, same_ids: bool, chat: Chat | None = None, reads: Sequence[str] = ()
) -> None:
    """Refuse a cache whose ids mean other text to the student with this ``tokenizer``.

    ``same_ids``: the user says that the tokenizers differ in what the cached ids do not depend on; that is checked.
    ``chat``: of a student that writes its own prompts. It shares the answers' ids and what the losses read (``reads``,
    arrays) alone, so that the base vocabulary and the end token decide.

    Raises ``CacheError``: names the first difference, and the setting that allows it where one does.
    """
    teacher, url = cache.manifest.teacher, cache.storage.url
    begins = chat is None and "bos_token" in teacher["chat_template"]
    found = cache.compare_tokenizer(tokenizer, begins)
    if chat is not None and (end := int(teacher["end_token"])) not in chat.ends:
        raise CacheError(
            f"{url}: {teacher['model']} ends its answers with token {end}, and the student's with "
            f"{', '.join(str(token) for token in sorted(chat.ends))}, so that it would never learn to stop. Name a "
            "chat template that ends answers as the teacher's (student.chat_template), or take another student"
        )
    if found.differences and not same_ids and chat is None:
        raise CacheError(
            f"{url}: the student's tokenizer is that of {teacher['model']} but for this: {_listed(found)}. If that is "
            "meant, as for the base model of an instruction-tuned teacher, set sources[…].tokenizer=same_ids: then "
            "only a cached id that means something else is refused"
        )
    kept = [spec.name for spec in cache.manifest.arrays] if chat is None else reads
    check_ids(cache, teacher["vocabulary"]["added"], found, kept, chat is not None)


def check_ids(
    cache: TeacherCache, added: Mapping[str, str], found: Comparison, kept: Sequence[str], answers: bool = False
) -> None:
    """No sample (or none of its ``answers``) may hold an id that is foreign to the student, and no top-k (if it is one
    of the arrays ``kept``) one that is another token there. (An id in a top-k that is no token of the student costs
    nothing: it is a row of its head that nobody uses.)

    Raises ``CacheError``.
    """
    scanned = {name: list(found.foreign) for name in ("input_ids",)}
    others = [i for i, is_token in found.foreign.items() if is_token]
    scanned |= {name: others for name in ("topk_ids", "sampled_ids") if name in kept}
    for name, foreign in scanned.items():
        for start in range(0, len(cache) if foreign else 0, SCANNED):
            read = cache.read(range(start, min(start + SCANNED, len(cache))), [name, "loss_mask"]).arrays
            ids = read[name][read["loss_mask"]] if answers and name == "input_ids" else read[name]
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
