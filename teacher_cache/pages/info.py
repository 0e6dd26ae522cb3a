"""What a cache holds, as a table, and its answers as an instruction set for others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from teacher_cache.data.conversations import Conversation, Image, to_llava_json
from teacher_cache.files import whole
from teacher_cache.store.manifest import data_names, read_manifest
from teacher_cache.store.reader import TeacherCache
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


def export_answers(storage: Storage, output: Path) -> int:
    """Write LLaVA JSON with the cached answers in the place of the original ones, in the data's order; the number of
    samples. One shard's texts are in memory at a time, and ``output`` appears whole or not at all."""
    count = 0
    with TeacherCache(storage) as cache, whole(output) as part, part.open("w", encoding="utf-8") as file:
        for text in cache.texts():
            images = tuple(Image(name, path=name) for name in text.image_ids)
            questions, answers = tuple(text.questions), tuple(text.answers)
            (line,) = to_llava_json([Conversation(text.sample_id, questions, answers, images, system=text.system)])
            plain = json.dumps(line, ensure_ascii=False, indent=1).replace("\n", "\n ")
            file.write(f"{',' if count else '['}\n {plain}")
            count += 1
        file.write("\n]" if count else "[]")
    return count


def _image_tokens(counts: dict[str, int]) -> str:
    least, most = counts.get("least_image", 0), counts.get("most_image", 0)
    return f"{least} to {most} tokens an image" if least < most else f"{most} tokens an image" if most else "no images"


def _generation(generation: dict[str, Any]) -> str:
    if generation["temperature"] == 0:
        return f"greedy, at most {generation['max_new_tokens']} tokens an answer"
    return f"temperature {generation['temperature']:g}, top_p {generation['top_p']:g}, seed {generation['seed']}"
