"""The student's processor: images and conversations as in its training, for whoever loads the exported folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from student_train.config import FitConfig, StudentConfig
from student_train.losses.catalogue import LossSpec
from teacher_cache.errors import CacheError, ConfigError, TemplateError
from teacher_cache.models.chat import Chat
from teacher_cache.models.processor_settings import processor_settings
from teacher_cache.store.manifest import Manifest

_IMAGE_SETTINGS = (
    "do_convert_rgb",
    "do_resize",
    "size",
    "resample",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)


def prepare_images(processor: Any, config: FitConfig, caches: Mapping[str, Manifest]) -> None:
    """Make ``processor`` show images as this run does; ``caches``: the manifests of the sources', by address.

    Raises ``ConfigError``, ``CacheError``: the caches' teachers saw images in several ways, or otherwise than a loss on
    image positions would compare.
    """
    mode = image_mode(config.student, caches)
    for source in config.sources:
        if source.cache and source.answers == "cached":
            check_image_mode(config.losses, mode, caches[source.cache], source.cache)
    processor.image_processor = shown_as(processor.image_processor, mode or own_image_mode(processor.image_processor))


def image_mode(student: StudentConfig, caches: Mapping[str, Manifest]) -> str:
    """``pad`` or ``crop``: as the config says, else as the caches' teachers saw images; empty where neither tells."""
    if student.image_mode != "auto":
        return student.image_mode
    seen = {url: str(m.teacher["image_mode"]) for url, m in caches.items() if "image_mode" in m.teacher}
    if len(set(seen.values())) > 1:
        raise ConfigError(
            f"sources: their teachers saw images in several ways ({', '.join(f'{u}: {m}' for u, m in seen.items())}), "
            "and a student sees them in one. Set student.image_mode=pad or crop"
        )
    return next(iter(seen.values()), "")


def check_image_mode(specs: Sequence[LossSpec], mode: str, manifest: Manifest, url: str) -> None:
    """Refuse to compare image positions that show different parts of the image."""
    seen = manifest.teacher.get("image_mode", mode)
    on_images = [spec.label for spec in specs if spec.on_images]
    if on_images and seen != mode:
        raise CacheError(
            f"{url}: its teacher saw images with image_mode={seen}, the student sees them with {mode}, so the image "
            f"positions that {', '.join(on_images)} compare show different parts of the image. Set "
            f"student.image_mode={seen}, or leave these losses out"
        )


_COLOURS = {"do_convert_rgb", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample"}
"""Settings that do not change which part of an image a position shows."""


def check_same_images(specs: Sequence[LossSpec], processor: Any, manifest: Manifest, url: str) -> None:
    """Refuse to compare image positions, one by one, of two processors that cut images in another way: of as many
    positions, too, those of a row of 8 x 32 are not those of a square."""
    theirs = manifest.teacher.get("processor", {}).get("image", {})
    on_images = [spec.label for spec in specs if spec.on_images]
    if not (on_images and theirs and hasattr(processor, "image_processor")):
        return
    ours = processor_settings(processor)["image"]
    for name in sorted({*ours, *theirs} - _COLOURS):
        one, other = (re.sub("(Pil|Fast)$", "", str(side.get(name, "none"))) for side in (theirs, ours))
        if one != other:
            raise CacheError(
                f"{url}: its teacher's image processor has {name}: {one}, the student's {other}, so the image "
                f"positions that {', '.join(on_images)} compare need not show the same parts of the image. Set "
                "student.image_processor as the teacher's, or leave these losses out"
            )


def own_image_mode(image_processor: Any) -> str:
    """What a processor does by itself: an exported student's says it, another crops or, as LLaVA-1.5, is padded for."""
    if isinstance(image_processor, LlavaImageProcessorPil):
        return "pad" if image_processor.do_pad else "crop"
    return "crop" if getattr(image_processor, "do_center_crop", False) else "pad"


def shown_as(image_processor: Any, mode: str) -> Any:
    """The same processing as Transformers' LlavaImageProcessor, which pads to a square by itself where told to, with
    the colour that ``teacher_cache.data.images.square`` takes."""
    plain = image_processor.to_dict()
    settings = {name: plain[name] for name in _IMAGE_SETTINGS if plain.get(name) is not None}
    crops = bool(plain.get("do_center_crop"))
    return LlavaImageProcessorPil(**settings, do_center_crop=crops, do_pad=mode == "pad")


def write_template(processor: Any, chat: Chat) -> None:
    """Make ``processor`` write conversations as ``chat`` does, with what is given to its template there.

    Raises ``TemplateError``: the template has no begin token, and the tokenizer writes one before every text.
    """
    tokenizer, given = getattr(processor, "tokenizer", processor), dict(chat.given)
    if chat.adds_begin and tokenizer is not processor:  # a processor has the tokenizer write it
        given["bos_token"] = ""
    elif chat.adds_begin is False and "bos_token" not in chat.text and _writes_begin(tokenizer):
        tokenizer.add_bos_token = False
        if _writes_begin(tokenizer):
            raise TemplateError(
                f"the template {chat.name} has no begin token, but the student's tokenizer writes "
                f"{tokenizer.bos_token!r} before every text. Take another tokenizer (student.tokenizer), or a template "
                "with a begin token"
            )
    if chat.name or given:
        settings = "".join(f"{{%- set {key} = {_literal(value)} %}}" for key, value in given.items())
        processor.chat_template = tokenizer.chat_template = settings + chat.text


def _writes_begin(tokenizer: Any) -> bool:
    return bool(tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id])


def _literal(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
