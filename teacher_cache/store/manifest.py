"""``manifest.json``: who made the cache, from what, with which settings, and whether it is complete.

The file is canonical JSON that carries a digest of itself, so that a changed byte anywhere in it is found. The
*fingerprint* is a digest of everything that decides the content; two caches with one fingerprint are the same cache.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from teacher_cache.config import CacheConfig, SignalsConfig, as_plain, build_config
from teacher_cache.data.logit_rule import LogitRule
from teacher_cache.errors import CacheError, CacheVersionError
from teacher_cache.store.manifest_rules import check_manifest
from teacher_cache.store.names import MANIFEST as MANIFEST
from teacher_cache.store.records import ArraySpec, TeacherShape, image_arrays, record_arrays, stats_names
from teacher_cache.store.storage import Storage
from teacher_cache.store.tables import JSON_BYTES, json_object

FORMAT_VERSION = 2


@dataclass(frozen=True)
class Manifest:
    """Plain data; ``teacher``, ``data``, ``generation`` and ``layout`` as they were configured and found.

    ``files``: sha256 of the cache's side files once it is complete. ``counts``: samples, skipped, rows, tokens,
    positions, runs, image_positions, images, bytes, and the fewest and most positions of one image.
    """

    teacher: dict[str, Any]
    data: dict[str, Any]
    generation: dict[str, Any]
    signals: dict[str, Any]
    layout: dict[str, Any]
    planned_samples: int
    planned_shards: int
    complete: bool = False
    files: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    made_with: dict[str, str] = field(default_factory=dict)
    created_at: str = ""
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        return digest({name: getattr(self, name) for name in _CONTENT})

    @property
    def shape(self) -> TeacherShape:
        return TeacherShape(**self.teacher["shape"])

    @property
    def image_token(self) -> int:
        return int(self.teacher["image_token"])

    @property
    def logit_rule(self) -> LogitRule:
        return LogitRule(**self.teacher["logit_rule"])

    @property
    def one_sequence(self) -> bool:
        """Whether a sample supervises all its answers; if not, the last one alone."""
        return bool(self.teacher.get("one_sequence", True))

    @property
    def image_tokens(self) -> int:
        """N where every image has as many positions; 0 where they differ, or there is none."""
        least, most = self.counts.get("least_image", 0), self.counts.get("most_image", 0)
        return least if least == most else 0

    @property
    def signals_config(self) -> SignalsConfig:
        return build_config(SignalsConfig, self.signals, MANIFEST)

    @property
    def arrays(self) -> list[ArraySpec]:
        return record_arrays(self.signals_config, self.shape)

    @property
    def image_arrays(self) -> list[ArraySpec]:
        return image_arrays(self.signals_config, self.shape)

    @property
    def stats_names(self) -> tuple[str, ...]:
        return stats_names(self.signals_config)


def data_names(manifest: Manifest) -> str:
    """The data files as the cache's maker called them."""
    return manifest.made_with.get("data", "")


_TEACHER_SETTINGS = ("template_kwargs", "max_length", "quantization")
_CONTENT = ("teacher", "data", "generation", "signals", "layout", "planned_samples", "format_version")


def new_manifest(config: CacheConfig, teacher: Mapping[str, Any], data: Mapping[str, Any], samples: int) -> Manifest:
    """The manifest of a cache that is about to be made."""
    layout = as_plain(config.layout)
    return Manifest(
        teacher=dict(teacher) | {name: getattr(config.teacher, name) for name in _TEACHER_SETTINGS},
        data=dict(data),
        generation=as_plain(config.generation),
        signals=as_plain(config.signals),
        layout=layout,
        planned_samples=samples,
        planned_shards=-(-samples // config.layout.shard_samples),
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def write_manifest(storage: Storage, manifest: Manifest) -> None:
    plain = dataclasses.asdict(manifest) | {"fingerprint": manifest.fingerprint}
    storage.write(MANIFEST, [_canonical(plain | {"digest": digest(plain)})])


def read_manifest(storage: Storage) -> Manifest:
    """The manifest at ``storage``.

    Raises
    ------
    CacheError
        No cache there, another format version, or a byte of the file was changed.
    """
    try:
        text = storage.read(MANIFEST, JSON_BYTES)
    except FileNotFoundError:
        raise CacheError(
            f"{storage.url}: no teacher cache here ({MANIFEST} is missing). "
            "Make one first: teacher-cache build CONFIG (or make cache-teacher)"
        ) from None
    where = f"{storage.url}/{MANIFEST}"
    try:
        plain = json_object(text, where)
        version, claimed = plain["format_version"], plain.pop("digest")
    except CacheError as error:
        raise CacheError(f"{error}: not a manifest that can be read; {_RESTORE}") from error
    except KeyError as error:
        raise CacheError(f"{where}: not a manifest ({error} is missing); {_RESTORE}") from error
    if version != FORMAT_VERSION:
        raise CacheVersionError(
            f"{where}: cache format {str(version)[:40]}, this package reads format {FORMAT_VERSION}. Build the "
            "cache again, with the same configuration and another output (answers/ of the old one cannot be kept); or "
            "install the package version that made it (made_with in the manifest)"
        )
    if digest(plain) != claimed or _canonical(plain | {"digest": claimed}) != text:
        raise CacheError(f"{where}: the file was changed after it was written; {_RESTORE}")
    check_manifest(plain, where)
    fingerprint = plain.pop("fingerprint", None)
    try:
        manifest = Manifest(**plain)
        _ = manifest.shape, manifest.logit_rule, manifest.arrays, manifest.image_arrays
    except (TypeError, ValueError) as error:
        raise CacheError(f"{where}: not a manifest of format {FORMAT_VERSION} ({error})") from error
    if manifest.fingerprint != fingerprint:
        raise CacheError(f"{where}: fingerprint does not belong to its content; {_RESTORE}")
    return manifest


_RESTORE = (
    "restore it from a copy; or run teacher-cache verify CACHE --repair, which puts it aside, and then teacher-cache "
    "build with the configuration that made the cache: its shards stay"
)


def check_same_content(old: Manifest, new: Manifest, where: str) -> None:
    """Refuse to go on with a cache that was begun with other content settings; names the first differences."""
    if old.fingerprint == new.fingerprint:
        return
    differences = [
        f"{path}: {was!r} in the cache, {now!r} now"
        for name in _CONTENT
        for path, was, now in _differences(name, getattr(old, name), getattr(new, name))
    ]
    raise CacheError(
        f"{where}: begun with other settings, so it cannot be continued. "
        + "; ".join(differences[:3])
        + (f" (and {len(differences) - 3} more)" if len(differences) > 3 else "")
        + ". Set them back, or choose another output"
    )


def digest(plain: Any) -> str:
    """sha256 of canonical JSON."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _canonical(plain: dict[str, Any]) -> bytes:
    return (json.dumps(plain, sort_keys=True, indent=1) + "\n").encode()


def _differences(path: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(f"{path}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield path, old, new
