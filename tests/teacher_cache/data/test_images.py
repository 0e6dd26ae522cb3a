"""Images: eight bits, upright, from a closed list of formats; no file stops a run, and reasons are always the same."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import socket
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags
from PIL import Image as PillowImage

from teacher_cache.build import inputs
from teacher_cache.build.build import build_cache
from teacher_cache.build.inputs import ShardInput
from teacher_cache.config import CacheConfig, DataConfig
from teacher_cache.data.conversations import Conversation, Image, StoredBytes
from teacher_cache.data.image_files import MAX_BYTES
from teacher_cache.data.images import FORMATS, MAX_SIDE, Picture, decode, load_image, open_picture
from teacher_cache.errors import DataError, ImageError
from teacher_cache.teachers.torch_teacher import TorchTeacher
from tests.fixtures.building import build_of
from tests.teacher_cache.build.test_build import contents

LEVELS = np.add.outer(np.arange(12), 3 * np.arange(16)).astype(np.uint8) * 3  # (12, 16), no two rows or columns alike


def saved(picture: PillowImage.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, kind, **options)
    return sink.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A grey PNG of any size in a few bytes, written without holding it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    squeeze = zlib.compressobj(9)
    body = b"".join(squeeze.compress(bytes(1 + width)) for _ in range(height)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("levels", "kind"),
    [
        (LEVELS.astype(np.uint16) * 257, "PNG"),
        (LEVELS.astype(np.uint16) * 257, "TIFF"),
        (LEVELS.astype(np.int32) * 257, "TIFF"),
        (LEVELS.astype(np.float32) / 255, "TIFF"),
    ],
)
def test_an_image_of_16_bit_or_float_levels_is_what_its_8_bit_form_is(levels: np.ndarray, kind: str) -> None:
    found = np.asarray(decode(saved(PillowImage.fromarray(levels), kind), "x"))
    assert (found == LEVELS[..., None]).all()


@pytest.mark.parametrize(
    ("levels", "reason"),
    [
        (np.full((2, 2), 70_000, np.int32), "32-bit integers"),
        (np.full((2, 2), -1, np.int32), "32-bit integers"),
        (np.full((2, 2), 200, np.int32), "32-bit integers"),
        (np.full((2, 2), 7.5, np.float32), "float levels outside 0 to 1"),
        (np.full((2, 2), np.nan, np.float32), "float levels outside 0 to 1"),
    ],
)
def test_an_image_whose_range_nobody_states_is_skipped_not_clipped(levels: np.ndarray, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(saved(PillowImage.fromarray(levels), "TIFF"), "x")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_seen_upright(kind: str, orientation: int) -> None:
    """The tag says where the stored first row and column lie; what undoes it is written out here once more."""
    upright = PillowImage.fromarray(LEVELS)
    turn = PillowImage.Transpose
    stored = upright
    for step in {
        2: (turn.FLIP_LEFT_RIGHT,),
        3: (turn.ROTATE_180,),
        4: (turn.FLIP_TOP_BOTTOM,),
        5: (turn.FLIP_LEFT_RIGHT, turn.ROTATE_90),
        6: (turn.ROTATE_90,),
        7: (turn.FLIP_LEFT_RIGHT, turn.ROTATE_270),
        8: (turn.ROTATE_270,),
    }.get(orientation, ()):
        stored = stored.transpose(step)
    tags = PillowImage.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    lossless = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    found = decode(saved(stored.convert("RGB"), kind, exif=tags, **lossless), "x")
    assert found.size == upright.size
    apart = np.abs(np.asarray(found).astype(int) - LEVELS[..., None])
    assert apart.max() <= (8 if kind == "JPEG" else 0)


def test_a_broken_orientation_tag_is_none() -> None:
    broken = saved(PillowImage.fromarray(LEVELS), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert (np.asarray(decode(broken, "x"))[..., 0] == LEVELS).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_a_damaged_image_of_any_format_is_skipped(kind: str) -> None:
    """Cut, zeroed and scrambled: it decodes, or it is an ImageError; nothing else ever comes out."""
    if kind == "AVIF" and not PillowImage.registered_extensions().get(".avif"):
        pytest.skip("this Pillow has no AVIF")
    whole = saved(PillowImage.effect_noise((40, 32), 60).convert("RGB"), kind)
    assert decode(whole, "x").size == (40, 32)
    random, reasons = np.random.default_rng(0), []
    for _ in range(120):
        data = bytearray(whole)
        begin, end = sorted(random.integers(0, len(data), 2).tolist())
        how = random.integers(3)
        if how == 0:
            del data[begin:]
        elif how == 1:
            data[begin:end] = bytes(end - begin)
        else:
            data[begin : begin + 8] = random.bytes(len(data[begin : begin + 8]))
        try:
            decode(bytes(data), "x")
        except ImageError as error:
            reasons.append(str(error))
    assert len(reasons) > 20
    assert set(reasons) <= {
        "image x: cannot be decoded (damaged or cut off)",
        f"image x: cannot be decoded (none of {', '.join(FORMATS)})",
        "image x: more than 64,000,000 pixels",
        *(r for r in reasons if re.fullmatch(r"image x: \d+×\d+ pixels, .*", r)),
    }


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "none of JPEG, PNG"),
        (b"<html>404</html>", "none of JPEG, PNG"),
        (png_of(1, MAX_SIDE + 1), "a side of more than 12,000"),
        (png_of(9000, 9000), "9000×9000 pixels, more than 64,000,000"),
        (png_of(20_000, 20_000), "more than 64,000,000 pixels"),
    ],
)
def test_an_image_that_is_a_program_or_a_bomb_is_refused_undecoded(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(data, "x")


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    (tmp_path / "file").touch()
    with (tmp_path / "endless.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # a hole: no byte of it is on the disk
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
    reasons = {
        "pipe.png": "a pipe, device or socket, not a regular file",
        "socket.png": "a pipe, device or socket, not a regular file",
        "folder.png": "a folder, not a regular file",
        "loop.png": "a link that leads to itself",
        "empty.png": "an empty file",
        "endless.png": "more than 268,435,456 bytes",
        "file/x.png": "no such file in the image folder",
        "a" * 5000: "the name is too long for a file",
        "nul\0.png": "not a name that a file can have",
    }
    for name, reason in reasons.items():
        with pytest.raises(ImageError, match=reason) as caught:
            load_image(Image(name, name), tmp_path)
        assert str(tmp_path) not in str(caught.value)


def test_the_images_of_a_shard_are_not_all_decoded_at_once(
    cache_config: CacheConfig, teacher: TorchTeacher, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted(p.name for p in (world / "images").glob("train-*"))[:8]
    side = PillowImage.open(world / "images" / names[0]).size[0]
    monkeypatch.setattr(inputs, "KEPT_BYTES", 3 * 4 * side * side)
    chosen = [Conversation(name, ("<image>what",), ("a circle",), (Image(name, name),)) for name in names]
    shard = ShardInput.load(build_of(cache_config, teacher), chosen)
    pictures = [picture for sample in shard.samples for picture in sample.pictures]
    assert len(pictures) == 8
    assert sum(picture.kept is not None for picture in pictures) == 3
    for picture, name in zip(pictures, names, strict=True):
        assert picture.decoded().tobytes() == load_image(Image(name, name), world / "images").tobytes()


def test_an_image_that_changes_while_its_shard_is_made_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png_of(3, 3))
    picture = replace(open_picture(Image("x.png", "x.png"), tmp_path), kept=None)
    assert isinstance(picture, Picture)
    (tmp_path / "x.png").write_bytes(png_of(4, 4))
    with pytest.raises(DataError, match=r"image x\.png: other bytes than those the teacher saw"):
        picture.decoded()


def test_stored_bytes_are_read_from_their_place(tmp_path: Path) -> None:
    (tmp_path / "all").write_bytes(b"before" + png_of(3, 2) + b"after")
    image = Image("digest", stored=StoredBytes(str(tmp_path / "all"), 6, len(png_of(3, 2))))
    assert image.embedded
    assert load_image(image, "").size == (3, 2)


def test_reasons_are_the_same_bytes_on_every_run_and_in_every_place(
    cache_config: CacheConfig, teacher: TorchTeacher, world: Path, tmp_path: Path
) -> None:
    """Two builds of broken images, embedded and in two folders: promise 4 holds for what is skipped, too."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = json.loads((world / "train.json").read_text())
    good = next(line for line in lines if "image" in line)
    found = []
    for place in ("a", "elsewhere/b"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        (folder / good["image"]).write_bytes((world / "images" / good["image"]).read_bytes())
        (folder / "page.jpg").write_bytes(b"<html>404</html>")
        (folder / "cut.png").write_bytes((world / "images" / good["image"]).read_bytes()[:80])
        named = [good, {**good, "id": "page", "image": "page.jpg"}, {**good, "id": "cut", "image": "cut.png"}]
        rows = [{**s, "image": {"bytes": (folder / s["image"]).read_bytes(), "path": None}} for s in named]
        (tmp_path / "d.json").write_text(json.dumps(named))
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
        for path in ("d.json", "d.parquet"):
            output = tmp_path / f"cache-{len(found)}"
            data = DataConfig(path=str(tmp_path / path), image_folder=str(folder))
            summary = build_cache(replace(cache_config, output=str(output), data=data), teacher=teacher, style="quiet")
            assert (summary.samples, summary.skipped) == (1, 2)
            assert str(tmp_path) not in (output / "skipped.jsonl").read_text()
            found.append(contents(output))
    assert found[0] == found[2]
    assert found[1] == found[3]


def test_an_image_folder_that_is_away_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_cache.files.FIRST_WAIT_SECONDS", 0.0)
    with pytest.raises(DataError, match=r"away is not there \(or not mounted\)"):
        load_image(Image("x.png", "x.png"), tmp_path / "away")
    with pytest.raises(DataError, match="image_folder: not set"):
        load_image(Image("x.png", "x.png"), "")


def test_too_many_open_files_stop_the_run_and_skip_nothing(tmp_path: Path) -> None:
    """A real EMFILE, in a process of its own; then one that passes while the reader waits."""
    (tmp_path / "x.png").write_bytes(png_of(3, 3))
    code = (
        "import os, resource, sys, threading\n"
        "from teacher_cache.data.conversations import Image\nfrom teacher_cache.errors import DataError\n"
        "from teacher_cache import files\n"
        "from teacher_cache.data.images import load_image\n"
        f"folder = {str(tmp_path)!r}\n"
        "load_image(Image('x.png', 'x.png'), folder)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "held = []\n"
        "def fill():\n"
        "    try:\n"
        "        while True: held.append(os.open('/dev/null', os.O_RDONLY))\n"
        "    except OSError: pass\n"
        "fill()\n"
        "files.FIRST_WAIT_SECONDS = 0.0\n"
        "try: load_image(Image('x.png', 'x.png'), folder)\n"
        "except DataError as error: print(error)\n"
        "files.time.sleep = lambda seconds: os.close(held.pop())\n"
        "print(load_image(Image('x.png', 'x.png'), folder).size)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert "does not answer (Too many open files), tried 5 times. The sample is not at fault" in first
    assert second == "(3, 3)"
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 64
