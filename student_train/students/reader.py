"""How a student reads samples: what its LLaVA-1.5 teacher read, or by its own chat template and processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from student_train.config import FitConfig
from student_train.students.chat_reader import ChatReader, chat_reader, make_chat
from student_train.students.preprocessor import Preprocessor, preprocessor_of
from student_train.students.processor import check_same_images, prepare_images, write_template
from teacher_cache.models.chat import CAPTIONS, TEMPLATES
from teacher_cache.models.processor_settings import set_image_processor
from teacher_cache.store.manifest import read_manifest
from teacher_cache.store.storage import Storage

Reader = Preprocessor | ChatReader


def prepare_reader(model: Any, processor: Any, config: FitConfig) -> tuple[Reader, list[int]]:
    """How this run's student reads, which its ``processor`` is made to do too, and the tokens that end its answers.

    Raises ``ConfigError``, ``CacheError``, ``TemplateError``: it cannot read so.
    """
    name, kwargs = config.student.chat_template, config.student.template_kwargs
    caches = {s.cache: read_manifest(Storage(s.cache)) for s in config.sources if s.cache}
    written = [str(manifest.teacher["template"]) for manifest in caches.values()]
    set_image_processor("student.image_processor", processor, config.student.image_processor)
    as_cached = model.config.model_type == "llava" and _one_paper(name, written)
    if as_cached:  # asked as in its first source that has questions
        name = name or next((one for one in written if one not in CAPTIONS), written[0])
        prepare_images(processor, config, caches)
    chat = make_chat(model, processor, name, kwargs)
    write_template(processor, chat)
    ends = [chat.end, *sorted(chat.ends - {chat.end})]
    if as_cached:
        return preprocessor_of(model.config, processor, chat), ends
    for url, manifest in caches.items():
        check_same_images(config.losses, processor, manifest, url)
    compares = {
        "compares_text": any(loss.tokens != "answer" for loss in config.losses),
        "compares_images": any(loss.on_images for loss in config.losses),
    }
    return chat_reader(model, processor, chat, **compares), ends


def _one_paper(name: str, written: Sequence[str]) -> bool:
    """Whether all caches were ``written`` in papers' templates, and in no other than the student's, if it has a
    ``name``: a LLaVA-1.5 student then reads their ids as they are, without a look at any text."""
    names = [name] if name else written
    return bool(names) and TEMPLATES.keys() >= {*names, *written} and (not name or {name, *CAPTIONS} >= {*written})
