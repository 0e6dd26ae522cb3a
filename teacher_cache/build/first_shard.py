"""The first shard that a run makes is read again, as ``verify --deep`` reads it, before it makes others."""

from __future__ import annotations

from teacher_cache.build.context import Build
from teacher_cache.errors import TeacherError
from teacher_cache.store.folder import ShardFolder
from teacher_cache.store.invariants import shard_faults
from teacher_cache.store.names import INDEX, answers_name, shard_name
from teacher_cache.store.prefetch import files_of
from teacher_cache.store.tables import INDEX_BYTES, answer_ids


def check_first(build: Build, number: int) -> None:
    """Refuse a teacher whose rows do not belong to its answers, or whose states do not give its log-probabilities.

    Raises
    ------
    TeacherError
        What does not hold, and in which sample. The shard is removed.
    """
    storage, manifest, name = build.storage, build.manifest, answers_name(number)
    head = (build.extractor.head.float().cpu().numpy(), build.extractor.scales)
    answers = answer_ids(storage.read(name, INDEX_BYTES), f"{storage.url}/{name}")
    files = files_of(storage, manifest.fingerprint)
    try:
        folder = ShardFolder(files, shard_name(number), None, True, storage.url, manifest)
        fault = next(shard_faults(folder, manifest, head, answers), None)
    finally:
        files.close()
    if fault is not None:
        storage.remove(shard_name(number), INDEX)
        what, array, sample = fault
        raise TeacherError(
            f"{storage.url}/{shard_name(number)}/{array}: sample {sample}: {what}. So teacher.model="
            f"{build.config.teacher.model} is not read here as it answers, and nothing was kept of this shard. Take "
            "another model, another teacher.backend, or a teacher.dtype of more digits"
        )
