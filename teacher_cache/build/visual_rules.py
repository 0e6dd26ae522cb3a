"""What is stored once an image is right only where every sample reads the image behind the same ids, alone."""

from __future__ import annotations

from collections.abc import Iterable

from teacher_cache.config import CacheConfig
from teacher_cache.data.conversations import IMAGE_TAG, Conversation
from teacher_cache.data.spool import Sample
from teacher_cache.errors import DataError


def check_images_alone(config: CacheConfig, samples: Iterable[Sample]) -> None:
    """Refuse visual signals of samples whose image is not alone or not in front of all text: a causal model's states
    there depend on what stands before, and some processors make other positions of an image beside another.

    Raises
    ------
    DataError
        The first such sample.
    """
    opening: str | None = None
    for sample in samples:
        if not isinstance(sample, Conversation) or not sample.images:
            continue
        opening = sample.system if opening is None else opening
        what = (
            f"{len(sample.images)} images"
            if len(sample.images) > 1
            else "its image does not stand before the first question"
            if not sample.questions[0].startswith(IMAGE_TAG)
            else "a system text, of which others have none or another"
            if sample.system != opening
            else ""
        )
        if what:
            raise DataError(
                f"signals.visual={config.signals.visual}: sample {sample.sample_id}: {what}; expected one image in "
                "front of the first question, behind the same text everywhere: visual signals are kept once an image, "
                "and would be another sample's. Set signals.visual=none, or take such samples out of data.path"
            )
