"""Images from disk or bytes, safely, as the teacher saw them in its training."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image as PillowImage
from PIL import ImageFile

from teacher_cache.conversations import Image

MAX_PIXELS = 64_000_000
"""Larger images are refused before they are decoded (decompression bombs); 8000 × 8000 fits."""


class ImageError(ValueError):
    """An image that is missing, outside the image folder, truncated, too large or no image at all."""


def load_image(image: Image, folder: str | Path) -> PillowImage.Image:
    """The decoded RGB image.

    Raises
    ------
    ImageError
        The sample is skipped with this text as its reason.
    """
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "a truncated image must be an error, not a grey area"
    try:
        source = io.BytesIO(image.data) if image.data else _inside(image.path, Path(folder))
        with PillowImage.open(source) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise ImageError(f"image {image.image_id}: {width}×{height} pixels, more than {MAX_PIXELS:,}")
            return opened.convert("RGB")
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"image {image.image_id}: no such file in the image folder") from None
    except (OSError, SyntaxError, ValueError, PillowImage.DecompressionBombError) as error:
        raise ImageError(f"image {image.image_id}: cannot be decoded ({error})") from error


def square(image: PillowImage.Image, mean: tuple[float, ...], mode: str) -> PillowImage.Image:
    """``pad``: the image centred on a square of the mean colour (LLaVA-1.5, expand2square); ``crop``: as it is."""
    width, height = image.size
    if mode == "crop" or width == height:
        return image
    side = max(width, height)
    colour = (round(255 * mean[0] - 0.5), round(255 * mean[1] - 0.5), round(255 * mean[2] - 0.5))
    canvas = PillowImage.new("RGB", (side, side), colour)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def image_tokens_of(model_config: Any) -> int:
    """N: positions one image takes in the language model, from a LLaVA configuration.

    CLIP's class token is one more where the strategy is ``full``; SigLIP has none.
    """
    vision = model_config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    class_token = vision.model_type.startswith("clip") and model_config.vision_feature_select_strategy == "full"
    return int(patches + class_token)


def _inside(name: str, folder: Path) -> Path:
    """``folder/name``, resolved; a path (or link) that leaves the folder is refused (promise 8)."""
    root = folder.resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise ImageError(f"image {name}: the path leaves the image folder")
    return path
