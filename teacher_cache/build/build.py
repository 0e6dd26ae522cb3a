"""Phase one, whole: conversations → answers → states → shards.

``build_cache`` reads as the list of its steps. A shard covers a fixed range of the input, so any worker can make any
shard, a shard is made the same way whenever it is made, and what is done is what lies in ``shards/``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save as save_safetensors

from teacher_cache import __version__
from teacher_cache.build.calibration import calibrate, scales_to_bytes
from teacher_cache.build.context import Build, Tally
from teacher_cache.build.prove import prove
from teacher_cache.build.shards import build_shards
from teacher_cache.build.skips import allowed, check_inputs, forget_skipped
from teacher_cache.build.visual_rules import check_images_alone
from teacher_cache.config import CacheConfig, as_plain, check_settings
from teacher_cache.data.data_files import data_files
from teacher_cache.data.spool import Sample, SampleFile, spool
from teacher_cache.errors import CacheError, ConfigError, TeacherError
from teacher_cache.models.chat import Chat
from teacher_cache.models.open_chat import open_chat
from teacher_cache.progress import Style, note, stage
from teacher_cache.store.arrays import safetensors_facts, tensor_entries
from teacher_cache.store.broken import redo_broken
from teacher_cache.store.locks import locked
from teacher_cache.store.manifest import (
    MANIFEST,
    Manifest,
    check_same_content,
    new_manifest,
    read_manifest,
    write_manifest,
)
from teacher_cache.store.storage import Storage
from teacher_cache.store.tables import HEAD_BYTES, INDEX_BYTES, JSON_BYTES, json_object
from teacher_cache.store.writer import (
    HEAD,
    SCALES,
    answers_name,
    committed_shards,
    finish,
    refuse_foreign_shards,
)
from teacher_cache.teachers.answerer import answerer_facts, with_answerer
from teacher_cache.teachers.teacher import Teacher


@dataclass(frozen=True)
class BuildSummary:
    """What ``teacher-cache build`` reports."""

    samples: int
    skipped: int
    rows: int
    bytes: int
    seconds: float
    answer_seconds: float
    score_seconds: float
    shards_made: int

    @property
    def bytes_per_row(self) -> float:
        return self.bytes / max(self.rows, 1)


def build_cache(
    config: CacheConfig,
    *,
    teacher: Teacher | None = None,
    style: Style = "auto",
    options: dict[str, Any] | None = None,
    break_lock: bool = False,
    redo_skipped: bool = False,
) -> BuildSummary:
    """Make the cache ``config.output``, or go on where an earlier run stopped. One build at a time has an output.

    ``redo_skipped`` makes shards again that left out samples which may be usable now.

    Raises
    ------
    ConfigError, DataError, TeacherError, CacheError, StorageError
        Each says what, where, what was expected and what to do. Shards that were committed stay.

    Examples
    --------
    >>> import teacher_cache as tc
    >>> config = tc.load_config(tc.CacheConfig, "pipelines/tiny/cache.yaml", ["data.max_samples=4", "output=runs/four"])
    >>> tc.build_cache(config, style="quiet").samples
    4
    """
    check_config(config)
    storage, chat = Storage(config.output, options), teacher.chat if teacher is not None else None
    with (
        locked(storage, break_lock=break_lock),
        read_samples(config, storage, style, redo_skipped=redo_skipped, chat=chat) as samples,
    ):
        begin = time.monotonic()
        with nullcontext(teacher) if teacher is not None else closing(open_teacher(config, samples, style)) as teacher:
            build = prepare(config, storage, samples, teacher, style)
            numbers = missing_shards(storage, build.manifest)
            build_shards(build, numbers)
        return finish_build(config, storage, build.manifest, build.tally, time.monotonic() - begin, len(numbers))


def read_samples(
    config: CacheConfig, storage: Storage, style: Style, *, redo_skipped: bool = False, chat: Chat | None = None
) -> SampleFile:
    """The samples of ``config.data``, laid down in the output while the run lasts, and looked at: shards with skipped
    samples are removed where they are to be made again, and a build that would skip too much is stopped here.
    ``chat``: the teacher's, where it is open already; how it is shown conversations decides what a sample is.

    Raises
    ------
    TeacherError, TemplateError
        The teacher's processor or chat template cannot be used.
    DataError
        The data cannot be read, the image folder is not there, or more than ``data.max_skipped`` would be skipped.
    """
    folder = storage.local / SPOOL if storage.local is not None else None
    total = sum(path.stat().st_size for path in data_files(config.data.path))
    note(f"reading {total / 1e6:,.1f} MB of samples", style)
    by_turn = not (chat or open_chat(config.teacher)).one_sequence
    with stage("reading", total, "bytes", style) as progress:
        samples = spool(config.data, folder, progress.advance, by_turn)
    try:
        if redo_skipped and storage.exists(MANIFEST):
            redone = forget_skipped(storage, read_manifest(storage), samples)
            note(f"making {len(redone)} shards again that left out samples", style)
        planned = -(-len(samples) // config.layout.shard_samples)
        if set(range(planned)) - {int(name) for name in storage.names("shards") if name.isdigit()}:
            check_inputs(config, samples)
        if config.signals.visual != "none":
            check_images_alone(config, samples)
    except BaseException:
        samples.close()
        raise
    return samples


SPOOL = ".samples"
"""Where the samples lie in the output while a build runs."""


def finish_build(
    config: CacheConfig, storage: Storage, manifest: Manifest, tally: Tally, seconds: float, shards_made: int
) -> BuildSummary:
    """Write the ledger and the manifest's last word once every shard is there, and say what was made."""
    counts = finish(storage, manifest, allowed(config, manifest.planned_samples)).counts
    _add_cost(storage, tally)
    made = {name: counts[name] for name in ("samples", "skipped", "rows", "bytes")}
    return BuildSummary(
        **made, seconds=seconds, answer_seconds=tally.answering, score_seconds=tally.scoring, shards_made=shards_made
    )


