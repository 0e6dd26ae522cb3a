"""What a run reads: its sources, its images' features, what the losses need of each teacher, what was left out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from student_train.config import FitConfig
from student_train.feed.features import ImageFeatures, compute_features
from student_train.feed.plain import PlainSource
from student_train.feed.raw import Source
from student_train.feed.skipped import SkippedFile
from student_train.feed.sources import CacheSource, leave_out_damaged
from student_train.losses.image_losses import head_square
from student_train.losses.needs import check_shared, reads_head_square
from student_train.losses.shared_ids import shared_count
from student_train.losses.targets import TeacherSide
from student_train.students.chat_reader import ChatReader
from student_train.students.reader import Reader
from student_train.training.objective import vision_features
from teacher_cache.errors import ConfigError
from teacher_cache.models.parts import other_layers
from teacher_cache.progress import note
from teacher_cache.store.manifest import digest
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.writer import HEAD


def check_packing(config: FitConfig, model: Any) -> None:
    """Raises ``ConfigError``: a layer that is no attention goes on from one sample of a line to the next."""
    other = other_layers(model.config)
    if config.train.pack and other:
        raise ConfigError(
            f"train.pack: the student has layers of {', '.join(other)}, which do not see where a sample of a line "
            "ends. Set train.pack=false"
        )


def tower_features(
    config: FitConfig, model: Any, sources: list[Source], preprocessor: Reader, accelerator: Accelerator
) -> ImageFeatures | None:
    """Features of a frozen tower, once per image; listed and computed by the main process, read by all."""
    if config.student.vision_features == "compute":
        return None
    if isinstance(preprocessor, ChatReader):
        raise ConfigError(
            f"student.vision_features=cache: the tower of a {type(model).__name__} that reads by its own chat template "
            "may look at a sample's images together. Set student.vision_features=compute"
        )
    if config.student.train_vision:
        raise ConfigError("student.vision_features=cache needs a frozen tower; set student.train_vision=false")
    llava = model.model.to(accelerator.device)

    def tower(pixels: torch.Tensor) -> torch.Tensor:
        return vision_features(llava, pixels.to(accelerator.device, llava.vision_tower.dtype))

    folder = [""]
    if accelerator.is_main_process:
        images = ((image, source.image_folder) for source in sources for image in source.images())
        weights = digest([[n, float(p.float().sum())] for n, p in llava.vision_tower.named_parameters()])
        seen_as = digest([weights, preprocessor.image_mode])
        beside, seen = Path(config.output).parent, (tower, preprocessor.pixels, seen_as)
        folder = [str(compute_features(beside, images, *seen, blank=preprocessor.blank))]
    features = ImageFeatures(Path(broadcast_object_list(folder)[0]))
    if features.damaged:
        leave_out_damaged(config.sources, sources, features.damaged)
    return features


def side_of(config: FitConfig, source: Source, model: Any, device: torch.device) -> TeacherSide | None:
    if not isinstance(source, CacheSource):
        return None
    manifest, vocabulary = source.cache.manifest, model.get_output_embeddings().weight.shape[0]
    shared = shared_count(manifest.shape.vocabulary, vocabulary)
    visual, url = manifest.signals["visual"], source.cache.storage.url
    check_shared(config.losses, manifest.shape.vocabulary, vocabulary, visual, url)
    dtype = getattr(torch, config.student.dtype)  # in which the student's products are formed
    head = any(loss.needs_head for loss in config.losses) and HEAD in manifest.files
    side = _shifted(TeacherSide.of(source.cache, vocabulary, device, dtype, head), source, vocabulary)
    if side.head is None or not reads_head_square(config.losses, visual):
        return side
    return dataclasses.replace(side, head_square=head_square(side.head[:shared]))


def _shifted(side: TeacherSide, source: CacheSource, vocabulary: int) -> TeacherSide:
    """``side`` with the caches of the source's shift: onto + shift · (cache − before), by default onto cache itself."""
    if not source.others or side.head is None:
        return side
    shift, head = source.shift, side.head
    factors = {"before": -shift, "onto": 1.0}
    others = tuple(
        (f"{name}/", factors[name], TeacherSide.of(cache, vocabulary, head.device, head.dtype, True))
        for name, cache in source.others.items()
    )
    return dataclasses.replace(side, factor=shift if "onto" in source.others else 1.0 + shift, others=others)


def skipped_file(folder: Path, sources: list[Source], main: bool) -> SkippedFile:
    """With what was left out before the first step."""
    found = SkippedFile(folder)
    before = [s for source in sources if isinstance(source, PlainSource) for s in source.skipped]
    if main and (new := found.add(before)):
        note(f"{len(new):,} samples are left out, see {found.path} (the first: {new[0].sample_id}, {new[0].reason})")
    found.known |= {s.sample_id for s in before}  # on the other ranks, too
    return found


def cache_facts(cache: TeacherCache) -> dict[str, Any]:
    """What a model card says of a cache."""
    manifest = cache.manifest
    return {"teacher": manifest.teacher["model"], "fingerprint": manifest.fingerprint, "samples": len(cache)}
