"""What a processor is set to: everything between a picture or a text and what the model reads of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from teacher_cache.errors import TeacherError


def processor_settings(processor: Any) -> dict[str, Any]:
    """Plain data for the manifest: the settings of the image processor and the processor's own, what is None left out,
    and the ``backend`` that resizes images: PIL and torchvision give other pixels."""
    image = processor.image_processor
    named = {name: value for name, value in image.to_dict().items() if value is not None and name[:1] != "_"}
    own = {name: value for name, value in vars(processor).items() if isinstance(value, int | float | str)}
    own.pop("chat_template", None)
    backend = "pil" if type(image).__name__.endswith("Pil") else "torchvision"
    plain: dict[str, Any] = json.loads(json.dumps({"backend": backend, "image": named, **own}, default=str))
    return plain


def set_image_processor(setting: str, processor: Any, given: Mapping[str, Any]) -> None:
    """Give ``processor`` its image processor with the settings ``given`` in place of its own, or another one
    (``image_processor_type``).

    Raises
    ------
    TeacherError
        No such class in Transformers, or a setting that it does not know.
    """
    if not given:
        return
    import transformers

    image = processor.image_processor
    kind, more = type(image), {name: value for name, value in given.items() if name != _KIND}
    if name := given.get(_KIND):
        pil = f"{str(name).removesuffix('Pil').removesuffix('Fast')}Pil"
        kind = getattr(transformers, pil, None) or getattr(transformers, str(name), None)  # type: ignore[assignment]
    known = set(kind.valid_kwargs.__annotations__) if hasattr(kind, "valid_kwargs") else set()
    if not known:
        raise TeacherError(f"{setting}.image_processor_type: Transformers has no image processor {given[_KIND]!r}")
    if unknown := sorted(set(more) - known):
        raise TeacherError(f"{setting}: {kind.__name__} has no {unknown[0]}; it has {', '.join(sorted(known))}")
    own = {name: value for name, value in image.to_dict().items() if value is not None and name in known}
    processor.image_processor = kind(**{**own, **more})


_KIND = "image_processor_type"