def _add_cost(storage: Storage, tally: Tally) -> None:
    """``cost.json``: what the teacher took, over all runs that made the cache. Not content: no checksum, no promise."""
    cost: dict[str, Any] = {}
    if storage.exists(COST):
        with contextlib.suppress(CacheError):  # not content: what cannot be read is counted anew
            cost = json_object(storage.read(COST, JSON_BYTES), f"{storage.url}/{COST}")
    cost = {"answer_seconds": 0.0, "score_seconds": 0.0} | cost
    cost["answer_seconds"] += tally.answering
    cost["score_seconds"] += tally.scoring
    cost["one_pass"] = cost.get("one_pass", False) or tally.one_pass
    storage.write(COST, [json.dumps(cost).encode()])


COST = "cost.json"


def answer_only(
    config: CacheConfig, style: Style = "auto", options: dict[str, Any] | None = None, break_lock: bool = False
) -> int:
    """Write the answers of every shard that has none yet; returns how many shards that were."""
    check_config(config)
    storage = Storage(config.output, options)
    with (
        locked(storage, break_lock=break_lock),
        read_samples(config, storage, style) as samples,
        closing(open_teacher(config, samples, style)) as teacher,
    ):
        build = prepare(config, storage, samples, teacher, style)
        numbers = [n for n in missing_shards(storage, build.manifest) if not storage.exists(answers_name(n))]
        build_shards(build, numbers, answers_only=True)
    return len(numbers)


def check_answered(config: CacheConfig, options: dict[str, Any] | None = None) -> None:
    """Refuse to score when a shard that is to be scored has no answers yet."""
    storage = Storage(config.output, options)
    manifest = read_manifest(storage)
    bare = [n for n in missing_shards(storage, manifest) if not storage.exists(answers_name(n))]
    if bare:
        raise CacheError(
            f"{storage.url}: {len(bare)} shards have no answers (first: {answers_name(bare[0])}). "
            "Run teacher-cache answer with the same configuration first, or build, which does both"
        )


def open_teacher(config: CacheConfig, samples: Sequence[Sample], style: Style = "auto") -> Teacher:
    """The teacher of ``config.teacher.backend``; ``auto`` takes vLLM where it is installed and holds the model.

    With ``teacher.answerer`` a student answers in its place.
    """
    check_config(config)
    teacher = with_answerer(_open_backend(config, samples, style), config)
    try:
        prove(config, teacher, samples)
    except TeacherError:
        teacher.close()
        raise
    return teacher


def _open_backend(config: CacheConfig, samples: Sequence[Sample], style: Style) -> Teacher:
    if config.teacher.backend != "torch":
        from teacher_cache.teachers.vllm.choice import choose

        choice = choose(config)
        note(choice.reason, style)
        if choice.use_vllm:
            from teacher_cache.teachers.vllm.vllm_teacher import VllmTeacher

            return VllmTeacher(config, samples)
    from teacher_cache.teachers.torch_teacher import TorchTeacher

    return TorchTeacher(config.teacher, config.generation, config.speed, attention=config.signals.attention)


