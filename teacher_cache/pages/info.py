"""What a cache holds, as a table."""

from __future__ import annotations

from typing import Any

from teacher_cache.store.manifest import data_names, read_manifest
from teacher_cache.store.storage import Storage
from teacher_cache.store.writer import committed_shards


def cache_info(storage: Storage) -> list[tuple[str, str]]:
    """(fact, value) rows; an incomplete cache is described too."""
    manifest = read_manifest(storage)
    teacher, counts, signals = manifest.teacher, manifest.counts, manifest.signals
    done = len(committed_shards(storage, manifest))
    state = "complete" if manifest.complete else "not complete"
    if manifest.complete and done < manifest.planned_shards:
        state = "not whole (run teacher-cache verify)"
    versions = ", ".join(f"{k} {v}" for k, v in manifest.made_with.items() if k != "data")
    size = f"{teacher['layers']} layers, d {manifest.shape.hidden_size}"
    arrays = [*manifest.arrays, *manifest.image_arrays]
    rows = [
        ("state", f"{state}, {done} of {manifest.planned_shards} shards"),
        ("fingerprint", manifest.fingerprint[:16]),
        ("teacher", f"{teacher['model']} ({teacher['dtype']}, {size})"),
        ("template, images", f"{teacher['template'] or 'own'}, {_image_tokens(counts)}"),
        ("data", f"{data_names(manifest)} (regenerate: {manifest.data['regenerate']})"),
        ("generation", _generation(manifest.generation)),
        ("preset", f"{signals['preset']}: top-{signals['top_k']}, hidden {signals['hidden']} ({signals['codec']})"),
        ("visual signals", signals["visual"]),
        ("made", f"{manifest.created_at} with {versions}"),
    ]
    if not manifest.complete:
        return rows
    per_row = counts["bytes"] / max(counts["rows"], 1)
    return [
        *rows,
        ("samples", f"{counts['samples']:,} cached + {counts['skipped']:,} skipped = {manifest.planned_samples:,}"),
        ("rows (answer tokens)", f"{counts['rows']:,}"),
        ("distinct images", f"{counts['images']:,}" if counts["images"] else "not stored apart"),
        ("bytes in shards", f"{counts['bytes']:,} ({per_row:,.1f} a row)"),
        *((f"  {s.name}", f"{s.line_bytes:,} bytes a {s.axis}, {s.dtype}") for s in arrays),
    ]


def _image_tokens(counts: dict[str, int]) -> str:
    least, most = counts.get("least_image", 0), counts.get("most_image", 0)
    return f"{least} to {most} tokens an image" if least < most else f"{most} tokens an image" if most else "no images"


def _generation(generation: dict[str, Any]) -> str:
    if generation["temperature"] == 0:
        return f"greedy, at most {generation['max_new_tokens']} tokens an answer"
    return f"temperature {generation['temperature']:g}, top_p {generation['top_p']:g}, seed {generation['seed']}"
