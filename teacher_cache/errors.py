"""The errors that both phases print calmly: each says what, where, expected and found, and what to do next."""

from __future__ import annotations


class CacheError(ValueError):
    """A cache that may not be used: other version, other tokenizer, incomplete, corrupted, made from other data."""


class CacheVersionError(CacheError):
    """A whole cache of another format version: nothing in it is broken."""
