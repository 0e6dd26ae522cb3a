"""Forge a cache as a hostile author would: every digest in it is right."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from teacher_cache.checksums import METADATA_KEY, file_sum, sha256
from teacher_cache.manifest import _CONTENT, _canonical, digest

Change = Callable[[Any], Any]


def nothing(_: Any) -> None:
    return None


def seal(root: Path, change: Change = nothing) -> None:
    """Rewrite the manifest: side-file digests as they are on disk, then ``change``, then fingerprint and digest."""
    plain = json.loads((root / "manifest.json").read_text())
    del plain["digest"]
    for name in plain["files"]:
        plain["files"][name] = sha256((root / name).read_bytes())
    change(plain)
    plain["fingerprint"] = digest({name: plain.get(name) for name in _CONTENT})
    (root / "manifest.json").write_bytes(_canonical(plain | {"digest": digest(plain)}))


def edit_index(root: Path, folder: str, metadata: Change = nothing, rows: Change = nothing) -> None:
    """Change the metadata and the lines of ``shards/00000/index.parquet`` and its digest in ledger and manifest."""
    path = root / folder / "index.parquet"
    table = pq.read_table(path)
    facts = json.loads(table.schema.metadata[METADATA_KEY])
    lines = table.to_pylist()
    metadata(facts)
    rows(lines)
    encoded = {METADATA_KEY: json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()}
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(lines, schema=table.schema).replace_schema_metadata(encoded), sink)
    path.write_bytes(sink.getvalue())
    kind, number = folder.split("/")
    edit_ledger(root, lambda entries: entries[int(number)].update({f"{_DIGESTS[kind]}": sha256(sink.getvalue())}))


def edit_ledger(root: Path, change: Change) -> None:
    ledger = pq.read_table(root / "shards.parquet")
    entries = ledger.to_pylist()
    change(entries)
    pq.write_table(pa.Table.from_pylist(entries, schema=ledger.schema), root / "shards.parquet")
    seal(root)


def edit_file(root: Path, folder: str, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change a file of a folder, and its size and checksums in the index."""
    path = root / folder / name
    data = change(path.read_bytes())
    path.write_bytes(data)
    put_sum(root, folder, name, data)


def put_sum(root: Path, folder: str, name: str, data: bytes) -> None:
    """Let the index of ``folder`` name a file ``name`` with this content."""
    sums = file_sum([data])
    entry = {"bytes": sums.bytes, "blocks": list(sums.blocks)}
    edit_index(root, folder, metadata=lambda facts: facts["files"].update({name: entry}))


def edit_zarr(root: Path, array: str, change: Change, folder: str = "shards/00000") -> None:
    def changed(data: bytes) -> bytes:
        plain = json.loads(data)
        change(plain)
        return json.dumps(plain).encode()

    edit_file(root, folder, f"{array}/zarr.json", changed)


@contextmanager
def untouched(*folders: Path) -> Iterator[None]:
    """Nothing in these folders is created, changed or deleted meanwhile."""
    before = [_snapshot(folder) for folder in folders]
    yield
    assert [_snapshot(folder) for folder in folders] == before


def _snapshot(folder: Path) -> dict[str, object]:
    found = {}
    for path in sorted(folder.rglob("*")):
        kept = path.read_bytes() if path.is_file() and not path.is_symlink() else path.lstat().st_mode
        found[str(path.relative_to(folder))] = kept
    return found


_DIGESTS = {"shards": "index_sha256", "images": "images_sha256"}
