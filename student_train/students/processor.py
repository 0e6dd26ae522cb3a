"""The student's processor: images and conversations as in its training, for whoever loads the exported folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from student_train.config import FitConfig, SourceConfig, StudentConfig
from student_train.losses.catalogue import LossSpec
from teacher_cache.data.conversations import IMAGE_TAG
from teacher_cache.data.tokenization import Template, template_by_name
from teacher_cache.errors import CacheError, ConfigError
from teacher_cache.store.manifest import Manifest, read_manifest
from teacher_cache.store.storage import Storage

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


def prepare_processor(processor: Any, config: FitConfig) -> Template:
    """Make ``processor`` show images and write conversations as this run does; returns the run's template.

    Raises ``ConfigError``, ``CacheError``: the caches' teachers saw images in several ways, or otherwise than a loss on
    image positions would compare, or the tokenizer cannot write the template.
    """
    caches = {s.cache: read_manifest(Storage(s.cache)) for s in config.sources if s.cache}
    mode = image_mode(config.student, caches)
    for source in config.sources:
        if source.cache and source.answers == "cached":
            check_image_mode(config.losses, mode, caches[source.cache], source.cache)
    processor.image_processor = shown_as(processor.image_processor, mode or own_image_mode(processor.image_processor))
    template = run_template(config.sources, caches)
    processor.chat_template = processor.tokenizer.chat_template = chat_template(template, processor.tokenizer)
    return template


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


def run_template(sources: Sequence[SourceConfig], caches: Mapping[str, Manifest]) -> Template:
    """How a student is asked: as in its first source that has questions, else (captions alone) as in its first."""
    names = [s.template if s.data else str(caches[s.cache].teacher["template"]) for s in sources]
    templates = [template_by_name(name) for name in names]
    return next((template for template in templates if template.questions), templates[0])


def chat_template(template: Template, tokenizer: Any) -> str:
    """``template`` in Jinja: its text, tokenised by ``tokenizer`` in the ordinary way, has the ids of
    ``tokenize_prompt``. Content may be a string, or a list of image and text parts; images stand first, as in LLaVA.

    Raises ``ConfigError``: of the tokenizer and the template one alone has a begin token.
    """
    if template.bos and tokenizer.bos_token is None:
        raise ConfigError(
            f"template {template.name} opens with a begin token, and the student's tokenizer has none. Take another "
            "template"
        )
    begin = "" if _begins_by_itself(tokenizer, template) or not template.bos else tokenizer.bos_token
    unknown = f"the student knows the roles user and assistant; its template, {template.name}, has one fixed opening"
    values = {
        "OPENING": begin + template.first,
        "SEPARATOR": template.separator,
        "USER": template.user,
        "TAG": f"{IMAGE_TAG}\n",
        "ASSISTANT": template.assistant,
        "SPACE": template.answer_space,
        "END": template.end,
        "UNKNOWN": unknown,
    }
    jinja = _JINJA if template.questions else _JINJA.replace("{{ images }}{{ text }}", "{{ images }}")
    return re.sub("|".join(values), lambda name: json.dumps(values[name[0]]), jinja)


# Content is read in loops, by which servers see that it may be a list.
_JINJA = (
    "{{ OPENING }}"
    "{% for message in messages %}"
    "{% set images %}{% if message['content'] is not string %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ TAG }}{% endif %}{% endfor %}{% endif %}{% endset %}"
    "{% set text %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endset %}"
    "{% if message['role'] == 'user' %}"
    "{% if not loop.first %}{{ SEPARATOR }}{% endif %}{{ USER }}{{ images }}{{ text }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ASSISTANT }}{% if text | trim %}{{ SPACE }}{{ text | trim }}{% endif %}{{ END }}"
    "{% else %}{{ raise_exception(UNKNOWN) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ASSISTANT }}{% endif %}"
)


def _begins_by_itself(tokenizer: Any, template: Template) -> bool:
    """Whether ``tokenizer`` writes a begin token before every text; told not to where the template has none."""
    if not _writes_bos(tokenizer) or template.bos:
        return _writes_bos(tokenizer)
    tokenizer.add_bos_token = False
    if _writes_bos(tokenizer):
        raise ConfigError(
            f"template {template.name} has no begin token, but the student's tokenizer writes {tokenizer.bos_token!r} "
            "before every text. Take another tokenizer (student.tokenizer), or a template with a begin token"
        )
    return False


def _writes_bos(tokenizer: Any) -> bool:
    ids = tokenizer("")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id
