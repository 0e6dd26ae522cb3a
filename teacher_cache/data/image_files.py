"""The bytes of an image, read so that no file stops or hangs a run and no passing fault becomes a lost sample."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import stat
from pathlib import Path

from teacher_cache.data.conversations import Image
from teacher_cache.errors import DataError, ImageError
from teacher_cache.files import TRIES, again, open_checked

MAX_BYTES = 256 << 20
"""Larger files are refused unread; an 8000 × 8000 picture of 16-bit RGB without compression is 384 MB, as PNG less."""
_OF_THE_SAMPLE = {
    errno.ENOENT: "no such file in the image folder",
    errno.ENOTDIR: "no such file in the image folder",
    errno.ENAMETOOLONG: "the name is too long for a file",
    errno.ELOOP: "a link that leads to itself",
    errno.ENXIO: "not a regular file",
}
"""What is wrong with the name or the file itself, and will be whenever it is looked at; anything else may pass."""


class OtherImageError(DataError):
    """An image whose bytes are not those that the teacher saw: nothing made from the two belongs together."""


def image_checksum(data: bytes) -> str:
    """32 hexadecimal digits that name the bytes of an image file (BLAKE2b of 128 bits)."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_image(image: Image, folder: str | Path) -> bytes:
    """The bytes of ``image``, compared with its checksum where it has one.

    Raises ``ImageError``: the sample cannot be used; the same whenever it is tried. ``OtherImageError``: other bytes
    than the teacher saw. ``DataError``: the folder or its disk does not answer, after several tries: the run stops,
    since the sample is not at fault.
    """
    if not image.embedded and not str(folder):
        check_folder(folder)
    try:
        data = again(lambda: _bytes(image, Path(folder)), lambda error: isinstance(error, OSError))
    except OSError as error:
        if image.stored is None:
            check_folder(Path(folder))
        place = folder if image.stored is None else image.stored.file
        raise DataError(
            f"image {image.image_id}: {place} does not answer ({error.strerror or error}), tried {TRIES} times. The "
            "sample is not at fault, so it is not skipped: see to the disk (or to the limit of open files), then run "
            "the same command again"
        ) from error
    if image.checksum and image_checksum(data) != image.checksum:
        raise OtherImageError(
            f"image {image.image_id}: other bytes than those the teacher saw (checksum {image_checksum(data)}, "
            f"expected {image.checksum}). Give the image folder that the cache was made from, or build the cache again"
        )
    return data


def check_folder(folder: str | Path) -> None:
    """Refuse an image folder that is not there: its samples would all be lost for one wrong setting."""
    if not str(folder):
        raise DataError("image_folder: not set, but samples name image files; set it to the folder they lie in")
    if not Path(folder).is_dir():
        raise DataError(
            f"image_folder: {folder} is not there (or not mounted). Nothing is skipped for that: set it to the folder "
            "the images lie in and run the same command again"
        )


def _bytes(image: Image, folder: Path) -> bytes:
    if image.stored is not None:
        return image.stored.read()
    try:
        return image.data or _file_bytes(image, folder)
    except OSError as error:
        reason = _OF_THE_SAMPLE.get(error.errno or 0)
        if reason and folder.is_dir():
            raise ImageError(f"image {image.image_id}: {reason}") from None
        raise


def _file_bytes(image: Image, folder: Path) -> bytes:
    with open_checked(_inside(image, folder), functools.partial(_check_regular, image)) as file:
        data = file.read(MAX_BYTES + 1)  # what grows while it is read, or says 0 and never ends, ends here
    if len(data) > MAX_BYTES:
        raise ImageError(f"image {image.image_id}: more than {MAX_BYTES:,} bytes")
    if not data:
        raise ImageError(f"image {image.image_id}: an empty file")
    return data


def _check_regular(image: Image, kind: os.stat_result) -> None:
    if not stat.S_ISREG(kind.st_mode):
        named = "a folder" if stat.S_ISDIR(kind.st_mode) else "a pipe, device or socket"
        raise ImageError(f"image {image.image_id}: {named}, not a regular file")
    if kind.st_size > MAX_BYTES:
        raise ImageError(f"image {image.image_id}: more than {MAX_BYTES:,} bytes")


def _inside(image: Image, folder: Path) -> Path:
    """``folder/path``, resolved; a path (or link) that leaves the folder is refused (promise 8)."""
    root = os.path.realpath(folder)
    try:
        path = Path(os.path.realpath(folder / image.path))  # resolve() raises at a loop of links in Python 3.11
    except ValueError:  # a NUL in the name
        raise ImageError(f"image {image.image_id!r}: not a name that a file can have") from None
    if not path.is_relative_to(root):
        raise ImageError(f"image {image.image_id}: the path leaves the image folder")
    return path
