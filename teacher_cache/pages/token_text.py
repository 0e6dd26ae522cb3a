"""Single tokens as text a person can read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from teacher_cache.data.vocabulary import compare, describe_vocabulary, tokenizer_fingerprint
from teacher_cache.errors import CacheError
from teacher_cache.store.reader import TeacherCache


class TokenText:
    """The text of a token where it stands. Without a tokenizer, its number."""

    def __init__(self, tokenizer: Any = None) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids) if tokenizer is not None else frozenset()
        self._text = lru_cache(maxsize=65_536)(self._decode)

    @classmethod
    def open(cls, tokenizer: str, cache: TeacherCache) -> TokenText:
        """The tokenizer at ``tokenizer`` (folder or name), which must be the teacher's.

        Raises ``CacheError``: it cannot be loaded, or its ids mean other text than the teacher's.
        """
        from teacher_cache.models.pretrained import ModelError, read_tokenizer

        try:
            loaded = read_tokenizer("--tokenizer", tokenizer)
        except ModelError as error:
            raise CacheError(f"{error}. Name the teacher's folder") from error
        if difference := _difference(cache.manifest.teacher, loaded):
            raise CacheError(
                f"--tokenizer {tokenizer}: not the tokenizer of {cache.manifest.teacher['model']} ({difference}); its "
                "words would be wrong. Name the teacher's folder, or leave the option out to see ids"
            )
        return cls(loaded)

    @property
    def known(self) -> bool:
        return self._tokenizer is not None

    def is_special(self, token: int) -> bool:
        return token in self._special

    def __call__(self, token: int, before: int) -> str:
        """What ``token`` adds to the text when it follows ``before``; its raw piece where it is part of a letter."""
        return self._text(token, before) if self.known else f"#{token}"

    def _decode(self, token: int, before: int) -> str:
        tokenizer = self._tokenizer
        piece = tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # an embedding row without a word: vocabularies are padded
            return f"#{token}"
        if token in self._special:
            return str(piece)
        both, first = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in ([before, token], [before]))
        text = both[len(first) :] if both.startswith(first) else ""
        return text if text and "\ufffd" not in text else str(piece)


def _difference(teacher: Mapping[str, Any], tokenizer: Any) -> str:
    """What the teacher's ids would not mean to ``tokenizer``, or an empty text. Where texts end is no matter here."""
    if not teacher.get("vocabulary"):
        expected, found = str(teacher["tokenizer"]), tokenizer_fingerprint(tokenizer)
        return "" if expected == found else f"fingerprint {found[:12]}, expected {expected[:12]}"
    found_ids = compare(teacher["vocabulary"], describe_vocabulary(tokenizer), "this tokenizer", begins=False)
    return found_ids.never or (found_ids.differences[0] if found_ids.foreign else "")