def check_config(config: CacheConfig) -> None:
    """Settings that are missing or contradict each other, before anything is loaded."""
    check_settings(config)
    if not config.output:
        raise ConfigError("output: not set; name a folder or an s3:// or gs:// address for the cache")
    if not config.teacher.model:
        raise ConfigError("teacher.model: not set; name a model (a folder or a hub name)")
    if not config.data.path:
        raise ConfigError("data.path: not set; name a JSON, JSON lines, Parquet or Arrow file, or hf://datasets/…")
    signals = config.signals
    if 1.0 not in signals.temperatures:
        raise ConfigError("signals.temperatures: must contain 1.0, the temperature of topk_logprobs")
    if signals.sampled and signals.sampled_from == "tail" and not signals.top_k:
        raise ConfigError("signals.sampled_from=tail needs signals.top_k: the tail is what lies outside the top-k")
    if signals.second_last and signals.hidden == "none":
        raise ConfigError("signals.second_last needs signals.hidden=rows or text")
    if signals.hidden == "none" and not signals.top_k:
        raise ConfigError("signals: neither hidden states nor a top-k would be stored; set signals.top_k")


def prepare(
    config: CacheConfig, storage: Storage, samples: SampleFile, teacher: Teacher, style: Style = "auto"
) -> Build:
    """Write manifest, head and channel scales, or check that those of an earlier run fit; what the shards need."""
    check_config(config)
    manifest = _manifest(config, samples, teacher)
    if storage.exists(MANIFEST):
        old = read_manifest(storage)
        check_same_content(old, manifest, storage.url)
        manifest = dataclasses.replace(old, complete=False, counts={}, files={})
        redo_broken(storage, old)
    else:
        refuse_foreign_shards(storage, manifest)
        write_manifest(storage, manifest)
        redo_broken(storage, manifest)
    build = Build(config, storage, manifest, samples, teacher, style)
    if manifest.signals_config.hidden != "none" or manifest.image_arrays:
        _keep_head(storage, save_safetensors({"head": teacher.head().cpu().contiguous()}))
        if not _scales_stand(storage, manifest) and (scales := calibrate(build)):
            storage.write(SCALES, [scales_to_bytes(scales, manifest.fingerprint)])
    return build


def _manifest(config: CacheConfig, samples: SampleFile, teacher: Teacher) -> Manifest:
    """What this configuration, these samples and this teacher make."""
    data = as_plain(config.data) | {"files": samples.files, "image_reading": IMAGE_READING} | answerer_facts(config)
    data = {name: value for name, value in data.items() if name not in _PLACES}
    manifest = new_manifest(config, teacher.description.facts(), data, len(samples))
    names = ", ".join(path.name for path in data_files(config.data.path))
    return dataclasses.replace(manifest, made_with=_versions() | {"data": names})


def _keep_head(storage: Storage, head: bytes) -> None:
    """Write the teacher's head; refuse that of another teacher, which an earlier cache in this folder left."""
    if storage.exists(HEAD) and storage.size(HEAD) == len(head):
        if storage.read(HEAD, HEAD_BYTES) != head:
            raise _leftover(storage, HEAD, "another teacher's output head")
        return
    if storage.exists(HEAD) and storage.size(HEAD):
        try:
            tensor_entries(storage.read(HEAD, HEAD_BYTES), f"{storage.url}/{HEAD}")
        except CacheError as error:  # cut by an interrupted copy
            note(f"{error}. It is written again")
        else:
            raise _leftover(storage, HEAD, "another teacher's output head")
    storage.write(HEAD, [head])


def _scales_stand(storage: Storage, manifest: Manifest) -> bool:
    """Whether there are scales of this cache; those of another one are refused, a broken file is made again."""
    if not storage.exists(SCALES):
        return False
    data, where = storage.read(SCALES, INDEX_BYTES), f"{storage.url}/{SCALES}"
    try:
        entries, owner = tensor_entries(data, where), safetensors_facts(data, where).get("fingerprint", "")
    except CacheError as error:
        note(f"{error}. The scales are fitted again")
        return False
    if owner == manifest.fingerprint or (not owner and committed_shards(storage, manifest)):
        return bool(entries)  # version 0.1 wrote no fingerprint: shards of this cache vouch for their scales
    raise _leftover(storage, SCALES, "scales fitted for another cache")


def _leftover(storage: Storage, name: str, what: str) -> CacheError:
    return CacheError(
        f"{storage.url}/{name}: {what}, left in this folder. Move it away and run the same command again, or choose "
        "another output"
    )


def missing_shards(storage: Storage, manifest: Manifest) -> list[int]:
    return sorted(set(range(manifest.planned_shards)) - committed_shards(storage, manifest))


_PLACES = ("path", "regenerate_ids", "image_folder", "max_skipped")
"""Where the data lie may change, and how much may be missing; what they are may not: ``files`` has their digests."""
IMAGE_READING = 2
"""1 (0.1): as stored, 16-bit levels clipped; 2: upright, scaled to eight bits."""


def _versions() -> dict[str, str]:
    import transformers

    return {"teacher_cache": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
