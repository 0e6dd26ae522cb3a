"""Ledger, head and scales of a cache, as the manifest says that they must be."""

from __future__ import annotations

import pyarrow as pa

from teacher_cache.errors import CacheError
from teacher_cache.store.arrays import load_safetensors_array
from teacher_cache.store.codecs import ChannelScales, scales_from_bytes
from teacher_cache.store.index import COUNTED
from teacher_cache.store.manifest import Manifest
from teacher_cache.store.names import HEAD, LEDGER, SAMPLES, SCALES
from teacher_cache.store.records import Array
from teacher_cache.store.storage import Storage
from teacher_cache.store.tables import HEAD_BYTES, INDEX_BYTES, read_table

_DIGESTS = ("index_sha256", "images_sha256", "answers_sha256")
_LEDGER_COLUMNS = {"samples": pa.int64(), **dict.fromkeys(_DIGESTS, pa.string())}


def ledger_table(data: bytes, where: str, manifest: Manifest) -> pa.Table:
    """samples and digests, a line a shard; ``CacheError`` where they do not make the manifest's number of samples."""
    table = read_table(data, where, _LEDGER_COLUMNS, manifest.planned_shards)
    samples = table["samples"].to_numpy()
    most, counted = manifest.layout["shard_samples"], manifest.counts.get("samples", 0)
    if len(samples) and not 0 <= samples.min() <= samples.max() <= most:
        raise CacheError(f"{where}: a shard of {samples.min():,} to {samples.max():,} samples, expected 0 to {most:,}")
    if samples.sum() != counted:
        raise CacheError(f"{where}: {samples.sum():,} samples, but the manifest counts {counted:,}")
    return table


def head_array(data: bytes, where: str, manifest: Manifest) -> Array:
    """(V, d) the teacher's output projection; bfloat16 comes as float32."""
    return load_safetensors_array(data, "head", where, (manifest.shape.vocabulary, manifest.shape.hidden_size))


def scale_arrays(data: bytes, where: str, manifest: Manifest) -> dict[str, ChannelScales]:
    """The codec's scales by array name."""
    return scales_from_bytes(data, where, manifest.shape.hidden_size, manifest.signals["pca"])


SAMPLE_COLUMNS = {"sample_id": pa.string(), **dict.fromkeys((*COUNTED, "images"), pa.int32())}


def read_samples(storage: Storage, manifest: Manifest) -> pa.Table:
    """``samples.parquet``: a line a sample."""
    data = storage.read(SAMPLES, INDEX_BYTES)
    return read_table(data, f"{storage.url}/{SAMPLES}", SAMPLE_COLUMNS, manifest.counts.get("samples", 0))


def read_ledger(storage: Storage, manifest: Manifest) -> pa.Table:
    return ledger_table(storage.read(LEDGER, INDEX_BYTES), f"{storage.url}/{LEDGER}", manifest)


def read_head(storage: Storage, manifest: Manifest) -> Array:
    return head_array(storage.read(HEAD, HEAD_BYTES), f"{storage.url}/{HEAD}", manifest)


def read_scales(storage: Storage, manifest: Manifest) -> dict[str, ChannelScales]:
    return scale_arrays(storage.read(SCALES, INDEX_BYTES), f"{storage.url}/{SCALES}", manifest)
