"""What a processor is set to: everything between a picture or a text and what the model reads of it."""

from __future__ import annotations

import json
from typing import Any


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
