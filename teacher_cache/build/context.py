"""What all steps of one build share: the cache that is made, from what, by whom; and what making its shards took."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from teacher_cache.build.signals import Extractor
from teacher_cache.config import CacheConfig
from teacher_cache.data.conversations import Conversation, Skipped
from teacher_cache.data.sample_reader import SkipCount
from teacher_cache.data.spool import SampleFile
from teacher_cache.errors import TeacherError
from teacher_cache.progress import Style
from teacher_cache.store.codecs import ChannelScales
from teacher_cache.store.index import ImagePlace
from teacher_cache.store.manifest import Manifest
from teacher_cache.store.reader import scales_from_bytes
from teacher_cache.store.storage import Storage
from teacher_cache.store.tables import INDEX_BYTES
from teacher_cache.store.writer import SCALES
from teacher_cache.teachers.teacher import Teacher


@dataclass
class Tally:
    """Of some shards: the seconds their teacher took, and what they left out."""

    answering: float = 0.0
    scoring: float = 0.0
    one_pass: bool = False
    """Some states were captured while answering, so ``scoring`` is not all that scoring takes."""
    skips: SkipCount = field(default_factory=SkipCount)

    def add(self, other: Tally) -> None:
        self.answering += other.answering
        self.scoring += other.scoring
        self.one_pass |= other.one_pass
        self.skips.merge(other.skips)


@dataclass(frozen=True, eq=False)
class Build:
    """One cache while its shards are made; ``build.prepare`` makes it.

    A step takes the build and what is its shard's own, and adds to ``tally`` what it took and left out.
    """

    config: CacheConfig
    storage: Storage
    manifest: Manifest
    samples: SampleFile
    teacher: Teacher
    style: Style = "auto"
    tally: Tally = field(default_factory=Tally)

    @cached_property
    def limit(self) -> tuple[int, str]:
        """Tokens of the longest conversation that can be cached (image expanded), and what sets that limit."""
        limit, positions = self.config.teacher.max_length, self.teacher.positions
        if positions is not None and positions < limit:
            return positions, f"the model has {positions} positions"
        return limit, f"teacher.max_length is {limit}"

    @cached_property
    def extractor(self) -> Extractor:
        """Turns states into what is stored, by the scales that lie in the cache."""
        config, shape, scales = self.config, self.manifest.shape, {}
        if config.signals.visual == "gram" and self.manifest.logit_rule.cap:
            raise TeacherError(
                f"signals.visual=gram: teacher.model={config.teacher.model} soft-caps its logits, and the Gram of such "
                "logits would need all of them. Set signals.visual=states or topk"
            )
        if self.storage.exists(SCALES):
            data, where = self.storage.read(SCALES, INDEX_BYTES), f"{self.storage.url}/{SCALES}"
            scales = scales_from_bytes(data, where, shape.hidden_size, config.signals.pca)
        none = ChannelScales(np.ones(shape.hidden_size, np.float32))
        return Extractor(
            signals=config.signals,
            shape=shape,
            head=self.teacher.head(),
            scales={name: scales.get(name, none) for name in ("hidden", "hidden_second_last", "visual")},
            seed=config.generation.seed,
            head_rows=config.speed.head_rows,
            rule=self.manifest.logit_rule,
        )

    @cached_property
    def image_places(self) -> dict[str, ImagePlace]:
        """Where each distinct image's line stands: in the shard in which it comes first, in order of appearance;
        nowhere in a cache without image arrays."""
        places: dict[str, ImagePlace] = {}
        filled: dict[int, int] = {}
        for position, image_id in enumerate(self.samples.image_ids() if self.manifest.image_arrays else ()):
            if image_id and image_id not in places:
                shard = position // self.config.layout.shard_samples
                places[image_id] = ImagePlace(shard, filled.get(shard, 0))
                filled[shard] = filled.get(shard, 0) + 1
        return places

    def chosen(self, number: int) -> list[Conversation | Skipped]:
        """The samples that shard ``number`` covers."""
        size = self.config.layout.shard_samples
        return self.samples[number * size : (number + 1) * size]


def shard_size(manifest: Manifest, number: int) -> int:
    """Samples that shard ``number`` covers."""
    size = int(manifest.layout["shard_samples"])
    return min(size, manifest.planned_samples - number * size)
