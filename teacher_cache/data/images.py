"""Images as the teacher and its students see them: eight bits a channel, upright, RGB."""

from __future__ import annotations

import dataclasses
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, ImageFile, UnidentifiedImageError
from PIL import Image as PillowImage

from teacher_cache.data.conversations import Image
from teacher_cache.data.image_files import image_checksum, read_image
from teacher_cache.errors import DataError, ImageError

MAX_PIXELS = 64_000_000
"""Larger images are refused before they are decoded (decompression bombs); 8000 × 8000 fits."""
MAX_SIDE = 12_000
"""Longer ones are refused: ``pad`` makes a square of the longer side (12,000² are 576 MB)."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""What is read, whatever the file is called. A closed list: an EPS is a program, and Pillow would run it."""


def load_image(image: Image, folder: str | Path) -> PillowImage.Image:
    """The decoded RGB image.

    Raises ``ImageError``: the sample is skipped with this text as its reason. ``DataError``: the image folder does not
    answer, or holds another image under this name: the run stops.
    """
    return decode(read_image(image, folder), image.image_id)


def decode(data: bytes, image_id: str) -> PillowImage.Image:
    """The RGB image in ``data``, as :func:`load_image`. No text of Pillow's is passed on: it holds addresses and paths.

    Raises ``ImageError``: no image of :data:`FORMATS`, damaged, too large, or of a range that nobody states.
    ``DataError``: not enough memory. That depends on the machine, so it is no reason to leave a sample out.
    """
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "a truncated image must be an error, not a grey area"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata
            return _decoded(data, image_id)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"image {image_id}: cannot be decoded (none of {', '.join(FORMATS)})") from None
    except PillowImage.DecompressionBombError:
        raise ImageError(f"image {image_id}: more than {MAX_PIXELS:,} pixels") from None
    except MemoryError as error:
        raise DataError(
            f"image {image_id}: not enough memory to decode it. Lower speed.loader_threads, or give the run more memory"
        ) from error
    except Exception:  # by damage every exception there is; AVIF's is a RuntimeError, others IndexError, struct.error
        raise ImageError(f"image {image_id}: cannot be decoded (damaged or cut off)") from None


def _decoded(data: bytes, image_id: str) -> PillowImage.Image:
    PillowImage.init()
    known = tuple(name for name in FORMATS if name in PillowImage.OPEN)
    with PillowImage.open(io.BytesIO(data), formats=known) as opened:
        width, height = opened.size
        if width * height > MAX_PIXELS:
            raise ImageError(f"image {image_id}: {width}×{height} pixels, more than {MAX_PIXELS:,}")
        if max(width, height) > MAX_SIDE:
            raise ImageError(f"image {image_id}: {width}×{height} pixels, a side of more than {MAX_SIDE:,}")
        opened.load()
        return _upright(opened, _eight_bits(opened, image_id))


def _eight_bits(opened: PillowImage.Image, image_id: str) -> PillowImage.Image:
    """RGB with eight bits a channel. Pillow's own conversion clips 16-bit and float images at 255."""
    if opened.mode.startswith("I;16"):
        return _grey((np.asarray(opened).astype(np.uint32) + 128) // 257)
    if opened.mode == "I":
        levels = np.asarray(opened)
        if levels.min() < 0 or levels.max() > 65535 or 0 < levels.max() <= 255:
            raise ImageError(f"image {image_id}: 32-bit integers that are not 16-bit levels; save it with 8 or 16 bits")
        return _grey((levels.astype(np.uint32) + 128) // 257)
    if opened.mode == "F":
        levels = np.asarray(opened)
        if not (np.isfinite(levels).all() and levels.min() >= 0 and levels.max() <= 1):
            raise ImageError(f"image {image_id}: float levels outside 0 to 1; save it with 8 or 16 bits")
        return _grey(np.rint(levels.astype(np.float64) * 255))
    return opened.convert("RGB")


def _grey(levels: np.ndarray[Any, Any]) -> PillowImage.Image:
    return PillowImage.fromarray(levels.astype(np.uint8)).convert("RGB")


_TURNS = {
    2: PillowImage.Transpose.FLIP_LEFT_RIGHT,
    3: PillowImage.Transpose.ROTATE_180,
    4: PillowImage.Transpose.FLIP_TOP_BOTTOM,
    5: PillowImage.Transpose.TRANSPOSE,
    6: PillowImage.Transpose.ROTATE_270,
    7: PillowImage.Transpose.TRANSVERSE,
    8: PillowImage.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation (CIPA DC-008, 4.6.5.1.6)."""


def _upright(opened: PillowImage.Image, picture: PillowImage.Image) -> PillowImage.Image:
    """``picture`` turned as the file's orientation tag says; a TIFF was turned when it was loaded. Metadata that cannot
    be read says nothing."""
    try:
        turn = _TURNS.get(opened.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        turn = None
    return picture if turn is None else picture.transpose(turn)


@dataclasses.dataclass
class Picture:
    """A sample's image, proved to be readable; decoded whenever it is asked for, unless it is small enough to keep."""

    image: Image
    """With the checksum of the bytes that were read first: reading others later is an error."""
    folder: str
    kept: PillowImage.Image | None = None

    def decoded(self) -> PillowImage.Image:
        return self.kept if self.kept is not None else load_image(self.image, self.folder)


AnyImage = PillowImage.Image | Picture
"""What a request to a teacher holds: an image, or where it lies and how it is seen."""


def open_picture(image: Image, folder: str | Path) -> Picture:
    """Read and decode ``image`` once; raises as :func:`load_image`."""
    data = read_image(image, folder)
    checked = dataclasses.replace(image, checksum=image.checksum or image_checksum(data))
    return Picture(checked, str(folder), decode(data, image.image_id))


def decoded(image: AnyImage) -> PillowImage.Image:
    """The image itself: a request to a teacher may hold it or where it lies."""
    return image.decoded() if isinstance(image, Picture) else image


def square(image: AnyImage, mean: tuple[float, ...], mode: str) -> PillowImage.Image:
    """``pad``: the image centred on a square of the mean colour (LLaVA-1.5, expand2square); ``crop``: as it is."""
    picture = decoded(image)
    width, height = picture.size
    if mode == "crop" or width == height:
        return picture
    side = max(width, height)
    colour = (round(255 * mean[0] - 0.5), round(255 * mean[1] - 0.5), round(255 * mean[2] - 0.5))
    canvas = PillowImage.new("RGB", (side, side), colour)
    canvas.paste(picture, ((side - width) // 2, (side - height) // 2))
    return canvas


def image_tokens_of(model_config: Any) -> int:
    """N: positions one image takes in the language model, from a LLaVA configuration.

    CLIP's class token is one more where the strategy is ``full``; SigLIP has none.
    """
    vision = model_config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    class_token = vision.model_type.startswith("clip") and model_config.vision_feature_select_strategy == "full"
    return int(patches + class_token)
